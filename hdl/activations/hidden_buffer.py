"""Keeps h until all of it is there, then quantises it for the down product."""

from amaranth import *
from amaranth.hdl import Assert
from amaranth.lib import memory, stream, wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import ceil_log2, exact_log2

from moeaccel.arithmetic import ELEMENT_BITS, RAISE_THRESHOLD
from moeaccel.config import BLOCK, AcceleratorConfig
from moeaccel.hdl import layouts
from moeaccel.hdl.activations.block_quantiser import BlockQuantiser, block_top
from moeaccel.hdl.pipeline import Pipeline

__all__ = ["HiddenBuffer"]


def _larger(m, a, b, name):
    """Return the larger of two ``block_top()``, where zero is less than anything."""
    out = Signal(block_top(), name=name)
    key_a, key_b = (Cat(v.raised, v.top[:-1], ~v.top[-1], ~v.zero) for v in (a, b))
    m.d.comb += out.eq(Mux(key_a > key_b, a, b))
    return out


class HiddenBuffer(wiring.Component):
    """Store h with the largest of each block and token; quantise slot by slot.

    ::

        i_elements -+--> [values, max_slots x max_dim] --> [BlockQuantiser] --> w_*, base_*
                    +--> [tree] --> [largest of block, of token] ----^

    As many consecutive elements of a slot come at once as there are channels, one from each core.
    With several results per cycle each core brings as many, or one (``full``). They come in the
    order of their index, those of different slots in any order. The bits are those
    of :func:`moeaccel.arithmetic.quantise_elements`. ``i_start`` says what the pass is; quantising
    begins when the element marked ``last`` has come, too, be it before or after.

    With two banks, elements of the next pass come while h of this one is quantised, but not before
    ``i_start`` of this one. The h lane buffer has one bank all the same: ``i_start`` comes when the
    last step of the pass before has started.

    Throughput: ``channels`` elements per cycle in; ``quantiser_lanes`` elements per cycle
    out, so that slot s is counted by ``o_slots_ready`` about ``(s + 1) * 32 * i_steps /
    quantiser_lanes + latency_cycles`` cycles after the beginning. Nothing can be refused: with
    one bank elements of the next pass may come only when all slots are ready. They do, for each
    group of a pass's first down tile waits until its slots are counted, and the next pass begins
    behind the last one.
    The h lane buffer is written again when the last element of the next gate and up rows has come,
    which has followed this pass's steps through the array. Reset forgets the pass.

    Parameters
    ----------
    config : :class:`AcceleratorConfig`

    Members
    -------
    i_elements : :py:`In(stream.Signature(layouts.hidden_elements(config), always_ready=True))`
    i_start : :py:`In(1)`
        Pulse, once in a pass, when the pass before is all ready.
    i_count : :py:`In(range(config.max_slots + 1))`
        Slots, 1 or more; valid with ``i_start``, as the next two.
    i_two_planes : :py:`In(1)`
    i_steps : :py:`In(layouts.steps_bits(config))`
        Blocks of h, d_expert / 32.
    i_bank : :py:`In(layouts.hidden_bank_bits(config))`
        Where its elements are.
    w_en, w_address, w_data
        Write port of the h lane buffer.
    base_en, base_address, base_data
        Write port of h's base exponents: {bank, slot} and signed(12).
    o_slots_ready : :py:`Out(range(config.max_slots + 1))`
        Slots of this pass which are in the lane buffer; 0 from the cycle after ``i_start``.
    o_complete : :py:`Out(1)`
        Pulse: the element marked ``last`` has come.
    """

    def __init__(self, config):
        if not isinstance(config, AcceleratorConfig):
            raise TypeError(f"config must be an AcceleratorConfig, not {config!r}")
        self._config = config
        # A leading bit is worth 2**(exponent + 23): exponents go in as they are.
        self._quantiser = BlockQuantiser(config, 1 - ELEMENT_BITS)
        members = self._quantiser.signature.members
        super().__init__({
            "i_elements": In(stream.Signature(
                layouts.hidden_elements(config), always_ready=True)),
            "i_start": In(1),
            "i_count": In(range(config.max_slots + 1)),
            "i_two_planes": In(1),
            "i_steps": In(layouts.steps_bits(config)),
            "i_bank": In(layouts.hidden_bank_bits(config)),
            "w_en": members["w_en"],
            "w_address": Out(layouts.lane_address_bits(config)),
            "w_data": members["w_data"],
            "base_en": members["base_en"],
            "base_address": Out(layouts.slot_bits(config) + layouts.hidden_bank_bits(config)),
            "base_data": members["base_data"],
            "o_slots_ready": Out(range(config.max_slots + 1)),
            "o_complete": Out(1),
        })

    @property
    def config(self):
        """Configuration."""
        return self._config

    @property
    def latency_cycles(self):
        """Cycles from the last elements to the count of the first slot, beyond that slot's groups.

        From ``i_start``, if that is later, they are fewer: by those of the tree, one a level, and
        one.
        """
        config = self._config
        tree = exact_log2(config.channels * config.results_per_cycle)
        return 7 + tree + BlockQuantiser.LATENCY_CYCLES

    def elaborate(self, platform):
        m = Module()
        config = self._config
        m.submodules.quantiser = quantiser = self._quantiser
        for name in ("w_en", "w_address", "w_data", "base_en", "base_address", "base_data"):
            m.d.comb += getattr(self, name).eq(getattr(quantiser, name))

        count, cores = config.quantiser_lanes, config.channels
        at_once = config.results_per_cycle
        width = max(count, cores * at_once)  # elements of a word
        core_bits = exact_log2(cores)
        lane_bits = exact_log2(count)
        sub_bits = exact_log2(width) - lane_bits  # of a group within its word
        block_bits = exact_log2(BLOCK)
        step_bits = ceil_log2(config.max_steps)
        group_bits = step_bits + block_bits - lane_bits
        word_bits = group_bits - sub_bits
        slot_bits = layouts.slot_bits(config)
        banked_bits = slot_bits + layouts.hidden_bank_bits(config)
        entry = layouts.hidden_float()
        shape = unsigned(block_top().size)

        # h is quantised when it is whole: nothing is read in the cycle in which it is written.
        unchecked = {"no_rw_check": 1}
        values = []
        for i in range(width):
            m.submodules[f"values{i}"] = storage = memory.Memory(
                shape=unsigned(entry.size), depth=1 << (word_bits + banked_bits), init=[],
                attrs=unchecked)
            values.append((storage.write_port(), storage.read_port()))
        m.submodules.tops = tops = memory.Memory(
            shape=shape, depth=1 << (step_bits + banked_bits), init=[], attrs=unchecked)
        tops_w, tops_r = tops.write_port(), tops.read_port()

        # Of each slot: the largest so far, of its current block and of all of it. No block is under
        # way when another pass's elements begin to come.
        m.submodules.blocks = blocks = memory.Memory(shape=shape, depth=1 << slot_bits, init=[])
        m.submodules.tokens = tokens = memory.Memory(shape=shape, depth=1 << banked_bits, init=[])
        block_w, block_r = blocks.write_port(), blocks.read_port(domain="comb")
        token_w, token_r = tokens.write_port(), tokens.read_port(domain="comb")
        token_q = tokens.read_port(domain="comb")

        # -- 1: arrive; the largest of them, a level of the tree in a stage; 2: look up what the
        # largest was; 3: compare. They are stored a cycle after they arrive: memories lie all over
        # a device, so there are registers in front of them, and behind.
        elements = self.i_elements.payload
        first_index = Cat(C(0, core_bits), elements.index)
        p = Pipeline(m, self.i_elements.valid, "arrival")
        s = p.stage(value=list(elements.value), slot=Cat(elements.slot, elements.bank),
                    index=first_index, last=elements.last, full=elements.full)
        enables = Signal(len(values))
        several = s.full if at_once > 1 else C(0)
        stripe = s.index[core_bits:lane_bits + sub_bits]  # of its word: an element of each core
        m.d.sync += enables.eq(Cat(
            p.valid & ((stripe == i >> core_bits)
                       | (several & ((stripe | at_once - 1) == (i >> core_bits | at_once - 1))))
            for i in range(len(values))))
        arrived = Pipeline(m, p.valid, "stored").stage(
            address=Cat(s.index[lane_bits + sub_bits:][:word_bits], s.slot), value=s.value,
            several=several)
        for i, (write, _) in enumerate(values):
            own, only = arrived.value[i % (cores * at_once)], arrived.value[i % cores]
            m.d.comb += [
                write.en.eq(enables[i]),
                write.addr.eq(arrived.address),
                write.data.eq(Mux(arrived.several, own, only) if at_once > 1 else only),
            ]
        # Beside the index of the first element that comes: that of the last.
        index_last = s.index | Mux(several, cores * (at_once - 1), 0)
        found = []
        for i, value in enumerate(s.value):
            top = Signal(block_top(), name=f"new{i}")
            m.d.comb += [
                top.top.eq(value.exponent),
                top.zero.eq((value.magnitude == 0) | (~several if i >= cores else 0)),
                top.raised.eq(value.magnitude >= RAISE_THRESHOLD),
            ]
            found.append(top)
        ends = Signal()  # a block
        m.d.comb += ends.eq(index_last[core_bits:block_bits].all())
        s.ends = ends
        while len(found) > 1:
            pairs = zip(found[::2], found[1::2], strict=True)
            found = [_larger(m, a, b, f"larger{len(found)}_{i}") for i, (a, b) in enumerate(pairs)]
            s = p.stage(found=found, slot=s.slot, index=s.index, ends=s.ends, last=s.last)
            found = s.found
        (new,) = found
        block_old, token_old, block_now, token_now = (
            Signal(block_top(), name=n)
            for n in ("block_old", "token_old", "block_now", "token_now"))
        # What is being stored, of the element before, is of the same slot: it is not read back.
        behind = Signal()
        m.d.comb += [
            block_r.addr.eq(s.slot[:slot_bits]),
            token_r.addr.eq(s.slot),
            block_old.eq(Mux(behind, block_now, block_r.data)),
            token_old.eq(Mux(behind, token_now, token_r.data)),
        ]
        before = s
        with m.If(s.index[:block_bits] == 0):
            m.d.comb += block_old.zero.eq(1)
        with m.If(s.index == 0):
            m.d.comb += token_old.zero.eq(1)
        s = p.stage(new=new, block_old=block_old, token_old=token_old, slot=s.slot, index=s.index,
                    ends=s.ends, last=s.last)
        m.d.comb += [
            behind.eq(p.valid & (s.slot == before.slot)),
            block_now.eq(_larger(m, s.new, s.block_old, "block_largest")),
            token_now.eq(_larger(m, s.new, s.token_old, "token_largest")),
            block_w.en.eq(p.valid),
            block_w.addr.eq(s.slot[:slot_bits]),
            block_w.data.eq(block_now),
            token_w.en.eq(p.valid),
            token_w.addr.eq(s.slot),
            token_w.data.eq(token_now),
            tops_w.en.eq(p.valid & s.ends),
            tops_w.addr.eq(Cat(s.index[block_bits:][:step_bits], s.slot)),
            tops_w.data.eq(block_now),
        ]

        # -- begin when told and complete ----------------------------------------------------------
        started, complete, active = Signal(), Signal(), Signal()
        slots = Signal(self.i_count.shape())
        two_planes = Signal()
        steps = Signal(self.i_steps.shape())
        bank = Signal(self.i_bank.shape())
        with m.If(p.valid & s.last):
            m.d.sync += complete.eq(1)
        begin = Signal()
        m.d.comb += [begin.eq(started & complete), self.o_complete.eq(p.valid & s.last)]
        m.d.sync += Assert(
            ~active | ~((self.i_elements.valid & (elements.bank == bank)) | self.i_start),
            "h must not change while it is quantised")
        with m.If(begin):
            m.d.sync += [started.eq(0), complete.eq(0), active.eq(1)]
        m.d.sync += self.o_slots_ready.eq(self.o_slots_ready + quantiser.base_en)
        with m.If(self.i_start):
            m.d.sync += [
                started.eq(1),
                slots.eq(self.i_count),
                two_planes.eq(self.i_two_planes),
                steps.eq(self.i_steps),
                bank.eq(self.i_bank),
                self.o_slots_ready.eq(0),
            ]

        # -- quantise ------------------------------------------------------------------------------
        # Counts go down to 0 and to 1; that they are there is known from registers.
        group = Signal(group_bits)
        slot = Signal(slot_bits)
        step = Signal(step_bits)
        steps_left, slots_left = Signal(step_bits), Signal(slots.shape())
        one_step, last_step, last_slot = Signal(), Signal(), Signal()
        block_end, slot_end = Signal(), Signal()
        in_block = block_bits - lane_bits
        m.d.comb += [
            step.eq(group >> in_block),
            block_end.eq(group[:in_block].all()),
            slot_end.eq(block_end & last_step),
            token_q.addr.eq(Cat(slot, bank)),
        ]
        with m.If(active):
            m.d.sync += group.eq(group + 1)
            with m.If(block_end):
                m.d.sync += [steps_left.eq(steps_left - 1), last_step.eq(steps_left == 1)]
            with m.If(slot_end):
                m.d.sync += [group.eq(0), slot.eq(slot + 1), steps_left.eq(steps - 1),
                             last_step.eq(one_step), slots_left.eq(slots_left - 1),
                             last_slot.eq(slots_left == 1)]
                with m.If(last_slot):
                    m.d.sync += active.eq(0)
        with m.If(begin):
            m.d.sync += [slot.eq(0), steps_left.eq(steps - 1), last_step.eq(steps == 1),
                         one_step.eq(steps == 1), slots_left.eq(slots - 1),
                         last_slot.eq(slots == 1)]
        q = Pipeline(m, active, "out")
        token = Signal(block_top())
        m.d.comb += token.eq(token_q.data)
        along = {"step": step, "slot": slot, "block_end": block_end, "slot_end": slot_end,
                 "token_top": token.top, "token_zero": token.zero, "sub": group[:max(1, sub_bits)]}
        s = q.stage(**along, word=group[sub_bits:])
        m.d.comb += [tops_r.en.eq(q.valid), tops_r.addr.eq(Cat(s.step, s.slot, bank))]
        for _, read in values:
            m.d.comb += [read.en.eq(q.valid), read.addr.eq(Cat(s.word, s.slot, bank))]
        s = q.stage(**{name: getattr(s, name) for name in along})
        s = q.stage(**vars(s), top=tops_r.data, values=[read.data for _, read in values])
        out = quantiser.i_group
        m.d.comb += [
            quantiser.i_valid.eq(q.valid),
            out.block.eq(s.top),
            out.token_top.eq(s.token_top),
            out.token_zero.eq(s.token_zero),
            out.two_planes.eq(two_planes),
            out.block_end.eq(s.block_end),
            out.slot_end.eq(s.slot_end),
            out.step.eq(s.step),
            out.slot.eq(s.slot),
            out.bank.eq(bank),
        ]
        for i in range(count):
            stored = Signal(entry, name=f"stored{i}")
            among = Array(s.values[i::count])
            m.d.comb += [
                stored.eq(among[s.sub[:sub_bits]] if sub_bits else among[0]),
                out.elements[i].significand.eq(stored.magnitude),
                out.elements[i].sign.eq(stored.sign),
                out.elements[i].top.eq(stored.exponent),
            ]
        return m
