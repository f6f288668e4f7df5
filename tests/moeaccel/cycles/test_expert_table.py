"""When the expert table's block asks for entries, and when it hands experts out."""

import numpy as np
import pytest

from moeaccel.config import PRESETS
from moeaccel.cycles.expert_table import ENTRIES, ExpertTable
from moeaccel.cycles.job import Job
from moeaccel.cycles.memory_port import READ_CYCLES, MemoryPort
from moeaccel.cycles.schedule import Schedule
from moeaccel.formats import weight_format
from moeaccel.image import Section

CONFIG = PRESETS["small"]
BEGIN = 100


def run(known, *, sections=2, latency=10, take=lambda expert, cycle: cycle):
    """Let the table run alone, with experts that become known in those cycles; return the cycles of
    requests, offers, and takings by expert."""
    ids = np.arange(len(known) or 1)[:, None] - (not known)
    fmt = weight_format("mxint8")
    shapes = (Section(fmt, 512, 256, 2), Section(fmt, 256, 256, 2))[:sections]
    job = Job(CONFIG, dict.fromkeys(range(len(known)), shapes), ids, 64, 256, 256, 1, latency,
              False)
    schedule, port, asked = Schedule(), MemoryPort(latency), []
    read = port.read
    port.read = lambda cycle, beats: (asked.append(cycle), read(cycle, beats))[1]
    table = ExpertTable(job, schedule, port)

    def taker():
        cycle = 0
        for expert, offered in table.offered.items():
            yield offered
            cycle = take(expert, max(cycle + 1, offered.cycle))
            schedule.set(table.taken[expert], cycle)

    schedule.start(0, taker())
    table.start(known)
    while schedule.next < 1 << 60:
        schedule.resume()
    return (asked, [event.cycle for event in table.offered.values()],
            [event.cycle for event in table.taken.values()])


def test_it_asks_three_cycles_behind_who_becomes_known():
    asked, _, _ = run([BEGIN, BEGIN + 1, BEGIN + 4, BEGIN + 90])
    # NUMBER, ADDRESS, ASK
    assert asked == [BEGIN + 3, BEGIN + 6, BEGIN + 9, BEGIN + 93]


@pytest.mark.parametrize(("sections", "cycles"), [(1, 14 + 4), (2, 19 + 4 + 4)])
def test_an_entry_is_checked_section_by_section(sections, cycles):
    """256 elements are 8 steps, of 4 bits."""
    asked, offered, _ = run([BEGIN], sections=sections, latency=50)
    last = asked[0] + READ_CYCLES + 50  # 64 bytes are one beat
    assert offered == [last + cycles]


def test_the_next_entry_is_checked_when_one_is_taken():
    _, offered, taken = run([BEGIN] * 3, take=lambda expert, cycle: cycle + 100)
    assert [there - cycle for there, cycle in zip(offered[1:], taken, strict=False)] == [24, 24]


def test_sixteen_entries_at_most_are_ahead():
    asked, offered, taken = run(
        [BEGIN] * 20, take=lambda expert, cycle: cycle + 1000 * (not expert))
    # The first is being offered, sixteen wait.
    assert [cycle < taken[0] for cycle in asked] == [True] * (ENTRIES + 1) + [False] * 3
    assert asked[ENTRIES + 1] == taken[0] + 2
    assert offered == sorted(offered)


def test_no_expert_has_tokens():
    assert run([]) == ([], [], [])
