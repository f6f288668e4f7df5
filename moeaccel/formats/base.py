"""What a weight format is: its attributes, and a matrix in it.

A weight is ``integer * significand * 2**shift * 2**row_exponent``: a small signed integer, a scale
for each group along K (an 11-bit significand, or 1 in power-of-two formats, and a non-negative
shift) and one exponent for each row, so that the shifts of a row start at its largest scale minus
``max_shift``. Groups whose scale lies below that range are coarsened, and counted.

Nothing asks for a format by its name: hardware, image, golden model and driver go by attributes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from moeaccel.errors import FormatError

BLOCK = 32
"""Elements of K in one block (OCP Microscaling): 32 mantissas share one power-of-two exponent."""

QUAD = 4
"""Consecutive weights of a row that an N:M pattern is about: M."""

SIGNIFICAND_BITS = 11
"""Bits of a real scale's significand."""

SHIFT_BITS = 5
"""Bits of a scale's shift in hardware."""

SHARED_FIELD_BITS = 12
"""Bits of the low row's product where two rows share a multiplier: |w x| <= 15 * 128 < 2**11."""

ZERO_POINT_BITS = 4
"""Bits of a group's zero point."""

MINIMUM_SHIFT_MAX = 8
"""Largest shift of a group's minimum: 16 scales of the largest shift that its formats have."""

MINIMUM_SHIFT_BITS = 4
"""Stored bits of that shift."""

SCALED_BLOCK_BITS = 32
"""Magnitude bits of a block's scaled sum: with them an accumulator closes at 53 bits and a sign for
K = 32768."""


