"""The activation: rows become h."""

from amaranth import *
from amaranth.lib import data, memory, stream, wiring
from amaranth.lib.wiring import In, Out

from moeaccel.activations import Factor
from moeaccel.arithmetic import ELEMENT_BITS, MANTISSA_BITS
from moeaccel.config import AcceleratorConfig
from moeaccel.hdl import layouts
from moeaccel.hdl.array.float_adder import FloatAdder, float_parts
from moeaccel.hdl.array.multiplier import FAMILIES, Multiplier
from moeaccel.hdl.array.normaliser import Normaliser
from moeaccel.hdl.layouts import EXPONENT_BITS
from moeaccel.hdl.pipeline import Pipeline
from moeaccel.tables import (
    FRACTION_BITS,
    LIMIT_EXPONENT,
    SEGMENT_BITS,
    SEGMENTS,
    SLOPE_BITS,
    VALUE_BITS,
    activation_table,
)

__all__ = ["ActivationUnit"]

POSITION_BITS = LIMIT_EXPONENT + SEGMENT_BITS + FRACTION_BITS
"""The table covers positions from -2**POSITION_BITS to 2**POSITION_BITS - 1, in units of 2**-18."""

MAX_LEFT_SHIFT = 8
"""Shift with which every normalised gate is beyond the table."""

MAX_RIGHT_SHIFT = 31
"""At least the bits of a mantissa moved left by MAX_LEFT_SHIFT."""

TABLE_EXPONENT_BITS = 5
WIDE_EXPONENT_BITS = EXPONENT_BITS + 2


def _magnitude(m, value, name):
    """Return sign, magnitude and exponent of an internal float."""
    out = Signal(float_parts(), name=name)
    m.d.comb += [
        out.sign.eq(value.mantissa < 0),
        out.magnitude.eq(Mux(value.mantissa < 0, -value.mantissa, value.mantissa)),
        out.exponent.eq(value.exponent),
    ]
    return out


