"""SdramChip: it stores words, and each of its rules, broken once, is reported."""

import pytest
from amaranth.sim import Simulator

from moeaccel.hdl.memory.sdram import MODE_REGISTER, SdramCommand as Command, SdramTiming
from moeaccel.sim.board.sdram_chip import REFRESHES_POSTPONED, SdramChip, Violation
from tests.support.sdram import short_timing

ALL = 1 << 10

# 120 MHz: rc 10 (more than ras and rp together), rfc 8, ras 6, rcd 3, rp 3, rrd 2, wr 2, mrd 2.
TIMING = short_timing(120_000_000, rc_ns=80, ras_max_ns=10_000, refresh_ns=1500)


def initialise(*, wait=TIMING.power_up, refreshes=8, mode=MODE_REGISTER, last=TIMING.rfc):
    """Return the commands of a power-up, each with the cycles since the one before."""
    return [(wait, Command.PRECHARGE, 0, ALL), (TIMING.rp, Command.REFRESH, 0, 0),
            *[(TIMING.rfc, Command.REFRESH, 0, 0)] * (refreshes - 1),
            (last, Command.MODE, 0, mode)]


class Player:
    """Play commands to a chip.

    A command is ``(cycles since the one before, command, bank, address)``, or ``(cycles, None)``
    for an end.
    """

    def __init__(self, *, rows=4):
        self.chip = SdramChip(TIMING, rows=rows)

    def run(self, commands, *, words=(), masks=None, drive=4, cke=None, read_masks=None):
        """Return what ``dq_i`` held in each cycle; ``violation`` is what the chip found.

        ``words`` and ``masks`` are on dq and dqm from a write on, dq driven for ``drive`` cycles;
        ``read_masks`` are on dqm, and ``cke`` is low, in these cycles.
        """
        pins, seen = self.chip.sdram, []
        schedule, cycle = {}, 0
        for gap, *command in commands:
            cycle += gap
            schedule[cycle] = command
        end = cycle + 1

        async def testbench(ctx):
            ctx.set(pins.cke, 1)
            written = None
            for now in range(end):
                kind, *where = schedule.get(now, [None])
                ctx.set(pins.cs_n, kind is None)
                ctx.set(pins.cke, now != cke)
                if kind is not None:
                    bank, address = where
                    ctx.set(pins.we_n, kind & 1)
                    ctx.set(pins.cas_n, kind >> 1 & 1)
                    ctx.set(pins.ras_n, kind >> 2)
                    ctx.set(pins.ba, bank)
                    ctx.set(pins.a, address)
                    if kind == Command.WRITE:
                        written = now
                step = 99 if written is None else now - written
                ctx.set(pins.dq_oe, step < drive)
                ctx.set(pins.dq_o, words[step] if step < len(words) else 0xEEEE)
                ctx.set(pins.dqm, (read_masks or {}).get(
                    now, masks[step] if masks and step < len(masks) else 0))
                seen.append(ctx.get(pins.dq_i))
                await ctx.tick()
            self.violation = ctx.get(self.chip.o_violation)

        simulator = Simulator(self.chip)
        simulator.add_clock(1e-6)
        simulator.add_testbench(testbench)
        simulator.run()
        return seen


def violation(commands, **options):
    player = Player()
    player.run([*commands, (1, None)], **options)
    return player.violation


ACTIVATE = (TIMING.mrd, Command.ACTIVATE, 0, 1)
OPEN = [*initialise(), ACTIVATE]
WORDS = [0x1122, 0x3344, 0x5566, 0x7788]


def test_words_are_stored():
    """Written with masks at an unaligned column, read in the same row and after another."""
    player = Player()
    seen = player.run([
        *OPEN,
        (3, Command.WRITE, 0, 0x1FE),
        (4, Command.READ, 0, 0x1FC),
        (4, Command.PRECHARGE, 0, 0),
        (3, Command.ACTIVATE, 0, 2),
        (6, Command.PRECHARGE, 0, ALL),
        (4, Command.ACTIVATE, 0, 1),
        (3, Command.READ, 0, 0x1FD),
        (7, None),
    ], words=WORDS, masks=[0, 0, 1, 2])
    assert player.violation == Violation.NONE
    # Bursts wrap within their aligned four words; bytes that were masked are as they were.
    assert seen[-8:] == [0xBAD5] * 3 + [0x0088, 0x1122, 0x3344, 0x5500] + [0xBAD5]


