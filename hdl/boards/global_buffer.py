"""A buffer that puts a signal on an FPGA's clock network."""

from amaranth import *
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from moeaccel.hdl.array.multiplier import FAMILIES

__all__ = ["GlobalBuffer"]


class GlobalBuffer(wiring.Component):
    """Carry a signal that thousands of registers read, such as a reset: ``o = i``.

    nextpnr promotes clocks only, so for an ECP5 the buffer in front of the clock network (DCCA) is
    instantiated: wires to every corner of the device would stand in the way of all others. For
    other families it is a wire; Vivado chooses by itself.

    nextpnr's timing counts the way to the buffer, but not the network behind it: only for what may
    reach its readers a cycle apart, as a reset that is held for many cycles may.

    Parameters
    ----------
    family : :class:`str`
        One of :data:`~moeaccel.hdl.array.multiplier.FAMILIES`.

    Members
    -------
    i : :py:`In(1)`
        Comes from a register that nothing else reads: it may be far away.
    o : :py:`Out(1)`
    """

    def __init__(self, family="generic"):
        if family not in FAMILIES:
            raise ValueError(f"family must be one of {', '.join(FAMILIES)}, not {family!r}")
        self._family = family
        super().__init__({"i": In(1), "o": Out(1)})

    def elaborate(self, platform):
        m = Module()
        if self._family == "ecp5":
            m.submodules.dcca = Instance("DCCA", i_CLKI=self.i, i_CE=Const(1), o_CLKO=self.o)
        else:
            m.d.comb += self.o.eq(self.i)
        return m
