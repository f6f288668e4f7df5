"""Sections of an image: how many words a matrix takes, and the words of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from moeaccel.errors import ImageError
from moeaccel.formats import BLOCK, QUAD, SHIFT_BITS, QuantisedMatrix, WeightFormat
from moeaccel.formats.patterns import compressed, expanded, places

STEPS_PER_PATTERN_WORD = 4
"""Steps of an N:M format whose patterns share a word: two bits for each multiplier."""

__all__ = ["Bytes", "Section", "deal", "pack_section", "stored_bytes", "unpack_section"]

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
    biased : :class:`bool`
        Each row has a bias beside its exponent.
    """

    format: WeightFormat
    rows: int
    k: int
    row_multipliers: int
    channels: int = 1
    biased: bool = False

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
        """Steps of the array through a tile: blocks of 32 along K."""
        return self.k // BLOCK

    @property
    def weight_words(self) -> int:
        """Weight words of a tile; where a word has two steps, the last may have one."""
        return -(-self.steps // self.format.steps_per_word)

    @property
    def tiles_per_row_word(self) -> int:
        """Tiles whose row exponents, and biases, share a word."""
        return 8 * self.word_bytes // ((32 if self.biased else 16) * self.tile_rows)

    @property
    def entries_per_scale_word(self) -> int:
        """Scale entries (one group of each row of a tile) in a word."""
        bits = self.format.scale_bits * self.format.scales_per_step
        return 8 * self.word_bytes // (bits * self.tile_rows)

    @property
    def groups(self) -> int:
        """Scale entries of a tile: for each group, or step that has several; whole weight words
        have some."""
        return -(-self.weight_words * self.format.steps_per_word // self.format.steps_per_group)

    @property
    def row_words(self) -> int:
        """Row words of the section."""
        return -(-self.tiles // self.tiles_per_row_word)

    @property
    def scale_words(self) -> int:
        """Scale words of the section."""
        return -(-self.tiles * self.groups // self.entries_per_scale_word)

    @property
    def pattern_words(self) -> int:
        """Words of N:M patterns of the section."""
        if self.format.parts == 1:
            return 0
        return -(-self.tiles * self.steps // STEPS_PER_PATTERN_WORD)

    @property
    def words(self) -> int:
        """Array words of the section."""
        return (self.row_words + self.scale_words + self.pattern_words
                + self.tiles * self.weight_words)

    @property
    def stored_bytes(self) -> int:
        """Bytes of weights, scales, row exponents and biases without padding, on all channels."""
        return stored_bytes(self.format, self.rows, self.k, biased=self.biased)

    def kinds(self) -> NDArray[np.uint8]:
        """Return the kind of each word in order: 0 row, 1 scale, 2 weight, 3 pattern."""
        step = np.full((self.tiles, self.weight_words, 4), 255, np.uint8)
        step[:, :, 3] = 2
        if self.format.parts > 1:
            at = np.arange(self.tiles * self.steps) % STEPS_PER_PATTERN_WORD == 0
            step[:, :, 2] = np.where(at, 3, 255).reshape(self.tiles, self.steps)
        step[:: self.tiles_per_row_word, 0, 0] = 0
        # The first entry of a word is never that of a weight word's second step.
        first = np.arange(0, self.tiles * self.groups, self.entries_per_scale_word)
        at = first % self.groups * self.format.steps_per_group // self.format.steps_per_word
        step[first // self.groups, at, 1] = 1
        flat = step.reshape(-1)
        return flat[flat != 255]


def stored_bytes(fmt: WeightFormat, rows: int, k: int, *, biased: bool = False) -> int:
    """Return the bytes of weights, scales, row exponents and biases, whole for each row."""
    quads = -(-k // QUAD)
    weights = -(-(k if fmt.parts == 1 else quads * fmt.nonzeros) * fmt.weight_bits // 8)
    patterns = -(-quads * fmt.pattern_bits // 8)
    return rows * int(weights + patterns + -(-k // fmt.group) * fmt.scale_bits // 8
                      + (4 if biased else 2))


def _pack_entries(values: NDArray[np.integer], bits: int, per_word: int, word_bytes: int) -> Bytes:
    """Pack rows of 8-, 16- or 32-bit values into words of ``per_word`` rows each, zero padded."""
    entries = values.astype(f"<u{bits // 8}").reshape(values.shape[0], -1)
    words = -(-len(entries) // per_word)
    out = np.zeros((words * per_word, entries.shape[1]), entries.dtype)
    out[: len(entries)] = entries
    return np.ascontiguousarray(out).view(np.uint8).reshape(words, word_bytes)


def deal(
    matrix: QuantisedMatrix, row_multipliers: int, channel: int, channels: int, together: int
) -> QuantisedMatrix:
    """Return the rows of one channel, ``together`` consecutive ones at a time, in whole tiles."""
    rows = matrix.integers.shape[0]
    if channels == 1 and rows % matrix.format.rows(row_multipliers) == 0:
        return matrix
    chosen = np.arange(rows).reshape(-1, channels, together)[:, channel].reshape(-1)
    padding = -len(chosen) % matrix.format.rows(row_multipliers)

    def part(values: NDArray[np.integer]) -> NDArray[np.integer]:
        return np.pad(values[chosen], [(0, padding)] + [(0, 0)] * (values.ndim - 1))

    return replace(matrix, **{name: part(getattr(matrix, name)) for name in matrix.parts})


def _gather(parts: Sequence[QuantisedMatrix], section: Section, together: int) -> QuantisedMatrix:
    """Return the matrix of which every channel has a part: the inverse of :func:`deal`."""

    def whole(name: str) -> NDArray[np.integer]:
        dealt = np.stack([getattr(part, name)[: section.channel_rows] for part in parts])
        pieces = dealt.reshape(len(parts), -1, together, *dealt.shape[2:])
        return pieces.swapaxes(0, 1).reshape(section.rows, *dealt.shape[2:])

    return replace(parts[0], **{name: whole(name) for name in parts[0].parts})


def _in_lanes(values: NDArray[np.uint8], section: Section) -> NDArray[np.uint8]:
    """Return rows of codes or places, one for each part of a multiplier, as multipliers have them,
    (steps of all tiles, multipliers).

    Multiplier ``4 g + N p + j`` of a row of them has the j-th of the N weights of the g-th four, of
    part p.
    """
    fmt = section.format
    stored = fmt.nonzeros
    if fmt.parts == 1:  # a row's block stays together: eight bytes at a time
        blocks = np.ascontiguousarray(values).view(np.uint64).reshape(
            section.tiles, section.row_multipliers, section.steps, -1)
        return np.ascontiguousarray(blocks.swapaxes(1, 2)).view(np.uint8).reshape(
            section.tiles * section.steps, -1)
    rows = section.tiles, section.row_multipliers, fmt.parts
    return values.reshape(*rows, section.steps, BLOCK // QUAD, stored).transpose(
        0, 3, 1, 4, 2, 5).reshape(section.tiles * section.steps, -1)


def _from_lanes(values: NDArray[np.uint8], section: Section) -> NDArray[np.uint8]:
    """Return rows, (n, K / QUAD, N), of what multipliers have: the inverse of :func:`_in_lanes`."""
    fmt, fields = section.format, values.shape[-1]
    quads = BLOCK // QUAD
    shape = (section.tiles, section.steps, section.row_multipliers, quads, fmt.parts, fmt.nonzeros,
             fields)
    return values.reshape(shape).transpose(0, 2, 4, 6, 1, 3, 5).reshape(
        -1, section.steps * quads, fmt.nonzeros)


def _two_bits(values: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return numbers of two bits, four in a byte, the first in the lowest bits."""
    four = values.reshape(len(values), -1, 4)
    return np.bitwise_or.reduce(four << np.array([0, 2, 4, 6], np.uint8), axis=2, dtype=np.uint8)


def _in_steps(scales: NDArray[np.uint32], section: Section) -> NDArray[np.uint32]:
    """Return scales, (n, groups), as entries of scale words, a row for each step that has some."""
    per_step = section.format.scales_per_step
    scales = np.pad(scales, ((0, 0), (0, section.groups * per_step - scales.shape[1])))
    return scales.reshape(section.tiles, section.tile_rows, section.groups, per_step).transpose(
        0, 2, 1, 3).reshape(-1, section.tile_rows * per_step)


def _in_words(codes: Bytes, section: Section) -> Bytes:
    """Return the weight words, (n, word_bytes), of the codes of all steps, (tiles, steps,
    word_bytes).

    The second of two steps that share a word has the upper half of each 4 bits.
    """
    if section.format.steps_per_word > 1:
        codes = np.pad(codes, ((0, 0), (0, section.steps % 2), (0, 0)))
        codes = codes[:, 0::2] | codes[:, 1::2] << np.uint8(2)
    return codes.reshape(-1, section.word_bytes)


def _from_words(words: Bytes, section: Section) -> Bytes:
    """Return the codes of all steps, (tiles * steps, word_bytes): the inverse of
    :func:`_in_words`."""
    if section.format.steps_per_word == 1:
        return words
    both = np.uint8(0x33)
    steps = np.stack([words & both, words >> np.uint8(2) & both], axis=1)
    return steps.reshape(section.tiles, -1, section.word_bytes)[:, : section.steps].reshape(
        -1, section.word_bytes)


def pack_section(matrix: QuantisedMatrix, row_multipliers: int) -> Bytes:
    """Return the words of one section as bytes, for a matrix whose rows are in image order."""
    fmt = matrix.format
    n, k = matrix.integers.shape
    section = Section(fmt, n, k, row_multipliers, biased=matrix.bias is not None)
    tiles, steps, tile_rows = section.tiles, section.steps, section.tile_rows
    codes, scales = fmt.stored(matrix)
    patterns: NDArray[np.uint8] | None = None
    if fmt.parts > 1:
        at = places(matrix.integers, fmt)
        codes = compressed(codes, at)
        patterns = _two_bits(_in_lanes(at, section))
    codes = codes.reshape(n, -1)
    if fmt.packed:
        codes = codes[0::2] | codes[1::2] << np.uint8(4)
    weights = _in_words(_in_lanes(codes, section).reshape(tiles, steps, section.word_bytes),
                        section)

    scales = _in_steps(scales, section)
    rows = matrix.row_exponent.reshape(tiles, tile_rows).view(np.uint16)
    if matrix.bias is not None:
        rows = np.concatenate([rows, matrix.bias.reshape(tiles, tile_rows)], axis=1)

    kinds = section.kinds()
    out = np.zeros((section.words, section.word_bytes), np.uint8)
    out[kinds == 0] = _pack_entries(rows, 16, section.tiles_per_row_word, section.word_bytes)
    out[kinds == 1] = _pack_entries(
        scales, fmt.scale_bits, section.entries_per_scale_word, section.word_bytes
    )
    out[kinds == 2] = weights
    if patterns is not None:
        out[kinds == 3] = _pack_entries(patterns, 8, STEPS_PER_PATTERN_WORD, section.word_bytes)
    return out.reshape(-1)


def unpack_section(words: Sequence[Bytes], section: Section, *, together: int = 1
                   ) -> QuantisedMatrix:
    """Return the matrix of a section from the words that each channel holds of it.

    What the words do not hold is not restored: ``coarsened`` is 0.

    Parameters
    ----------
    words : sequence of uint8 array
        One for each channel.
    section : :class:`Section`
    together : :class:`int`
        Rows that stay together on a channel: those of an element of h.

    Raises
    ------
    ImageError
        If the bytes are not as many as the section has.
    """
    parts = [_unpack_part(part, section) for part in words]
    return parts[0] if section.channels == 1 else _gather(parts, section, together)


def _unpack_part(words: Bytes, section: Section) -> QuantisedMatrix:
    """Return one channel's rows, those of zeros included: the inverse of :func:`pack_section`."""
    fmt, tile_rows, tiles = section.format, section.tile_rows, section.tiles
    if words.size != section.words * section.word_bytes:
        raise ImageError(
            f"section must be {section.words * section.word_bytes} bytes, not {words.size}"
        )
    words = words.reshape(section.words, section.word_bytes)
    kinds = section.kinds()

    rows = np.ascontiguousarray(words[kinds == 0]).view("<i2").reshape(-1, tile_rows)
    exponents, biases = (rows[0::2], rows[1::2]) if section.biased else (rows, None)
    scales = np.ascontiguousarray(words[kinds == 1]).view(f"<u{fmt.scale_bits // 8}")
    per_step = fmt.scales_per_step
    scales = scales.reshape(-1, tile_rows * per_step)[: tiles * section.groups]
    scales = scales.reshape(tiles, section.groups, tile_rows, per_step).transpose(0, 2, 1, 3)
    scales = scales.reshape(tiles * tile_rows, section.groups * per_step)
    scales = np.ascontiguousarray(scales[:, : -(-section.k // fmt.group)])

    codes: Bytes = _from_words(words[kinds == 2], section)[..., None]
    if fmt.packed:
        codes = np.concatenate([codes & 15, codes >> 4], axis=2).astype(np.uint8)
    codes = _from_lanes(codes, section)
    matrix = fmt.restored(codes.reshape(len(codes), -1), scales,
                          exponents[:tiles].reshape(-1).astype(np.int16))
    if fmt.parts > 1:
        four = words[kinds == 3].reshape(-1)[: tiles * section.steps * section.word_bytes // 4]
        at = np.stack([four >> shift & 3 for shift in (0, 2, 4, 6)], axis=1).astype(np.uint8)
        matrix = replace(matrix, integers=expanded(
            matrix.integers.reshape(codes.shape),
            _from_lanes(at.reshape(tiles * section.steps, -1, 1), section)))
    if biases is not None:
        matrix = replace(
            matrix, bias=biases[:tiles].reshape(-1).astype(np.int16).view(np.uint16))
    # As the device reads what was damaged: a shift has so many bits, and at most that value.
    shift = matrix.shift & ((1 << SHIFT_BITS) - 1)
    return replace(matrix, shift=np.minimum(shift, fmt.max_shift).astype(np.int8))
