"""The device's end of the serial link: registers and memory over two wires.

The protocol is that of :mod:`moeaccel.interface.link`.
"""

from amaranth import *
from amaranth.lib import memory, wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import exact_log2

from moeaccel.hdl.boards.link_frames import BUFFER_BYTES, FrameReceiver, FrameTransmitter
from moeaccel.hdl.boards.uart import UartReceiver, UartTransmitter
from moeaccel.hdl.memory.axi import AXI4LiteSignature, AXI4Signature
from moeaccel.hdl.memory.sdram import CHIP_BYTES
from moeaccel.interface.link import (
    ADDRESS_BITS as LINK_ADDRESS_BITS,
    HEADER_BYTES,
    HELLO_BYTES,
    INTERRUPT,
    MAX_PAYLOAD,
    REGISTER_BYTES,
    VERSION,
    WINDOW,
    Opcode,
    Status,
)
from moeaccel.interface.registers import ADDRESS_BITS

__all__ = ["SerialLink"]

BEAT_BYTES = 8
"""Bytes of a beat of the memory bus."""

_BEAT_LOG2 = exact_log2(BEAT_BYTES)
_BURST_INCR = 1


class SerialLink(wiring.Component):
    """Execute the requests of a serial line on a register bus and a memory bus.

    ::

        i_rx --> UartReceiver --> FrameReceiver --> [requests] <--> axil, axi
        o_tx <-- UartTransmitter <-- FrameTransmitter <--+--- i_irq

    Requests are executed one after another, each when all of it has arrived intact; which are
    executed and which only answered is said in :mod:`moeaccel.interface.link`. Memory is accessed
    beat by beat: on the line a beat takes as long as 80 bits, so bursts would gain nothing. A write
    beat carries the strobes of its bytes. Each bus has one transfer at a time; one that is not
    answered within ``bus_timeout_cycles`` ends its request with ``BUS_TIMEOUT``, and so do later
    requests to that bus until the late answer has come, which is dropped. The other bus and the
    link go on.

    Throughput: the line's, in both directions at once, as long as a beat takes less than
    ``80 * baud_divisor`` cycles. Latency from the last bit of a request to the first bit of its
    reply: about 40 cycles and the bus's, and 40 more for a beat of payload. Reset: request number 0
    is expected, the line is idle; whoever resets it must reset the buses' other ends too.

    Parameters
    ----------
    baud_divisor : :class:`int`
        Clock cycles of a bit, 4 or more.
    addr_width : :class:`int`
        Bits of memory addresses, at most 32; a higher address gives ``NO_MEMORY``.
    id_width : :class:`int`
        Bits of AXI ids; the link uses id 0.
    memory_bytes : :class:`int`
        What the device says about its memory, a power of two; that of the SDRAM when left out.
    bus_timeout_cycles : :class:`int`
        A power of two.

    Members
    -------
    i_rx, o_tx : :py:`In(1)`, :py:`Out(1)`
        The line; i_rx is asynchronous.
    axil : :py:`Out(AXI4LiteSignature(moeaccel.interface.registers.ADDRESS_BITS))`
    axi : :py:`Out(AXI4Signature(addr_width, 64, id_width))`
    i_irq : :py:`In(1)`
        Level of the interrupt.
    """

    def __init__(self, *, baud_divisor, id_width, addr_width=LINK_ADDRESS_BITS,
                 memory_bytes=CHIP_BYTES, bus_timeout_cycles=1 << 16):
        if not isinstance(addr_width, int) or not 4 <= addr_width <= LINK_ADDRESS_BITS:
            raise ValueError(
                f"addr_width must be from 4 to {LINK_ADDRESS_BITS}, not {addr_width!r}")
        for name, value in (("memory_bytes", memory_bytes),
                            ("bus_timeout_cycles", bus_timeout_cycles)):
            if not isinstance(value, int) or value < 16 or value & (value - 1):
                raise ValueError(f"{name} must be a power of two from 16 on, not {value!r}")
        self._addr_width = addr_width
        self._memory_bytes = memory_bytes
        self._bus_timeout_cycles = bus_timeout_cycles
        self._uarts = UartReceiver(divisor=baud_divisor), UartTransmitter(divisor=baud_divisor)
        super().__init__({
            "i_rx": In(1, init=1),
            "o_tx": Out(1, init=1),
            "axil": Out(AXI4LiteSignature(ADDRESS_BITS)),
            "axi": Out(AXI4Signature(addr_width, 8 * BEAT_BYTES, id_width)),
            "i_irq": In(1),
        })

    def elaborate(self, platform):
        m = Module()
        axi, axil = self.axi, self.axil
        m.submodules.uart_receiver, m.submodules.uart_transmitter = self._uarts
        uart_receiver, uart_transmitter = self._uarts
        m.submodules.receiver = receiver = FrameReceiver()
        m.submodules.transmitter = transmitter = FrameTransmitter()
        wiring.connect(m, uart=uart_receiver.o_stream, frames=receiver.i_stream)
        wiring.connect(m, frames=transmitter.o_stream, uart=uart_transmitter.i_stream)
        m.d.comb += [uart_receiver.i_rx.eq(self.i_rx), self.o_tx.eq(uart_transmitter.o_tx)]
        receive, send = receiver.o_stream, transmitter.i_stream

        # The request in execution, and how it goes.
        header = Signal(8 * HEADER_BYTES)
        number, kind, count, address = header[:8], header[8:16], header[16:32], header[32:]
        opcode, writes = kind[:4], kind[0]
        is_memory = kind[1]
        expected = Signal(8)
        status = Signal(Shape.cast(Status))
        perform = Signal()  # its beats go to a bus; else its payload is dropped or made up
        returns = Signal()  # its reply carries a payload
        executed = Signal()  # it is a write that was not executed before

        # A beat: its address, with one bit more than addresses have; its first byte that counts;
        # bytes that count to come. Eight steps move its bytes through a shift register.
        beat = Signal(LINK_ADDRESS_BITS + 1 - _BEAT_LOG2)
        skip = Signal(_BEAT_LOG2)
        left = Signal(range(BUFFER_BYTES))
        step = Signal(_BEAT_LOG2)
        data = Signal(8 * BEAT_BYTES)
        strobes = Signal(BEAT_BYTES)
        beyond = Signal()
        active = Signal()
        last_step = Signal()
        m.d.comb += last_step.eq(step == BEAT_BYTES - 1)
        # In a register, for which a step has a state of its own (SETTLE): it is the ready of the
        # receiver, whose memory lies elsewhere on the chip.
        m.d.sync += active.eq((step >= skip) & (left != 0))
        m.d.sync += beyond.eq(is_memory & (beat >> self._addr_width - _BEAT_LOG2).any())

        # -- buses: one transfer each, in registers of its own; a late answer is only taken --------
        launch = Signal()
        memory_busy, register_busy, busy = Signal(), Signal(), Signal()
        memory_answer, register_answer, answered = Signal(), Signal(), Signal()
        response = Signal(2)
        bus_beat = Signal(self._addr_width - _BEAT_LOG2)
        m.d.comb += [
            axi.awaddr.eq(bus_beat << _BEAT_LOG2),
            axi.awsize.eq(_BEAT_LOG2),
            axi.awburst.eq(_BURST_INCR),
            axi.wlast.eq(1),
            axi.bready.eq(1),
            axi.araddr.eq(bus_beat << _BEAT_LOG2),
            axi.arsize.eq(_BEAT_LOG2),
            axi.arburst.eq(_BURST_INCR),
            axi.rready.eq(1),
            axil.araddr.eq(axil.awaddr),
            axil.wstrb.eq(~0),
            axil.bready.eq(1),
            axil.rready.eq(1),
            memory_answer.eq(axi.bvalid | axi.rvalid),
            register_answer.eq(axil.bvalid | axil.rvalid),
            busy.eq(Mux(is_memory, memory_busy, register_busy)),
        ]
        for bus, is_busy, answer, chosen in (
                (axi, memory_busy, memory_answer, is_memory),
                (axil, register_busy, register_answer, ~is_memory)):
            for channel in ("aw", "w", "ar"):
                with m.If(getattr(bus, f"{channel}ready")):
                    m.d.sync += getattr(bus, f"{channel}valid").eq(0)
            with m.If(answer):
                m.d.sync += is_busy.eq(0)
            with m.If(launch & chosen):
                m.d.sync += [
                    is_busy.eq(1), bus.awvalid.eq(writes), bus.wvalid.eq(writes),
                    bus.arvalid.eq(~writes), bus.wdata.eq(data),
                ]
        m.d.sync += launch.eq(0)
        with m.If(launch):
            m.d.sync += beat.eq(beat + 1)
        with m.If(launch & is_memory):
            m.d.sync += [bus_beat.eq(beat), axi.wstrb.eq(strobes)]
        with m.If(launch & ~is_memory):
            m.d.sync += axil.awaddr.eq(address)
        m.d.sync += [
            answered.eq(Mux(is_memory, memory_answer, register_answer)),
            response.eq(Mux(is_memory, Mux(axi.bvalid, axi.bresp, axi.rresp),
                            Mux(axil.bvalid, axil.bresp, axil.rresp))),
        ]

        # -- what the header asks for, in registers ------------------------------------------------
        age = Signal(8)  # how many requests ago its number was the expected one
        in_order, repeated, bad = Signal(), Signal(), Signal()
        m.d.comb += age.eq(expected - number)
        m.d.sync += [
            in_order.eq((age == 0) | (opcode == Opcode.HELLO)),
            repeated.eq((age != 0) & (age <= WINDOW)),
        ]
        with m.Switch(opcode):
            with m.Case(Opcode.HELLO):
                m.d.sync += bad.eq(count != HELLO_BYTES)
            with m.Case(Opcode.MEMORY_READ, Opcode.MEMORY_WRITE):
                m.d.sync += bad.eq(count > MAX_PAYLOAD)
            with m.Case(Opcode.REGISTER_READ, Opcode.REGISTER_WRITE):
                m.d.sync += bad.eq((count != REGISTER_BYTES) | address[:2].any()
                                   | address[ADDRESS_BITS:].any())
            with m.Default():
                m.d.sync += bad.eq(1)

        # How each of the latest writes ended, for the case that its reply got lost.
        m.submodules.endings = endings = memory.Memory(
            shape=Shape.cast(Status), depth=WINDOW, init=[])
        endings_write = endings.write_port()
        endings_read = endings.read_port(domain="comb")
        m.d.comb += [
            endings_read.addr.eq(number),
            endings_write.addr.eq(number),
            endings_write.data.eq(status),
        ]

        # What is to be told unasked.
        damaged, reported = Signal(), Signal()

        hello = Cat(address, C(VERSION, 8), C(WINDOW, 8), C(exact_log2(MAX_PAYLOAD), 8),
                    C(exact_log2(self._memory_bytes), 8))
        timer = Signal(exact_log2(self._bus_timeout_cycles) + 1)
        m.d.sync += timer.eq(0)

        # The shift register: loaded from what the opcode reads until its answer is there, shifted
        # by a step. Both are told by registers, since they go to many places.
        shift, load = Signal(), Signal()
        byte, strobe = Signal(8, reset_less=True), Signal()
        m.d.sync += shift.eq(0)
        with m.If(shift):
            m.d.sync += [
                step.eq(step + 1), data.eq(Cat(data[8:], byte)),
                strobes.eq(Cat(strobes[1:], strobe)), left.eq(left - strobe),
            ]
            with m.If(last_step):
                m.d.sync += skip.eq(0)
        with m.Elif(load & ~answered):
            with m.If(is_memory):
                m.d.sync += data.eq(axi.rdata)
            with m.Elif(opcode[2]):
                m.d.sync += data.eq(axil.rdata)
            with m.Else():
                m.d.sync += data.eq(hello)

        # Told by a register, too, in the cycle of the state DECIDE.
        decide = Signal()
        m.d.sync += decide.eq(0)
        with m.If(decide):
            m.d.sync += [
                beat.eq(address[_BEAT_LOG2:]), skip.eq(Mux(is_memory, address, 0)),
                left.eq(count), load.eq(~writes), executed.eq(writes & in_order),
                perform.eq(1), returns.eq(~writes), status.eq(Status.OK),
            ]
            with m.If(in_order):
                m.d.sync += expected.eq(number + 1)
            with m.If(~in_order & ~repeated):
                m.d.sync += [perform.eq(0), returns.eq(0), status.eq(Status.OUT_OF_ORDER)]
            with m.Elif(bad):
                m.d.sync += [perform.eq(0), returns.eq(0), status.eq(Status.BAD_REQUEST)]
            with m.Elif(~in_order & writes):
                m.d.sync += [perform.eq(0), status.eq(endings_read.data)]

        def proceed():
            with m.If(~writes):
                m.next = "GIVE"
            with m.Elif(left == 0):
                m.next = "REPLY STATUS"
            with m.Else():
                m.next = "TAKE"

        interrupt = exact_log2(INTERRUPT) - len(status)
        with m.FSM():
            with m.State("IDLE"):
                with m.If(receive.valid):
                    m.next = "HEADER"
                with m.Elif(damaged | (self.i_irq & ~reported)):
                    m.d.sync += [
                        opcode.eq(Opcode.NOTICE), damaged.eq(0), returns.eq(0), executed.eq(0),
                        status.eq(Mux(damaged, Status.DAMAGED, Status.OK)),
                    ]
                    m.next = "REPLY NUMBER"
            with m.State("HEADER"):
                m.d.comb += receive.ready.eq(1)
                with m.If(receive.valid):
                    m.d.sync += [header.eq(Cat(header[8:], receive.payload)), step.eq(step + 1)]
                    with m.If(last_step):
                        m.next = "CHECK"
            with m.State("CHECK"):
                m.d.sync += decide.eq(1)
                m.next = "DECIDE"
            with m.State("DECIDE"):
                m.next = "REPLY NUMBER"
            with m.State("REPLY NUMBER"):
                m.d.comb += [send.valid.eq(1), send.payload.byte.eq(number)]
                with m.If(send.ready):
                    m.next = "REPLY KIND"
            with m.State("REPLY KIND"):
                m.d.comb += [send.valid.eq(1), send.payload.byte.eq(kind)]
                with m.If(send.ready):
                    with m.If(writes & (left != 0)):
                        m.next = "TAKE"
                    with m.Elif(~returns | (left == 0)):
                        m.next = "REPLY STATUS"
                    with m.Elif(opcode == Opcode.HELLO):
                        m.next = "GIVE"
                    with m.Else():
                        m.next = "LAUNCH"
            with m.State("TAKE"):
                m.d.comb += receive.ready.eq(active)
                m.d.sync += [byte.eq(receive.payload), strobe.eq(active)]
                with m.If(receive.valid | ~active):
                    m.d.sync += shift.eq(1)
                    m.next = "SHIFT"
            with m.State("GIVE"):
                m.d.comb += [send.valid.eq(active), send.payload.byte.eq(data[:8])]
                m.d.sync += [load.eq(0), strobe.eq(active)]
                with m.If(send.ready | ~active):
                    m.d.sync += shift.eq(1)
                    m.next = "SHIFT"
            with m.State("SHIFT"):
                with m.If(writes & last_step):
                    m.next = "LAUNCH"
                with m.Elif(last_step):
                    m.next = "GIVEN"
                with m.Else():
                    m.next = "SETTLE"
            with m.State("SETTLE"):
                with m.If(writes):
                    m.next = "TAKE"
                with m.Else():
                    m.next = "GIVE"
            with m.State("GIVEN"):
                with m.If(left == 0):
                    m.next = "REPLY STATUS"
                with m.Else():
                    m.next = "LAUNCH"
            with m.State("LAUNCH"):
                m.d.sync += timer.eq(timer + 1)
                with m.If(~perform):
                    proceed()
                with m.Elif(beyond):
                    m.d.sync += [perform.eq(0), status.eq(Status.NO_MEMORY)]
                with m.Elif(timer[-1]):
                    m.d.sync += [perform.eq(0), status.eq(Status.BUS_TIMEOUT)]
                with m.Elif(~busy):
                    m.d.sync += [launch.eq(1), load.eq(~writes)]
                    m.next = "WAIT"
            with m.State("WAIT"):
                m.d.sync += timer.eq(timer + 1)
                with m.If(answered):
                    m.d.sync += load.eq(0)
                    with m.If(response[1]):
                        m.d.sync += [perform.eq(0), status.eq(response)]
                    proceed()
                with m.Elif(timer[-1]):
                    m.d.sync += [load.eq(0), perform.eq(0), status.eq(Status.BUS_TIMEOUT)]
                    proceed()
            with m.State("REPLY STATUS"):
                m.d.comb += [
                    send.valid.eq(1), send.payload.byte.eq(Cat(status, self.i_irq << interrupt))]
                with m.If(send.ready):
                    m.d.comb += endings_write.en.eq(executed)
                    m.d.sync += reported.eq(self.i_irq)
                    m.next = "REPLY EXPECTED"
            with m.State("REPLY EXPECTED"):
                m.d.comb += [
                    send.valid.eq(1), send.payload.byte.eq(expected), send.payload.last.eq(1)]
                with m.If(send.ready):
                    m.next = "IDLE"
        with m.If(receiver.o_damaged):
            m.d.sync += damaged.eq(1)
        return m
