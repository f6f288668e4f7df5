"""Weights a core's outputs and sums them exactly."""

from amaranth import *
from amaranth.hdl import Assert
from amaranth.lib import data, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out
from amaranth.utils import ceil_log2, exact_log2

from moeaccel.arithmetic import TERM_BITS
from moeaccel.config import AcceleratorConfig
from moeaccel.hdl import layouts
from moeaccel.hdl.array.multiplier import Multiplier
from moeaccel.hdl.array.normaliser import any_of, shift_right
from moeaccel.hdl.pipeline import Pipeline

__all__ = ["SUM_BITS", "RowSums", "part_word", "stripe", "stripe_address", "sums_word"]

SUM_BITS = 48
LEFT = 10
"""Largest left shift of a product that still fits: its 33 bits become 43."""


def sums_word(config: AcceleratorConfig) -> data.ArrayLayout:
    """Return a word of one core's y buffer: in each cycle as many sums are added as are rounded."""
    return data.ArrayLayout(signed(SUM_BITS), max(
        config.results_per_cycle, config.quantiser_lanes // config.channels))


def part_word(config: AcceleratorConfig) -> data.ArrayLayout:
    """Return what one RowSums has of a core's word: of n results per cycle each nth sum."""
    return data.ArrayLayout(
        signed(SUM_BITS), sums_word(config).length // config.results_per_cycle)


def stripe(config: AcceleratorConfig) -> data.ArrayLayout:
    """Return one word of every core: consecutive sums, row r of all being row r // C of core r % C.

    That is at least what is drained in a cycle, ``quantiser_lanes``.
    """
    return data.ArrayLayout(signed(SUM_BITS), sums_word(config).length * config.channels)


def stripe_address(config: AcceleratorConfig) -> data.StructLayout:
    """Return where a slot's word is."""
    return data.StructLayout({
        "word": ceil_log2(config.max_dim // stripe(config).length),
        "slot": layouts.slot_bits(config)})


class RowSums(wiring.Component):
    """Sum a core's weighted outputs on a fixed-point grid: order cannot matter
    (docs/arithmetic.md).

    ::

        i_element --> (x) weight of its slot --> round to the grid --> [+] --> y buffer, 48 bits
                                                     r_*, w_* <--------------------^

    term = round(value * weight / 2**grid_exponent), zero and counted if it needs more than 43 bits;
    also counted is a term of zero whose value and weight are not.
    The first pass of a set of tokens (``i_fresh``) stores, later ones add. While ``i_draining`` a
    bank of the buffer belongs to the Combiner, which has the same words of all cores side by side.
    No element of that bank comes or is under way then, for the Sequencer hands it over: to the
    Combiner after ``o_pass_done``, back when the drain is acknowledged, until which no step of down
    starts whose sums are in it. With several results per cycle there are as many of these, each
    with every so manieth row; rows are counted by each for itself.

    Latency LATENCY_CYCLES from an element to its place in the buffer; throughput one per cycle.
    Reset forgets everything under way.

    Parameters
    ----------
    config : :class:`AcceleratorConfig`
    family : :class:`str`
        FPGA family of the multiplier.

    Members
    -------
    i_grid_exponent
        Of the command.
    i_valid, i_element : an output; ``i_fresh``, ``i_bank``: of its pass; ``i_last``: its pass's
        last one
    i_weight : :py:`In(layouts.internal_float())`
        Of the element's slot, one cycle later.
    o_pass_done : :py:`Out(1)`
        Pulse: the element marked ``i_last`` is in the y buffer.
    o_overflow, o_underflow : :py:`Out(1)`
        Pulse for each output beyond the grid, and for each that the grid makes zero; before
        ``o_pass_done``.
    i_draining : :py:`In(config.y_banks)`
        A bit for each bank, at most one of them set.
    r_address, r_data : :py:`In(stripe_address(config))`, this core's sums after READ_LATENCY_CYCLES
    w_en, w_address, w_data
        An enable for each sum.
    """

    LATENCY_CYCLES = Multiplier.LATENCY_CYCLES + 12
    READ_LATENCY_CYCLES = 3

    def __init__(self, config: AcceleratorConfig, family="generic"):
        if not isinstance(config, AcceleratorConfig):
            raise TypeError(f"config must be an AcceleratorConfig, not {config!r}")
        self._config = config
        self._family = family
        word = part_word(config)
        super().__init__({
            "i_grid_exponent": In(signed(8)),
            "i_valid": In(1),
            "i_element": In(layouts.element(config)),
            "i_weight": In(layouts.internal_float()),
            "i_fresh": In(1),
            "i_bank": In(layouts.y_bank_bits(config)),
            "i_last": In(1),
            "o_pass_done": Out(1),
            "o_overflow": Out(1),
            "o_underflow": Out(1),
            "i_draining": In(config.y_banks),
            "r_address": In(stripe_address(config)),
            "r_data": Out(word),
            "w_en": In(word.length),
            "w_address": In(stripe_address(config)),
            "w_data": In(word),
        })

    def elaborate(self, platform):
        m = Module()
        config = self._config
        lanes = part_word(config).length
        lanes_log2 = exact_log2(lanes)
        address = stripe_address(config)
        # A sum is not needed in the cycle in which it is written. A memory for each lane: that one
        # of them is written does not touch the others; nor do banks share ports.
        banks = []
        for bank in range(config.y_banks):
            ports = []
            for i in range(lanes):
                name = f"words{i}" if not bank else f"words{i}_{bank}"
                m.submodules[name] = words = Memory(
                    shape=signed(SUM_BITS), depth=config.max_slots << address["word"].width,
                    init=[], attrs={"no_rw_check": 1})
                ports.append((words.write_port(), words.read_port()))
            banks.append(ports)

        # Elements: weight, round, add
        element = self.i_element
        pipe = Pipeline(m, self.i_valid)
        along = {"slot": element.slot, "row": element.row, "fresh": self.i_fresh,
                 "last": self.i_last, "bank": self.i_bank}

        def carried(s, **more):
            return {name: getattr(s, name) for name in along} | more

        s = pipe.stage(**along, mantissa=element.value.mantissa, exponent=element.value.exponent)
        m.submodules.multiplier = multiplier = Multiplier(18, 18, self._family)
        weight = self.i_weight
        m.d.comb += [multiplier.i_a.eq(s.mantissa), multiplier.i_b.eq(weight.mantissa)]
        s = pipe.delay(Multiplier.LATENCY_CYCLES, **carried(
            s, zero=(s.mantissa == 0) | (weight.mantissa == 0),
            shift=s.exponent + weight.exponent))
        product = multiplier.o_product
        base = Signal(signed(9))  # LEFT + grid exponent
        m.d.sync += base.eq(self.i_grid_exponent + LEFT)
        s = pipe.stage(**carried(
            s, zero=s.zero, product=product, large=product[33] ^ product[35],
            amount=base - s.shift))
        # (product << 10) >> amount, with a rounding and a sticky bit below
        wide = Cat(C(0, LEFT + 2), s.product).as_signed()
        amount, beyond = s.amount, s.amount[6:-1].any()
        s = pipe.stage(**carried(
            s, zero=s.zero, overflow=~s.zero & ((amount < 0) | ((amount == 0) & s.large)),
            product=s.product,
            amount=Mux(amount < 0, 0, Mux(beyond, 63, amount[:6])), parts=any_of(wide, 8)))
        wide = Cat(C(0, LEFT + 2), s.product).as_signed()
        value, sticky = shift_right(m, wide, s.amount[3:], unit=8, parts=s.parts)
        s = pipe.stage(**carried(s, overflow=s.overflow, counts=~s.zero & ~s.overflow,
                                 amount=s.amount[:3], value=value, sticky=sticky))
        value, sticky = shift_right(m, s.value, s.amount)
        s = pipe.stage(**carried(s, overflow=s.overflow, counts=s.counts, value=value,
                                 sticky=s.sticky | sticky))
        value = s.value
        up = value[1] & (value[0] | s.sticky | value[2])
        s = pipe.stage(**carried(s, overflow=s.overflow, counts=s.counts, term=Mux(
            s.overflow, 0, (value[2:].as_signed() + up)[:TERM_BITS + 1].as_signed())))
        element_read = Signal(address)
        m.d.comb += [element_read.word.eq(s.row >> lanes_log2), element_read.slot.eq(s.slot)]
        # Memories lie all over a device and are slow to answer: registers in front and behind.
        s = pipe.stage(**carried(s, overflow=s.overflow, counts=s.counts, term=s.term,
                                 parts=any_of(s.term, 8)))
        s = pipe.stage(**carried(s, overflow=s.overflow, term=s.term,
                                 underflow=s.counts & ~s.parts.any()))
        s = pipe.delay(self.READ_LATENCY_CYCLES - 2, **carried(
            s, overflow=s.overflow, underflow=s.underflow, term=s.term))
        held = []
        for bank, ports in enumerate(banks):
            word = Signal(part_word(config), name=f"held{bank}", reset_less=True)
            m.d.sync += word.eq(Cat(read.data for _, read in ports))
            held.append(word)
        m.d.comb += self.r_data.eq(held[0])
        words = Signal.like(self.r_data)  # of the element's bank
        m.d.comb += words.eq(held[0])
        for bank in range(1, len(banks)):
            with m.If(self.i_draining[bank]):
                m.d.comb += self.r_data.eq(held[bank])
            with m.If(s.bank == bank):
                m.d.comb += words.eq(held[bank])
        chosen = Array(words[i] for i in range(lanes))[s.row[:lanes_log2]]
        s = pipe.stage(**carried(s, overflow=s.overflow, underflow=s.underflow, term=s.term,
                                 old=Mux(s.fresh, 0, chosen)[:SUM_BITS].as_signed()))
        s = pipe.stage(**carried(s, overflow=s.overflow, underflow=s.underflow,
                                 total=(s.old + s.term)[:SUM_BITS]))
        m.d.comb += [self.o_overflow.eq(pipe.valid & s.overflow),
                     self.o_underflow.eq(pipe.valid & s.underflow)]
        element_write = Signal(address)
        m.d.comb += [element_write.word.eq(s.row >> lanes_log2), element_write.slot.eq(s.slot)]
        for bank, ports in enumerate(banks):
            draining = self.i_draining[bank]
            m.d.sync += Assert(
                ~draining | ~((self.i_valid & (self.i_bank == bank))
                              | (pipe.valid & (s.bank == bank))),
                "an element must not meet the drain")
            r_address = Signal(address, name=f"r_address{bank}")
            w_address = Signal(address, name=f"w_address{bank}")
            m.d.sync += [
                r_address.eq(Mux(draining, self.r_address, element_read)),
                w_address.eq(Mux(draining, self.w_address, element_write)),
            ]
            for i, (write, read) in enumerate(ports):
                w_en = Signal(name=f"w_en{i}_{bank}")
                w_data = Signal(signed(SUM_BITS), name=f"w_data{i}_{bank}")
                m.d.sync += [
                    w_en.eq(Mux(draining, self.w_en[i],
                                pipe.valid & (s.bank == bank) & (s.row[:lanes_log2] == i))),
                    w_data.eq(Mux(draining, self.w_data[i], s.total)),
                ]
                m.d.comb += [read.addr.eq(r_address), write.addr.eq(w_address), write.en.eq(w_en),
                             write.data.eq(w_data)]
        s = pipe.stage(last=s.last)
        m.d.comb += self.o_pass_done.eq(pipe.valid & s.last)
        assert pipe.depth == self.LATENCY_CYCLES
        return m
