"""A behavioural SDRAM that checks its controller."""

# RTL: Amaranth makes attributes at run time.
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from amaranth import *
from amaranth.lib import enum, memory, wiring
from amaranth.lib.wiring import In, Out

from moeaccel.hdl.memory.sdram import (
    BANK_BITS,
    BURST_WORDS,
    CAS_LATENCY,
    COLUMN_BITS,
    MODE_REGISTER,
    POWER_UP_REFRESHES,
    ROW_BITS,
    SdramCommand,
    SdramSignature,
    SdramTiming,
)

__all__ = ["REFRESHES_POSTPONED", "SdramChip", "Violation"]

REFRESHES_POSTPONED = 8
"""Most refreshes that may be owed."""

_BANKS = 1 << BANK_BITS


class Violation(enum.Enum, shape=5):
    """What the controller did wrong."""

    NONE = 0
    POWER_UP = 1
    """A command before ``power_up`` has passed."""
    NOT_INITIALISED = 2
    """Precharge of all banks, 8 refreshes and the mode come first."""
    UNSUPPORTED = 3
    """Low ``cke``, termination of a burst, automatic precharge, or a mode not MODE_REGISTER."""
    RC = 4
    RFC = 5
    RAS = 6
    RAS_MAX = 7
    RCD = 8
    RP = 9
    RRD = 10
    WR = 11
    MRD = 12
    REFRESH = 13
    """More than REFRESHES_POSTPONED refreshes are owed."""
    ROW_OPEN = 14
    """An activation of an open bank, or a refresh or mode while a bank is open."""
    ROW_CLOSED = 15
    """A column command to a closed bank."""
    NO_SUCH_ROW = 16
    """A row that this model does not store."""
    BURST_CUT = 17
    """A column command, or a precharge of the bank, before the burst has ended."""
    CONTENTION = 18
    """The controller drives dq with the chip, or without a cycle between."""
    NOT_DRIVEN = 19
    """A word to be written is not driven."""


