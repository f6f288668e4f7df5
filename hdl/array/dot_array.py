"""The array: decode, multiply, sum over a block of 32, scale, accumulate."""

import functools
import operator
from itertools import pairwise

from amaranth import *
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import exact_log2

from moeaccel.config import ACTIVATION_SHIFT_MAX, BLOCK, AcceleratorConfig
from moeaccel.formats import (
    MINIMUM_SHIFT_MAX,
    QUAD,
    SHARED_FIELD_BITS,
    SIGNIFICAND_BITS,
    ZERO_POINT_BITS,
)
from moeaccel.hdl import layouts
from moeaccel.hdl.array.multiplier import FAMILIES, Multiplier
from moeaccel.hdl.weights.tile_buffer import (
    minimum_layout,
    scale_layout,
    select_bits,
    zero_layout,
)

__all__ = ["DotArray", "sums_layout"]

FACTOR_BITS = 17
"""Bits of a multiplier's weight operand: |(w1 << 12) + w0| <= 15 * 4097 < 2**16."""

DECODED_BITS = 5
"""Bits of a 4-bit format's integer."""

PRODUCT_BITS = 24
TREE_LEVELS = exact_log2(BLOCK)
"""Levels of an adder tree, each a pipeline stage."""

BLOCK_BITS = SHARED_FIELD_BITS + TREE_LEVELS
"""Bits of a sum of fields of 12 bits."""


def sums_layout(config):
    """Return the sums of a tile and group: entry ``row * token_lanes + lane``, rows numbered as
    :func:`moeaccel.hdl.layouts.sum_of_row` says."""
    return data.ArrayLayout(signed(config.accumulator_bits), config.rows * config.token_lanes)


