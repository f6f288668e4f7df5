"""The accelerator's AXI4 master: many linear readers and writers, one checked stream of bursts."""

import functools
import operator

from amaranth import *
from amaranth.lib import memory, wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import ceil_log2, exact_log2

from moeaccel.config import AcceleratorConfig
from moeaccel.hdl import layouts
from moeaccel.hdl.layouts import ReadClientSignature, WriteClientSignature, read_request
from moeaccel.hdl.memory.axi import AXI4Signature
from moeaccel.hdl.memory.burst_splitter import BurstSplitter

ID_BITS = 4
"""Bits of ARID and AWID."""

OUTSTANDING_BURSTS = 64
"""Bursts that one reader may have outstanding, bar a margin of at most four."""

WRITE_AHEAD_BURSTS = 4
"""Bursts by which AW may run ahead of the one on W, and one more."""

_BURST_INCR = 1


class _Kept:
    """Makes the registers that a reset leaves alone, since memory goes on where it was."""

    def __init__(self):
        self.signals = []

    def __call__(self, shape, *, name):
        self.signals.append(Signal(shape, name=name, reset_less=True))
        return self.signals[-1]


class MemoryPort(wiring.Component):
    """Join linear readers and writers in one AXI4 master whose every burst is checked.

    ::

        reader0 --> [splitter] --+                                          +--> AR
        reader1 --> [splitter] --+--> [priority, 2] --> [window check, register] --> zero beats
        ...     <----- valid, data, last <-- [register] <--------+------------ R
        writer0 --> [splitter] ------> [window check, register] -------------> AW
                --> data ------------> [one burst after another] ------------> W
                <-- done <------------ [count of answers] <------------------- B

    Every request is cut into INCR bursts that stay within aligned blocks of
    ``config.max_burst_beats`` beats, hence within a 4 KiB page. Reader i uses ARID i; between
    readers the lowest number wins, decided burst by burst. At least 60 bursts of each reader may
    be outstanding. Answers are routed by RID and may come in any order between readers. RREADY and
    BREADY are constantly 1. One writer is served at a time (writer 0 first), until all that
    it has asked for is acknowledged; AW runs a few bursts (WRITE_AHEAD_BURSTS) ahead of W.

    A burst that is not wholly inside ``[window_base, window_limit)`` never reaches the bus. A
    reader gets its beats as zeros, in order, once it has nothing outstanding (no new read bursts
    are issued meanwhile); a writer's beats are swallowed, and ``done`` comes all the same. The
    first fault is latched until ``clear_faults``: one of ``fault_window`` and ``fault_bus``, never
    both. An answer with an error sets ``fault_bus`` and passes as it comes. ``fault_address`` is
    the burst's first byte (0 for a write that memory refused), valid one cycle after the flag.

    ``flush`` is held until ``idle``. From the cycle after it until the one behind it no request is
    accepted, no burst is issued, what was accepted is dropped without ``done`` or data, and write
    bursts already issued are completed with beats whose strobes are 0. Then everything but the
    latched fault is as after reset.

    **Reset** is such a flush, at any time, of any length, any number of times; memory knows nothing
    of it. Registers that hold what is offered on the bus and count what is not answered are not
    reset: ARVALID, AWVALID and WVALID stay, with what they offer, until they are taken; bursts on W
    are completed with beats whose strobes are 0, so a row may be half written; late answers are
    swallowed, also while the reset lasts. Memory must answer each burst, however late: until the
    last answer no request is accepted. Where memory, or the way to it, is reset as well, nothing
    more comes: then, and only then, ``forget`` is held for a cycle or more of the reset, and the
    port forgets that it has asked. (Also at power-on, where registers do not start at their
    initial values.)

    Latency: ARVALID 4 cycles after a request is accepted; data 2 cycles after the R beat; WVALID
    1 cycle after a beat of data; ``done`` 2 cycles after the last BVALID. Throughput: one AR a
    cycle within a request, a request of one burst every 3 cycles for a reader; one AW every 3
    cycles; one R beat and one W beat a cycle. No output depends on an input of the bus within a
    cycle. Changes of the window take 2 cycles.

    Parameters
    ----------
    config : :class:`AcceleratorConfig`
        Port width, burst length, address width.
    readers, writers : :class:`int`
        Number of clients, 1 to 16; without writers AW and W stay idle.

    Members
    -------
    reader0, reader1, ... : :py:`In(ReadClientSignature(config))`
    writer0, writer1, ... : :py:`In(WriteClientSignature(config))`
    axi_mem : :py:`Out(AXI4Signature(config.address_bits, 8 * config.port_bytes, ID_BITS))`
    window_base, window_limit : :py:`In(config.address_bits + 1)`
        First byte of the window, first byte behind it.
    flush, forget, clear_faults : :py:`In(1)`
    idle : :py:`Out(1)`
        Nothing accepted was unfinished in the cycle before.
    fault_window, fault_bus : :py:`Out(1)`
    fault_address : :py:`Out(config.address_bits)`
    read_beat, read_beat_reader : :py:`Out(1)`, :py:`Out(range(readers))`
        A beat has arrived for that reader (zero beats do not count).
    write_beat : :py:`Out(1)`
        A beat with its strobes set has been taken by memory.
    """

    def __init__(self, config, *, readers, writers):
        if not isinstance(config, AcceleratorConfig):
            raise TypeError(f"config must be an AcceleratorConfig, not {config!r}")
        for name, value, least in (("readers", readers, 1), ("writers", writers, 0)):
            if not isinstance(value, int) or not least <= value <= 1 << ID_BITS:
                raise ValueError(f"{name} must be from {least} to {1 << ID_BITS}, not {value!r}")
        self._config = config
        self._readers = readers
        self._writers = writers
        super().__init__({
            **{f"reader{i}": In(ReadClientSignature(config)) for i in range(readers)},
            **{f"writer{i}": In(WriteClientSignature(config)) for i in range(writers)},
            "axi_mem": Out(AXI4Signature(config.address_bits, 8 * config.port_bytes, ID_BITS)),
            "window_base": In(config.address_bits + 1),
            "window_limit": In(config.address_bits + 1),
            "flush": In(1),
            "forget": In(1),
            "clear_faults": In(1),
            "idle": Out(1),
            "fault_window": Out(1),
            "fault_bus": Out(1),
            "fault_address": Out(config.address_bits),
            "read_beat": Out(1),
            "read_beat_reader": Out(range(max(2, readers))),
            "write_beat": Out(1),
        })

    def elaborate(self, platform):
        m = Module()
        config = self._config
        axi = self.axi_mem
        shift = exact_log2(config.port_bytes)
        index = exact_log2(config.max_burst_beats)
        burst_layout = layouts.burst(config)
        kept = _Kept()
        readers = [getattr(self, f"reader{i}") for i in range(self._readers)]
        writers = [getattr(self, f"writer{i}") for i in range(self._writers)]

        # A reset is a flush that has lost everything but what is kept.
        flushing, flushing_next = Signal(init=1), Signal()
        m.d.comb += flushing_next.eq(self.flush | (flushing & ~self.idle))
        m.d.sync += flushing.eq(flushing_next)

        # The window in beats: the first allowed one, and the first behind the last whole one.
        first_beat = Signal(config.address_bits + 2 - shift)
        limit_beat = Signal(config.address_bits + 1 - shift)
        m.d.sync += [
            first_beat.eq((self.window_base + (config.port_bytes - 1)) >> shift),
            limit_beat.eq(self.window_limit >> shift),
        ]

        def inside(burst):
            return (Cat(burst.start, burst.block) >= first_beat) \
                & (Cat(burst.end, burst.block) < limit_beat)

        def address_of(burst):
            return Cat(C(0, shift), burst.start, burst.block)

        # -- read bursts: choose one, check it, issue it -------------------------------------------
        read_splitters = []
        for i, reader in enumerate(readers):
            splitter = BurstSplitter(config)
            m.submodules[f"read_splitter{i}"] = splitter
            wiring.connect(m, port=wiring.flipped(reader.request), splitter=splitter.request)
            m.d.comb += splitter.drop.eq(flushing)
            read_splitters.append(splitter)

        pointer = exact_log2(OUTSTANDING_BURSTS)
        numbers = range(len(readers))
        outstanding = Array(kept(pointer + 1, name=f"outstanding{i}") for i in numbers)
        write_index = Array(kept(pointer, name=f"write_index{i}") for i in numbers)
        read_index = Array(kept(pointer, name=f"read_index{i}") for i in numbers)

        chosen_valid = Signal()
        chosen = Signal(burst_layout)
        chosen_reader = Signal(range(max(2, len(readers))))
        issue = Signal()
        issue_inside = Signal()
        ar_valid = kept(1, name="ar_valid")
        ar_id = kept(ID_BITS, name="ar_id")
        ar_address = kept(config.address_bits, name="ar_address")
        ar_length = kept(len(axi.arlen), name="ar_length")
        # The cycle after: AR's registers hold the burst, whether it was put on the bus or not.
        issued = kept(1, name="issued")
        suppressed = Signal()
        issued_last = Signal()
        zero_active = Signal()
        ar_free = Signal()
        m.d.comb += [
            ar_free.eq(~ar_valid | axi.arready),
            issue.eq(chosen_valid & ar_free & ~suppressed & ~zero_active & ~flushing),
            issue_inside.eq(inside(chosen)),
        ]
        m.d.sync += [
            issued.eq(issue & issue_inside),
            suppressed.eq(issue & ~issue_inside),
            issued_last.eq(chosen.last),
        ]
        # The grant is a register, and whether a burst is taken does not depend on AR: while that
        # is busy, one more burst waits in a spare register.
        grants = Signal(len(readers))
        spare_valid = Signal()
        spare = Signal(burst_layout)
        spare_reader = Signal.like(chosen_reader)
        selected = Signal(burst_layout)
        selected_reader = Signal.like(chosen_reader)
        wanted = C(0)
        for i, splitter in enumerate(read_splitters):
            # Five more bursts may be on their way when the count is looked at: a margin for them.
            room = Signal(name=f"room{i}")
            wants = Signal(name=f"wants{i}")
            m.d.sync += room.eq(~outstanding[i][-1] & ~outstanding[i][2:-1].all())
            m.d.comb += [
                splitter.burst.ready.eq(grants[i] & ~spare_valid),
                wants.eq(splitter.burst.valid & room & ~(grants[i] & splitter.burst.payload.last)),
            ]
            with m.If(~spare_valid):
                m.d.sync += grants[i].eq(wants & ~wanted)
            # A grant is exclusive: the choice is an AND and an OR, not a chain of multiplexers.
            with m.If(grants[i]):
                m.d.comb += selected_reader.eq(i)
            wanted = wanted | wants
        m.d.comb += selected.eq(functools.reduce(operator.or_, (
            splitter.burst.payload.as_value() & grant.replicate(len(selected.as_value()))
            for splitter, grant in zip(read_splitters, grants, strict=True))))
        with m.If(~spare_valid):
            m.d.sync += [spare.eq(selected), spare_reader.eq(selected_reader)]
        with m.If(~chosen_valid | issue):
            m.d.sync += [
                chosen_valid.eq(spare_valid | grants.any()),
                chosen.eq(Mux(spare_valid, spare, selected)),
                chosen_reader.eq(Mux(spare_valid, spare_reader, selected_reader)),
                spare_valid.eq(0),
            ]
        with m.Elif(~spare_valid):
            m.d.sync += spare_valid.eq(grants.any())
        with m.If(flushing):
            m.d.sync += [grants.eq(0), spare_valid.eq(0), chosen_valid.eq(0)]

        with m.If(ar_free):
            m.d.sync += [
                ar_valid.eq(issue & issue_inside),
                ar_id.eq(chosen_reader),
                ar_address.eq(address_of(chosen)),
                ar_length.eq(chosen.end - chosen.start),
            ]
        m.d.comb += [
            axi.arvalid.eq(ar_valid), axi.arid.eq(ar_id), axi.araddr.eq(ar_address),
            axi.arlen.eq(ar_length), axi.arsize.eq(shift), axi.arburst.eq(_BURST_INCR),
            axi.rready.eq(1),
        ]

        # -- answers: a register, whose they are, and one more, since readers are far away ---------
        beat_valid = kept(len(readers), name="beat_valid")
        beat_reader = Signal(range(max(2, len(readers))))
        beat_data = Signal(8 * config.port_bytes)
        beat_last = kept(1, name="beat_last")
        beat_error = Signal()
        beat_is_zero = Signal()
        beat_zero_last = Signal()
        zero_ready = Signal()
        zero_reader = Signal(range(max(2, len(readers))))
        zero_left = Signal(index)
        zero_last = Signal()
        zero_beat = Signal()
        data_out = Signal(8 * config.port_bytes, reset_less=True)
        m.d.sync += data_out.eq(beat_data)
        m.d.comb += zero_beat.eq(zero_ready & ~axi.rvalid)
        m.d.sync += [
            beat_reader.eq(Mux(axi.rvalid, axi.rid, zero_reader)),
            beat_data.eq(Mux(axi.rvalid, axi.rdata, 0)),
            beat_last.eq(axi.rvalid & axi.rlast),
            beat_error.eq(axi.rvalid & axi.rresp[1]),
            beat_is_zero.eq(zero_beat),
            beat_zero_last.eq(zero_beat & zero_last & (zero_left == 0)),
        ]
        for i, reader in enumerate(readers):
            m.d.sync += beat_valid[i].eq(
                Mux(axi.rvalid, axi.rid == i, zero_ready & (zero_reader == i)))

            # Whether a burst is its request's last, one bit for each outstanding burst.
            flags = memory.Memory(shape=unsigned(1), depth=OUTSTANDING_BURSTS, init=[])
            m.submodules[f"flags{i}"] = flags
            flags_write = flags.write_port()
            flags_read = flags.read_port(domain="comb")
            mine = Signal(name=f"issued{i}")
            answered = Signal(name=f"answered{i}")
            m.d.comb += [
                mine.eq(issued & (ar_id == i)),
                answered.eq(beat_valid[i] & beat_last),
                flags_write.en.eq(mine),
                flags_write.addr.eq(write_index[i]),
                flags_write.data.eq(issued_last),
                flags_read.addr.eq(read_index[i]),
                reader.data.eq(data_out),
            ]
            m.d.sync += [
                reader.valid.eq(beat_valid[i] & ~flushing_next),
                reader.last.eq(beat_zero_last | (beat_last & flags_read.data)),
                write_index[i].eq(write_index[i] + mine),
                read_index[i].eq(read_index[i] + answered),
                outstanding[i].eq(outstanding[i] + Mux(mine == answered, 0, Mux(mine, 1, -1))),
            ]
        m.d.comb += [
            self.read_beat.eq(beat_valid.any() & ~beat_is_zero),
            self.read_beat_reader.eq(beat_reader),
        ]

        # A suppressed burst: wait for the reader's earlier ones, then use the gaps between R beats.
        with m.If(suppressed):
            m.d.sync += [
                zero_active.eq(1),
                zero_reader.eq(ar_id),
                zero_left.eq(ar_length),
                zero_last.eq(issued_last),
            ]
        m.d.sync += zero_ready.eq(zero_active & (outstanding[zero_reader] == 0))
        with m.If(zero_beat):
            m.d.sync += zero_left.eq(zero_left - 1)
            with m.If(zero_left == 0):
                m.d.sync += [zero_active.eq(0), zero_ready.eq(0)]
        with m.If(flushing):
            m.d.sync += [zero_active.eq(0), zero_ready.eq(0)]

        # -- writes
        owner_valid, write_issued, write_allowed = (
            kept(1, name=name) for name in ("owner_valid", "write_issued", "write_allowed"))
        b_error = Signal()
        m.d.comb += axi.bready.eq(1)
        if writers:
            self._write(m, kept, writers, flushing, flushing_next, inside, address_of,
                        owner_valid, write_issued, write_allowed, b_error)

        # -- faults: the first one since clear_faults ----------------------------------------------
        # Addresses of outstanding bursts, in block RAM, only to say which one memory refused.
        refused = Signal(2)
        first_address = Signal(config.address_bits)
        refused_address = Signal(config.address_bits - shift)
        addresses = memory.Memory(
            shape=unsigned(config.address_bits - shift),
            depth=OUTSTANDING_BURSTS << ceil_log2(len(readers)), init=[],
            attrs={"no_rw_check": True})  # what is read at a write's address is not used
        m.submodules.addresses = addresses
        addresses_write = addresses.write_port()
        addresses_read = addresses.read_port()
        m.d.comb += [
            addresses_write.en.eq(issued),
            addresses_write.addr.eq(Cat(write_index[ar_id], ar_id)),
            addresses_write.data.eq(ar_address[shift:]),
            addresses_read.addr.eq(Cat(read_index[beat_reader], beat_reader)),
        ]
        # Block RAM is slow to answer: a register behind it, ahead of everything else.
        m.d.sync += [refused.eq(refused << 1), refused_address.eq(addresses_read.data)]
        m.d.comb += self.fault_address.eq(first_address)
        with m.If(~self.fault_window & ~self.fault_bus):
            # Without a fault it means nothing, and need not wait for one to be found.
            m.d.sync += first_address.eq(Mux(
                suppressed, ar_address, Mux(write_issued & ~write_allowed, axi.awaddr, 0)))
        with m.If(refused[1]):
            m.d.comb += self.fault_address.eq(refused_address << shift)
            m.d.sync += first_address.eq(self.fault_address)
        with m.If(~self.fault_window & ~self.fault_bus & ~flushing):
            with m.If(suppressed | (write_issued & ~write_allowed)):
                m.d.sync += self.fault_window.eq(1)
            with m.Elif(beat_error):
                m.d.sync += self.fault_bus.eq(1), refused.eq(1)
            with m.Elif(b_error):
                m.d.sync += self.fault_bus.eq(1)
        with m.If(self.clear_faults):
            m.d.sync += [self.fault_window.eq(0), self.fault_bus.eq(0)]

        m.d.sync += self.idle.eq(~(
            Cat(s.burst.valid for s in read_splitters).any() | grants.any() | spare_valid
            | chosen_valid | ar_valid | suppressed
            | Cat(*outstanding).any() | beat_valid.any() | zero_active
            | owner_valid | Cat(w.done for w in writers).any()))
        with m.If(self.forget):
            m.d.sync += [signal.eq(0) for signal in kept.signals]
        return m

    def _write(self, m, kept, writers, flushing, flushing_next, inside, address_of,
               owner_valid, write_issued, write_allowed, b_error):
        """Serve one writer at a time; the last four signals say what goes on."""
        config = self._config
        axi = self.axi_mem
        shift = exact_log2(config.port_bytes)
        index = exact_log2(config.max_burst_beats)
        pointer = exact_log2(OUTSTANDING_BURSTS)
        burst_layout = layouts.burst(config)
        owner = Signal(range(max(2, len(writers))))
        feeds = Signal(len(writers))  # whose data W may take: the owner's, unless flushing
        m.submodules.write_splitter = splitter = BurstSplitter(config)
        # The splitter is empty while there is no owner; the owner's next request waits for it.
        accepted = Signal()
        request = Signal(read_request(config))
        m.d.comb += [
            splitter.drop.eq(flushing),
            splitter.request.valid.eq(accepted),
            splitter.request.payload.eq(request),
        ]
        with m.If(splitter.request.ready):
            m.d.sync += accepted.eq(0)
        free = ~owner_valid & ~flushing
        for i, writer in enumerate(writers):
            ready = Signal(name=f"ready{i}")
            m.d.comb += [
                ready.eq(free | (feeds[i] & ~accepted & ~flushing)), writer.request.ready.eq(ready)]
            with m.If(ready & writer.request.valid):
                m.d.sync += [owner_valid.eq(1), owner.eq(i), feeds[i].eq(1), accepted.eq(1),
                             request.eq(writer.request.payload)]
            free = free & ~writer.request.valid
        with m.If(flushing):
            m.d.sync += accepted.eq(0)

        granted = Signal()
        checked_valid = Signal()
        checked = Signal(burst_layout)
        write_issue = Signal()
        write_inside = Signal()
        write_room = Signal()
        aw_valid = kept(1, name="aw_valid")
        aw_address = kept(config.address_bits, name="aw_address")
        aw_length = kept(len(axi.awlen), name="aw_length")
        unanswered = kept(pointer + 1, name="unanswered")
        # Bursts announced and not begun on W: length, and whether they are on the bus.
        depth = 2 * WRITE_AHEAD_BURSTS
        m.submodules.bursts = bursts = memory.Memory(
            shape=unsigned(index + 1), depth=depth, init=[])
        bursts_write, bursts_read = bursts.write_port(), bursts.read_port(domain="comb")
        bursts_in, bursts_out = (
            kept(range(depth), name=name) for name in ("bursts_in", "bursts_out"))
        bursts_level = kept(range(depth + 1), name="bursts_level")
        bursts_any = Signal()
        bursts_taken = Signal()
        m.d.comb += [
            write_issue.eq(checked_valid & ~aw_valid & write_room & ~flushing),
            write_inside.eq(inside(checked)),
            splitter.burst.ready.eq(granted & ~checked_valid),
            bursts_write.en.eq(write_issued),
            bursts_write.addr.eq(bursts_in),
            bursts_write.data.eq(Cat(aw_length[:index], write_allowed)),
            bursts_read.addr.eq(bursts_out),
            bursts_any.eq(bursts_level != 0),
        ]
        m.d.sync += [
            write_issued.eq(write_issue), write_allowed.eq(write_inside),
            write_room.eq((bursts_level < WRITE_AHEAD_BURSTS - 1) & ~unanswered[-1]),
            bursts_in.eq(bursts_in + write_issued),
            bursts_out.eq(bursts_out + bursts_taken),
            bursts_level.eq(bursts_level + write_issued - bursts_taken),
        ]
        with m.If(write_issue):
            m.d.sync += checked_valid.eq(0)
        with m.If(~checked_valid):
            m.d.sync += [
                granted.eq(splitter.burst.valid & ~(granted & splitter.burst.payload.last)),
                checked_valid.eq(granted),
                checked.eq(splitter.burst.payload),
            ]
        with m.If(flushing):
            m.d.sync += [granted.eq(0), checked_valid.eq(0)]
        with m.If(axi.awready):
            m.d.sync += aw_valid.eq(0)
        with m.If(~aw_valid):
            m.d.sync += [
                aw_valid.eq(write_issue & write_inside),
                aw_address.eq(address_of(checked)),
                aw_length.eq(checked.end - checked.start),
            ]
        m.d.comb += [
            axi.awvalid.eq(aw_valid), axi.awid.eq(0), axi.awaddr.eq(aw_address),
            axi.awlen.eq(aw_length), axi.awsize.eq(shift), axi.awburst.eq(_BURST_INCR),
        ]

        # W: one burst after another, without a gap between them: the next one waits in a register.
        # While that is filled the burst before it has a beat to go, unless it is a request's last.
        next_valid, next_inside, w_active, w_last, w_inside, w_spare_valid, w_valid = (
            kept(1, name=name) for name in (
                "next_valid", "next_inside", "w_active", "w_last", "w_inside", "w_spare_valid",
                "w_valid"))
        next_left = kept(index, name="next_left")
        w_left = kept(index, name="w_left")
        w_beat = Signal(8 * config.port_bytes + 2)
        w_spare = Signal.like(w_beat, reset_less=True)
        w_output = Signal.like(w_beat, reset_less=True)
        w_take = Signal()
        w_offered = Signal()
        w_strobe = w_output[1]
        data_valid = Signal()
        data_payload = Signal(8 * config.port_bytes)
        for i, writer in enumerate(writers):
            m.d.comb += writer.data.ready.eq(feeds[i] & w_offered)
            with m.If(owner == i):
                m.d.comb += data_payload.eq(writer.data.payload)
        m.d.comb += [
            data_valid.eq((Cat(writer.data.valid for writer in writers) & feeds).any()),
            w_offered.eq(w_active & (~w_spare_valid | ~w_inside)),
            w_beat.eq(Cat(w_last, ~flushing, data_payload)),
            w_take.eq(w_offered & (data_valid | flushing)),
            bursts_taken.eq(~next_valid & bursts_any),
            axi.wvalid.eq(w_valid),
            axi.wlast.eq(w_output[0]),
            axi.wstrb.eq(w_strobe.replicate(config.port_bytes)),
            axi.wdata.eq(w_output[2:]),
        ]
        with m.If(~next_valid):
            m.d.sync += [
                next_valid.eq(bursts_any), Cat(next_left, next_inside).eq(bursts_read.data)]
        with m.If(~w_active | (w_take & w_last)):
            m.d.sync += [
                w_active.eq(next_valid), w_left.eq(next_left), w_last.eq(next_left == 0),
                w_inside.eq(next_inside),
            ]
            with m.If(next_valid):
                m.d.sync += next_valid.eq(0)
        with m.Elif(w_take):
            m.d.sync += [w_left.eq(w_left - 1), w_last.eq(w_left == 1)]
        # Whether a beat is taken does not depend on W: while that is busy, one more waits.
        with m.If(~w_spare_valid):
            m.d.sync += w_spare.eq(w_beat)
        with m.If(~w_valid | axi.wready):
            m.d.sync += [
                w_valid.eq(w_spare_valid | (w_take & w_inside)),
                w_output.eq(Mux(w_spare_valid, w_spare, w_beat)),
                w_spare_valid.eq(0),
            ]
        with m.Elif(~w_spare_valid):
            m.d.sync += w_spare_valid.eq(w_take & w_inside)
        m.d.sync += self.write_beat.eq(w_valid & axi.wready & w_strobe)

        asked = Signal()
        # B: count; requests are done when nothing of them is left anywhere.
        m.d.sync += [
            b_error.eq(axi.bvalid & axi.bresp[1]),
            unanswered.eq(unanswered + Mux(asked == axi.bvalid, 0, Mux(asked, 1, -1))),
        ]
        writes_done = Signal()
        m.d.comb += [
            asked.eq(write_issued & write_allowed),
            writes_done.eq(~Cat(
                accepted, splitter.burst.valid, granted, checked_valid, aw_valid, write_issued,
                bursts_any, next_valid, w_active, w_spare_valid, w_valid, unanswered).any()),
        ]
        # An owner that asks now is taken at its word: nothing else is accepted while there is one.
        wants_more = (Cat(writer.request.valid for writer in writers) & feeds).any() & ~flushing
        finished = Signal()
        m.d.comb += finished.eq(owner_valid & writes_done & ~wants_more)
        with m.If(finished):
            m.d.sync += owner_valid.eq(0)
        with m.If(finished | flushing_next):
            m.d.sync += feeds.eq(0)
        for i, writer in enumerate(writers):
            done = Signal(name=f"done{i}")
            m.d.sync += done.eq(finished & (owner == i) & ~flushing)
            m.d.comb += writer.done.eq(done)
