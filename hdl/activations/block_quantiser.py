"""Rounds elements to the mantissas of a block, after the block's and the token's largest."""

from amaranth import *
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import exact_log2

from moeaccel.arithmetic import ELEMENT_BITS, EXPONENT_RANGE
from moeaccel.config import BLOCK, AcceleratorConfig
from moeaccel.hdl import layouts
from moeaccel.hdl.array.normaliser import any_of, shift_right
from moeaccel.hdl.layouts import EXPONENT_BITS
from moeaccel.hdl.pipeline import Pipeline

__all__ = ["BlockQuantiser", "block_top", "quantiser_group"]

PLANE_FRACTION = ELEMENT_BITS - 15
"""Bits below the mantissa of an ``a16`` element at the block's exponent."""

EXTRA_FRACTION = 8
"""Further bits below the mantissa in ``a8``."""

MAX_SHIFT = 16
"""Shift beyond which a mantissa is zero in either precision: the 24-bit significand is below
half."""


def block_top():
    """Return the largest of a block: its exponent, whether it rounds beyond ``a16``, whether all
    are 0.

    Where every element is zero, only ``zero`` counts.
    """
    return data.StructLayout({"raised": 1, "top": signed(EXPONENT_BITS), "zero": 1})


def quantiser_group(config):
    """Return a group of ``quantiser_lanes`` consecutive elements of a block, and the context it
    needs.

    ``top`` of an element is the exponent of its leading bit, ``significand`` is zero or has bit 23
    set. Exponents may carry an offset, the same one everywhere.
    """
    element = data.StructLayout({
        "significand": ELEMENT_BITS, "sign": 1, "top": signed(EXPONENT_BITS),
    })
    return data.StructLayout({
        "elements": data.ArrayLayout(element, config.quantiser_lanes),
        "block": block_top(),
        "token_top": signed(EXPONENT_BITS),
        "token_zero": 1,
        "two_planes": 1,
        "block_end": 1,
        "slot_end": 1,
        "step": range(config.max_steps),
        "slot": layouts.slot_bits(config),
        "bank": 1,
    })


