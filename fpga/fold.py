"""Fold a block's ports onto two pins, so that it can be placed and routed alone."""

from amaranth import *
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from moeaccel.hdl.boards.global_buffer import GlobalBuffer

__all__ = ["Fold"]


class Fold(wiring.Component):
    """Surround a block with registers that are filled from one pin and observed on another.

        i_serial --> [shift register] --> block --> [output registers] --> [XOR] --> o_serial

    Each of the block's inputs comes from a flip-flop and each output goes to one, so the slowest
    path is the block's own; no input is constant and no output unused, so nothing is optimised
    away. The XOR tree has a register for every four bits.

    Parameters
    ----------
    block : :class:`amaranth.lib.wiring.Component`
        Becomes the submodule ``block``.
    family : :class:`str`
        Of the FPGA; for other than "generic" the block's reset comes from a register, through a
        :class:`~moeaccel.hdl.boards.global_buffer.GlobalBuffer`.

    Members
    -------
    i_serial : :py:`In(1)`
    o_serial : :py:`Out(1)`
    """

    def __init__(self, block, family="generic"):
        if not isinstance(block, wiring.Component):
            raise TypeError(f"block must be a component, not {block!r}")
        self._block = block
        self._family = family
        super().__init__({"i_serial": In(1), "o_serial": Out(1)})

    @property
    def block(self):
        """The block inside."""
        return self._block

    def elaborate(self, platform):
        m = Module()
        if self._family == "generic":
            m.submodules.block = self._block
        else:
            reset = Signal(init=1, reset_less=True)
            m.submodules.reset = buffer = GlobalBuffer(self._family)
            m.domains.block = ClockDomain(local=True)
            m.d.sync += reset.eq(ResetSignal())
            m.d.comb += [buffer.i.eq(reset), ClockSignal("block").eq(ClockSignal()),
                         ResetSignal("block").eq(buffer.o)]
            m.submodules.block = DomainRenamer("block")(self._block)
        inputs, outputs = [], []
        for _, member, value in self._block.signature.flatten(self._block):
            value = Value.cast(value)
            if not len(value) or isinstance(value, Const):  # a stream that is always ready
                continue
            (inputs if member.flow == In else outputs).append(value)

        chain = Signal(sum(len(value) for value in inputs), reset_less=True)
        m.d.sync += chain.eq(Cat(self.i_serial, chain))
        start = 0
        for value in inputs:
            m.d.comb += value.eq(chain[start:start + len(value)])
            start += len(value)

        level, bits = 0, list(Cat(outputs))
        captured = Signal(len(bits), name="captured", reset_less=True)
        m.d.sync += captured.eq(Cat(bits))
        bits = list(captured)
        while len(bits) > 1:
            groups = [Cat(bits[i:i + 4]).xor() for i in range(0, len(bits), 4)]
            reduced = Signal(len(groups), name=f"reduced{level}", reset_less=True)
            m.d.sync += reduced.eq(Cat(groups))
            level, bits = level + 1, list(reduced)
        m.d.comb += self.o_serial.eq(bits[0])
        return m
