"""Fetches the tokens of a pass and quantises them into the x lane buffer."""

from amaranth import *
from amaranth.hdl import Assert
from amaranth.lib import data, memory, stream, wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import ceil_log2, exact_log2

from moeaccel.arithmetic import RAISE_THRESHOLD
from moeaccel.config import BLOCK, AcceleratorConfig
from moeaccel.hdl import layouts
from moeaccel.hdl.activations.block_quantiser import BlockQuantiser
from moeaccel.hdl.dispatch.dispatcher import load_request
from moeaccel.hdl.pipeline import Pipeline
from moeaccel.hdl.sequential_multiplier import SequentialMultiplier

__all__ = ["PACE", "ActivationLoader"]

BIAS = 127
"""Exponent bias of float32."""

NOT_FINITE = 255
"""Exponent field of infinities and NaN."""

PACE = 4
"""Rows whose time one takes that can wait, of x and of y."""

NARROW_BLOCK_BYTES = 2 * BLOCK
"""Bytes of a block of bfloat16 elements; of float32 twice that."""


class ActivationLoader(wiring.Component):
    """Read rows of float32 or bfloat16, find their largest elements, quantise them.

    ::

        slots --> token * row bytes --> reader => [line buffer, 2 rows] --> [BlockQuantiser] --> w_*
                                          |                                       ^
                                          +--> [maximum of block and token] ------+

    Row ``token`` is the ``32 * i_steps`` elements at ``i_x_address + token * 128 * i_steps``
    (``64`` where they are narrow), little-endian. A bfloat16 is the float32 of which it is the
    upper half. The bits are those of :func:`moeaccel.arithmetic.quantise_float32`: subnormals
    count as zero, NaN and infinities too, and are reported. Slot s of the slot table's bank goes to
    the lanes of slot s (:class:`~moeaccel.hdl.activations.block_quantiser.BlockQuantiser`); lanes
    of absent slots keep what they held.

    With several banks of the y buffer, x is loaded while the array works; while that can wait
    (``i_can_wait``), a row is asked for when as many cycles as PACE rows have beats have passed
    since the one before, so that weights come, too.

    Throughput: one port beat per cycle in and out, or ``quantiser_lanes`` elements per cycle out if
    these are less; the next row is fetched while one is quantised. A slot takes about
    ``max_bits(steps) + 6`` cycles to look up, hidden behind the row before. The memory port cannot
    be refused: a row is asked for only when half of the line buffer is free. The x bank and the
    slot table's bank are free, for the Dispatcher sees to it. Reset forgets the request under way;
    the memory port must be flushed with it.

    Parameters
    ----------
    config : :class:`AcceleratorConfig`

    Members
    -------
    i_request : :py:`In(stream.Signature(load_request(config)))`
        x bank to fill, slot table bank, slots (1 or more). Accepted when idle.
    i_two_planes, i_steps, i_x_address, i_narrow
        Of the command (``i_narrow``: x is bfloat16); constant while there are requests.
    i_can_wait : :py:`In(1)`
        Nobody waits for what is being loaded.
    slot_address : :py:`Out(layouts.slot_address_bits(config))`
        Slot, slot table bank.
    slot_token : :py:`In(layouts.token_bits(config))`
        Token of that slot, one cycle later.
    reader : :py:`Out(layouts.ReadClientSignature(config))`
    w_en, w_address, w_data
        Write port of the x lane buffer.
    base_en, base_address, base_data
        Write port of the base exponents: {slot, bank} and signed(12).
    o_done : :py:`Out(1)`
        Pulse: the request's last block and base have been written.
    o_idle : :py:`Out(1)`
        No request is under way.
    o_nonfinite : :py:`Out(1)`
        A row had a NaN or an infinity since ``i_clear``.
    o_nonfinite_token : :py:`Out(layouts.token_bits(config))`
        Lowest such token.
    i_clear : :py:`In(1)`
        Forget non-finite rows.
    """

    def __init__(self, config):
        if not isinstance(config, AcceleratorConfig):
            raise TypeError(f"config must be an AcceleratorConfig, not {config!r}")
        self._config = config
        self._quantiser = BlockQuantiser(config, BIAS)
        token_bits = layouts.token_bits(config)
        outputs = ("w_en", "w_address", "w_data", "base_en", "base_address", "base_data")
        super().__init__({
            "i_request": In(stream.Signature(load_request(config))),
            "i_two_planes": In(1),
            "i_steps": In(layouts.steps_bits(config)),
            "i_x_address": In(config.address_bits),
            "i_narrow": In(1),
            "i_can_wait": In(1),
            "slot_address": Out(layouts.slot_address_bits(config)),
            "slot_token": In(token_bits),
            "reader": Out(layouts.ReadClientSignature(config)),
            **{name: self._quantiser.signature.members[name] for name in outputs},
            "o_done": Out(1),
            "o_idle": Out(1),
            "o_nonfinite": Out(1),
            "o_nonfinite_token": Out(token_bits),
            "i_clear": In(1),
        })

    @property
    def config(self):
        """Configuration."""
        return self._config

    def elaborate(self, platform):
        m = Module()
        config = self._config
        m.submodules.quantiser = quantiser = self._quantiser
        for name in ("w_en", "w_address", "w_data", "base_en", "base_address", "base_data"):
            m.d.comb += getattr(self, name).eq(getattr(quantiser, name))

        per_beat = config.port_bytes // 4
        beat_bits = ceil_log2(config.max_dim // per_beat)
        step_bits = ceil_log2(config.max_steps)
        narrow_beats_log2 = exact_log2(NARROW_BLOCK_BYTES // config.port_bytes)  # of a block
        token_bits = layouts.token_bits(config)
        count_shape = range(config.max_slots + 1)

        # Rows are quantised when they are whole: nothing is read while it is written.
        unchecked = {"no_rw_check": 1}
        m.submodules.line = line = memory.Memory(
            shape=unsigned(32 * per_beat), depth=2 << beat_bits, init=[], attrs=unchecked)
        line_w, line_r = line.write_port(), line.read_port()
        key = data.StructLayout({"raised": 1, "exponent": 8})
        m.submodules.tops = tops = memory.Memory(
            shape=unsigned(key.size), depth=2 << step_bits, init=[], attrs=unchecked)
        tops_w, tops_r = tops.write_port(), tops.read_port()

        # -- one row after another: token, address, request ----------------------------------------
        request = Signal(load_request(config))
        slot = Signal(count_shape)
        half = Signal()  # of the row to be asked for
        occupied = Signal(2)  # halves of the line buffer asked for and not yet quantised
        token_of = [Signal(token_bits, name=f"token_of{i}") for i in range(2)]
        address = Signal(config.address_bits)
        written = Signal(count_shape)
        asked, released = Signal(), Signal()
        beats = self.reader.request.p.beats
        waits = Signal()  # until it is this row's turn
        if config.y_banks > 1:
            pace = Signal(len(beats) + exact_log2(PACE))
            with m.If(asked):
                m.d.sync += pace.eq(beats << exact_log2(PACE))
            with m.Elif(pace != 0):
                m.d.sync += pace.eq(pace - 1)
            m.d.sync += waits.eq(self.i_can_wait & (asked | (pace != 0)))
        m.submodules.multiplier = multiplier = SequentialMultiplier(
            token_bits, layouts.steps_bits(config))
        m.d.comb += [
            self.slot_address.eq(Cat(slot[:layouts.slot_bits(config)], request.slot_bank)),
            multiplier.i_a.eq(self.slot_token),
            multiplier.i_b.eq(self.i_steps),
            self.reader.request.p.address.eq(address),
            self.reader.request.p.beats.eq(
                Mux(self.i_narrow, self.i_steps, self.i_steps << 1) << narrow_beats_log2),
        ]
        m.d.sync += [
            occupied.eq(occupied + asked - released),
            written.eq(written + quantiser.base_en),
            self.o_done.eq(0),
        ]
        with m.FSM():
            with m.State("IDLE"):
                m.d.comb += [self.i_request.ready.eq(1), self.o_idle.eq(1)]
                m.d.sync += [request.eq(self.i_request.payload), slot.eq(0), written.eq(0)]
                with m.If(self.i_request.valid):
                    m.next = "LOOKUP"
            with m.State("LOOKUP"):
                m.next = "TOKEN"
            with m.State("TOKEN"):
                m.d.comb += multiplier.i_start.eq(1)
                for i in range(2):
                    with m.If((half == i) & (occupied != 2)):
                        m.d.sync += token_of[i].eq(self.slot_token)
                with m.If(occupied != 2):
                    m.next = "MULTIPLY"
            with m.State("MULTIPLY"):
                blocks = multiplier.o_product
                m.d.sync += address.eq(self.i_x_address + (
                    Mux(self.i_narrow, blocks, blocks << 1) << exact_log2(NARROW_BLOCK_BYTES)))
                with m.If(multiplier.o_done):
                    m.next = "REQUEST"
            with m.State("REQUEST"):
                m.d.comb += self.reader.request.valid.eq(~waits)
                with m.If(self.reader.request.valid & self.reader.request.ready):
                    m.d.comb += asked.eq(1)
                    m.d.sync += [half.eq(~half), slot.eq(slot + 1)]
                    m.next = "LOOKUP"
                    with m.If(slot + 1 == request.count):
                        m.next = "FINISH"
            with m.State("FINISH"):
                with m.If(written == request.count):
                    m.d.sync += self.o_done.eq(1)
                    m.next = "IDLE"

        # -- beats: into the line buffer, and the largest exponents
        beat = Signal(beat_bits)
        arriving = Signal()  # half
        m.d.comb += [
            line_w.en.eq(self.reader.valid),
            line_w.addr.eq(Cat(beat, arriving)),
            line_w.data.eq(self.reader.data),
        ]
        with m.If(self.reader.valid):
            m.d.sync += [beat.eq(beat + 1),
                         Assert(occupied != 0, "memory brought a beat that nobody asked for")]
            with m.If(self.reader.last):
                m.d.sync += [beat.eq(0), arriving.eq(~arriving)]

        # A word is one float32, or two of bfloat16; the upper one has its exponent field in place.
        keys, wrong = [], []
        for i in range(per_beat):
            word = self.reader.data.word_select(i, 32)
            for half_word in range(2):
                field = word[16 * half_word + 7: 16 * half_word + 15]
                fraction = Cat(C(0, 16), word[16 * half_word: 16 * half_word + 7])
                there = C(1)
                if half_word:
                    fraction = Mux(self.i_narrow, fraction, word[:23])
                else:
                    there = self.i_narrow
                value = Signal(key, name=f"key{2 * i + half_word}")
                bad = Signal(name=f"bad{2 * i + half_word}")
                m.d.comb += bad.eq(there & (field == NOT_FINITE))
                with m.If(there & (field != NOT_FINITE) & (field != 0)):
                    m.d.comb += [
                        value.exponent.eq(field),
                        value.raised.eq(fraction >= RAISE_THRESHOLD - (1 << 23)),
                    ]
                keys.append(value.as_value())
                wrong.append(bad)
        place = data.StructLayout({
            "half": 1, "step": step_bits, "first": 1, "end": 1, "row_first": 1, "row_end": 1})
        at = Signal(place)
        in_block = beat[:narrow_beats_log2]
        wide_bit = beat[narrow_beats_log2]  # of the beats in a block of float32 one bit more
        m.d.comb += [
            at.half.eq(arriving),
            at.step.eq(Mux(self.i_narrow, beat, beat >> 1) >> narrow_beats_log2),
            at.first.eq((in_block == 0) & (self.i_narrow | ~wide_bit)),
            at.end.eq(in_block.all() & (self.i_narrow | wide_bit)),
            at.row_first.eq(beat == 0),
            at.row_end.eq(self.reader.last),
        ]
        p = Pipeline(m, self.reader.valid, "top")
        s = p.stage(keys=keys, bad=Cat(wrong).any(), at=at)
        while len(s.keys) > 1:
            larger = [Mux(a > b, a, b) for a, b in zip(s.keys[::2], s.keys[1::2], strict=True)]
            s = p.stage(keys=larger, bad=s.bad, at=s.at)
        block_key, row_key = Signal(key.size), Signal(key.size)  # so far
        row_bad = Signal()
        block_now, row_now = Signal(key.size), Signal(key.size)
        row_bad_now = Signal()
        row_top = [Signal(key, name=f"row_top{i}") for i in range(2)]
        ready = Signal(2)
        m.d.comb += [
            block_now.eq(Mux(s.at.first | (s.keys[0] > block_key), s.keys[0], block_key)),
            row_now.eq(Mux(s.at.row_first | (s.keys[0] > row_key), s.keys[0], row_key)),
            row_bad_now.eq(s.bad | (row_bad & ~s.at.row_first)),
            tops_w.en.eq(p.valid & s.at.end),
            tops_w.addr.eq(Cat(s.at.step, s.at.half)),
            tops_w.data.eq(block_now),
        ]
        row_token = Signal(token_bits)
        m.d.comb += row_token.eq(Mux(s.at.half, token_of[1], token_of[0]))
        with m.If(p.valid):
            m.d.sync += [block_key.eq(block_now), row_key.eq(row_now), row_bad.eq(row_bad_now)]
            for i in range(2):
                with m.If(s.at.row_end & (s.at.half == i)):
                    m.d.sync += [ready[i].eq(1), row_top[i].eq(row_now)]
            with m.If(s.at.row_end & row_bad_now):
                m.d.sync += self.o_nonfinite.eq(1)
                with m.If(~self.o_nonfinite | (row_token < self.o_nonfinite_token)):
                    m.d.sync += self.o_nonfinite_token.eq(row_token)
        with m.If(self.i_clear):
            m.d.sync += [self.o_nonfinite.eq(0), self.o_nonfinite_token.eq(0)]

        # -- rows: out of the line buffer, through the quantiser
        count = config.quantiser_lanes
        group_bits = exact_log2(BLOCK // count)  # groups of a block
        wide = int(count > per_beat)  # a group of float32 is two beats, read one after the other
        sub_bits = exact_log2(max(1, per_beat // count))  # groups of a beat; one bit more if narrow
        group = Signal(beat_bits + sub_bits - wide)
        second_beat = Signal(wide)
        leaving = Signal()  # half
        out_slot = Signal(layouts.slot_bits(config))
        running = Signal()
        whole = Signal()  # all of a group has been read
        block_end, slot_end = Signal(), Signal()
        step_now = Signal(step_bits)
        line_at = Mux(  # of a narrow group: in its beat there are twice as many
            self.i_narrow, group[sub_bits + 1 - wide:], Cat(second_beat, group[sub_bits:]))
        # Down to 0 and to 1; that it is there is known from registers.
        steps_left, last_step = Signal(step_bits), Signal()
        steps_last, one_step = Signal(step_bits), Signal()
        m.d.sync += [steps_last.eq(self.i_steps - 1), one_step.eq(self.i_steps == 1)]
        m.d.comb += [
            running.eq(Mux(leaving, ready[1], ready[0])),
            step_now.eq(group >> group_bits),
            block_end.eq(group[:group_bits].all()),
            slot_end.eq(block_end & last_step),
            line_r.en.eq(running),
            whole.eq(running & (second_beat | self.i_narrow) if wide else running),
            line_r.addr.eq(Cat(line_at[:beat_bits], leaving)),
            tops_r.en.eq(running),
            tops_r.addr.eq(Cat(step_now, leaving)),
            released.eq(whole & slot_end),
        ]
        with m.If(running):
            m.d.sync += second_beat.eq(second_beat + 1)
        with m.If(whole):
            m.d.sync += [group.eq(group + 1), second_beat.eq(0)]
            with m.If(block_end):
                m.d.sync += [steps_left.eq(steps_left - 1), last_step.eq(steps_left == 1)]
            with m.If(slot_end):
                m.d.sync += [
                    group.eq(0),
                    leaving.eq(~leaving),
                    ready.eq(ready & Mux(leaving, 0b01, 0b10)),
                    out_slot.eq(out_slot + 1),
                ]
                for i in range(2):  # a row may become ready in the cycle in which the other is left
                    with m.If(p.valid & s.at.row_end & (s.at.half == i)):
                        m.d.sync += ready[i].eq(1)
        with m.If(~running | (whole & slot_end)):
            m.d.sync += [steps_left.eq(steps_last), last_step.eq(one_step)]
        with m.If(self.o_idle):
            m.d.sync += out_slot.eq(0)
        q = Pipeline(m, whole, "out")
        s = q.stage(
            sub=group[:sub_bits + 1 - wide], step=step_now, slot=out_slot, block_end=block_end,
            slot_end=slot_end, row_top=Mux(leaving, row_top[1], row_top[0]))
        # Block RAM is slow to answer: a register behind it, ahead of everything else.
        line_data = line_r.data
        if wide:
            first_beat = Signal.like(line_r.data, reset_less=True)
            m.d.sync += first_beat.eq(line_r.data)
            line_data = Cat(Mux(self.i_narrow, line_r.data, first_beat), line_r.data)
        s = q.stage(**vars(s), line=line_data, top=tops_r.data)

        def widened(part):
            """Return ``count`` elements of bfloat16 as float32."""
            return Cat(Cat(C(0, 16), part.word_select(e, 16)) for e in range(count))

        words = Signal(32 * count)
        if wide:
            m.d.comb += words.eq(Mux(self.i_narrow, widened(s.line[:16 * count]), s.line))
        else:
            with m.Switch(Cat(s.sub, self.i_narrow)):
                for i in range(1 << sub_bits):  # the uppermost bit of sub is of the next beat
                    with m.Case(*(i | upper << sub_bits for upper in range(2))):
                        m.d.comb += words.eq(s.line[32 * count * i: 32 * count * (i + 1)])
                for i in range(2 << sub_bits):
                    with m.Case(i | 2 << sub_bits):
                        m.d.comb += words.eq(widened(s.line[16 * count * i: 16 * count * (i + 1)]))
        # One more, with nothing but a choice of words before it: the memory may be far away.
        s = q.stage(words=words, step=s.step, slot=s.slot, block_end=s.block_end,
                    slot_end=s.slot_end, row_top=s.row_top, top=s.top)
        out = quantiser.i_group
        top = Signal(key)
        token_top = Signal(key)
        m.d.comb += [
            top.eq(s.top),
            token_top.eq(s.row_top),
            quantiser.i_valid.eq(q.valid),
            out.block.raised.eq(top.raised),
            out.block.top.eq(top.exponent),
            out.block.zero.eq(top.exponent == 0),
            out.token_top.eq(token_top.exponent),
            out.token_zero.eq(token_top.exponent == 0),
            out.two_planes.eq(self.i_two_planes),
            out.block_end.eq(s.block_end),
            out.slot_end.eq(s.slot_end),
            out.step.eq(s.step),
            out.slot.eq(s.slot),
            out.bank.eq(request.bank),
        ]
        for i in range(count):
            word = s.words[32 * i: 32 * (i + 1)]
            field = word[23:31]
            element = out.elements[i]
            with m.If((field != 0) & (field != NOT_FINITE)):
                m.d.comb += element.significand.eq(Cat(word[:23], 1))
            m.d.comb += [element.sign.eq(word[31]), element.top.eq(field)]
        return m