def test_read_masks_come_two_cycles_late():
    player = Player()
    commands = [*OPEN, (3, Command.WRITE, 0, 0), (4, Command.READ, 0, 0), (6, None)]
    start = sum(gap for gap, *_ in commands) - 6
    seen = player.run(commands, words=WORDS, read_masks={start + 2: 1, start + 3: 2})
    assert seen[-4:] == [0x1122, 0x33D5, 0xD566, 0x7788]
    assert player.violation == Violation.NONE


def test_banks_are_apart():
    player = Player()
    commands = [*initialise()]
    for bank in range(4):
        commands += [(2, Command.ACTIVATE, bank, 3)]
    for bank in range(4):
        commands += [(4, Command.WRITE, bank, 8)]
    for bank in range(4):
        commands += [(4, Command.READ, bank, 8)]
    player.run([*commands, (7, None)], words=WORDS)
    assert player.violation == Violation.NONE


FINE = [
    [*OPEN],
    [*OPEN, (3, Command.READ, 0, 0), (4, Command.PRECHARGE, 0, 0), (3, Command.ACTIVATE, 0, 0)],
    [*OPEN, (3, Command.WRITE, 0, 0), (5, Command.PRECHARGE, 0, 0)],
    [*OPEN, (2, Command.ACTIVATE, 1, 0), (2, Command.ACTIVATE, 2, 0)],
    [*OPEN, (3, Command.READ, 0, 0), (4, Command.READ, 0, 4), (8, Command.WRITE, 0, 4)],
    [*OPEN, (7, Command.PRECHARGE, 0, 0), (3, Command.REFRESH, 0, 0), (8, Command.REFRESH, 0, 0),
     (8, Command.ACTIVATE, 0, 0)],
    [*OPEN, (7, Command.PRECHARGE, 0, ALL), (3, Command.MODE, 0, MODE_REGISTER),
     (2, Command.ACTIVATE, 0, 0)],
    [*OPEN, (TIMING.ras_max, Command.PRECHARGE, 0, 0)],
    [*initialise(), ((REFRESHES_POSTPONED + 1) * TIMING.refresh - 1, Command.REFRESH, 0, 0)],
]


@pytest.mark.parametrize("commands", FINE)
def test_legal_sequences(commands):
    """As fast as the limits allow, and as late."""
    assert violation(commands) == Violation.NONE