class ActivationUnit(wiring.Component):
    """Compute ``h = (gate * f(gate)) * up``, where f is that of the pass's activation.

    Bit for bit :func:`moeaccel.tables.gated` (Shazeer, 2020) and ``ungated``: gate and up clamped
    where there is a limit, f by linear interpolation, then two products, each rounded once. There
    is a table for each activation that has one.

    ::

        gate, up --> clamp --> position --> [ROM] --> value + slope * fraction --> round
             --> * gate --> round --> * up --> round --> h
                                        ^
        up --> clamp --> [FloatAdder] --+  of an activation with an offset: up + 1, rounded once
        up, second --> clamp --> * -----+  with second up rows: their product, rounded once

    Elements that are not to be combined are rows of h. Where two of them make an element of h, one
    of an even row is a gate; the next one, of the odd row above it and the same slot, is its up.
    Other cycles may lie between them. Where one does, each is a gate, and up is 1. Where four do
    (``config.second_up``), up is the product of the second and the last, rounded once, and has no
    offset; the third is not looked at. Latency LATENCY_CYCLES from the last element of an h; one
    element per cycle in, never a stall. Reset forgets what is under way.

    With two results per cycle there are two units, one for even rows and one for odd ones. Gate and
    up come at once, the gate to the first unit, which has the up by ``i_up``; the other unit works
    only where a row is an h.

    Parameters
    ----------
    config : :class:`AcceleratorConfig`
    family : :class:`str`
        FPGA family of the multipliers.
    part : :class:`int`
        Less than ``config.results_per_cycle``.

    Members
    -------
    i_up : :py:`In(layouts.internal_float())`
        Of the first of two units: what is beside the element.
    i_element : :py:`In(stream.Signature(layouts.result_element(config), always_ready=True))`
        ``combine`` elements are ignored.
    i_form : :py:`In(layouts.hidden_form(config))`
        Of the pass: constant from before its first element to its last one's h.
    o_element : :py:`Out(stream.Signature(layouts.hidden_element(config), always_ready=True))`
        ``last`` is that of the last element of an h.
    """

    LATENCY_CYCLES = 11 + 3 * (Multiplier.LATENCY_CYCLES + 3)

    def __init__(self, config, family="generic", part=0):
        if not isinstance(config, AcceleratorConfig):
            raise TypeError(f"config must be an AcceleratorConfig, not {config!r}")
        if family not in FAMILIES:
            raise ValueError(f"family must be one of {', '.join(FAMILIES)}, not {family!r}")
        if not isinstance(part, int) or not 0 <= part < config.results_per_cycle:
            raise ValueError(
                f"part must be less than {config.results_per_cycle}, not {part!r}")
        self._config = config
        self._family = family
        self._part = part
        at_once = config.results_per_cycle > 1 and part == 0
        super().__init__({
            **({"i_up": In(layouts.internal_float())} if at_once else {}),
            "i_element": In(stream.Signature(
                layouts.result_element(config), always_ready=True)),
            "i_form": In(layouts.hidden_form(config)),
            "o_element": Out(stream.Signature(
                layouts.hidden_element(config), always_ready=True)),
        })

    @property
    def config(self):
        """Configuration."""
        return self._config

    @property
    def family(self):
        """FPGA family of the multipliers."""
        return self._family

    def elaborate(self, platform):
        m = Module()
        config = self._config
        element = self.i_element.payload

        form = self.i_form

        # -- pairs ---------------------------------------------------------------------------------
        paired = form.rows_log2 != 0
        fours = config.second_up and not self._part  # the second unit has rows that are an h alone
        product = form.rows_log2 == 2 if fours else C(0)
        arrives = self.i_element.valid & ~element.combine
        held = Signal(layouts.internal_float(), reset_less=True)
        if config.results_per_cycle == 1:
            with m.If(arrives & ~element.row[0]):
                m.d.sync += held.eq(element.value)
        meta = Signal(data.StructLayout({
            name: layouts.hidden_element(config)[name].shape
            for name in ("slot", "index", "last", "bank")}))
        m.d.comb += [
            meta.slot.eq(element.slot),
            meta.index.eq(element.row >> form.rows_log2),
            meta.last.eq(element.last),
            meta.bank.eq(element.slot_bank),
        ]
        gate, up = (Signal(layouts.internal_float(), name=name) for name in ("gate_in", "up_in"))
        at_once = config.results_per_cycle > 1
        with m.If(paired):
            if at_once:
                m.d.comb += [gate.eq(element.value), up.eq(self.i_up if not self._part else 0)]
            else:
                m.d.comb += [gate.eq(held), up.eq(element.value)]
        with m.Else():  # up is 1
            m.d.comb += [gate.eq(element.value), up.mantissa.eq(1 << MANTISSA_BITS - 1),
                         up.exponent.eq(1 - MANTISSA_BITS)]
        complete = (C(1) if not self._part else C(0)) if at_once else element.row[0]
        whole = complete | ~paired
        inputs = {"gate": gate, "up": up}
        limits = {"gate": form.gate_limit, "up": form.limit}
        if fours:
            # Of four rows the first two wait for the others: in another tile, maybe.
            pair = data.StructLayout({"gate": gate.shape(), "up": up.shape()})
            m.submodules.pairs = pairs = memory.Memory(
                shape=pair, depth=config.max_slots, init=[])
            pairs_w, pairs_r = pairs.write_port(), pairs.read_port(domain="comb")
            third_row = element.row[1]
            m.d.comb += [
                pairs_w.en.eq(arrives & whole & ~third_row), pairs_w.addr.eq(element.slot),
                pairs_w.data.gate.eq(gate), pairs_w.data.up.eq(up),
                pairs_r.addr.eq(element.slot),
            ]
            whole &= ~product | third_row
            first = {name: Signal(layouts.internal_float(), name=f"{name}_first")
                     for name in inputs}
            for name, signal in first.items():
                m.d.comb += signal.eq(Mux(product, pairs_r.data[name], inputs[name]))
            inputs = {**first, "second": up}
            limits["second"] = form.limit
        p = Pipeline(m, arrives & whole, "position")
        s = p.stage(**{name: _magnitude(m, v, name) for name, v in inputs.items()}, meta=meta)

        # -- 2, 3: no more than the limit, whose significand is made as long as a mantissa ---------
        def exceeds(value, limit):
            exponent = (limit.exponent - (127 + MANTISSA_BITS - 1)).as_signed()
            return (limit.exponent != 0) & (value.magnitude != 0) & (
                (value.exponent > exponent)
                | ((value.exponent == exponent) & (value.magnitude > significand(limit))))

        def significand(limit):
            return Cat(C(0, MANTISSA_BITS - 1 - len(limit.fraction)), limit.fraction, C(1, 1))

        def clamp(value, limit, there):
            after = Signal.like(value)
            m.d.comb += after.eq(value)
            with m.If(there):
                m.d.comb += [after.magnitude.eq(significand(limit)),
                             after.exponent.eq(limit.exponent - (127 + MANTISSA_BITS - 1))]
            return after

        there = {f"{name}_there": exceeds(getattr(s, name), limit)
                 for name, limit in limits.items()}
        there["gate_there"] &= ~s.gate.sign
        there["up_there"] &= paired
        s = p.stage(**vars(s), **there)
        s = p.stage(**{name: clamp(getattr(s, name), limit, getattr(s, f"{name}_there"))
                       for name, limit in limits.items()}, meta=s.meta)

        def multiplied(name, valid, a, b, sign, exponent, tag, bits=MANTISSA_BITS):
            """Multiply magnitudes, add the delay to the rest, round to ``bits``."""
            multiplier = Multiplier(MANTISSA_BITS + 1, MANTISSA_BITS + 1, family=self._family)
            m.submodules[name] = multiplier
            m.d.comb += [multiplier.i_a.eq(a), multiplier.i_b.eq(b)]
            q = Pipeline(m, valid, name)
            s = q.delay(Multiplier.LATENCY_CYCLES, sign=sign, exponent=exponent, tag=tag)
            rounder = Normaliser(
                2 * MANTISSA_BITS, mantissa_bits=bits, exponent_bits=WIDE_EXPONENT_BITS,
                max_leading_zeros=1, tag=tag.shape())
            m.submodules[f"{name}_round"] = rounder
            m.d.comb += [
                rounder.i_valid.eq(q.valid),
                rounder.i_sign.eq(s.sign),
                rounder.i_magnitude.eq(multiplier.o_product),
                rounder.i_exponent.eq(s.exponent),
                rounder.i_tag.eq(s.tag),
            ]
            return rounder

        # -- up + 1, where the activation has it: it is there when f is rounded --------------------
        offset = [a for a in config.expert_activations if a.up_offset]
        clamped, clamped_valid, clamped_at = s, p.valid, p.depth
        add_one = None
        if offset:
            m.submodules.add_one = add_one = FloatAdder()
            m.d.comb += [
                add_one.i_valid.eq(p.valid),
                add_one.i_a.eq(s.up),
                add_one.i_b.magnitude.eq(1 << MANTISSA_BITS - 1),
                add_one.i_b.exponent.eq(1 - MANTISSA_BITS),
            ]

        # -- 4 to 6: position of the gate in the table, rounded down -------------------------------
        distance = Signal(signed(EXPONENT_BITS + 1))
        by = Signal(range(MAX_RIGHT_SHIFT + 1))
        mantissa = Signal(signed(MANTISSA_BITS + 1))
        m.d.comb += [
            mantissa.eq(Mux(s.gate.sign, -s.gate.magnitude, s.gate.magnitude)),
            distance.eq(MAX_LEFT_SHIFT - SEGMENT_BITS - FRACTION_BITS - s.gate.exponent),
            by.eq(Mux(distance > MAX_RIGHT_SHIFT, MAX_RIGHT_SHIFT, distance[:len(by)])),
        ]
        s = p.stage(
            value=Cat(Const(0, MAX_LEFT_SHIFT), mantissa).as_signed(), by=by,
            over=distance < 0, gate=s.gate, up=s.up, meta=s.meta)
        s = p.stage(value=s.value >> s.by[:3], by=s.by[3:], over=s.over, gate=s.gate, up=s.up,
                    meta=s.meta)
        s = p.stage(value=s.value >> (s.by << 3), over=s.over, gate=s.gate, up=s.up, meta=s.meta)
        tables, plain = (
            [a for a in config.expert_activations if (a.factor is Factor.TABLE) is tabulated]
            for tabulated in (True, False))
        # What the form says holds for long: decoded a cycle before it is needed.
        stepped, ramps, chosen = Signal(), Signal(), Signal(len(tables))
        m.d.sync += [
            stepped.eq(Cat(form.activation == a.code for a in plain).any()),
            ramps.eq(Cat(form.activation == a.code
                         for a in plain if a.factor is Factor.RAMP).any()),
            chosen.eq(Cat(form.activation == a.code for a in tables)),
        ]

        # -- 7: look it up -------------------------------------------------------------------------
        # A memory for each: together they would be cut into banks, with a selector behind them.
        address = Signal(POSITION_BITS + 1 - FRACTION_BITS)
        m.d.comb += address.eq(s.value[FRACTION_BITS:POSITION_BITS + 1] ^ (SEGMENTS // 2))
        found = []
        for act in tables:
            words = activation_table(act).packed()
            m.submodules[f"table_{act.name}"] = table = memory.Memory(
                shape=unsigned(VALUE_BITS + SLOPE_BITS + TABLE_EXPONENT_BITS), depth=SEGMENTS,
                init=words)
            rom = table.read_port()
            m.d.comb += [rom.en.eq(p.valid), rom.addr.eq(address)]
            found.append(rom.data)
        beyond = s.value[POSITION_BITS:]  # all equal to the sign within the table
        negative = s.value[-1]
        s = p.stage(
            above=~negative & (s.gate.magnitude != 0) & (s.over | beyond.any() | stepped),
            below=Mux(stepped, negative | (s.gate.magnitude == 0),
                      negative & (s.over | ~beyond.all())),
            fraction=s.value[:FRACTION_BITS], gate=s.gate, up=s.up, meta=s.meta)
        # Block RAM is slow to answer: a register behind it, ahead of everything else.
        s = p.stage(**vars(s), found=found)
        entry = Signal(VALUE_BITS + SLOPE_BITS + TABLE_EXPONENT_BITS)
        for i, word in enumerate(s.found):
            with m.If(chosen[i]):
                m.d.comb += entry.eq(word)

        # The multiplier may be far from the memories.
        s = p.stage(entry=entry, above=s.above, below=s.below, fraction=s.fraction, gate=s.gate,
                    up=s.up, meta=s.meta)
        entry = s.entry

        # -- 10 to 13: interpolate -----------------------------------------------------------------
        m.submodules.interpolate = interpolate = Multiplier(
            SLOPE_BITS + 1, FRACTION_BITS + 1, family=self._family)
        m.d.comb += [
            interpolate.i_a.eq(entry[VALUE_BITS:VALUE_BITS + SLOPE_BITS]),
            interpolate.i_b.eq(s.fraction),
        ]
        s = p.delay(
            Multiplier.LATENCY_CYCLES, value=entry[:VALUE_BITS],
            exponent=entry[VALUE_BITS + SLOPE_BITS:], above=s.above, below=s.below,
            gate=s.gate, up=s.up, meta=s.meta)
        bits = VALUE_BITS + FRACTION_BITS + 1
        exact = Signal(bits)
        exponent = Signal(signed(EXPONENT_BITS))
        m.d.comb += [
            exact.eq((s.value << FRACTION_BITS) + interpolate.o_product),
            exponent.eq(-(VALUE_BITS - 1) - FRACTION_BITS - s.exponent),
        ]
        s = p.stage(exact=exact, exponent=exponent, above=s.above, below=s.below, gate=s.gate,
                    up=s.up, meta=s.meta)
        tag = data.StructLayout({
            "above": 1, "below": 1, "gate": s.gate.shape(), "up": s.up.shape(),
            "meta": meta.shape()})
        m.submodules.round_f = round_f = Normaliser(
            bits, exponent_bits=EXPONENT_BITS, max_leading_zeros=1, tag=tag)
        m.d.comb += [
            round_f.i_valid.eq(p.valid),
            round_f.i_magnitude.eq(s.exact),
            round_f.i_exponent.eq(s.exponent),
            *(round_f.i_tag[name].eq(getattr(s, name)) for name in tag.members),
        ]

        # -- gate * f(gate), then that * up --------------------------------------------------------
        factor, factor_exponent = Signal(MANTISSA_BITS), Signal(signed(EXPONENT_BITS))
        with m.If(round_f.o_tag.above):  # 1, or the gate itself
            m.d.comb += [
                factor.eq(Mux(ramps, round_f.o_tag.gate.magnitude, 1 << MANTISSA_BITS - 1)),
                factor_exponent.eq(
                    Mux(ramps, round_f.o_tag.gate.exponent, -(MANTISSA_BITS - 1)))]
        with m.Elif(~round_f.o_tag.below):  # else 0
            m.d.comb += [factor.eq(round_f.o_magnitude), factor_exponent.eq(round_f.o_exponent)]

        gate = round_f.o_tag.gate
        rest = Signal(data.StructLayout({"up": s.up.shape(), "meta": meta.shape()}))
        m.d.comb += [rest.up.eq(round_f.o_tag.up), rest.meta.eq(round_f.o_tag.meta)]
        since = p.depth + round_f.latency_cycles - clamped_at
        if add_one is not None:
            late = Pipeline(m, C(1), "add_one_late")
            plus_one = late.delay(since - FloatAdder.LATENCY_CYCLES, up=add_one.o_sum).up
            with m.If(paired & Cat(form.activation == a.code for a in offset).any()):
                m.d.comb += rest.up.eq(plus_one)
        if fours:
            ups = multiplied(
                "ups", clamped_valid, clamped.up.magnitude, clamped.second.magnitude,
                clamped.up.sign ^ clamped.second.sign,
                clamped.up.exponent + clamped.second.exponent, C(0, 0))
            late = Pipeline(m, ups.o_valid, "ups_late")
            both = Signal(s.up.shape())
            m.d.comb += [both.sign.eq(ups.o_sign), both.magnitude.eq(ups.o_magnitude),
                         both.exponent.eq(ups.o_exponent)]
            both = late.delay(since - Multiplier.LATENCY_CYCLES - ups.latency_cycles, up=both).up
            with m.If(product):
                m.d.comb += rest.up.eq(both)
        act = multiplied("activate", round_f.o_valid, gate.magnitude, factor, gate.sign,
                         (gate.exponent + factor_exponent).as_signed(), rest)
        up = act.o_tag.up
        hidden = multiplied("gated", act.o_valid, act.o_magnitude, up.magnitude,
                         act.o_sign ^ up.sign, act.o_exponent + up.exponent, act.o_tag.meta,
                         ELEMENT_BITS)

        out = Pipeline(m, hidden.o_valid, "out")
        s = out.stage(
            magnitude=hidden.o_magnitude, sign=hidden.o_sign, exponent=hidden.o_exponent,
            meta=hidden.o_tag)
        m.d.comb += [
            self.o_element.valid.eq(out.valid),
            self.o_element.payload.slot.eq(s.meta.slot),
            self.o_element.payload.index.eq(s.meta.index),
            self.o_element.payload.last.eq(s.meta.last),
            self.o_element.payload.bank.eq(s.meta.bank),
            self.o_element.payload.value.magnitude.eq(s.magnitude),
            self.o_element.payload.value.sign.eq(s.sign),
            self.o_element.payload.value.exponent.eq(s.exponent),
        ]
        return m