@dataclass(frozen=True, kw_only=True)
class WeightFormat(ABC):
    """How the weights of one format are stored and what they mean.

    A family of formats is a subclass in a file of its own, which says how a tensor becomes one.

    Parameters
    ----------
    name, code : :class:`str`, :class:`int`
        Name for users; number in images, expert tables and hardware, 0 to 255.
    weight_bits : :class:`int`
        2, 4 (two rows share a multiplier) or 8. With 2 bits a word has the weights of two steps.
    group : :class:`int`
        Weights along K that share a scale, a power of two from 32 on; 16, too, in 4-bit formats
        without zero points, minima or pattern. The last group of a row may be short.
    real_scale : :class:`bool`
        A scale is a significand and a shift (16 stored bits: significand in bits 0 to 10, shift in
        bits 11 to 15), else a power of two (8 stored bits: the shift).
    low, high : :class:`int`
        Least and largest integer that a quantised weight may be.
    table : tuple of int, optional
        Integer of each stored code; left out: two's complement of ``weight_bits``.
    max_shift : :class:`int`
        Largest shift, such that ``scaled_block_bits`` are at most SCALED_BLOCK_BITS.
    zero_point : :class:`bool`
        Each group has one, from 0 to 15, beside its scale (in bits 16 to 19 of 32): an integer is
        its stored code less the zero point. It follows from a group's integers
        (:meth:`zero_points`). 4-bit weights with real scales only.
    minimum : :class:`bool`
        Each group has one, which is added to each of its weights: 11 bits, a shift of at most
        MINIMUM_SHIFT_MAX and a sign, in units of the row's exponent, in bits 16 to 31 beside the
        scale (significand, shift, sign). 4-bit weights with real scales only.
    nonzeros : :class:`int`
        Of each QUAD consecutive weights of a row so many may differ from 0, and only these are
        stored, with their places: 1, 2, or all of them; in 2-bit formats, and with minima, all.

    Raises
    ------
    FormatError
        If the attributes are not those of a format that the arithmetic and an array can hold.
    """

    name: str
    code: int
    weight_bits: int
    group: int
    real_scale: bool
    low: int
    high: int
    max_shift: int
    table: tuple[int, ...] | None = None
    zero_point: bool = False
    minimum: bool = False
    nonzeros: int = QUAD

    def __post_init__(self) -> None:
        def require(field: str, ok: bool, what: str) -> None:
            if not ok:
                raise FormatError(f"{field} of weight format {self.name!r} must be {what}, "
                                  f"not {getattr(self, field)!r}")

        require("code", 0 <= self.code < 256, "from 0 to 255")
        require("weight_bits", self.weight_bits in (2, 4, 8), "2, 4 or 8")
        halves = (self.weight_bits == 4 and self.nonzeros == QUAD
                  and not (self.zero_point or self.minimum))
        least = BLOCK // 2 if halves else BLOCK
        require("group", self.group >= least and self.group & (self.group - 1) == 0,
                f"a power of two from {least} on")
        thin = self.weight_bits > 2 and not self.minimum
        require("nonzeros", self.nonzeros == QUAD or (thin and self.nonzeros in (1, 2)),
                f"1, 2 or {QUAD}" if thin else f"{QUAD} for 2-bit weights, and with minima")
        may = self.weight_bits == 4 and self.real_scale
        require("zero_point", may or not self.zero_point,
                "false but for 4-bit weights with real scales")
        require("minimum", (may and not self.zero_point) or not self.minimum,
                "false but for 4-bit weights with real scales and without zero points")
        values = self.integers
        require("table", len(values) == 1 << self.weight_bits, "one integer for each code")
        least = int(values.min()) - ((1 << ZERO_POINT_BITS) - 1 if self.zero_point else 0)
        require("low", least <= self.low <= 0, "an integer of the table, at most 0")
        require("high", 0 <= self.high <= int(values.max()), "an integer of the table, at least 0")
        largest = 15 if self.packed else 128  # times 128: fits the field of a row, or a byte each
        require("table", int(np.abs(values).max()) <= largest, f"of integers up to {largest}")
        require("max_shift", 0 <= self.max_shift < 1 << SHIFT_BITS
                and self.scaled_block_bits <= SCALED_BLOCK_BITS,
                f"such that a scaled block has {SCALED_BLOCK_BITS} bits at most")

    # -- what is stored ----------------------------------------------------------------------------
    @property
    def packed(self) -> bool:
        """Whether two rows share one multiplier."""
        return self.weight_bits < 8

    @property
    def steps_per_word(self) -> int:
        """Steps of the array whose weights share a word: blocks of 32 along K."""
        return 4 // self.weight_bits or 1

    @property
    def nibbles(self) -> tuple[int, ...] | None:
        """Integer of each 4 bits that the array decodes, where two rows share a multiplier; None:
        they are two's complement. Of a 2-bit format the upper two say nothing."""
        if self.steps_per_word == 1:
            return self.table
        return tuple(int(i) for i in self.integers) * (1 << 4 - self.weight_bits)

    @property
    def parts(self) -> int:
        """Rows, or pairs of rows, that a multiplier row computes at once: each has a part of it."""
        return QUAD // self.nonzeros

    @property
    def scale_bits(self) -> int:
        """Stored bits of a scale, its zero point or minimum with it."""
        return 32 if self.zero_point or self.minimum else 16 if self.real_scale else 8

    @property
    def steps_per_group(self) -> int:
        """Blocks of 32 that share a scale; 1 where a block has several."""
        return max(1, self.group // BLOCK)

    @property
    def scales_per_step(self) -> int:
        """Scales of a row that come at once: those of a block."""
        return max(1, BLOCK // self.group)

    @property
    def max_integer(self) -> int:
        """Largest magnitude of a quantised weight's integer."""
        return max(-self.low, self.high)

    @property
    def scaled_block_bits(self) -> int:
        """Magnitude bits of a block's sum times its scale, before the activation's shift."""
        significand = (1 << SIGNIFICAND_BITS) - 1 if self.real_scale else 1
        largest = self.max_integer * significand << self.max_shift
        if self.minimum:
            largest += significand << MINIMUM_SHIFT_MAX
        return (BLOCK * 128 * largest).bit_length()

    def rows(self, row_multipliers: int) -> int:
        """Rows of one tile on an array with that many multiplier rows."""
        return row_multipliers * (2 if self.packed else 1) * self.parts

    def bits_per_weight(self) -> float:
        """Stored bits of a weight, those that are left out counted, too, scales and places of
        patterns included, for K a multiple of the group."""
        return (self.weight_bits * self.nonzeros / QUAD + self.pattern_bits / QUAD
                + self.scale_bits / self.group)

    @property
    def pattern_bits(self) -> float:
        """Stored bits of a row for the places of each four weights: two for each that is stored,
        half of it where two rows share them."""
        if self.parts == 1:
            return 0
        return 2 * self.nonzeros / (2 if self.packed else 1)

    # -- codes -------------------------------------------------------------------------------------
    @cached_property
    def integers(self) -> NDArray[np.int16]:
        """Integer of each stored code, (2**weight_bits,), its group's zero point not taken off."""
        if self.table is not None:
            return np.array(self.table, np.int16)
        codes = np.arange(1 << self.weight_bits, dtype=np.int16)
        return np.where(codes >> (self.weight_bits - 1), codes - (1 << self.weight_bits), codes)

    def encode(self, integers: NDArray[np.int8]) -> NDArray[np.uint8]:
        """Return the stored code of each integer."""
        if self.table is None:
            return integers.view(np.uint8) & np.uint8((1 << self.weight_bits) - 1)
        lookup = np.zeros(256, np.uint8)
        for code in reversed(range(len(self.table))):  # of two codes the lower one: +0
            lookup[self.table[code] & 255] = code
        return lookup[integers.view(np.uint8)]

    def decode(self, codes: NDArray[np.uint8]) -> NDArray[np.int8]:
        """Return the integer of each stored code."""
        return self.integers.astype(np.int8)[codes]

    @property
    def known(self) -> list[int]:
        """Every integer that a weight may be, ascending."""
        if self.zero_point:
            return list(range(self.low, self.high + 1))
        return sorted({int(i) for i in self.integers if self.low <= i <= self.high})

    @cached_property
    def filler(self) -> int:
        """Integer of weights that are not there: nothing they are multiplied with is not zero."""
        return min(self.known, key=abs)

    def zero_points(self, grouped: NDArray[np.int8]) -> NDArray[np.int8]:
        """Return the zero point of each group, (n, groups), for integers (n, groups, group).

        The least that makes no code negative; 0 without ``zero_point``.
        """
        if not self.zero_point:
            return np.zeros(grouped.shape[:2], np.int8)
        return np.maximum(-grouped.min(axis=2), 0)

    def whole_groups(self, grouped: NDArray[np.int8]) -> NDArray[np.bool_]:
        """Return which groups' integers, (n, groups, group), of ``known`` each, fit one zero
        point, (n, groups)."""
        if not self.zero_point:
            return np.ones(grouped.shape[:2], bool)
        top = grouped.max(axis=2).astype(np.int16) + self.zero_points(grouped)
        return top < 1 << self.weight_bits

    def stored(self, matrix: QuantisedMatrix) -> tuple[NDArray[np.uint8], NDArray[np.uint32]]:
        """Return the codes, (n, K), and what is stored of each group's scale, (n, groups)."""
        entries = matrix.shift.astype(np.uint32)
        if self.real_scale:
            entries = entries << SIGNIFICAND_BITS | matrix.significand.astype(np.uint32)
        if matrix.minimum is not None:
            entries = entries | minimum_entries(matrix.minimum) << 16
        if not self.zero_point:
            return self.encode(matrix.integers), entries.astype(np.uint32)
        zero = self.zero_points(in_groups(matrix.integers, self.group))
        codes = matrix.integers + np.repeat(zero, self.group, axis=1)[:, :matrix.integers.shape[1]]
        return codes.view(np.uint8), (entries | zero.astype(np.uint32) << 16).astype(np.uint32)

    def restored(self, codes: NDArray[np.uint8], entries: NDArray[np.integer],
                 row_exponent: NDArray[np.int16]) -> QuantisedMatrix:
        """Return the matrix of which that is stored: the inverse of :meth:`stored`.

        Shifts beyond ``max_shift``, which a damaged entry may have, stay as they are.
        """
        integers = self.decode(codes)
        if self.zero_point:
            zero = (entries >> 16 & (1 << ZERO_POINT_BITS) - 1).astype(np.int8)
            integers = integers - np.repeat(zero, self.group, axis=1)[:, :codes.shape[1]]
        significand = (entries & (1 << SIGNIFICAND_BITS) - 1 if self.real_scale
                       else np.ones_like(entries))
        shift = entries >> SIGNIFICAND_BITS if self.real_scale else entries
        return QuantisedMatrix(
            self, integers, significand.astype(np.int16),
            (shift & (1 << SHIFT_BITS) - 1 if self.scale_bits == 32 else shift).astype(np.int8),
            row_exponent, 0, minimum=minima(entries >> 16) if self.minimum else None)

    # -- how a tensor becomes one ------------------------------------------------------------------
    @abstractmethod
    def group_scale(
        self, amax: NDArray[np.float64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return (significand, exponent) of the scale of groups with these largest magnitudes.

        ``significand * 2**exponent``; the significand is 1 without ``real_scale``, else it has
        SIGNIFICAND_BITS. What is returned for 0 is not used.
        """

    @property
    def scaled_alone(self) -> bool:
        """Whether a group's scale is all that is looked for: no zero point, no minimum."""
        return not (self.zero_point or self.minimum)

    def nearest(self, scaled: NDArray[np.floating]) -> NDArray[np.floating]:
        """Round weights, divided by their scale, to integers of the format, in place; saturate."""
        np.rint(scaled, out=scaled)
        return np.clip(scaled, self.low, self.high, out=scaled)

    def nearest_groups(self, scaled: NDArray[np.floating]) -> NDArray[np.floating]:
        """Round whole groups, (m, group), as :meth:`nearest` does."""
        return self.nearest(scaled)

    def quantised(self, weights: NDArray[np.float32], quantiser: str,
                  moments: NDArray[np.floating] | None) -> QuantisedMatrix | None:
        """Return a float matrix, (n, K), in this format; None if it goes as
        :mod:`moeaccel.formats.quantisers` does."""
        return None


def in_groups(values: NDArray[np.int8], group: int) -> NDArray[np.int8]:
    """Return the rows of a matrix in groups, (n, groups, group), zeros behind the last."""
    missing = -values.shape[1] % group
    if missing:
        values = np.pad(values, ((0, 0), (0, missing)))
    return np.ascontiguousarray(values).reshape(len(values), -1, group)


def minimum_entries(minimum: NDArray[np.int32]) -> NDArray[np.uint32]:
    """Return what is stored of minima: significand, shift above it, sign above that."""
    size = np.abs(minimum)
    shift = np.maximum(np.frexp(size)[1] - SIGNIFICAND_BITS, 0)
    entry = size >> shift | shift << SIGNIFICAND_BITS
    return (entry | (minimum < 0) << SIGNIFICAND_BITS + MINIMUM_SHIFT_BITS).astype(np.uint32)


def minima(entries: NDArray[np.integer]) -> NDArray[np.int32]:
    """Return the minima of which that is stored, (n, groups); shifts count as the largest at
    most."""
    size = entries.astype(np.int32) & (1 << SIGNIFICAND_BITS) - 1
    shift = entries.astype(np.int32) >> SIGNIFICAND_BITS & (1 << MINIMUM_SHIFT_BITS) - 1
    size <<= np.minimum(shift, MINIMUM_SHIFT_MAX)
    return np.where(entries >> SIGNIFICAND_BITS + MINIMUM_SHIFT_BITS & 1, -size, size)


def bfloat16_bits(values: NDArray[np.float32], what: str) -> NDArray[np.uint16]:
    """Round numbers to bfloat16, half to even, and return their bits; subnormal ones are zero.

    Raises
    ------
    FormatError
        If one is not finite, or not after rounding; ``what`` it is.
    """
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.int64)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    wrong = (rounded & 0x7F80) == 0x7F80
    if wrong.any():
        row = int(np.flatnonzero(wrong.reshape(-1))[0])
        raise FormatError(f"{what} must be of numbers that bfloat16 has, up to 3.38e38, but number "
                          f"{row} is {values.reshape(-1)[row]}")
    return np.where(rounded & 0x7F80, rounded, 0).astype(np.uint16)


def bfloat16_floats(stored: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Return bfloat16 as float32, exactly."""
    return np.left_shift(stored, 16, dtype=np.uint32).view(np.float32)


@dataclass(frozen=True)
class QuantisedMatrix:
    """A quantised matrix of ``n`` rows and K columns.

    Parameters
    ----------
    format : :class:`WeightFormat`
    integers : int8 array, (n, K)
        Decoded integers (``mxfp4``: twice the E2M1 value).
    significand : int16 array, (n, groups)
        1 in power-of-two formats, else 0 to 2047.
    shift : int8 array, (n, groups)
        0 to ``max_shift``.
    row_exponent : int16 array, (n,)
    coarsened : :class:`int`
        Groups whose scale the row's range clamped.
    bias : uint16 array, (n,), optional
        Added to each row's dot product: the bits of bfloat16 numbers.
    minimum : int32 array, (n, groups), optional
        Added to each weight of a group, in units of ``2**row_exponent``: at most 11 significant
        bits and MINIMUM_SHIFT_MAX zeros below.
    """

    format: WeightFormat
    integers: NDArray[np.int8]
    significand: NDArray[np.int16]
    shift: NDArray[np.int8]
    row_exponent: NDArray[np.int16]
    coarsened: int
    bias: NDArray[np.uint16] | None = None
    minimum: NDArray[np.int32] | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the arrays that it has, each with an entry or a row for each row."""
        return ("integers", "significand", "shift", "row_exponent",
                *(name for name in ("bias", "minimum") if getattr(self, name) is not None))

    def with_bias(self, bias: NDArray[np.floating] | None) -> QuantisedMatrix:
        """Return the matrix with a bias for each row, (n,), rounded to bfloat16; None: without.

        Raises
        ------
        FormatError
            If they are not as many as rows, or one is not finite as a bfloat16 number.
        """
        if bias is None:
            return replace(self, bias=None)
        values = np.ascontiguousarray(bias, dtype=np.float32)
        if values.shape != self.row_exponent.shape:
            raise FormatError(f"bias must have the shape {self.row_exponent.shape}, one number for "
                              f"each row, not {values.shape}")
        return replace(self, bias=bfloat16_bits(values, "bias"))

    @property
    def bias_values(self) -> NDArray[np.float32]:
        """The biases, (n,) float32, zeros where there are none."""
        if self.bias is None:
            return np.zeros(len(self.row_exponent), np.float32)
        return bfloat16_floats(self.bias)

    def __getitem__(self, rows: slice) -> QuantisedMatrix:
        """Return some rows; ``coarsened`` stays that of the whole."""
        return replace(self, **{name: getattr(self, name)[rows] for name in self.parts})

    def filled(self, rows: int, k: int) -> QuantisedMatrix:
        """Return the matrix with zeros behind its rows and columns, (rows, k)."""
        n, columns = self.integers.shape
        if (n, columns) == (rows, k):
            return self
        groups = -(-k // self.format.group)
        below = [(0, rows - n)]
        right = [(0, groups - self.significand.shape[1])]
        return replace(
            self,
            integers=np.pad(self.integers, [*below, (0, k - columns)],
                            constant_values=self.format.filler),
            significand=np.pad(self.significand, below + right,
                               constant_values=0 if self.format.real_scale else 1),
            shift=np.pad(self.shift, below + right),
            row_exponent=np.pad(self.row_exponent, below),
            bias=None if self.bias is None else np.pad(self.bias, below),
            minimum=None if self.minimum is None else np.pad(self.minimum, below + right))

    def cut(self, rows: int, k: int) -> QuantisedMatrix:
        """Return the first rows and columns: the inverse of :meth:`filled`."""
        if self.integers.shape == (rows, k):
            return self
        wide = {"integers": k, **dict.fromkeys(
            ("significand", "shift", "minimum"), -(-k // self.format.group))}
        return replace(self, **{
            name: np.ascontiguousarray(getattr(self, name)[:rows, : wide[name]] if name in wide
                                       else getattr(self, name)[:rows]) for name in self.parts})

    def group_terms(self) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
        """Return the scales and the minima of all groups, (n, groups), in units of
        ``2**row_exponent``; None: there are none."""
        return (self.significand.astype(np.float64) * 2.0**self.shift,
                None if self.minimum is None else self.minimum.astype(np.float64))

    def dequantise(self) -> NDArray[np.float64]:
        """Return the exact weights, (n, K) float64."""
        def each(values: NDArray[np.float64]) -> NDArray[np.float64]:
            exact = np.ldexp(values, self.row_exponent[:, None].astype(np.int32))
            return np.repeat(exact, self.format.group, axis=1)[:, : self.integers.shape[1]]

        scale, minimum = self.group_terms()
        weights = self.integers.astype(np.float64) * each(scale)
        return weights if minimum is None else weights + each(minimum)

    def relative_error(self, weights: NDArray[np.floating]) -> float:
        """Return the relative Frobenius error against the float weights it came from."""
        return float(np.linalg.norm(self.dequantise() - weights) / np.linalg.norm(weights))
