"""Several AXI4 masters on one slave."""

from amaranth import *
from amaranth.hdl import Assert
from amaranth.lib import fifo, wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import ceil_log2

from moeaccel.hdl.memory.axi import AXI4Signature

__all__ = ["AxiArbiter"]

_QUEUE = 16
"""Depth of the queues: that of a LUT RAM."""


class AxiArbiter(wiring.Component):
    """Share an AXI4 slave between masters, burst by burst.

    ::

        master0 ar, aw --> [queue] --+
        master1 ar, aw --> [queue] --+--> [take turns] -------> [register] --> slave ar, aw
                w ---------------> [in the order of aw] --> [register] --> slave w
                r, b <-------------------- [by the id's top bits] --- slave r, b

    Masters that have an address waiting take turns, reads and writes separately; one alone gets
    every cycle. The slave's ids have the master's number above the master's id, so answers of a
    master keep their order, and the slave may be as clever between masters as it likes. Data of
    writes follows the order of their addresses: a master that gives an address long before its data
    holds up the writes of the others, and one that does not take its answers holds up the answers
    behind them. The data of an address that is offered to the slave may be there before the slave
    takes it.

    Latency: 2 cycles for addresses, 1 for data of writes, whose first beat is taken 2 cycles after
    its address, none for R and B. Throughput: one address of each kind and one beat of W and R in a
    cycle. AxREADY, WREADY and what the slave is offered come from registers. Reset empties the
    queues.

    Parameters
    ----------
    addr_width, data_width, id_width : :class:`int`
        Of the masters, see :class:`AXI4Signature`.
    masters : :class:`int`
        2 to 16.

    Members
    -------
    master0, master1, ... : :py:`In(AXI4Signature(addr_width, data_width, id_width))`
    slave : :py:`Out(AXI4Signature(addr_width, data_width, id_width + ceil_log2(masters)))`
    """

    def __init__(self, *, addr_width, data_width, id_width, masters=2):
        if not isinstance(masters, int) or not 2 <= masters <= 16:
            raise ValueError(f"masters must be from 2 to 16, not {masters!r}")
        self._masters = masters
        self._number_bits = ceil_log2(masters)
        super().__init__({
            **{f"master{i}": In(AXI4Signature(addr_width, data_width, id_width))
               for i in range(masters)},
            "slave": Out(AXI4Signature(addr_width, data_width, id_width + self._number_bits)),
        })

    def elaborate(self, platform):
        m = Module()
        slave = self.slave
        masters = [getattr(self, f"master{i}") for i in range(self._masters)]
        numbers = range(self._masters)

        def addresses(channel, go):
            """Let masters' addresses take turns while ``go``; return whose goes, and when."""
            names = [f"{channel}{field}" for field in ("addr", "len", "size", "burst", "id")]
            waiting = Signal(self._masters, name=f"{channel}_waiting")
            chosen = Signal(range(self._masters), name=f"{channel}_chosen")
            latest = Signal(range(self._masters), name=f"{channel}_latest")
            sent = Signal(name=f"{channel}_sent")
            fields = Signal(sum(len(getattr(masters[0], name)) for name in names),
                            name=f"{channel}_fields")
            for i, master in enumerate(masters):
                payload = Cat(getattr(master, name) for name in names)
                queue = fifo.SyncFIFO(width=len(payload), depth=_QUEUE)
                m.submodules[f"{channel}_queue{i}"] = queue
                m.d.comb += [
                    queue.w_en.eq(getattr(master, f"{channel}valid")),
                    queue.w_data.eq(payload),
                    getattr(master, f"{channel}ready").eq(queue.w_rdy),
                    waiting[i].eq(queue.r_rdy),
                    queue.r_en.eq(sent & (chosen == i)),
                ]
                with m.If(chosen == i):
                    m.d.comb += fields.eq(queue.r_data)
            # The one after the latest comes first.
            with m.Switch(latest):
                for last in numbers:
                    with m.Case(last):
                        for step in reversed(range(1, self._masters + 1)):
                            candidate = (last + step) % self._masters
                            with m.If(waiting[candidate]):
                                m.d.comb += chosen.eq(candidate)
            valid, ready = getattr(slave, f"{channel}valid"), getattr(slave, f"{channel}ready")
            m.d.comb += sent.eq(waiting.any() & go & (~valid | ready))
            with m.If(~valid | ready):
                m.d.sync += [
                    valid.eq(waiting.any() & go),
                    Cat(getattr(slave, name) for name in names).eq(Cat(fields, chosen)),
                ]
            with m.If(sent):
                m.d.sync += latest.eq(chosen)
            return chosen, sent

        addresses("ar", 1)

        # -- data of writes ------------------------------------------------------------------------
        m.submodules.order = order = fifo.SyncFIFO(width=self._number_bits, depth=_QUEUE)
        room = Signal()  # for one, and for that which was sent since
        writer, sent = addresses("aw", room)
        m.d.sync += room.eq(order.w_level < _QUEUE - 1)
        owners = Signal(self._masters)  # at most one
        names = ("wlast", "wdata", "wstrb")
        beat, spare = (Signal(sum(len(getattr(slave, name)) for name in names), name=name)
                       for name in ("w_beat", "w_spare"))
        offered, taken, spare_valid = (Signal(name=name) for name in (
            "w_offered", "w_taken", "w_spare_valid"))
        m.d.comb += [
            order.w_en.eq(sent),
            order.w_data.eq(writer),
            order.r_en.eq(~owners.any() | (taken & beat[0])),
            taken.eq(offered & ~spare_valid),
        ]
        m.d.sync += Assert(~sent | order.w_rdy, "a write has no place in the order")
        with m.If(order.r_en):
            m.d.sync += owners.eq(Mux(order.r_rdy, 1 << order.r_data, 0))
        for i, master in enumerate(masters):
            m.d.comb += master.wready.eq(owners[i] & ~spare_valid)
            with m.If(owners[i]):
                m.d.comb += [offered.eq(master.wvalid),
                             beat.eq(Cat(getattr(master, name) for name in names))]
        # Whether a beat is taken does not depend on the slave: while that is busy, one more waits.
        with m.If(~spare_valid):
            m.d.sync += spare.eq(beat)
        with m.If(~slave.wvalid | slave.wready):
            m.d.sync += [
                slave.wvalid.eq(spare_valid | taken),
                Cat(getattr(slave, name) for name in names).eq(Mux(spare_valid, spare, beat)),
                spare_valid.eq(0),
            ]
        with m.Elif(~spare_valid):
            m.d.sync += spare_valid.eq(taken)

        # -- answers -------------------------------------------------------------------------------
        for channel, fields in (("r", ("data", "resp", "last", "id")), ("b", ("resp", "id"))):
            answer_id = getattr(slave, f"{channel}id")
            number = answer_id[-self._number_bits:]
            ready = Signal(name=f"{channel}_ready")
            m.d.comb += getattr(slave, f"{channel}ready").eq(ready)
            for i, master in enumerate(masters):
                for field in fields:
                    target = getattr(master, f"{channel}{field}")
                    m.d.comb += target.eq(getattr(slave, f"{channel}{field}")[:len(target)])
                m.d.comb += getattr(master, f"{channel}valid").eq(
                    getattr(slave, f"{channel}valid") & (number == i))
                with m.If(number == i):
                    m.d.comb += ready.eq(getattr(master, f"{channel}ready"))
        return m
