"""The device's end of the two command rings: where the next entries are, if there are any."""

from amaranth import *
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import exact_log2

from moeaccel.config import AcceleratorConfig
from moeaccel.interface.commands import ENTRY_BYTES, RING_LOG2_MAX

__all__ = ["Rings"]

_ALIGNMENT_BITS = exact_log2(ENTRY_BYTES)


class Rings(wiring.Component):
    """Keep the indices of both rings, and check the registers that describe them.

    The rings of ``1 << ring_log2`` entries lie one behind the other in memory from their bases on.
    Indices count modulo the entries; one entry stays empty. Registers are bad where ``ring_log2``
    is not from 1 to RING_LOG2_MAX, or where a base is not aligned or its ring does not end within
    the address space; while any is bad, nothing waits.

    Latency: ``o_bad`` shows at most 3 cycles after a register, what it depends on else in the same.
    Reset: indices 0, phase 1.

    Parameters
    ----------
    config : :class:`AcceleratorConfig`
        Address width.

    Members
    -------
    enable, sq_base, cq_base, ring_log2, sq_tail, cq_head : :py:`In`
        Of the registers with these names.
    i_fetched, i_completed : :py:`In(1)`
        The submission has been taken, the completion is in memory: go on to the next one.
    i_reset : :py:`In(1)`
        As after reset.
    o_waiting : :py:`Out(1)`
        A submission may be fetched, and there is room for its completion.
    o_bad : :py:`Out(3)`
        ring_log2, sq_base, cq_base. Registers.
    o_submission, o_completion : :py:`Out(config.address_bits - 6)`
        The next entry's address in units of ENTRY_BYTES.
    o_phase : :py:`Out(1)`
        Of the next completion.
    sq_head, cq_tail : :py:`Out(32)`
        Registers.
    """

    def __init__(self, config):
        if not isinstance(config, AcceleratorConfig):
            raise TypeError(f"config must be an AcceleratorConfig, not {config!r}")
        self._address_bits = config.address_bits
        block_bits = config.address_bits - _ALIGNMENT_BITS
        super().__init__({
            "enable": In(1),
            "sq_base": In(64),
            "cq_base": In(64),
            "ring_log2": In(32),
            "sq_tail": In(32),
            "cq_head": In(32),
            "i_fetched": In(1),
            "i_completed": In(1),
            "i_reset": In(1),
            "o_waiting": Out(1),
            "o_bad": Out(3),
            "o_submission": Out(block_bits),
            "o_completion": Out(block_bits),
            "o_phase": Out(1, init=1),
            "sq_head": Out(32),
            "cq_tail": Out(32),
        })

    def elaborate(self, platform):
        m = Module()
        mask = Signal(RING_LOG2_MAX)
        head = Signal(RING_LOG2_MAX)
        tail = Signal(RING_LOG2_MAX)
        after = Signal(RING_LOG2_MAX)
        wraps = Signal()
        m.d.comb += [
            after.eq((tail + 1) & mask),
            self.sq_head.eq(head),
            self.cq_tail.eq(tail),
            self.o_waiting.eq(self.enable & ~self.o_bad.any()
                              & (head != (self.sq_tail & mask)) & (after != (self.cq_head & mask))),
        ]
        m.d.sync += [
            mask.eq(Cat(self.ring_log2 > i for i in range(RING_LOG2_MAX))),
            wraps.eq(after == 0),
            self.o_bad[0].eq((self.ring_log2 == 0) | (self.ring_log2 > RING_LOG2_MAX)),
        ]
        for i, (base, entry, index) in enumerate((
                (self.sq_base, self.o_submission, head), (self.cq_base, self.o_completion, tail))):
            block = base[_ALIGNMENT_BITS:self._address_bits]
            wrong = Signal(3, name=f"wrong{i}")
            m.d.comb += entry.eq(block + index)
            m.d.sync += [
                wrong.eq(Cat(base[:_ALIGNMENT_BITS].any(), base[self._address_bits:].any(),
                             mask > ~block)),
                self.o_bad[1 + i].eq(wrong.any()),
            ]
        with m.If(self.i_fetched):
            m.d.sync += head.eq((head + 1) & mask)
        with m.If(self.i_completed):
            m.d.sync += [tail.eq(after), self.o_phase.eq(self.o_phase ^ wraps)]
        with m.If(self.i_reset):
            m.d.sync += [head.eq(0), tail.eq(0), self.o_phase.eq(1)]
        return m
