"""Scores of logits."""

import enum

from amaranth import *
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from moeaccel.hdl.array.normaliser import shift_right
from moeaccel.hdl.layouts import SCORE_WIDTH
from moeaccel.hdl.pipeline import Pipeline
from moeaccel.hdl.router.leading import Leading
from moeaccel.hdl.router.line_table import LineTable
from moeaccel.hdl.router.product import Product
from moeaccel.router.choices import Score
from moeaccel.router.tables import (
    EXP2,
    EXPONENTIAL_LIMIT,
    LOG1P,
    LOG2E,
    LOG2E_BITS,
    LOGIT_BITS,
    RECIPROCAL,
    SCORE_BITS,
    SQRT,
    VALUE_BITS,
    WORD_BITS,
)

__all__ = ["ScoreMode", "ScoreUnit"]

_POWER_FRACTION = 23
_NEAR_BITS = EXPONENTIAL_LIMIT.bit_length() - 1


class ScoreMode(enum.IntEnum):
    """What becomes of a logit s."""

    EXPONENTIAL = 0
    """``exp(s - reference)``."""
    QUOTIENT = 1
    """That, over a sum whose reciprocal is known."""
    SIGMOID = 2
    SQRT_SOFTPLUS = 3


def signed_digits(value):
    """Return (sign, shift) of powers of two that add up to a number, no two adjacent."""
    digits, shift = [], 0
    while value:
        if value & 1:
            sign = 2 - (value & 3)
            digits.append((sign, shift))
            value -= sign
        value >>= 1
        shift += 1
    return digits