class BlockQuantiser(wiring.Component):
    """Quantise blocks of 32 elements and write them to a lane buffer.

    Bit for bit ``quantise_elements`` of :mod:`moeaccel.arithmetic` (after OCP Microscaling v1.0).

    ::

        floor    = token_top - 10                           (a zero token counts as token_top = 10)
        shift    = max(block_top - floor, 0) + raised       (raised: a16 only, block_top >= floor)
        mantissa = round(significand / 2**(shift + floor - top + 17 or 9))        half to even
        base     = floor - 6 or 14

        i_group --> floor, gap, shift --> distances --> shift --> round, sign --> join --> w_*

    A block's groups come in order, other blocks' groups not between them, the last with
    ``block_end``; a slot's last one with ``slot_end``. The lane write appears LATENCY_CYCLES after
    ``block_end``, to lane ``slot % T`` of group ``slot // T`` (``a8``) or lanes 2j (high plane) and
    2j + 1 (low plane), j = ``slot % (T / 2)``, of group ``slot // (T / 2)`` (``a16``). With a
    slot's last write comes its base. Throughput: one group per cycle. Nothing can be refused. Reset
    forgets what is under way.

    Parameters
    ----------
    config : :class:`AcceleratorConfig`
    offset : :class:`int`
        Offset of all exponents: an element's leading bit is worth ``2**(top - offset)``.

    Members
    -------
    i_valid : :py:`In(1)`
    i_group : :py:`In(quantiser_group(config))`
    w_en : :py:`Out(config.token_lanes)`
    w_address : :py:`Out(layouts.lane_address_bits(config) + 1)`
        Step, group, bank.
    w_data : :py:`Out(ArrayLayout(layouts.lane(config), config.token_lanes))`
    base_en : :py:`Out(1)`
        The slot's last block is being written; write its base exponent, too.
    base_address : :py:`Out(layouts.slot_bits(config) + 1)`
        Slot, bank.
    base_data : :py:`Out(signed(12))`
    """

    LATENCY_CYCLES = 9

    def __init__(self, config, offset=0):
        if not isinstance(config, AcceleratorConfig):
            raise TypeError(f"config must be an AcceleratorConfig, not {config!r}")
        if not isinstance(offset, int) or not -1024 <= offset < 1024:
            raise ValueError(f"offset must be an integer from -1024 to 1023, not {offset!r}")
        self._config = config
        self._offset = offset
        super().__init__({
            "i_valid": In(1),
            "i_group": In(quantiser_group(config)),
            "w_en": Out(config.token_lanes),
            "w_address": Out(layouts.lane_address_bits(config) + 1),
            "w_data": Out(data.ArrayLayout(layouts.lane(config), config.token_lanes)),
            "base_en": Out(1),
            "base_address": Out(layouts.slot_bits(config) + 1),
            "base_data": Out(signed(EXPONENT_BITS)),
        })

    @property
    def config(self):
        """Configuration."""
        return self._config

    @property
    def offset(self):
        """Offset of all exponents."""
        return self._offset

    def elaborate(self, platform):
        m = Module()
        config = self._config
        count = config.quantiser_lanes
        group = self.i_group
        exponent_shape = signed(EXPONENT_BITS + 1)

        def new(shape, value, name):
            signal = Signal(shape, name=name)
            m.d.comb += signal.eq(value)
            return signal

        # Where the write goes is known at once and travels along.
        meta_layout = data.StructLayout({
            "two": 1, "block_end": 1, "slot_end": 1, "step": range(config.max_steps),
            "slot": layouts.slot_bits(config), "bank": 1,
        })
        meta = Signal(meta_layout)
        m.d.comb += [
            meta.two.eq(group.two_planes),
            meta.block_end.eq(group.block_end),
            meta.slot_end.eq(group.slot_end),
            meta.step.eq(group.step),
            meta.slot.eq(group.slot),
            meta.bank.eq(group.bank),
        ]
        p = Pipeline(m, self.i_valid)
        elements = [group.elements[i] for i in range(count)]

        # 1: the least exponent of a block of this token
        floor = new(exponent_shape, Mux(
            group.token_zero, self._offset, group.token_top - EXPONENT_RANGE), "floor")
        s = p.stage(
            significand=[e.significand for e in elements], sign=[e.sign for e in elements],
            top=[e.top for e in elements], block=group.block, floor=floor, meta=meta)

        # 2: the block above it
        base = new(signed(EXPONENT_BITS), s.floor - self._offset - Mux(s.meta.two, 14, 6), "base")
        s = p.stage(
            significand=s.significand, sign=s.sign, top=s.top, block=s.block, floor=s.floor,
            meta=s.meta, base=base,
            gap=new(signed(EXPONENT_BITS + 2), s.block.top - s.floor, "gap"))

        # 3: shift and exponent
        low = new(1, s.block.zero | (s.gap < 0), "low")
        up = new(1, ~low & s.meta.two & s.block.raised, "up")
        s = p.stage(
            significand=s.significand, sign=s.sign, top=s.top, meta=s.meta, base=s.base,
            shift=new(4, Mux(low, 0, s.gap[:4]) + up, "shift"),
            exponent=new(exponent_shape, Mux(low, s.floor, s.block.top) + up, "exponent"))

        # 4: how far each element is to be shifted, 8 further in a8
        distances = []
        for i in range(count):
            distance = new(signed(EXPONENT_BITS + 2), s.exponent - s.top[i], f"distance{i}")
            limit = Mux(s.meta.two, MAX_SHIFT, MAX_SHIFT - EXTRA_FRACTION)
            far = new(1, (distance >= limit), f"far{i}")
            distances.append(new(5, Mux(
                far, MAX_SHIFT, distance[:4] + Mux(s.meta.two, 0, EXTRA_FRACTION)), f"by{i}"))
        s = p.stage(
            significand=s.significand, parts=[any_of(v, 4) for v in s.significand], sign=s.sign,
            by=distances, meta=s.meta, base=s.base, shift=s.shift)

        # 5, 6: shift; bits that leave are remembered in one
        coarse = [shift_right(m, v, by[2:], unit=4, parts=parts)
                  for v, by, parts in zip(s.significand, s.by, s.parts, strict=True)]
        s = p.stage(
            value=[v for v, _ in coarse], sticky=[out for _, out in coarse], sign=s.sign,
            by=[by[:2] for by in s.by], meta=s.meta, base=s.base, shift=s.shift)
        fine = [shift_right(m, v, by) for v, by in zip(s.value, s.by, strict=True)]
        s = p.stage(
            value=[v for v, _ in fine],
            sticky=[new(1, a | out, f"sticky{i}")
                    for i, (a, (_, out)) in enumerate(zip(s.sticky, fine, strict=True))],
            sign=s.sign, meta=s.meta, base=s.base, shift=s.shift)

        # 7: round half to even
        rounded = []
        for i, (value, sticky) in enumerate(zip(s.value, s.sticky, strict=True)):
            keep = value[PLANE_FRACTION:]
            half = value[PLANE_FRACTION - 1]
            more = value[:PLANE_FRACTION - 1].any() | sticky | keep[0]
            rounded.append(new(15, keep + (half & more), f"rounded{i}"))
        s = p.stage(value=rounded, sign=s.sign, meta=s.meta, base=s.base, shift=s.shift)

        # 8: limit and sign
        signed_values = []
        for i, (value, sign) in enumerate(zip(s.value, s.sign, strict=True)):
            limited = new(15, Mux(~s.meta.two & value[7], 127, value), f"limited{i}")
            signed_values.append(new(signed(16), Mux(sign, -limited, limited), f"value{i}"))
        s = p.stage(value=signed_values, meta=s.meta, base=s.base, shift=s.shift)

        # 9: split into planes (x = 256 hi + lo; in a8 both are x), assemble the block
        high = Signal(8 * BLOCK, reset_less=True)
        low_plane = Signal(8 * BLOCK, reset_less=True)
        values_low = Cat(value[:8] for value in s.value)
        values_high = Cat(
            new(8, Mux(s.meta.two, value[8:] + value[7], value[:8]), f"high{i}")
            for i, value in enumerate(s.value))
        with m.If(p.valid):
            m.d.sync += [
                high.eq(Cat(high[8 * count:], values_high)),
                low_plane.eq(Cat(low_plane[8 * count:], values_low)),
            ]
        lanes_log2 = exact_log2(config.token_lanes)
        groups_log2 = exact_log2(config.token_groups)
        slot = s.meta.slot
        lane_mask = Signal(config.token_lanes)
        address = Signal(self.w_address.shape())
        group_bits = Signal(max(1, groups_log2))
        with m.If(s.meta.two):
            pair = slot[:lanes_log2 - 1]
            for lane in range(config.token_lanes):
                m.d.comb += lane_mask[lane].eq((pair == lane // 2) if len(pair) else 1)
            m.d.comb += group_bits.eq(slot[lanes_log2 - 1:])
        with m.Else():
            for lane in range(config.token_lanes):
                m.d.comb += lane_mask[lane].eq(slot[:lanes_log2] == lane)
            m.d.comb += group_bits.eq(slot[lanes_log2:])
        m.d.comb += address.eq(Cat(s.meta.step, group_bits[:groups_log2], s.meta.bank))
        end = p.valid & s.meta.block_end
        m.d.sync += [
            self.w_en.eq(Mux(end, lane_mask, 0)),
            self.base_en.eq(end & s.meta.slot_end),
        ]
        shift = Signal(4, reset_less=True)
        with m.If(end):
            m.d.sync += [
                self.w_address.eq(address),
                shift.eq(s.shift),
                self.base_address.eq(Cat(slot, s.meta.bank)),
                self.base_data.eq(s.base),
            ]
        for lane in range(config.token_lanes):
            m.d.comb += [
                self.w_data[lane].mantissas.eq(low_plane if lane % 2 else high),
                self.w_data[lane].shift.eq(shift),
            ]
        return m
