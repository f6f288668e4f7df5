"""Asynchronous serial lines: one start bit, eight data bits, no parity, one stop bit."""

from amaranth import *
from amaranth.lib import stream, wiring
from amaranth.lib.cdc import FFSynchronizer
from amaranth.lib.wiring import In, Out

__all__ = ["UartReceiver", "UartTransmitter"]

DIVISOR_MIN = 4
"""Clock cycles of the shortest bit: fewer leave no cycle that is surely in the middle of it."""

_BITS = 10


def _check_divisor(divisor):
    if not isinstance(divisor, int) or divisor < DIVISOR_MIN:
        raise ValueError(f"divisor must be an integer from {DIVISOR_MIN} on, not {divisor!r}")


class UartReceiver(wiring.Component):
    """Receive bytes.

    A bit is sampled once, in its middle as seen from the falling edge of the start bit. A start bit
    that is gone by its middle is a glitch; a byte whose stop bit is 0 is dropped, and the line must
    be 1 again before the next one starts, so that a broken line gives no bytes at all. Rates may
    differ by 4 % when a bit has 16 cycles or more.

    Latency: ``o_stream.valid`` is high for one cycle, 3 cycles after the middle of the stop bit;
    there is no back-pressure. Reset: waiting for a start bit.

    Parameters
    ----------
    divisor : :class:`int`
        Clock cycles of a bit, 4 or more.

    Members
    -------
    i_rx : :py:`In(1)`
        The line; asynchronous.
    o_stream : :py:`Out(stream.Signature(8, always_ready=True))`
    """

    def __init__(self, *, divisor):
        _check_divisor(divisor)
        self._divisor = divisor
        super().__init__({
            "i_rx": In(1, init=1),
            "o_stream": Out(stream.Signature(8, always_ready=True)),
        })

    @property
    def divisor(self):
        """Clock cycles of a bit."""
        return self._divisor

    def elaborate(self, platform):
        m = Module()
        line = Signal(init=1)
        m.submodules.synchronizer = FFSynchronizer(self.i_rx, line, init=1)

        # From the first cycle with the start bit to its middle, then from middle to middle.
        timer = Signal(range(self._divisor))
        bits = Signal(range(_BITS), init=0)
        shift = Signal(8, reset_less=True)
        receiving = Signal()
        broken = Signal()
        m.d.sync += self.o_stream.valid.eq(0)
        m.d.comb += self.o_stream.payload.eq(shift)
        with m.If(~receiving):
            m.d.sync += [
                timer.eq((self._divisor - 1) // 2),
                bits.eq(0),
                receiving.eq(~line & ~broken),
                broken.eq(broken & ~line),
            ]
        with m.Elif(timer != 0):
            m.d.sync += timer.eq(timer - 1)
        with m.Else():
            m.d.sync += [timer.eq(self._divisor - 1), bits.eq(bits + 1)]
            with m.If(bits == 0):
                m.d.sync += receiving.eq(~line)
            with m.Elif(bits == _BITS - 1):
                m.d.sync += [
                    receiving.eq(0), broken.eq(~line), self.o_stream.valid.eq(line)]
            with m.Else():
                m.d.sync += shift.eq(Cat(shift[1:], line))
        return m


class UartTransmitter(wiring.Component):
    """Send bytes, one after another without a gap.

    Latency: the start bit begins 1 cycle after a byte is taken. Throughput: a byte every
    ``10 * divisor`` cycles. Reset: the line is idle, 1.

    Parameters
    ----------
    divisor : :class:`int`
        Clock cycles of a bit, 4 or more.

    Members
    -------
    i_stream : :py:`In(stream.Signature(8))`
    o_tx : :py:`Out(1)`
        The line, from a register.
    """

    def __init__(self, *, divisor):
        _check_divisor(divisor)
        self._divisor = divisor
        super().__init__({"i_stream": In(stream.Signature(8)), "o_tx": Out(1, init=1)})

    @property
    def divisor(self):
        """Clock cycles of a bit."""
        return self._divisor

    def elaborate(self, platform):
        m = Module()
        timer = Signal(range(self._divisor))
        bits = Signal(range(_BITS))
        shift = Signal(9, init=(1 << 9) - 1)  # what follows the bit on the line
        last = Signal(init=1)  # the bit on the line may be followed by another byte's start bit
        m.d.comb += self.i_stream.ready.eq(last)
        with m.If(self.i_stream.valid & self.i_stream.ready):
            m.d.sync += [
                self.o_tx.eq(0), shift.eq(Cat(self.i_stream.payload, 1)),
                timer.eq(self._divisor - 1), bits.eq(_BITS - 1), last.eq(0),
            ]
        with m.Elif(timer != 0):
            m.d.sync += [timer.eq(timer - 1), last.eq(last | ((timer == 1) & (bits == 0)))]
        with m.Elif(bits != 0):
            m.d.sync += [
                self.o_tx.eq(shift[0]), shift.eq(Cat(shift[1:], 1)),
                timer.eq(self._divisor - 1), bits.eq(bits - 1),
            ]
        return m
