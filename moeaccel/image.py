"""Expert images: an expert's weights in the order in which the device consumes them.

An image is a header, then the gate/up rows, then the down rows. Everything after the header is a
sequence of *array words* of ``32 * row_multipliers`` bytes. A tile is ``R`` consecutive rows (R =
2 * row_multipliers in 4-bit formats, else row_multipliers); gate and up rows alternate (g0, u0, g1,
u1, ...), so that a pair is always in one tile. For each section::

    for tile in tiles:
        if tile % tiles_per_row_word == 0:
            row word: R int16 row exponents for each of the next tiles
        for step in range(K / 32):
            if step % steps_per_group == 0:
                if entry % entries_per_scale_word == 0:
                    scale word: R scales for each of the next groups
                entry += 1
            weight word: R x 32 weights

Where the device has several channels, an image has a part for each, a whole image with a header of
its own, and all parts of an expert lie at the same address, each in its channel's memory. Rows are
dealt one by one: row r of down is row ``r // channels`` of the part of channel ``r % channels``,
and so it is with pairs of gate and up. A part's last tile is filled up with rows of zeros, for
which the device has no output.

Inside a weight word, byte ``rm * 32 + k`` holds column k of row rm (8-bit), or of rows 2 rm (low
nibble) and 2 rm + 1 (high nibble). Entries of row and scale words are packed from the least
significant bit, row 0 first; numbers are little-endian. Padding at the end of a section is zero.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from moeaccel.config import BLOCK
from moeaccel.errors import ImageError
from moeaccel.formats import (
    FORMATS,
    QuantisedMatrix,
    WeightFormat,
    check_dims,
    quantise,
    weight_format,
    whole_blocks,
)

MAGIC = 0x4558_4F4D  # "MOXE" in memory order
VERSION = 1
HEADER = struct.Struct("<IHBBIIIIIBB")
HEADER_BYTES = 64
ALIGNMENT = 4096
"""Images start on a page, so that their bursts are whole."""

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Section:
    """Shape of one section: ``rows`` output rows of ``k`` inputs each.

    Parameters
    ----------
    format : :class:`WeightFormat`
    rows, k : :class:`int`
        Multiples of 32.
    row_multipliers : :class:`int`
        Of an array that will read it.
    channels : :class:`int`
        To which the rows are dealt; tiles and words are those of one channel.
    """

    format: WeightFormat
    rows: int
    k: int
    row_multipliers: int
    channels: int = 1

    @property
    def word_bytes(self) -> int:
        """Bytes of an array word."""
        return BLOCK * self.row_multipliers

    @property
    def tile_rows(self) -> int:
        """Rows of a tile, R."""
        return self.format.rows(self.row_multipliers)

    @property
    def tiles(self) -> int:
        """Tiles in the section; the last one may be short."""
        return -(-self.channel_rows // self.tile_rows)

    @property
    def channel_rows(self) -> int:
        """Rows of the section on one channel."""
        return self.rows // self.channels

    @property
    def steps(self) -> int:
        """Weight words of a tile."""
        return self.k // BLOCK

    @property
    def tiles_per_row_word(self) -> int:
        """Tiles whose row exponents share a word."""
        return 8 * self.word_bytes // (16 * self.tile_rows)

    @property
    def entries_per_scale_word(self) -> int:
        """Scale entries (one group of each row of a tile) in a word."""
        return 8 * self.word_bytes // (self.format.scale_bits * self.tile_rows)

    @property
    def groups(self) -> int:
        """Scale entries of a tile."""
        return -(-self.steps // self.format.steps_per_group)

    @property
    def row_words(self) -> int:
        """Row words of the section."""
        return -(-self.tiles // self.tiles_per_row_word)

    @property
    def scale_words(self) -> int:
        """Scale words of the section."""
        return -(-self.tiles * self.groups // self.entries_per_scale_word)

    @property
    def words(self) -> int:
        """Array words of the section."""
        return self.row_words + self.scale_words + self.tiles * self.steps

    @property
    def stored_bytes(self) -> int:
        """Bytes of weights, scales and row exponents without padding, on all
        channels."""
        return _stored_bytes(self.format, self.rows, self.k)

    def kinds(self) -> NDArray[np.uint8]:
        """Return the kind of each word in order: 0 row, 1 scale, 2 weight."""
        step = np.full((self.tiles, self.steps, 3), 255, np.uint8)
        step[:, :, 2] = 2
        step[:: self.tiles_per_row_word, 0, 0] = 0
        entry = np.arange(self.tiles * self.groups) % self.entries_per_scale_word == 0
        step[:, :: self.format.steps_per_group, 1] = np.where(entry, 1, 255).reshape(
            self.tiles, self.groups
        )
        flat = step.reshape(-1)
        return flat[flat != 255]


def _stored_bytes(fmt: WeightFormat, rows: int, k: int) -> int:
    """Return the bytes of weights, scales and row exponents, whole for each row."""
    weights = -(-k * fmt.weight_bits // 8)
    return rows * (weights + -(-k // fmt.group) * fmt.scale_bits // 8 + 2)


@dataclass(frozen=True)
class ExpertShape:
    """Shape of an expert: the two sections of its image; bytes and words are those of a part.

    Any dimensions: the sections are of whole blocks, filled up with zeros.
    """

    format: WeightFormat
    d_model: int
    d_expert: int
    row_multipliers: int
    channels: int = 1

    def __post_init__(self) -> None:
        check_dims(d_model=self.d_model, d_expert=self.d_expert)

    @property
    def gate_up(self) -> Section:
        """Rows g0, u0, g1, u1, ... of d_model inputs."""
        return Section(
            self.format, 2 * whole_blocks(self.d_expert), whole_blocks(self.d_model),
            self.row_multipliers, self.channels)

    @property
    def down(self) -> Section:
        """d_model rows of d_expert inputs."""
        return Section(
            self.format, whole_blocks(self.d_model), whole_blocks(self.d_expert),
            self.row_multipliers, self.channels)

    @property
    def header_bytes(self) -> int:
        """Bytes before the first word."""
        return max(HEADER_BYTES, BLOCK * self.row_multipliers)

    @property
    def image_bytes(self) -> int:
        """Bytes of the image, or of each part."""
        return self.header_bytes + (self.gate_up.words + self.down.words) * self.gate_up.word_bytes

    @property
    def stride(self) -> int:
        """Bytes from one expert's image to the next."""
        return -(-self.image_bytes // ALIGNMENT) * ALIGNMENT

    @property
    def stored_bytes(self) -> int:
        """Bytes of weights, scales and row exponents without padding, in all parts."""
        return (_stored_bytes(self.format, 2 * self.d_expert, self.d_model)
                + _stored_bytes(self.format, self.d_model, self.d_expert))


@dataclass(frozen=True)
class LinearShape:
    """Shape of a linear layer's image: one section, ``d_out`` rows of ``d_in`` inputs each, both
    filled up with zeros to whole blocks."""

    format: WeightFormat
    d_out: int
    d_in: int
    row_multipliers: int
    channels: int = 1

    def __post_init__(self) -> None:
        check_dims(d_out=self.d_out, d_in=self.d_in)

    @property
    def section(self) -> Section:
        """The only section."""
        return Section(self.format, whole_blocks(self.d_out), whole_blocks(self.d_in),
                       self.row_multipliers, self.channels)

    @property
    def header_bytes(self) -> int:
        """Bytes before the first word."""
        return max(HEADER_BYTES, BLOCK * self.row_multipliers)

    @property
    def image_bytes(self) -> int:
        """Bytes of the image, or of each part."""
        return self.header_bytes + self.section.words * self.section.word_bytes

    @property
    def stride(self) -> int:
        """Bytes that the image occupies, a multiple of a page."""
        return -(-self.image_bytes // ALIGNMENT) * ALIGNMENT

    @property
    def stored_bytes(self) -> int:
        """Bytes of weights, scales and row exponents without padding, in all parts."""
        return _stored_bytes(self.format, self.d_out, self.d_in)


def _pack_entries(values: NDArray[np.integer], bits: int, per_word: int, word_bytes: int) -> Bytes:
    """Pack rows of 8- or 16-bit values into words of ``per_word`` rows each, zero padded."""
    entries = values.astype(np.uint8 if bits == 8 else "<u2").reshape(values.shape[0], -1)
    words = -(-len(entries) // per_word)
    out = np.zeros((words * per_word, entries.shape[1]), entries.dtype)
    out[: len(entries)] = entries
    return np.ascontiguousarray(out).view(np.uint8).reshape(words, word_bytes)


def _deal(
    matrix: QuantisedMatrix, row_multipliers: int, channel: int, channels: int, together: int
) -> QuantisedMatrix:
    """Return the rows of one channel, ``together`` consecutive ones at a time, in whole tiles."""
    rows = matrix.integers.shape[0]
    chosen = np.arange(rows).reshape(-1, channels, together)[:, channel].reshape(-1)
    padding = -len(chosen) % matrix.format.rows(row_multipliers)

    def part(values: NDArray[np.integer]) -> NDArray[np.integer]:
        return np.pad(values[chosen], [(0, padding)] + [(0, 0)] * (values.ndim - 1))

    return replace(
        matrix, integers=part(matrix.integers), significand=part(matrix.significand),
        shift=part(matrix.shift), row_exponent=part(matrix.row_exponent))


def _gather(parts: Sequence[QuantisedMatrix], section: Section, together: int) -> QuantisedMatrix:
    """Return the matrix of which every channel has a part: the inverse of :func:`_deal`."""

    def whole(name: str) -> NDArray[np.integer]:
        dealt = np.stack([getattr(part, name)[: section.channel_rows] for part in parts])
        pieces = dealt.reshape(len(parts), -1, together, *dealt.shape[2:])
        return pieces.swapaxes(0, 1).reshape(section.rows, *dealt.shape[2:])

    return replace(parts[0], **{
        name: whole(name) for name in ("integers", "significand", "shift", "row_exponent")})


def pack_section(matrix: QuantisedMatrix, row_multipliers: int) -> Bytes:
    """Return the words of one section as bytes, for a matrix whose rows are in image order."""
    fmt = matrix.format
    n, k = matrix.integers.shape
    section = Section(fmt, n, k, row_multipliers)
    tiles, steps, tile_rows = section.tiles, section.steps, section.tile_rows
    codes = (
        fmt.encode(matrix.integers)
        .reshape(tiles, tile_rows, steps, BLOCK)
        .transpose(0, 2, 1, 3)
    )
    if fmt.packed:
        codes = codes[:, :, 0::2] | codes[:, :, 1::2] << 4
    weights = np.ascontiguousarray(codes).reshape(tiles * steps, section.word_bytes)

    scales = matrix.shift.astype(np.int32)
    if fmt.real_scale:
        scales = scales << 11 | matrix.significand
    scales = (
        scales.reshape(tiles, tile_rows, section.groups).transpose(0, 2, 1).reshape(-1, tile_rows)
    )
    rows = matrix.row_exponent.reshape(tiles, tile_rows).view(np.uint16)

    kinds = section.kinds()
    out = np.zeros((section.words, section.word_bytes), np.uint8)
    out[kinds == 0] = _pack_entries(rows, 16, section.tiles_per_row_word, section.word_bytes)
    out[kinds == 1] = _pack_entries(
        scales, fmt.scale_bits, section.entries_per_scale_word, section.word_bytes
    )
    out[kinds == 2] = weights
    return out.reshape(-1)


def unpack_section(words: Sequence[Bytes], section: Section, *, paired: bool) -> QuantisedMatrix:
    """Return the matrix of a section from the words that each channel holds of it.

    What the words do not hold is not restored: ``coarsened`` is 0.

    Parameters
    ----------
    words : sequence of uint8 array
        One for each channel.
    section : :class:`Section`
    paired : :class:`bool`
        Rows are pairs of gate and up.

    Raises
    ------
    ImageError
        If the bytes are not as many as the section has.
    """
    parts = [_unpack_part(part, section) for part in words]
    return parts[0] if section.channels == 1 else _gather(parts, section, 1 + paired)


def _unpack_part(words: Bytes, section: Section) -> QuantisedMatrix:
    """Return one channel's rows, those of zeros included: the inverse of :func:`pack_section`."""
    fmt, tile_rows, tiles = section.format, section.tile_rows, section.tiles
    if words.size != section.words * section.word_bytes:
        raise ImageError(
            f"section must be {section.words * section.word_bytes} bytes, not {words.size}"
        )
    words = words.reshape(section.words, section.word_bytes)
    kinds = section.kinds()

    exponents = np.ascontiguousarray(words[kinds == 0]).view("<i2").reshape(-1, tile_rows)
    scales = np.ascontiguousarray(words[kinds == 1]).view("<u2" if fmt.scale_bits == 16 else "u1")
    scales = scales.reshape(-1, tile_rows)[: tiles * section.groups]
    scales = scales.reshape(tiles, section.groups, tile_rows).transpose(0, 2, 1)
    scales = scales.reshape(tiles * tile_rows, section.groups)

    codes: Bytes = words[kinds == 2].reshape(tiles, section.steps, section.row_multipliers, BLOCK)
    if fmt.packed:
        codes = np.stack([codes & 15, codes >> 4], axis=3).astype(np.uint8)
    codes = codes.reshape(tiles, section.steps, tile_rows, BLOCK).transpose(0, 2, 1, 3)
    integers = fmt.decode(np.ascontiguousarray(codes).reshape(-1, section.k))
    return QuantisedMatrix(
        fmt,
        integers,
        (scales & 2047 if fmt.real_scale else np.ones_like(scales)).astype(np.int16),
        (scales >> 11 if fmt.real_scale else scales).astype(np.int8),
        exponents[:tiles].reshape(-1).astype(np.int16),
        0,
    )


def unpack_image(*parts: Bytes) -> Expert:
    """Check an expert's image and return the expert: the inverse of :func:`build_image`.

    Parameters
    ----------
    *parts : uint8 array
        The parts of all channels, in their order.

    Raises
    ------
    ImageError
        Naming what is wrong.
    """
    shapes = {check_image(part, channel=channel) for channel, part in enumerate(parts)}
    if len(shapes) != 1 or (shape := shapes.pop()).channels != len(parts):
        raise ImageError(
            f"parts must be all those of one image, not {len(parts)} of {sorted(map(str, shapes))}")
    split = shape.header_bytes + shape.gate_up.words * shape.gate_up.word_bytes
    return Expert(
        unpack_section([p[shape.header_bytes : split] for p in parts], shape.gate_up, paired=True),
        unpack_section([p[split : shape.image_bytes] for p in parts], shape.down, paired=False))


def interleave_gate_up(gate_up: NDArray[np.floating]) -> NDArray[np.floating]:
    """Reorder ``[gate; up]`` rows, (2 I, H), to g0, u0, g1, u1, ..."""
    half = gate_up.shape[0] // 2
    return np.stack([gate_up[:half], gate_up[half:]], axis=1).reshape(gate_up.shape)


def build_image(
    gate_up: QuantisedMatrix,
    down: QuantisedMatrix,
    row_multipliers: int,
    *,
    channel: int = 0,
    channels: int = 1,
) -> Bytes:
    """Return the image of one expert, or a channel's part of it, header included.

    Dimensions are filled up with zeros to multiples of 32, and the header has those.

    Parameters
    ----------
    gate_up : :class:`QuantisedMatrix`
        (2 d_expert, d_model), rows interleaved (:func:`interleave_gate_up`).
    down : :class:`QuantisedMatrix`
        (d_model, d_expert).
    row_multipliers : :class:`int`
        Of the array that will read it.
    channel, channels : :class:`int`
    """
    filled = Expert(gate_up, down).filled()
    gate_up, down = filled.gate_up, filled.down
    shape = ExpertShape(gate_up.format, gate_up.integers.shape[1], down.integers.shape[1],
                        row_multipliers, channels)
    payload = np.concatenate([
        pack_section(_deal(matrix, row_multipliers, channel, channels, together), row_multipliers)
        for matrix, together in ((gate_up, 2), (down, 1))])
    words = shape.gate_up.words, shape.down.words
    head = _header(shape, shape.d_model, shape.d_expert, words, channel, payload)
    return np.concatenate([head, payload])


def build_linear_image(
    matrix: QuantisedMatrix, row_multipliers: int, *, channel: int = 0, channels: int = 1
) -> Bytes:
    """Return the image of one linear layer, (d_out, d_in), or a channel's part of it; filled up as
    in :func:`build_image`."""
    d_out, d_in = (whole_blocks(dim) for dim in matrix.integers.shape)
    matrix = matrix.filled(d_out, d_in)
    shape = LinearShape(matrix.format, d_out, d_in, row_multipliers, channels)
    payload = pack_section(_deal(matrix, row_multipliers, channel, channels, 1), row_multipliers)
    head = _header(shape, shape.d_out, shape.d_in, (0, shape.section.words), channel, payload)
    return np.concatenate([head, payload])


def _header(
    shape: ExpertShape | LinearShape,
    first_dim: int,
    second_dim: int,
    words: tuple[int, int],
    channel: int,
    payload: Bytes,
) -> Bytes:
    """Return an image's header for its payload."""
    raw = HEADER.pack(
        MAGIC,
        VERSION,
        shape.format.code,
        shape.row_multipliers,
        first_dim,
        second_dim,
        *words,
        zlib.crc32(payload.data),
        channel,
        shape.channels - 1,
    )
    return np.frombuffer(raw.ljust(shape.header_bytes, b"\0"), np.uint8)


def check_image(image: Bytes, *, channel: int = 0) -> ExpertShape:
    """Check an image's header and CRC-32 and return its shape.

    Parameters
    ----------
    image : uint8 array
    channel : :class:`int`
        Whose part it must be.

    Raises
    ------
    ImageError
        Naming what is wrong.
    """
    if len(image) < HEADER_BYTES:
        raise ImageError(f"image must be at least {HEADER_BYTES} bytes, not {len(image)}")
    (magic, version, code, row_multipliers, d_model, d_expert, gate_up, down, crc, found_channel,
     last_channel) = HEADER.unpack_from(image.tobytes())
    if magic != MAGIC:
        raise ImageError(
            f"image must start with {MAGIC:#010x}, not {magic:#010x}; this is no expert image"
        )
    if version != VERSION:
        raise ImageError(f"image version must be {VERSION}, not {version}; build the image again")
    fmt = next((f for f in FORMATS.values() if f.code == code), None)
    if fmt is None:
        raise ImageError(
            f"image format code must be one of {[f.code for f in FORMATS.values()]}, not {code}"
        )
    if found_channel != channel:
        raise ImageError(
            f"image must be the part of channel {channel}, not of {found_channel} of "
            f"{last_channel + 1} channels"
        )
    if not d_model or not d_expert or d_model % BLOCK or d_expert % BLOCK:
        raise ImageError(
            f"image dimensions must be positive multiples of {BLOCK}, not {d_model} and "
            f"{d_expert}; its header was damaged, load it again"
        )
    shape = ExpertShape(fmt, d_model, d_expert, row_multipliers, last_channel + 1)
    if (gate_up, down) != (shape.gate_up.words, shape.down.words) or len(image) < shape.image_bytes:
        raise ImageError(
            f"image must be {shape.image_bytes} bytes for its header, "
            f"not {len(image)}; it is truncated"
        )
    found = zlib.crc32(np.ascontiguousarray(image[shape.header_bytes : shape.image_bytes]).data)
    if found != crc:
        raise ImageError(
            f"image CRC-32 must be {crc:#010x}, not {found:#010x}; it was damaged, load it again"
        )
    return shape


@dataclass(frozen=True)
class Expert:
    """One quantised expert: what an image holds, before packing."""

    gate_up: QuantisedMatrix
    down: QuantisedMatrix

    @classmethod
    def quantise(
        cls, gate_up: NDArray[np.floating], down: NDArray[np.floating], name: str | WeightFormat, *,
        quantiser: str = "search",
        moments: tuple[NDArray[np.floating] | None, NDArray[np.floating] | None] = (None, None),
    ) -> Expert:
        """Quantise float weights: ``gate_up`` (2 I, H) as ``[gate; up]``, ``down`` (H, I).

        ``quantiser`` and ``moments``, those of x and of h, as in :func:`moeaccel.formats.quantise`.
        """
        fmt = weight_format(name)
        return cls(
            quantise(interleave_gate_up(gate_up), fmt, quantiser=quantiser, moments=moments[0]),
            quantise(down, fmt, quantiser=quantiser, moments=moments[1]))

    def filled(self) -> Expert:
        """Return what device memory holds: zeros behind rows and columns, up to whole blocks."""
        d_model, d_expert = (whole_blocks(dim) for dim in self.down.integers.shape)
        return Expert(
            self.gate_up.filled(2 * d_expert, d_model), self.down.filled(d_model, d_expert))
