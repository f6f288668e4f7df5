"""Sections of an image: how many words a matrix takes, and the words of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from moeaccel.errors import ImageError
from moeaccel.formats import BLOCK, QuantisedMatrix, WeightFormat

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
        """Weight words of a tile."""
        return self.k // BLOCK

    @property
    def tiles_per_row_word(self) -> int:
        """Tiles whose row exponents, and biases, share a word."""
        return 8 * self.word_bytes // ((32 if self.biased else 16) * self.tile_rows)

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
        """Bytes of weights, scales, row exponents and biases without padding, on all channels."""
        return stored_bytes(self.format, self.rows, self.k, biased=self.biased)

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


def stored_bytes(fmt: WeightFormat, rows: int, k: int, *, biased: bool = False) -> int:
    """Return the bytes of weights, scales, row exponents and biases, whole for each row."""
    weights = -(-k * fmt.weight_bits // 8)
    return rows * (weights + -(-k // fmt.group) * fmt.scale_bits // 8 + (4 if biased else 2))



def _pack_entries(values: NDArray[np.integer], bits: int, per_word: int, word_bytes: int) -> Bytes:
    """Pack rows of 8- or 16-bit values into words of ``per_word`` rows each, zero padded."""
    entries = values.astype(np.uint8 if bits == 8 else "<u2").reshape(values.shape[0], -1)
    words = -(-len(entries) // per_word)
    out = np.zeros((words * per_word, entries.shape[1]), entries.dtype)
    out[: len(entries)] = entries
    return np.ascontiguousarray(out).view(np.uint8).reshape(words, word_bytes)


def deal(
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
        shift=part(matrix.shift), row_exponent=part(matrix.row_exponent),
        bias=None if matrix.bias is None else part(matrix.bias))


def _gather(parts: Sequence[QuantisedMatrix], section: Section, together: int) -> QuantisedMatrix:
    """Return the matrix of which every channel has a part: the inverse of :func:`deal`."""

    def whole(name: str) -> NDArray[np.integer]:
        dealt = np.stack([getattr(part, name)[: section.channel_rows] for part in parts])
        pieces = dealt.reshape(len(parts), -1, together, *dealt.shape[2:])
        return pieces.swapaxes(0, 1).reshape(section.rows, *dealt.shape[2:])

    names = ["integers", "significand", "shift", "row_exponent", *["bias"] * section.biased]
    return replace(parts[0], **{name: whole(name) for name in names})


def pack_section(matrix: QuantisedMatrix, row_multipliers: int) -> Bytes:
    """Return the words of one section as bytes, for a matrix whose rows are in image order."""
    fmt = matrix.format
    n, k = matrix.integers.shape
    section = Section(fmt, n, k, row_multipliers, biased=matrix.bias is not None)
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
    if matrix.bias is not None:
        rows = np.concatenate([rows, matrix.bias.reshape(tiles, tile_rows)], axis=1)

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

    rows = np.ascontiguousarray(words[kinds == 0]).view("<i2").reshape(-1, tile_rows)
    exponents, biases = (rows[0::2], rows[1::2]) if section.biased else (rows, None)
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
        None if biases is None else biases[:tiles].reshape(-1).astype(np.int16).view(np.uint16),
    )