class SdramChip(wiring.Component):
    """An SDRAM of 4 banks of rows of 512 words, in bursts of 4 with a CAS latency of 3.

    It samples ``sdram`` at the clock edge; ``dq_i`` holds a read's first word 3 cycles after the
    cycle in which the command was on ``sdram``, and nonsense while the chip drives nothing. Every
    limit of ``timing`` and the protocol is checked, in cycles; ``o_violation`` latches the first
    breach until reset, after which the chip goes on as well as it can. Stricter than real ones: a
    burst must not be cut, and there is no automatic precharge, self refresh or power-down. A
    precharge of a closed bank is allowed, and counts as one.

    The word of a row, bank and column is at ``row << 11 | bank << 9 | column`` of the one memory:
    half the byte address of :class:`moeaccel.hdl.memory.sdram_controller.SdramController`.

    Parameters
    ----------
    timing : :class:`SdramTiming`
    rows : :class:`int`
        Rows of a bank that are stored, from the first on: a power of two, at most 8192.

    Members
    -------
    sdram : :py:`In(SdramSignature())`
    o_violation : :py:`Out(Violation)`
    """

    def __init__(self, timing, *, rows=1 << ROW_BITS):
        if not isinstance(timing, SdramTiming):
            raise TypeError(f"timing must be a SdramTiming, not {timing!r}")
        if not isinstance(rows, int) or not 2 <= rows <= 1 << ROW_BITS or rows & (rows - 1):
            raise ValueError(
                f"rows must be a power of two from 2 to {1 << ROW_BITS}, not {rows!r}")
        self._timing = timing
        self._rows = rows
        self._memory = memory.Memory(shape=16, depth=rows << (BANK_BITS + COLUMN_BITS), init=[])
        super().__init__({"sdram": In(SdramSignature()), "o_violation": Out(Violation)})

    @property
    def memory(self):
        """The memory of 16-bit words."""
        return self._memory

    def elaborate(self, platform):
        m = Module()
        timing, pins = self._timing, self.sdram
        m.submodules.memory = self._memory
        stored_bits = (self._rows - 1).bit_length()

        def passed(event, cycles, name):
            """Return whether `cycles` have passed since the latest event."""
            count = Signal(range(cycles + 1), init=cycles, name=name)
            with m.If(event):
                m.d.sync += count.eq(1)
            with m.Elif(count != cycles):
                m.d.sync += count.eq(count + 1)
            return count == cycles

        # -- commands ------------------------------------------------------------------------------
        command = Cat(pins.we_n, pins.cas_n, pins.ras_n)

        def given(kind):
            signal = Signal(name=kind.name.lower())
            m.d.comb += signal.eq(pins.cke & ~pins.cs_n & (command == kind))
            return signal

        mode, refresh, precharge, activate, write, read, terminate = (
            given(kind) for kind in SdramCommand if kind != SdramCommand.NOP)
        all_banks = pins.a[10]
        column = read | write
        is_open = Signal(_BANKS)
        rows = Array(Signal(ROW_BITS, name=f"row{i}") for i in range(_BANKS))
        write_left = Signal(range(BURST_WORDS))
        write_bank = Signal(BANK_BITS)
        writing = Signal()
        m.d.comb += writing.eq(write | (write_left != 0))
        bank_written = Mux(write, pins.ba, write_bank)

        on_bank = {name: Signal(_BANKS, name=f"{name}_on_bank") for name in (
            "activate", "precharge", "column", "written")}
        for i in range(_BANKS):
            m.d.comb += [
                on_bank["activate"][i].eq(activate & (pins.ba == i)),
                on_bank["precharge"][i].eq(precharge & (all_banks | (pins.ba == i))),
                on_bank["column"][i].eq(column & (pins.ba == i)),
                on_bank["written"][i].eq(writing & (bank_written == i)),
            ]
        m.d.sync += is_open.eq((is_open | on_bank["activate"]) & ~on_bank["precharge"])
        with m.If(activate):
            m.d.sync += rows[pins.ba].eq(pins.a)

        def passed_on_banks(event, cycles, name):
            bits = Signal(_BANKS, name=f"{name}_passed")
            for i in range(_BANKS):
                m.d.comb += bits[i].eq(passed(on_bank[event][i], cycles, f"{name}{i}"))
            return bits

        rc = passed_on_banks("activate", timing.rc, "rc")
        ras = passed_on_banks("activate", timing.ras, "ras")
        ras_max = passed_on_banks("activate", timing.ras_max + 1, "ras_max")
        rcd = passed_on_banks("activate", timing.rcd, "rcd")
        rp = passed_on_banks("precharge", timing.rp, "rp")
        wr = passed_on_banks("written", timing.wr, "wr")
        burst = passed_on_banks("column", BURST_WORDS, "burst")
        rrd = passed(activate, timing.rrd, "rrd")
        rfc = passed(refresh, timing.rfc, "rfc")
        mrd = passed(mode, timing.mrd, "mrd")

        # -- power-up and refresh ------------------------------------------------------------------
        powered = Signal(range(timing.power_up + 1))
        precharged = Signal()
        refreshes = Signal(range(POWER_UP_REFRESHES + 1))
        ready = Signal()
        with m.If(powered != timing.power_up):
            m.d.sync += powered.eq(powered + 1)
        with m.If(precharge & all_banks):
            m.d.sync += precharged.eq(1)
        with m.If(refresh & (refreshes != POWER_UP_REFRESHES)):
            m.d.sync += refreshes.eq(refreshes + 1)
        with m.If(mode):
            m.d.sync += ready.eq(1)
        enough = refreshes == POWER_UP_REFRESHES

        interval = Signal(range(timing.refresh))
        owed = Signal(range(REFRESHES_POSTPONED + 2))
        due = Signal()
        m.d.comb += due.eq(ready & (interval == timing.refresh - 1))
        with m.If(ready):
            m.d.sync += interval.eq(Mux(due, 0, interval + 1))
        with m.If(due & ~refresh & (owed <= REFRESHES_POSTPONED)):
            m.d.sync += owed.eq(owed + 1)
        with m.Elif(refresh & ~due & (owed != 0)):
            m.d.sync += owed.eq(owed - 1)

        # -- writes: the first word comes with the command -----------------------------------------
        write_port = self._memory.write_port(granularity=8)
        write_address = Signal(COLUMN_BITS + BANK_BITS + stored_bits)
        following = Signal.like(write_address)
        address = Cat(pins.a[:COLUMN_BITS], pins.ba, rows[pins.ba][:stored_bits])

        def after(value):
            """Return the address after: bursts wrap within their aligned four words."""
            return Cat((value[:2] + 1)[:2], value[2:])

        m.d.comb += [
            write_address.eq(Mux(write, address, following)),
            write_port.addr.eq(write_address),
            write_port.data.eq(pins.dq_o),
            write_port.en.eq(~pins.dqm & writing.replicate(2)),
        ]
        with m.If(write):
            m.d.sync += write_left.eq(BURST_WORDS - 1), write_bank.eq(pins.ba)
        with m.Elif(write_left != 0):
            m.d.sync += write_left.eq(write_left - 1)
        m.d.sync += following.eq(after(write_address))

        # -- reads: address, memory, output register; masks come two cycles late -------------------
        read_port = self._memory.read_port()
        read_address = Signal.like(write_address)
        read_left = Signal(range(BURST_WORDS + 1))
        fetched = Signal(CAS_LATENCY - 1)
        drives = Signal()
        drove = Signal()
        masked = [Signal(2, name=f"masked{i}") for i in range(2)]
        output = Signal(16)
        m.d.comb += [
            read_port.addr.eq(read_address),
            drives.eq(fetched[-1]),
            pins.dq_i.eq(Mux(drives, output, 0xBAD5)),
        ]
        m.d.sync += [
            fetched.eq(Cat(read_left != 0, fetched)),
            drove.eq(drives),
            output.eq(read_port.data),
            masked[0].eq(pins.dqm),
            masked[1].eq(masked[0]),
        ]
        for i in range(2):
            with m.If(masked[1][i]):
                m.d.comb += pins.dq_i[8 * i:8 * i + 8].eq(0xD5)
        with m.If(read):
            m.d.sync += read_address.eq(address), read_left.eq(BURST_WORDS)
        with m.Elif(read_left != 0):
            m.d.sync += read_left.eq(read_left - 1), read_address.eq(after(read_address))

        # -- rules ---------------------------------------------------------------------------------
        here = C(1, _BANKS) << pins.ba
        closing = on_bank["precharge"] & is_open
        any_command = mode | refresh | precharge | activate | column | terminate
        whole_chip = refresh | mode
        rules = [
            (Violation.UNSUPPORTED, ~pins.cke & (powered == timing.power_up)),
            (Violation.POWER_UP, any_command & (powered != timing.power_up)),
            (Violation.UNSUPPORTED, terminate | (column & pins.a[10])
             | (mode & (Cat(pins.a, pins.ba) != MODE_REGISTER))),
            (Violation.NOT_INITIALISED, (whole_chip & ~precharged) | (mode & ~enough)
             | ((activate | column) & ~ready)),
            (Violation.RFC, any_command & ~rfc),
            (Violation.MRD, any_command & ~mrd),
            (Violation.ROW_OPEN,
             (activate & (is_open & here).any()) | (whole_chip & is_open.any())),
            (Violation.RP, (activate & (~rp & here).any()) | (whole_chip & ~rp.all())),
            (Violation.RC, (activate & (~rc & here).any()) | (whole_chip & ~rc.all())),
            (Violation.RRD, activate & ~rrd),
            (Violation.NO_SUCH_ROW, activate & pins.a[stored_bits:].any()),
            (Violation.ROW_CLOSED, column & ~(is_open & here).any()),
            (Violation.RCD, column & (~rcd & here).any()),
            (Violation.BURST_CUT, (column & ~burst.all()) | (closing & ~burst).any()),
            (Violation.WR, (closing & ~wr).any()),
            (Violation.RAS, (closing & ~ras).any()),
            (Violation.RAS_MAX, (is_open & ras_max).any()),
            (Violation.REFRESH, owed > REFRESHES_POSTPONED),
            (Violation.CONTENTION, pins.dq_oe & (drives | drove)),
            (Violation.NOT_DRIVEN, writing & ~pins.dq_oe & ~pins.dqm.all()),
        ]
        with m.If(self.o_violation == Violation.NONE):
            for i, (violation, broken) in enumerate(rules):
                with m.If(broken) if i == 0 else m.Elif(broken):
                    m.d.sync += self.o_violation.eq(violation)
        return m
