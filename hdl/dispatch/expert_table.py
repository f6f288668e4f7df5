"""The experts that have tokens, with what the expert table says of them."""

from amaranth import *
from amaranth.hdl import Assert
from amaranth.lib import data, memory, stream, wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import exact_log2

from moeaccel.arithmetic import MANTISSA_BITS
from moeaccel.config import BLOCK, AcceleratorConfig
from moeaccel.hdl import layouts
from moeaccel.hdl.control.field_checks import bad_words, lowest
from moeaccel.hdl.dispatch.section_words import SectionWords
from moeaccel.hdl.pipeline import Pipeline
from moeaccel.interface.commands import ENTRY_BYTES, EXPERT, SECTIONS_MAX, Sink, field_of

__all__ = ["ExpertTable"]

_UNIT = exact_log2(ENTRY_BYTES)

_FRACTION_BITS = 23
"""Of a float32."""


class ExpertTable(wiring.Component):
    """Hand out the experts with tokens, in the order in which they become known, with entries.

    ::

        experts --> walk --> reader.request
                      |
                      +--> [number] --------------------------+
        reader --> [entry] --> field checks --> [ENTRIES] ----+--> words of sections --> o_expert

    An entry is asked for as soon as its expert is known, ENTRIES ahead at most of the one that is
    handed out, what is under way included. Its fields are checked as it comes; that the
    words of its sections are those which follow from their shapes, and that its image ends within
    the address space, when it is the next one. So whoever computes with an expert relies on it.
    Of a bad entry the lowest word with a field out of range is reported; else that of
    ``image_address``, if the image runs beyond the address space, or of the first wrong words.

    Cycles: 3 from where ``i_experts`` counts an expert to the request, and 3 for each expert. From
    the last beat of an entry to ``o_expert``: 14 + B with one section, 19 + B + B' with two, where
    B and B' are the bits of the steps of each (x: d_in / 32, h: d_expert / 32); 3 less from the
    cycle in which one is taken to the next one whose entry is there. The stream is empty when no
    expert is left; it does not say so. Reset drops all, and must wait until ``o_quiet``.

    Parameters
    ----------
    config : :class:`AcceleratorConfig`

    Members
    -------
    i_job : :py:`In(layouts.job(config))`
        Constant from the first expert on.
    i_experts : :py:`In(range(config.max_experts + 1))`
        Experts that are known, 0 in the cycle after a reset; it may grow until the next one.
    expert_address, expert_data : :py:`Out(layouts.expert_bits(config))`, :py:`In`
        The number of one of them, one cycle later.
    reader : :py:`Out(layouts.ReadClientSignature(config))`
    o_expert : :py:`Out(stream.Signature(layouts.expert(config)))`
    o_quiet : :py:`Out(1)`
        No entry is under way, and none will be while no expert is taken or becomes known.
    """

    ENTRIES = 16

    def __init__(self, config):
        if not isinstance(config, AcceleratorConfig):
            raise TypeError(f"config must be an AcceleratorConfig, not {config!r}")
        self._config = config
        super().__init__({
            "i_job": In(layouts.job(config)),
            "i_experts": In(range(config.max_experts + 1)),
            "expert_address": Out(layouts.expert_bits(config)),
            "expert_data": In(layouts.expert_bits(config)),
            "reader": Out(layouts.ReadClientSignature(config)),
            "o_expert": Out(stream.Signature(layouts.expert(config))),
            "o_quiet": Out(1),
        })

    def _stored(self):
        """Return what of an entry is kept."""
        config = self._config
        return data.StructLayout({
            "single": 1,
            "form": layouts.hidden_form(config),
            "steps_hidden": layouts.steps_bits(config),
            "image_unit": config.address_bits - _UNIT,
            **{f"format{i}": config.format_bits for i in range(SECTIONS_MAX)},
            **{f"words{i}": 32 for i in range(SECTIONS_MAX)},
            **{f"bias{i}": 1 for i in range(SECTIONS_MAX) if config.bias},
            "bad": 1,
            "word": range(ENTRY_BYTES // 4),
        })

    def elaborate(self, platform):
        m = Module()
        config, job = self._config, self.i_job
        pointer = exact_log2(self.ENTRIES)

        def queue(name, shape, write_en, write_at, value, read_at):
            m.submodules[name] = storage = memory.Memory(
                shape=shape, depth=self.ENTRIES, init=[])
            write, read = storage.write_port(), storage.read_port(domain="comb")
            m.d.comb += [write.en.eq(write_en), write.addr.eq(write_at), write.data.eq(value),
                         read.addr.eq(read_at)]
            return read.data

        # -- walk: over the experts that are known; ask for their entries --------------------------
        walk = Signal.like(self.i_experts)
        more = Signal()  # the one that it is at is known, and was a cycle ago
        number = Signal.like(self.expert_data)
        asked, arrived, taken = Signal(), Signal(), Signal()
        asked_at, arrived_at, taken_at = (Signal(pointer, name=f"{name}_at")
                                          for name in ("asked", "arrived", "taken"))
        room = Signal(range(self.ENTRIES + 1), init=self.ENTRIES)
        outstanding, ready = (Signal(range(self.ENTRIES + 1), name=name)
                              for name in ("outstanding", "ready"))
        beats = ENTRY_BYTES // config.port_bytes
        request = self.reader.request
        where = Signal(config.address_bits)  # of the entry
        m.d.comb += [
            self.expert_address.eq(walk),
            request.p.address.eq(where),
            request.p.beats.eq(beats),
            asked.eq(request.valid & request.ready),
        ]
        m.d.sync += [
            more.eq(walk != self.i_experts),
            where.eq(job.table_address + (number << _UNIT)),
        ]
        with m.FSM(name="walk") as walking:
            with m.State("NUMBER"):
                m.d.sync += number.eq(self.expert_data)
                with m.If(more):
                    m.d.sync += walk.eq(walk + 1)
                    m.next = "ADDRESS"
            with m.State("ADDRESS"):
                m.next = "ASK"
            with m.State("ASK"):
                m.d.comb += request.valid.eq(room != 0)
                with m.If(asked):
                    m.next = "NUMBER"
        m.d.sync += [
            asked_at.eq(asked_at + asked), arrived_at.eq(arrived_at + arrived),
            taken_at.eq(taken_at + taken),
            room.eq(room - asked + taken),
            outstanding.eq(outstanding + asked - arrived),
            ready.eq(ready + arrived - taken),
            self.o_quiet.eq((outstanding == 0)
                            & ((walking.ongoing("NUMBER") & ~more) | (room == 0))),
        ]

        # -- entries: collect the beats, check the fields ------------------------------------------
        entry = Signal(8 * ENTRY_BYTES, reset_less=True)
        beat = Signal(range(max(2, beats)))
        with m.If(self.reader.valid):
            m.d.sync += [
                beat.eq(Mux(self.reader.last, 0, beat + 1)),
                Assert(outstanding != 0, "memory brought an entry that nobody asked for"),
            ]
            with m.Switch(beat):
                for i in range(beats):
                    with m.Case(i):
                        m.d.sync += entry[8 * config.port_bytes * i:][:8 * config.port_bytes].eq(
                            self.reader.data)
        fields = layouts.entry_fields(EXPERT, entry)
        p = Pipeline(m, self.reader.valid & self.reader.last, "entry")
        p.stage()
        bad = bad_words(m, EXPERT, entry, config)
        kept = Signal(self._stored())
        gate_limit = fields["gate_limit"][:31]
        limit_bits = len(kept.form.gate_limit.fraction) - len(kept.form.limit.fraction)
        m.d.comb += [
            kept.single.eq(fields["sections"] == 1),
            kept.form.activation.eq(fields["activation"]),
            kept.form.rows_log2.eq(
                Mux(fields["sink0"] == Sink.ACTIVATION_PRODUCT, 2,
                    fields["sink0"] == Sink.ACTIVATION)),
            kept.form.limit.eq(fields["limit"]),
            kept.form.gate_limit.eq(Mux(
                gate_limit[_FRACTION_BITS:] == 0, Cat(C(0, limit_bits), fields["limit"]),
                gate_limit[_FRACTION_BITS + 1 - MANTISSA_BITS:])),
            kept.steps_hidden.eq(fields["d_expert"] >> exact_log2(BLOCK)),
            kept.image_unit.eq(fields["image_address"] >> _UNIT),
            *(kept[f"{name}{i}"].eq(fields[f"{name}{i}"])
              for i in range(SECTIONS_MAX)
              for name in ("format", "words", *(["bias"] if config.bias else []))),
        ]
        s = p.stage(kept=kept)
        checked = Signal(self._stored())
        m.d.comb += [checked.eq(s.kept), checked.bad.eq(bad.any()), checked.word.eq(lowest(bad))]
        s = p.stage(checked=checked)
        m.d.comb += arrived.eq(p.valid)
        numbers = queue("numbers", len(number), asked, asked_at, number, taken_at)
        entries = queue("entries", self._stored(), arrived, arrived_at, s.checked, taken_at)

        # -- the next expert: words of its sections, end of its image ------------------------------
        expert = self.o_expert
        m.submodules.sizes = sizes = SectionWords(config)
        held = Signal(self._stored(), reset_less=True)
        second, started = Signal(), Signal()
        wrong = Signal(SECTIONS_MAX)
        beyond = Signal()
        words_log2 = exact_log2(config.word_bytes) - _UNIT
        total = Signal(32)
        last_unit = Signal(32 + words_log2)
        row_blocks = Mux(
            second | held.single, job.steps_out, held.steps_hidden << held.form.rows_log2)
        m.d.comb += [
            sizes.i_format.eq(Mux(second, held.format1, held.format0)),
            sizes.i_steps.eq(Mux(second, held.steps_hidden, job.steps_in)),
            sizes.i_row_blocks.eq(row_blocks),
            sizes.i_start.eq(started),
        ]
        if config.bias:
            m.d.comb += sizes.i_biased.eq(Mux(second, held.bias1, held.bias0))
        m.d.sync += [
            started.eq(0),
            last_unit.eq((total << words_log2) - 1),
            beyond.eq(last_unit > (~held.image_unit)),
        ]
        work = expert.p.work
        with m.FSM(name="check"):
            with m.State("NEXT"):
                with m.If((ready != 0) & ~expert.valid):
                    m.d.comb += taken.eq(1)
                    m.d.sync += [
                        held.eq(entries), second.eq(0), wrong.eq(0), total.eq(0), started.eq(1),
                        expert.p.expert.eq(numbers),
                        expert.p.image_address.eq(entries.image_unit << _UNIT),
                        work.single.eq(entries.single), work.form.eq(entries.form),
                        expert.p.bad.eq(entries.bad), expert.p.word.eq(entries.word),
                    ]
                    m.next = "START"
            with m.State("START"):
                m.next = "SECTION"
                with m.If(held.bad):
                    m.next = "OFFER"
            with m.State("SECTION"):
                with m.If(sizes.o_done):
                    m.next = "COMPARE"
            with m.State("COMPARE"):
                m.d.sync += total.eq(total + sizes.o_words)
                with m.If(~second):
                    m.d.sync += expert.p.first_words.eq(sizes.o_words)
                for i in range(SECTIONS_MAX):
                    with m.If(second == i):
                        section = work.sections[i]
                        m.d.sync += [
                            wrong[i].eq(sizes.o_words != held[f"words{i}"]),
                            section.dims.format.eq(sizes.i_format),
                            section.dims.steps.eq(sizes.i_steps),
                            section.dims.tiles.eq(sizes.o_tiles),
                            section.short.eq(sizes.o_short),
                            section.hidden.eq(i),
                            section.combine.eq(second | held.single),
                            *([section.dims.biased.eq(sizes.i_biased)] if config.bias else []),
                        ]
                m.next = "TOTAL"
                with m.If(~second & ~held.single):
                    m.d.sync += [second.eq(1), started.eq(1)]
                    m.next = "START"
            with m.State("TOTAL"):
                m.d.sync += expert.p.words.eq(total)
                m.next = "BEYOND"
            with m.State("BEYOND"):
                m.next = "DECIDE"
            with m.State("DECIDE"):
                for i in reversed(range(SECTIONS_MAX)):
                    with m.If(wrong[i]):
                        m.d.sync += [
                            expert.p.bad.eq(1),
                            expert.p.word.eq(field_of(EXPERT, f"words{i}").word)]
                with m.If(beyond):
                    m.d.sync += [expert.p.bad.eq(1),
                                 expert.p.word.eq(field_of(EXPERT, "image_address").word)]
                m.next = "OFFER"
            with m.State("OFFER"):
                m.d.sync += expert.valid.eq(1)
                m.next = "NEXT"
        with m.If(expert.valid & expert.ready):
            m.d.sync += expert.valid.eq(0)
        return m
