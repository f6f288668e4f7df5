"""Turns the array's sums into internal floats, one after another."""

from amaranth import *
from amaranth.hdl import Assert
from amaranth.lib import data, memory, stream, wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import exact_log2

from moeaccel.arithmetic import MANTISSA_BITS
from moeaccel.config import AcceleratorConfig
from moeaccel.hdl import layouts
from moeaccel.hdl.array.float_adder import FloatAdder, float_parts
from moeaccel.hdl.array.normaliser import Normaliser
from moeaccel.hdl.layouts import EXPONENT_BITS
from moeaccel.hdl.pipeline import Pipeline

__all__ = ["ResultSerialiser"]

ROW_EXPONENT_BITS = 16


class ResultSerialiser(wiring.Component):
    """Join planes, round once, and emit the outputs of a tile and group in order.

    ::

        i_sums -> [FIFO] ----> choose -> 256 hi + lo -> magnitude -> [Normaliser] -+--> o_element
        i_row_exponents --------------------> + <- base exponent of the slot       |      ^
        i_row_biases ------------------------------------------------------> [FloatAdder]-+

    ``value = sum * 2**(base[slot] + row_exponent[row])``, rounded as by
    :func:`moeaccel.arithmetic.normalise`; of a biased section plus ``bias[row]``, rounded once
    more. Order: slot 0 row 0, slot 0 row 1, ..., slot 1 row 0,
    ...; rows are the R of the array but for those that the tile has not (``tag.missing``: a row is
    the last one when ``row ^ missing`` is all ones); slots those of the tag. The sum of row r is
    entry ``sum_of_row * T + lane`` (:func:`moeaccel.hdl.layouts.sum_of_row`).

    With several results per cycle there is a serialiser for each of as many consecutive rows: part
    p of n has rows p, n + p, ..., their sums in this order, and runs in step with the others. Of an
    odd number of rows the last part has one less, and emits nothing in its place.

    A result cannot be refused; ``o_free`` says how many more there is room for, and the Sequencer
    counts those that are still in the array against it. Element outputs cannot be refused either:
    what follows them is as fast, and has a place for each (h, sums). Throughput: one element per
    cycle, also from one result to the next. Latency: ``latency_cycles`` from a result's arrival (in
    an empty FIFO, its row exponents being there) to its first element, and that of the FloatAdder
    more in a biased section; one that is not, behind one that is, waits until the adder is empty.
    Waits for row exponents, but those are there before a tile's first step can start. Reset forgets
    everything under way.

    Parameters
    ----------
    config : :class:`AcceleratorConfig`
    part : :class:`int`
        Less than ``config.results_per_cycle``.

    Members
    -------
    i_valid : :py:`In(1)`
    i_sums : :py:`In(ArrayLayout(signed(config.accumulator_bits), rows * token_lanes))`
    i_tag : :py:`In(layouts.result_tag(config))`
    o_free : :py:`Out(range(config.result_places + 1))`
        Results that may still arrive; counts one that arrives from the next cycle on.
    i_row_exponents : :py:`In(stream.Signature(ArrayLayout(signed(16), rows)))`
        One for each tile; taken with the last element of the tile's last group.
    i_row_biases : :py:`In(ArrayLayout(16, rows))`
        Of a configuration with biases: bfloat16 numbers, beside ``i_row_exponents``.
    base_address : :py:`Out(layouts.base_address(config))`
    base_data : :py:`In(signed(12))`
        Base exponent of that slot, one cycle later.
    o_element : :py:`Out(stream.Signature(layouts.result_element(config), always_ready=True))`
        ``combine`` elements carry ``slot_bank`` and ``fresh`` of their tag. ``last``: of the
        section.
    """

    def __init__(self, config, part=0):
        if not isinstance(config, AcceleratorConfig):
            raise TypeError(f"config must be an AcceleratorConfig, not {config!r}")
        if not isinstance(part, int) or not 0 <= part < config.results_per_cycle:
            raise ValueError(
                f"part must be less than {config.results_per_cycle}, not {part!r}")
        self._config = config
        self._part = part
        self._rows = config.rows // config.results_per_cycle
        entries = self._rows * config.token_lanes
        self._normaliser = Normaliser(
            config.joined_bits - 1, exponent_bits=ROW_EXPONENT_BITS + 2, tag=self._tag())
        super().__init__({
            "i_valid": In(1),
            "i_sums": In(data.ArrayLayout(signed(config.accumulator_bits), entries)),
            "i_tag": In(layouts.result_tag(config)),
            "o_free": Out(range(config.result_places + 1)),
            "i_row_exponents": In(stream.Signature(
                data.ArrayLayout(signed(ROW_EXPONENT_BITS), self._rows))),
            **({"i_row_biases": In(data.ArrayLayout(16, self._rows))} if config.bias else {}),
            "base_address": Out(layouts.base_address(config)),
            "base_data": In(signed(EXPONENT_BITS)),
            "o_element": Out(stream.Signature(
                layouts.result_element(config), always_ready=True)),
        })

    @property
    def config(self):
        """Configuration."""
        return self._config

    @property
    def latency_cycles(self):
        """Cycles from a result to its first element, where no bias is added."""
        return 6 + self._normaliser.latency_cycles

    def _meta(self):
        fields = dict(layouts.result_element(self._config).members)
        del fields["value"]
        return data.StructLayout(fields)

    def _tag(self):
        """Return what travels through the normaliser."""
        bias = {"biased": 1, "bias": 16} if self._config.bias else {}
        return data.StructLayout({"meta": self._meta(), **bias})

    def elaborate(self, platform):
        m = Module()
        config = self._config
        m.submodules.normaliser = normaliser = self._normaliser
        lanes, rows = config.token_lanes, self._rows
        parts_log2, places = exact_log2(config.results_per_cycle), config.result_places
        row_bits = exact_log2(rows)
        lane_bits = exact_log2(lanes)

        # -- FIFO: one memory for each sum, so that none is wider than a machine word --------------
        pointer = exact_log2(places)
        write_at, read_at = Signal(pointer), Signal(pointer)
        level = Signal(range(places + 1))
        taken = Signal()
        m.d.comb += self.o_free.eq(places - level)
        m.d.sync += [
            Assert(~self.i_valid | (level != places), "a result must have a place"),
            write_at.eq(write_at + self.i_valid),
            read_at.eq(read_at + taken),
            level.eq(level + self.i_valid - taken),
        ]

        def queue(name, value, address):
            shape = unsigned(len(Value.cast(value)))
            m.submodules[name] = storage = memory.Memory(
                shape=shape, depth=places, init=[])
            write, read = storage.write_port(), storage.read_port(domain="comb")
            m.d.comb += [
                write.en.eq(self.i_valid),
                write.addr.eq(write_at),
                write.data.eq(value),
                read.addr.eq(address),
            ]
            return read.data

        # -- the first result's tag, in a register -------------------------------------------------
        # The first to come goes there at once, those behind it by way of the FIFO.
        tag, after = (Signal(layouts.result_tag(config), name=n) for n in ("tag", "after"))
        tag_valid, tag_free = Signal(), Signal()
        after_at = Signal(pointer)
        after_valid = Signal()
        waiting = Signal(places - 1)  # behind the first: a 1 for each, from bit 0 on
        m.d.comb += [
            tag_free.eq(~tag_valid | taken),
            after.eq(Mux(waiting[0], queue("tags", self.i_tag, after_at), self.i_tag)),
            after_valid.eq(waiting[0] | self.i_valid),
        ]
        with m.If(self.i_valid & ~tag_free):
            m.d.sync += waiting.eq(Cat(1, waiting))
        with m.Elif(~self.i_valid & tag_free):
            m.d.sync += waiting.eq(waiting >> 1)

        # -- 0: the next element -------------------------------------------------------------------
        row = Signal(row_bits)
        member = Signal(range(lanes))  # of the group
        valid = Signal()
        last_row, last_member = Signal(), Signal()  # of its member, of the result
        # Of this part; the parts before it may have one less.
        missing, missing_after = tag.missing[parts_log2:], after.missing[parts_log2:]
        slot = Signal(layouts.slot_bits(config))
        exponents = self.i_row_exponents
        goes = tag_valid
        if config.bias:
            # What passes by the adder must not overtake what is in it.
            adding = Signal(range(FloatAdder.LATENCY_CYCLES + 1))
            with m.If(adding != 0):
                m.d.sync += adding.eq(adding - 1)
            with m.If(valid & tag.biased):
                m.d.sync += adding.eq(FloatAdder.LATENCY_CYCLES)
            goes = tag_valid & (tag.biased | (adding == 0))
        m.d.comb += [
            valid.eq(goes & exponents.valid),
            taken.eq(valid & last_row & last_member),
            exponents.ready.eq(goes & last_row & last_member & tag.last_group),
            slot.eq(Mux(
                tag.two_planes,
                Cat(member[:lane_bits - 1], tag.group),
                Cat(member[:lane_bits], tag.group))),
            self.base_address.slot.eq(slot),
            self.base_address.hidden.eq(tag.hidden),
            self.base_address.bank.eq(Mux(
                tag.hidden, tag.slot_bank[:layouts.hidden_bank_bits(config)], tag.x_bank)),
        ]
        with m.If(valid):
            m.d.sync += [row.eq(row + 1), last_row.eq(((row + 1)[:row_bits] ^ missing).all())]
            with m.If(last_row):
                m.d.sync += [row.eq(0), last_row.eq(missing.all()),
                             member.eq(member + 1), last_member.eq(member + 2 == tag.slots)]
        with m.If(tag_free):
            m.d.sync += [tag.eq(after), tag_valid.eq(after_valid),
                         after_at.eq(after_at + after_valid),
                         row.eq(0), last_row.eq(missing_after.all()),
                         member.eq(0), last_member.eq(after.slots == 1)]
        meta = Signal(self._meta())
        m.d.comb += [
            meta.slot.eq(slot),
            meta.row.eq(tag.row + (row << parts_log2 | self._part)),
            meta.combine.eq(tag.combine),
            meta.last.eq(tag.last & last_row & last_member),
            meta.slot_bank.eq(tag.slot_bank),
            meta.fresh.eq(tag.fresh),
            meta.y_bank.eq(tag.y_bank),
        ]

        pair_of = Signal(range(max(2, lanes // 2)))
        m.d.comb += pair_of.eq(Mux(tag.two_planes, member, member >> 1))
        row_exponent = Signal(signed(ROW_EXPONENT_BITS))
        travels = Signal(self._tag())  # beside the number
        m.d.comb += travels.meta.eq(meta)
        if config.bias:
            m.d.comb += travels.biased.eq(tag.biased)
        with m.Switch(row):
            for i in range(rows):
                with m.Case(i):
                    m.d.comb += row_exponent.eq(exponents.payload[i])
                    if config.bias:
                        m.d.comb += travels.bias.eq(self.i_row_biases[i])

        sum_row = Signal(row_bits)
        if parts_log2:
            m.d.comb += sum_row.eq(row)
        else:
            with m.Switch(tag.row_order):
                for number, order in enumerate(layouts.row_orders(config)):
                    with m.Case(number):
                        m.d.comb += sum_row.eq(layouts.sum_of_row(config, order, row))

        # -- 1: choose; 2, 3: join planes; 4: magnitude --------------------------------------------
        there = valid & ~(last_row & tag.missing[0]) if self._part else valid
        p = Pipeline(m, there)
        s = p.stage(at=read_at, pair=Cat(pair_of[:lane_bits - 1], sum_row), two=tag.two_planes,
                    second=member[0], row_exponent=row_exponent, tag=travels)
        # A pair of lanes is a token of a16, or two of a8. What comes next to the place of a result
        # that has just left is written at the end of this cycle at the earliest.
        shape = signed(config.accumulator_bits)
        even, odd = Signal(shape), Signal(shape)
        sums = [queue(f"sum{i}", self.i_sums[i], s.at) for i in range(rows * lanes)]
        with m.Switch(s.pair):
            for i in range(rows * lanes // 2):
                with m.Case(i):
                    m.d.comb += [even.eq(sums[2 * i]), odd.eq(sums[2 * i + 1])]
        exponent = Signal(signed(ROW_EXPONENT_BITS + 2))
        m.d.comb += exponent.eq(s.row_exponent + self.base_data)
        s = p.stage(even=even, odd=odd, two=s.two, second=s.second, exponent=exponent, tag=s.tag)
        joined = Signal(signed(config.joined_bits))
        with m.If(s.two):
            m.d.comb += joined.eq((s.even << 8) + s.odd)
        with m.Else():
            m.d.comb += joined.eq(Mux(s.second, s.odd, s.even))
        s = p.stage(joined=joined, exponent=s.exponent, tag=s.tag)
        magnitude = Signal(config.joined_bits - 1)
        m.d.comb += magnitude.eq(Mux(s.joined < 0, -s.joined, s.joined))
        s = p.stage(magnitude=magnitude, sign=s.joined[-1], exponent=s.exponent, tag=s.tag)
        m.d.comb += [
            normaliser.i_valid.eq(p.valid),
            normaliser.i_sign.eq(s.sign),
            normaliser.i_magnitude.eq(s.magnitude),
            normaliser.i_exponent.eq(s.exponent),
            normaliser.i_tag.eq(s.tag),
        ]
        rounded_valid = Signal()
        rounded, meta = Signal(float_parts()), Signal(self._meta())
        m.d.comb += [
            rounded_valid.eq(normaliser.o_valid),
            rounded.sign.eq(normaliser.o_sign),
            rounded.magnitude.eq(normaliser.o_magnitude),
            rounded.exponent.eq(normaliser.o_exponent),
            meta.eq(normaliser.o_tag.meta),
        ]
        if config.bias:
            rounded_valid, rounded, meta = self._add_bias(
                m, rounded_valid, rounded, meta, normaliser.o_tag)

        # -- sign ----------------------------------------------------------------------------------
        out = Pipeline(m, rounded_valid, "out")
        mantissa = Signal(signed(18))
        m.d.comb += mantissa.eq(Mux(rounded.sign, -rounded.magnitude, rounded.magnitude))
        s = out.stage(mantissa=mantissa, exponent=rounded.exponent, meta=meta)
        element = self.o_element.payload
        m.d.comb += [
            self.o_element.valid.eq(out.valid),
            element.value.mantissa.eq(s.mantissa),
            element.value.exponent.eq(s.exponent),
        ]
        for name in self._meta().members:
            m.d.comb += element[name].eq(s.meta[name])
        return m

    def _add_bias(self, m, valid, number, meta, tag):
        """Add a bias to numbers that have one; return what comes out: numbers with and without."""
        m.submodules.adder = adder = FloatAdder(tag=self._meta())
        bias = adder.i_b
        exponent = tag.bias[7:15]
        with m.If(exponent != 0):
            m.d.comb += [
                bias.sign.eq(tag.bias[-1]),
                bias.magnitude.eq(Cat(C(0, MANTISSA_BITS - 8), tag.bias[:7], C(1, 1))),
                bias.exponent.eq(exponent - (127 + MANTISSA_BITS - 1)),
            ]
        m.d.comb += [
            adder.i_valid.eq(valid & tag.biased),
            adder.i_a.eq(number),
            adder.i_tag.eq(meta),
        ]
        passes = valid & ~tag.biased
        m.d.sync += Assert(~(passes & adder.o_valid), "a sum must not be overtaken")
        return (passes | adder.o_valid,
                data.View(float_parts(), Mux(adder.o_valid, adder.o_sum, number)),
                data.View(self._meta(), Mux(adder.o_valid, adder.o_tag, meta)))