class ScoreUnit(wiring.Component):
    """Make scores of logits: bit for bit the functions of :mod:`moeaccel.router.tables`.

    ::

        i_logit --> |distance| --> x log2(e) --> [2**-v] --> shift --> o_score  (exponential)
                                                   |           |
                                                   |     [1 / (1 + v)]
                                                   +--> product --> shift ----> o_score  (others)
                                                           |
                                                           +--> [sqrt] -------> o_score

    Latency ``latency_cycles(mode)``, one a cycle, no flow control. Mode, reference and divisor hold
    until the last score has come out. Reset forgets everything under way.

    Parameters
    ----------
    scores : tuple of :class:`Score`
        Those that can be asked for.
    tag_bits : :class:`int`
        Of what travels along.
    family : :class:`str`
        FPGA family: see :class:`~moeaccel.hdl.array.multiplier.Multiplier`.

    Members
    -------
    i_mode : :py:`In(ScoreMode)`
    i_valid, i_logit, i_tag : :py:`In(1)`, :py:`In(signed(32))`, :py:`In(tag_bits)`
    i_reference : :py:`In(signed(32))`
        No logit is larger. For EXPONENTIAL and QUOTIENT.
    i_reciprocal, i_position : :py:`In(24)`, :py:`In(6)`
        Of the sum: its reciprocal by the table, and the position of its first bit. For QUOTIENT.
    o_valid, o_score, o_tag : :py:`Out(1)`, :py:`Out(42)`, :py:`Out(tag_bits)`
    """

    _EXPONENTIAL_CYCLES = 4 + LineTable.LATENCY_CYCLES + 2
    _OUT_CYCLES = 1
    _OTHER_CYCLES = _EXPONENTIAL_CYCLES + LineTable.LATENCY_CYCLES + Product.LATENCY_CYCLES + 3
    _SQRT_CYCLES = (_OTHER_CYCLES + 1 + Leading.LATENCY_CYCLES + 1 + LineTable.LATENCY_CYCLES + 2)

    def __init__(self, scores, tag_bits=1, family="generic"):
        if not scores or not all(isinstance(score, Score) for score in scores):
            raise TypeError(f"scores must be members of Score, not {scores!r}")
        self._scores = tuple(scores)
        self._family = family
        super().__init__({
            "i_mode": In(ScoreMode),
            "i_valid": In(1),
            "i_logit": In(signed(WORD_BITS)),
            "i_tag": In(tag_bits),
            "i_reference": In(signed(WORD_BITS)),
            "i_reciprocal": In(VALUE_BITS),
            "i_position": In(6),
            "o_valid": Out(1),
            "o_score": Out(SCORE_WIDTH),
            "o_tag": Out(tag_bits),
        })

    def latency_cycles(self, mode):
        """Return the cycles from a logit to its score."""
        match mode:
            case ScoreMode.EXPONENTIAL:
                return self._EXPONENTIAL_CYCLES + self._OUT_CYCLES
            case ScoreMode.SQRT_SOFTPLUS:
                return self._SQRT_CYCLES + self._OUT_CYCLES
        return self._OTHER_CYCLES + self._OUT_CYCLES

    def elaborate(self, platform):
        m = Module()
        has_sqrt = Score.SQRT_SOFTPLUS in self._scores
        relative = (self.i_mode == ScoreMode.EXPONENTIAL) | (self.i_mode == ScoreMode.QUOTIENT)
        pipe = Pipeline(m, self.i_valid)

        # How far below the reference, or from 0; times log2(e), by additions.
        left = Mux(relative, self.i_reference, 0)
        swap = ~relative & ~self.i_logit[-1]
        s = pipe.stage(
            distance=Mux(swap, self.i_logit, left - self.i_logit)[:WORD_BITS + 1],
            negative=self.i_logit[-1], tag=self.i_tag)
        digits = signed_digits(LOG2E)
        groups = [digits[start:start + 3] for start in range(0, len(digits), 3)]
        s = pipe.stage(
            near=s.distance[:_NEAR_BITS], distance=s.distance if has_sqrt else C(0, 0),
            far=s.distance[_NEAR_BITS:].any(), negative=s.negative, tag=s.tag)
        near = s.near
        s = pipe.stage(
            sums=[sum(near << shift if sign > 0 else -(near << shift) for sign, shift in group)
                  for group in groups],
            distance=s.distance, far=s.far, negative=s.negative, tag=s.tag)
        total = sum(s.sums)[LOGIT_BITS + LOG2E_BITS - _POWER_FRACTION:]
        power_bits = _NEAR_BITS + LOG2E.bit_length() - (LOGIT_BITS + LOG2E_BITS - _POWER_FRACTION)
        s = pipe.stage(power=total[:power_bits], distance=s.distance, far=s.far,
                       negative=s.negative, tag=s.tag)

        # 2**-power
        m.submodules.exp2 = exp2 = LineTable(EXP2, family=self._family)
        m.d.comb += exp2.i_position.eq(s.power[:_POWER_FRACTION])
        s = pipe.delay(LineTable.LATENCY_CYCLES, shift=s.power[_POWER_FRACTION:],
                       distance=s.distance, far=s.far, negative=s.negative, tag=s.tag)
        e = Mux(s.far, 0, exp2.o_value)
        extended = Cat(C(0, SCORE_BITS - VALUE_BITS), e)
        shifted, _ = shift_right(m, extended, s.shift[3:], unit=8)
        s = pipe.stage(e=e, value=shifted, shift=s.shift, distance=s.distance,
                       negative=s.negative, tag=s.tag)
        shifted, _ = shift_right(m, s.value, s.shift[:3])
        s = pipe.stage(e=s.e, value=shifted, shift=s.shift, distance=s.distance,
                       negative=s.negative, tag=s.tag)
        assert pipe.depth == self._EXPONENTIAL_CYCLES
        exponential, exponential_valid, exponential_tag = s.value, pipe.valid, s.tag

        # 1 / (1 + v), or log(1 + v) / v
        tables = (RECIPROCAL, LOG1P) if has_sqrt else (RECIPROCAL,)
        m.submodules.ratio = ratio = LineTable(*tables, family=self._family)
        m.d.comb += ratio.i_position.eq(s.value[SCORE_BITS - VALUE_BITS:])
        if has_sqrt:
            m.d.comb += ratio.i_table.eq(self.i_mode == ScoreMode.SQRT_SOFTPLUS)
        s = pipe.delay(LineTable.LATENCY_CYCLES, e=s.e, shift=s.shift, distance=s.distance,
                       negative=s.negative, tag=s.tag)
        r = Mux(self.i_mode == ScoreMode.QUOTIENT, self.i_reciprocal, ratio.o_value)
        m.submodules.product = product = Product(self._family)
        m.d.comb += [product.i_a.eq(s.e), product.i_b.eq(r)]
        s = pipe.delay(Product.LATENCY_CYCLES, r=r, shift=s.shift, distance=s.distance,
                       negative=s.negative, tag=s.tag)

        # In units of scores
        amount = s.shift + Mux(self.i_mode == ScoreMode.QUOTIENT,
                               (self.i_position - (2 * SCORE_BITS - 2 * VALUE_BITS))[:6],
                               2 * VALUE_BITS - SCORE_BITS)
        s = pipe.stage(product=product.o_product, r=s.r, shift=s.shift, amount=amount[:7],
                       distance=s.distance, negative=s.negative, tag=s.tag)
        coarse, _ = shift_right(m, s.product, s.amount[3:6], unit=8)
        s = pipe.stage(product=s.product if has_sqrt else C(0, 0),
                       value=Mux(s.amount[6], 0, coarse), r=s.r, shift=s.shift,
                       amount=s.amount[:3], distance=s.distance, negative=s.negative, tag=s.tag)
        fine, _ = shift_right(m, s.value, s.amount)
        alone = (self.i_mode == ScoreMode.SIGMOID) & ~s.negative
        s = pipe.stage(
            product=s.product, shift=s.shift, distance=s.distance, negative=s.negative, tag=s.tag,
            value=Mux(alone, s.r << (SCORE_BITS - VALUE_BITS), fine[:SCORE_BITS + 1]))
        assert pipe.depth == self._OTHER_CYCLES
        score, valid, tag = s.value, pipe.valid, s.tag

        # Which of them comes out holds for long.
        out_valid, out_score, out_tag = Signal(), Signal(SCORE_WIDTH), Signal.like(self.o_tag)
        m.d.comb += [out_valid.eq(valid), out_score.eq(score), out_tag.eq(tag)]
        with m.If(self.i_mode == ScoreMode.EXPONENTIAL):
            m.d.comb += [out_valid.eq(exponential_valid), out_score.eq(exponential),
                         out_tag.eq(exponential_tag)]
        if has_sqrt:
            root, root_valid, root_tag = self._root(m, pipe, s)
            with m.If(self.i_mode == ScoreMode.SQRT_SOFTPLUS):
                m.d.comb += [out_valid.eq(root_valid), out_score.eq(root), out_tag.eq(root_tag)]
        out = Pipeline(m, out_valid, "out")
        s = out.stage(score=out_score, tag=out_tag)
        m.d.comb += [self.o_valid.eq(out.valid), self.o_score.eq(s.score), self.o_tag.eq(s.tag)]
        return m

    def _root(self, m, pipe, s):
        """Take the square root of the product, to which positive logits are added."""
        inside = s.value + (s.distance << (SCORE_BITS - LOGIT_BITS))
        s = pipe.stage(inside=Mux(s.negative, s.product, inside)[:2 * VALUE_BITS], shift=s.shift,
                       negative=s.negative, tag=s.tag)
        m.submodules.leading = leading = Leading()
        m.d.comb += leading.i_value.eq(s.inside)
        s = pipe.delay(Leading.LATENCY_CYCLES, shift=s.shift, negative=s.negative, tag=s.tag)
        mantissa = leading.o_mantissa[1:]
        # An exponent that is never negative, and as even or odd as the true one.
        offset = 2 * VALUE_BITS + 64
        exponent = (leading.o_position + Mux(
            s.negative, offset - 2 * VALUE_BITS - s.shift, offset - SCORE_BITS))[:8]
        s = pipe.stage(mantissa=mantissa, exponent=exponent, tag=s.tag)
        m.submodules.sqrt = sqrt = LineTable(SQRT, family=self._family)
        m.d.comb += sqrt.i_position.eq(Cat(s.mantissa[:-1], s.exponent[0]))
        s = pipe.delay(LineTable.LATENCY_CYCLES, some=s.mantissa[-1], half=s.exponent[1:],
                       tag=s.tag)
        # The largest score has its exponent's half 5 above that of 1.
        top = offset // 2 + 5
        right = (top - s.half)[:6]
        wide = Mux(s.some, sqrt.o_value << (SCORE_WIDTH - VALUE_BITS), 0)
        coarse, _ = shift_right(m, wide, right[3:], unit=8)
        s = pipe.stage(value=coarse, right=right[:3], tag=s.tag)
        fine, _ = shift_right(m, s.value, s.right)
        s = pipe.stage(value=fine, tag=s.tag)
        assert pipe.depth == self._SQRT_CYCLES
        return s.value, pipe.valid, s.tag