class DotArray(wiring.Component):
    """Compute the exact dot products of a tile of weights and a group of tokens, a step per cycle.

    For each row r and lane t, over the steps from ``i_first`` to ``i_last``::

        sum[r, t] += (sum over k of w[r, k] * x[t, k]) * significand[r] << (shift[r] +
        lane_shift[t])

    where k runs over a block of 32. Formats with minima add ``(minimum[r] * sum over k of x[t, k])
    << lane_shift[t]``; that sum is made once for a lane. In N:M formats multiplier k takes one of
    its four elements of x instead of element k, which ``i_selects`` says, and its sum goes to the
    row of its part.

        codes -> decode -> [multiplier] -> split, trees --> [multiplier] -> shift ---> sum
           0      1, 2     [ 3, 4, 5  ]      6 to 10        [11, 12, 13]    14, 15     16
        lanes --> 1, 2 ----^                                significand     shift
        scales-------------- delayed -----------------------^---------------^

    Two rows of a 4-bit format share a multiplier: P = ((w1 << 12) + w0) * x, whose low 12 bits,
    signed, are w0 * x because |w0 * x| <= 15 * 128. These low fields are summed in one tree and
    what is above them in another, to which each field below 0 returns the 1 that it borrowed: exact
    for every operand. Each field of each part of a multiplier row has a scale, a shift and an
    accumulator of its own, numbered ``(multiplier row * splits + part) * 2 + field``. What belongs
    to one row, the two fields of an 8-bit format and the halves of a block with two scales, is
    added behind the accumulators.

    Latency LATENCY_CYCLES from a step to the sums that it ends; one step per cycle, never a stall.
    Reset forgets the steps under way.

    Parameters
    ----------
    config : :class:`AcceleratorConfig`
    family : :class:`str`
        FPGA family of the multipliers.
    tag_width : :class:`int`
        Bits of ``i_tag``; 1 or more.
    gated : :class:`bool`
        Registers hold where no step passes, and in lanes without a token, which simulates faster.
        By default not for ``"ecp5"``: an enable for each stage would have to cross the whole array
        in a cycle.

    Members
    -------
    i_valid : :py:`In(1)`
        A step enters.
    i_first, i_last : :py:`In(1)`
        It is the first, the last of its tile and group.
    i_used : :py:`In(config.token_lanes)`
        Lanes that hold a token, all when left alone; the sums of others are meaningless.
    i_format : :py:`In(config.format_bits)`
    i_codes : :py:`In(8 * config.word_bytes)`
    i_scales : :py:`In(scale_layout(config))`
    i_zeros, i_minima, i_selects
        As from :class:`~moeaccel.hdl.weights.tile_buffer.TileBuffer`, where a format needs them.
    i_lanes : :py:`In(ArrayLayout(layouts.lane(config), config.token_lanes))`
        LANES_LATER_CYCLES after the rest of the step, so that they may be chosen meanwhile.
        Mantissas in [-128, 127]; shift plus the row's shift at most ``max_shift``.
    i_tag : :py:`In(tag_width)`
    o_valid : :py:`Out(1)`
        For one cycle after a last step: sums and tag are there.
    o_sums : :py:`Out(sums_layout(config))`
    o_tag : :py:`Out(tag_width)`
        Tag of the last step.
    """

    LANES_LATER_CYCLES = 2
    LATENCY_CYCLES = 3 + 2 * Multiplier.LATENCY_CYCLES + TREE_LEVELS + 3

    def __init__(self, config, family="generic", *, tag_width=1, gated=None):
        if not isinstance(config, AcceleratorConfig):
            raise TypeError(f"config must be an AcceleratorConfig, not {config!r}")
        if family not in FAMILIES:
            raise ValueError(f"family must be one of {', '.join(FAMILIES)}, not {family!r}")
        if not isinstance(tag_width, int) or tag_width < 1:
            raise ValueError(f"tag_width must be a positive integer, not {tag_width!r}")
        self._config = config
        self._family = family
        self._tag_width = tag_width
        self._gated = family == "generic" if gated is None else bool(gated)
        super().__init__({
            "i_valid": In(1),
            "i_first": In(1),
            "i_last": In(1),
            "i_used": In(config.token_lanes, init=(1 << config.token_lanes) - 1),
            "i_format": In(config.format_bits),
            "i_codes": In(8 * config.word_bytes),
            "i_scales": In(scale_layout(config)),
            **({"i_zeros": In(zero_layout(config))} if config.zero_points else {}),
            **({"i_minima": In(minimum_layout(config))} if config.minima else {}),
            **({"i_selects": In(select_bits(config))} if config.parts > 1 else {}),
            "i_lanes": In(data.ArrayLayout(layouts.lane(config), config.token_lanes)),
            "i_tag": In(tag_width),
            "o_valid": Out(1),
            "o_sums": Out(sums_layout(config)),
            "o_tag": Out(tag_width),
        })

    @property
    def config(self):
        """Configuration."""
        return self._config

    @property
    def family(self):
        """FPGA family of the multipliers."""
        return self._family

    @property
    def max_shift(self):
        """Largest shift of a block's sum, that of its scale and that of its lane together."""
        return max(f.max_shift for f in self._config.weight_formats) + ACTIVATION_SHIFT_MAX

    @property
    def tag_width(self):
        """Bits of the tag."""
        return self._tag_width

    @property
    def gated(self):
        """Whether registers hold where no step passes."""
        return self._gated

    def elaborate(self, platform):
        config = self._config
        m = Module()
        multiplier_rows, lanes = config.row_multipliers, config.token_lanes

        # valid[i]: a step's data is at the input of stage i; register i loads then.
        stages = self.LATENCY_CYCLES
        valid = [self.i_valid, *(Signal(name=f"valid{i}") for i in range(1, stages + 1))]
        for before, after in pairwise(valid):
            m.d.sync += after.eq(before)
        # used[i][lane]: it is for this lane, too; without a lane, for any.
        used = [{None: valid[0]} | dict(enumerate(self.i_used & valid[0].replicate(lanes)))]
        for i in range(1, stages + 1):
            used.append({None: valid[i]})
            for lane in range(lanes):
                used[i][lane] = after = Signal(name=f"used{i}_{lane}")
                m.d.sync += after.eq(used[i - 1][lane])

        def register(stage, shape, value, name, lane=None):
            """Return ``value`` after the register of ``stage``."""
            signal = Signal(shape, name=f"{name}_{stage}", reset_less=True)
            with m.If(used[stage][lane] if self._gated else 1):
                m.d.sync += signal.eq(value)
            return signal

        def delay(stage, last, value, name, lane=None):
            """Return ``value`` after the registers of stages ``stage`` to ``last``."""
            for i in range(stage, last + 1):
                value = register(i, value.shape(), value, name, lane)
            return value

        multiply = 3  # first stage of the multipliers, and so on
        tree = multiply + Multiplier.LATENCY_CYCLES
        scale = tree + TREE_LEVELS
        shift = scale + Multiplier.LATENCY_CYCLES
        accumulate = shift + 2
        assert accumulate == stages - 1

        def multiplier(name, stage, a, b, a_width, b_width, lane):
            """Return the product of two values that are at the input of ``stage``."""
            m.submodules[name] = unit = Multiplier(a_width, b_width, self._family)
            m.d.comb += [unit.i_a.eq(a), unit.i_b.eq(b)]
            if self._gated:
                m.d.comb += unit.i_enable.eq(Cat(used[i][lane] for i in range(stage, stage + 3)))
            return unit.o_product

        # -- input registers and decoding ---------------------------------------------------------
        # One hot, a bit for each table and for 8 bits: what two of them have in common would be a
        # wire to all of the array.
        formats = config.weight_formats
        packed_formats = [f for f in formats if f.packed]
        table_copies = {
            (table, zero): self._copies(
                register,
                layouts.is_format(self.i_format, [
                    f for f in packed_formats if (f.nibbles, f.zero_point) == (table, zero)]),
                f"table{i}")
            for i, (table, zero) in enumerate(
                dict.fromkeys((f.nibbles, f.zero_point) for f in packed_formats))}
        int8_copies = self._copies(
            register, ~layouts.is_packed(config, self.i_format), "int8")
        zeros = [register(0, ZERO_POINT_BITS, zero, f"zero{row}")
                 for row, zero in enumerate(self.i_zeros)] if config.zero_points else None

        def look_up(table, nibble):
            """Return the integer that a 4-bit code stands for: low bits and sign by themselves."""
            if table is None:
                return Cat(nibble, nibble[3])
            low = sum((value & 15) << 4 * code for code, value in enumerate(table))
            signs = sum((value < 0) << code for code, value in enumerate(table))
            return Cat((C(low, 64) >> (nibble << 2))[:4], (C(signs, 16) >> nibble)[0])

        def decode(nibble, copy, row):
            """Return the integer that a 4-bit code stands for, 0 in an 8-bit format."""
            return functools.reduce(operator.or_, (
                ((nibble - zeros[row])[:DECODED_BITS] if zero else look_up(table, nibble))
                & copies[copy].replicate(DECODED_BITS)
                for (table, zero), copies in table_copies.items()))

        # What is decoded, what is joined and what crosses the array have registers of their own.
        factors = []
        for rm in range(multiplier_rows):
            for k in range(BLOCK):
                name = f"{rm}_{k}"
                code = register(0, 8, self.i_codes.word_select(rm * BLOCK + k, 8), f"code{name}")
                copy = k * len(int8_copies) // BLOCK
                low = register(
                    1, signed(8),
                    decode(code[:4], copy, 2 * rm).as_signed()
                    | Mux(int8_copies[copy], code, 0),
                    f"low_factor{name}")
                high = register(1, signed(DECODED_BITS),
                                decode(code[4:], copy, 2 * rm + 1).as_signed(),
                                f"high_factor{name}")
                factors.append(register(
                    2, signed(FACTOR_BITS), (high << SHARED_FIELD_BITS) + low, f"factor{name}"))

        # -- multiply, and sum over the block -----------------------------------------------------
        mantissas = [[delay(self.LANES_LATER_CYCLES, multiply - 1,
                             self.i_lanes[lane].mantissas[k], f"mantissa{lane}_{k}", lane)
                      for k in range(BLOCK)] for lane in range(lanes)]

        def mode(first, last, some, name):
            """Return whether the step's format is one of some, after stage ``last``; 0 if none."""
            if not some:
                return None
            early = register(0, 1, layouts.is_format(self.i_format, some), name)
            return early if last == 0 else delay(first, last, early, name)

        sparse = [f for f in formats if f.parts > 1]
        selects = {}
        if sparse:
            chosen = mode(1, 0, sparse, "sparse")
            for i in range(multiplier_rows * BLOCK):
                select = register(0, 2, self.i_selects.word_select(i, 2), f"select{i}")
                select = register(1, 2, Mux(chosen, select, i % QUAD), f"select{i}")
                selects[divmod(i, BLOCK)] = delay(2, multiply - 1, select, f"select{i}")

        def operand(rm, k, lane):
            """Return what a multiplier takes of a lane: element k, or one of its four."""
            if not sparse:
                return mantissas[lane][k]
            select, four = selects[rm, k], mantissas[lane][k // QUAD * QUAD:][:QUAD]
            return Mux(select[1], Mux(select[0], four[3], four[2]),
                       Mux(select[0], four[1], four[0]))

        trees = _Trees(config, register, tree, lambda level, some, name: mode(
            1, tree + level - 1, some, name))
        sums = {}  # by (rm, part, field, lane)
        for rm in range(multiplier_rows):
            for lane in range(lanes):
                name = f"{rm}_{lane}"
                high, low = [], []
                for k in range(BLOCK):
                    product = Signal(signed(PRODUCT_BITS), name=f"product{name}_{k}")
                    m.d.comb += product.eq(multiplier(
                        f"multiply{name}_{k}", multiply, factors[rm * BLOCK + k],
                        operand(rm, k, lane), FACTOR_BITS, 8, lane))
                    low.append(product[:SHARED_FIELD_BITS].as_signed())
                    high.append(product[SHARED_FIELD_BITS:].as_signed())
                # A low field below 0 has borrowed from the high one.
                borrows = [field[-1] for field in low]
                for field, values in enumerate((
                        trees.sums(low, f"low{name}", lane),
                        trees.sums(high, f"high{name}", lane, borrows))):
                    for part, value in enumerate(values):
                        sums[rm, part, field, lane] = value

        # -- scale --------------------------------------------------------------------------------
        scales = [register(0, 16, scale, f"scale{i}") for i, scale in enumerate(self.i_scales)]
        significands = [delay(1, scale - 1, s[:SIGNIFICAND_BITS], f"significand{i}")
                        for i, s in enumerate(scales)]
        row_shifts = [delay(1, shift - 2, s[SIGNIFICAND_BITS:], f"row_shift{i}")
                      for i, s in enumerate(scales)]
        lane_shifts = [delay(self.LANES_LATER_CYCLES, shift - 2, self.i_lanes[lane].shift,
                             f"lane_shift{lane}", lane) for lane in range(lanes)]

        # Every operand, -128 and an empty scale included, fits.
        scaled_bits = BLOCK_BITS + SIGNIFICAND_BITS
        coarse_bits = 3
        addend_bits = config.accumulator_bits - (config.max_steps - 1).bit_length()

        def shifted(scaled, row_shift, most, name, lane):
            """Return a scaled sum after both of its shifts, at the input of the last register."""
            amount = register(shift - 1, range(most + 1), row_shift + lane_shifts[lane],
                              f"amount{name}", lane)
            fine = register(shift, signed(len(scaled) + (1 << coarse_bits) - 1),
                            scaled << amount[:coarse_bits], f"fine{name}", lane)
            amount = register(shift, len(amount) - coarse_bits, amount[coarse_bits:],
                              f"coarse_amount{name}", lane)
            # Not shifted by a variable, which would make it wider than it can be.
            for i, much in enumerate(amount):
                fine = Mux(much, fine << (1 << coarse_bits + i), fine)[:addend_bits].as_signed()
            return fine

        minima = self._minima(register, delay, multiplier, mantissas, multiply, scale, shift)
        first = delay(0, accumulate - 1, self.i_first, "first")
        last = delay(0, accumulate - 1, self.i_last, "last")
        totals = {}
        for (rm, part, field, lane), block in sums.items():
            entry = (rm * config.splits + part) * 2 + field
            name = f"{entry}_{lane}"
            scaled = Signal(signed(scaled_bits), name=f"scaled{name}")
            m.d.comb += scaled.eq(multiplier(
                f"scale{name}", scale, block, Cat(significands[entry], C(0, 1)).as_signed(),
                BLOCK_BITS, SIGNIFICAND_BITS + 1, lane))
            addend = shifted(scaled, row_shifts[entry], self.max_shift, name, lane)
            if part == 0 and minima:
                of_minimum, row_shift = minima[rm, field, lane]
                addend = (addend + shifted(
                    of_minimum, row_shift, MINIMUM_SHIFT_MAX + ACTIVATION_SHIFT_MAX,
                    f"{name}_minimum", lane))[:addend_bits].as_signed()
            addend = register(shift + 1, signed(addend_bits), addend, f"addend{name}", lane)
            total = Signal(signed(config.accumulator_bits), name=f"total{name}", reset_less=True)
            with m.If(used[accumulate][lane] if self._gated else valid[accumulate]):
                m.d.sync += total.eq(Mux(first, 0, total) + addend)
            totals[rm, part, field, lane] = total

        # -- join what is one row's ---------------------------------------------------------------
        wide = mode(1, accumulate, [f for f in formats if not f.packed], "wide")
        halves = mode(1, accumulate, [f for f in formats if f.group < BLOCK], "halves")
        for (rm, part, field, lane), total in totals.items():
            if part >= config.parts:
                continue
            others = []
            if halves is not None and part == 0:
                others.append((halves, totals[rm, config.splits // 2, field, lane]))
            if wide is not None and field == 0:
                others.append((wide, (totals[rm, part, 1, lane] << SHARED_FIELD_BITS)[:len(total)]))
            if others:
                total = total + functools.reduce(operator.or_, (
                    value & needed.replicate(len(value)) for needed, value in others))
            entry = (rm * config.parts + part) * 2 + field
            m.d.comb += self.o_sums[entry * lanes + lane].eq(total)

        # -- output -------------------------------------------------------------------------------
        m.d.sync += self.o_valid.eq(valid[accumulate] & last)
        m.d.comb += self.o_tag.eq(delay(0, accumulate, self.i_tag, "tag"))
        return m

    def _minima(self, register, delay, multiplier, mantissas, multiply, scale, shift):
        """Return (minimum * sum of x before its shift, minimum's shift) by multiplier row, field
        and lane, at the inputs of the stages behind the scales' multipliers; none without minima.

        ``mantissas``, by lane, are at the input of stage ``multiply``, the first of the
        multipliers; ``scale`` and ``shift`` are those of scales and shifts.
        """
        if not self._config.minima:
            return {}
        factors, row_shifts = [], []
        for i, minimum in enumerate(self.i_minima):
            minimum = register(0, len(minimum.as_value()), minimum.as_value(), f"minimum{i}")
            size = minimum[:SIGNIFICAND_BITS]
            factor = register(1, signed(SIGNIFICAND_BITS + 1), Mux(minimum[-1], -size, size),
                              f"minimum_factor{i}")
            factors.append(delay(2, scale - 1, factor, f"minimum_factor{i}"))
            row_shifts.append(delay(1, shift - 2, minimum[SIGNIFICAND_BITS:-1],
                                    f"minimum_shift{i}"))
        found = {}
        for lane, terms in enumerate(mantissas):
            for level in range(TREE_LEVELS):
                terms = [register(multiply + level, signed(9 + level), a + b,
                                  f"x_sum{lane}_{i}", lane)
                         for i, (a, b) in enumerate(zip(terms[0::2], terms[1::2], strict=True))]
            total = delay(multiply + TREE_LEVELS, scale - 1, terms[0], f"x_total{lane}", lane)
            for i, (factor, row_shift) in enumerate(zip(factors, row_shifts, strict=True)):
                product = multiplier(f"minimum{i}_{lane}", scale, total, factor, len(total),
                                     len(factor), lane)
                found[i >> 1, i & 1, lane] = product, row_shift
        return found

    def _copies(self, register, value, name):
        """Return the register of a bit as often as its many readers, all over the array, need it.

        Synthesis would merge equal registers. These differ: in what they hold while no step
        passes, and in polarity.
        """
        if self._gated:
            return [register(0, 1, value, name)]
        low, high = value & self.i_valid, value | ~self.i_valid
        return [register(0, 1, low, f"{name}_low"), ~register(0, 1, ~low, f"{name}_low_n"),
                register(0, 1, high, f"{name}_high"), ~register(0, 1, ~high, f"{name}_high_n")]


class _Trees:
    """Adder trees over a block: one sum of each field, or one of each part of it.

    Parts are what N:M formats and groups shorter than a block scale by themselves: multipliers
    ``4 g + 2 h`` and ``4 g + 2 h + 1`` are those of half h of an N:M format (one each in quarters),
    and multipliers from 0 to 15 and from 16 to 31 those of the halves of a block. Where an array
    has both, a level of multiplexers exchanges quarter sums. Formats without parts add them.

    Parameters
    ----------
    config : :class:`AcceleratorConfig`
    register, stage
        :meth:`DotArray.elaborate`'s; the first stage.
    mode : callable
        ``mode(level, formats, name)``: whether the step's format is one of some, at the input of
        that level's stage.
    """

    def __init__(self, config, register, stage, mode):
        self._register = register
        self._stage = stage
        formats = config.weight_formats
        short = [f for f in formats if f.group < BLOCK]
        self._swap = None
        self._whole = {}  # by level: 1 where all parts are to be one sum
        self._order = tuple(range(TREE_LEVELS))
        if config.splits == 1:
            return
        last = TREE_LEVELS - 1
        self._whole[last] = ~mode(last, [*short, *(f for f in formats if f.parts > 1)], "split")
        if config.parts > 1:
            self._order = (2, 3, 4, 0, 1)
            if config.parts > 2:
                quarters = [f for f in formats if f.parts > 2]
                self._whole[last - 1] = ~mode(last - 1, quarters, "quarters")
            if short:
                self._swap = mode(2, short, "swap")

    def sums(self, fields, name, lane, carries=None):
        """Return the sums of the parts, of ``fields`` in the order of K.

        A bit for each field may be added, too: each adder takes one, and the last comes on top.
        """
        terms = dict(enumerate(
            (field, None if carries is None else carries[k]) for k, field in enumerate(fields)))
        for level, bit in enumerate(self._order):
            if level == 2 and self._swap is not None:
                terms = {k: self._exchanged(terms, k) for k in terms}
            terms = self._level(level, bit, terms, name, lane)
        return [total if carry is None else (total + carry)[:len(total)].as_signed()
                for _, (total, carry) in sorted(terms.items())]

    def _exchanged(self, terms, k):
        """Return the term that takes the place of k where halves are those of the block."""
        other = k & ~0b10010 | (k >> 4 & 1) << 1 | (k >> 1 & 1) << 4
        if other == k:
            return terms[k]
        return tuple(None if a is None else Mux(self._swap, b, a)
                     for a, b in zip(terms[k], terms[other], strict=True))

    def _level(self, level, bit, terms, name, lane):
        """Return the terms after a level: those that differ in a bit of their number, added."""
        stage, whole = self._stage + level, self._whole.get(level)
        after = {}
        done = functools.reduce(operator.or_, (
            1 << self._order[before] for before in self._whole if before < level), 0)

        def keep(k, total, carry):
            j = len(after)
            after[k] = (
                self._register(stage, total.shape(), total, f"{name}_{j}", lane),
                None if carry is None else self._register(
                    stage, 1, carry, f"{name}_carry{j}", lane))

        for k in terms:
            if k & done:  # a part by itself since a level before
                keep(k, *terms[k])
            if k & (done | 1 << bit):
                continue
            (a, carry), (b, left) = terms[k], terms[k | 1 << bit]
            if whole is not None:
                keep(k | 1 << bit, b, left)
                b = (b.as_unsigned() & whole.replicate(len(b))).as_signed()
                left = None if left is None else left & whole
            total = a + b if carry is None else (
                Cat(1, a).as_signed() + Cat(carry, b).as_signed())[1:].as_signed()
            keep(k, total, left)
        return after