BROKEN = [
    (Violation.POWER_UP, initialise(wait=TIMING.power_up - 1)),
    (Violation.NOT_INITIALISED, [(TIMING.power_up, Command.REFRESH, 0, 0)]),
    (Violation.NOT_INITIALISED, initialise(refreshes=7)),
    (Violation.NOT_INITIALISED, [*initialise()[:-1], (TIMING.rfc, Command.ACTIVATE, 0, 0)]),
    (Violation.UNSUPPORTED, initialise(mode=MODE_REGISTER | 1)),
    (Violation.UNSUPPORTED, [*OPEN, (3, Command.READ, 0, ALL)]),
    (Violation.UNSUPPORTED, [*OPEN, (3, Command.TERMINATE, 0, 0)]),
    (Violation.RC, [*OPEN, (6, Command.PRECHARGE, 0, 0), (3, Command.ACTIVATE, 0, 0)]),
    (Violation.RFC, initialise(last=TIMING.rfc - 1)),
    (Violation.RAS, [*OPEN, (5, Command.PRECHARGE, 0, 0)]),
    (Violation.RAS, [*OPEN, (5, Command.PRECHARGE, 3, ALL)]),
    (Violation.RAS_MAX, [*OPEN, (TIMING.ras_max + 1, Command.PRECHARGE, 0, 0)]),
    (Violation.RCD, [*OPEN, (2, Command.READ, 0, 0)]),
    (Violation.RCD, [*OPEN, (2, Command.WRITE, 0, 0)]),
    (Violation.RP, [*OPEN, (8, Command.PRECHARGE, 0, 0), (2, Command.ACTIVATE, 0, 0)]),
    (Violation.RP, [*OPEN, (8, Command.PRECHARGE, 0, 0), (2, Command.REFRESH, 0, 0)]),
    (Violation.RP, [*OPEN, (8, Command.PRECHARGE, 0, 0), (2, Command.MODE, 0, MODE_REGISTER)]),
    (Violation.RRD, [*OPEN, (1, Command.ACTIVATE, 1, 0)]),
    (Violation.WR, [*OPEN, (3, Command.WRITE, 0, 0), (4, Command.PRECHARGE, 0, 0)]),
    (Violation.MRD, [*initialise(), (1, Command.ACTIVATE, 0, 0)]),
    (Violation.REFRESH,
     [*initialise(), ((REFRESHES_POSTPONED + 1) * TIMING.refresh + 1, Command.REFRESH, 0, 0)]),
    (Violation.ROW_OPEN, [*OPEN, (20, Command.ACTIVATE, 0, 0)]),
    (Violation.ROW_OPEN, [*OPEN, (20, Command.REFRESH, 0, 0)]),
    (Violation.ROW_OPEN, [*OPEN, (20, Command.MODE, 0, MODE_REGISTER)]),
    (Violation.ROW_CLOSED, [*OPEN, (3, Command.READ, 1, 0)]),
    (Violation.ROW_CLOSED, [*OPEN, (6, Command.PRECHARGE, 0, 0), (3, Command.WRITE, 0, 0)]),
    (Violation.NO_SUCH_ROW, [*initialise(), (2, Command.ACTIVATE, 0, 4)]),
    (Violation.BURST_CUT, [*OPEN, (3, Command.READ, 0, 0), (3, Command.READ, 0, 4)]),
    (Violation.BURST_CUT, [*OPEN, (3, Command.READ, 0, 0), (3, Command.PRECHARGE, 0, 0)]),
    (Violation.CONTENTION, [*OPEN, (3, Command.READ, 0, 0), (7, Command.WRITE, 0, 0)]),
]


@pytest.mark.parametrize(("broken", "commands"), BROKEN)
def test_broken_rules(broken, commands):
    """One cycle, or one bit, less than a legal sequence."""
    assert violation(commands) == broken


def test_clock_enable_must_stay_high():
    assert violation([*OPEN, (9, Command.PRECHARGE, 0, 0)],
                     cke=sum(gap for gap, *_ in OPEN) + 3) == Violation.UNSUPPORTED


def test_a_word_that_is_not_driven():
    commands = [*OPEN, (3, Command.WRITE, 0, 0), (5, Command.PRECHARGE, 0, 0)]
    assert violation(commands, drive=3) == Violation.NOT_DRIVEN
    assert violation(commands, drive=3, masks=[0, 0, 0, 3]) == Violation.NONE


def test_every_rule_is_tested():
    tested = {broken for broken, _ in BROKEN} | {Violation.NONE, Violation.NOT_DRIVEN}
    assert tested == set(Violation)


def test_the_first_violation_stays():
    assert violation([*OPEN, (2, Command.READ, 0, 0), (1, Command.ACTIVATE, 0, 0)]) \
        == Violation.RCD


def test_limits_of_the_ulx3s():
    """In cycles, by hand."""
    fast, slow = (SdramTiming.ulx3s(clock_hz=mhz * 1_000_000) for mhz in (120, 100))
    names = ("rc", "rfc", "ras", "rcd", "rp", "rrd", "wr", "mrd", "refresh", "power_up", "ras_max")
    assert [getattr(fast, name) for name in names] \
        == [8, 8, 6, 3, 3, 2, 2, 2, 937, 24_000, 12_000]
    assert [getattr(slow, name) for name in names] == [7, 7, 5, 3, 3, 2, 2, 2, 781, 20_000, 10_000]


def test_arguments():
    with pytest.raises(TypeError, match="timing must be a SdramTiming, not 5"):
        SdramChip(5)
    with pytest.raises(ValueError, match="rows must be a power of two from 2 to 8192, not 3"):
        SdramChip(TIMING, rows=3)
    with pytest.raises(ValueError, match="clock_hz must be a positive integer, not 0"):
        SdramTiming.ulx3s(clock_hz=0)
