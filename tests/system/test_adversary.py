"""No bit, no count and no completion depends on when memory answers.

Cases are those of ``moeaccel soak``, with less time for each: one AXI channel or several are slow
to the extreme, while commands with tokens without experts, with partial sums, with errors, that are
aborted or dropped by a reset, are in flight. A seed that fails here is made smaller by
``moeaccel soak --case``, with the line that the failure shows. Four channels are left to the slow
tests and to ``moeaccel soak``: nothing else here needs a model of them, which takes long to build.
"""

from dataclasses import replace

import pytest

from moeaccel.config import PRESETS
from moeaccel.sim import StallModel
from moeaccel.sim.cases import ENDS, PROMPT, Call, Case, draw_case
from moeaccel.sim.soak import check
from tests.system.test_channels import TWO
from tests.system.test_routing import CONFIG as ROUTER

BUDGET = {"tiny": 40_000, "small": 12_000}
"""Cycles of a case: a fifth of a second."""

SEEDS = [*(("tiny", 1, seed) for seed in range(40)), *(("tiny", 2, seed) for seed in range(20)),
         *(("small", 1, seed) for seed in range(12))]


def hold(model_of, case):
    """Run a case; two channels are those that other tests have built."""
    config = TWO if case.channels == 2 else case.parameters
    wrong = check(case, model_of(config), config)
    assert wrong is None, f"{wrong}\nmoeaccel soak --case '{case.to_json()}'"


@pytest.mark.timeout(900)  # the first run builds the models
@pytest.mark.parametrize(("config", "channels", "seed"), SEEDS)
def test_drawn(model_of, config, channels, seed):
    hold(model_of, draw_case(seed, config, channels, budget=BUDGET[config]))


@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(16))
def test_drawn_with_a_router(monkeypatch, model_of, seed):
    """MOE and ROUTE among the others, on the model that tests of the router have built."""
    monkeypatch.setitem(PRESETS, "tiny", ROUTER)
    hold(model_of, draw_case(seed, "tiny", 1, budget=BUDGET["tiny"]))


SLOW = {
    "as prompt as it may be": PROMPT,
    "reads take 20,000 cycles": replace(PROMPT, read_latency=20_000),
    **{f"writes take {n} cycles": replace(PROMPT, write_latency=n)
       for n in (100, 450, 500, 550, 600, 5000, 20_000)},
    **{f"pauses of {name}": replace(PROMPT, stalls=StallModel(**{name: 0.99}, length=5))
       for name in ("ar", "aw", "w", "b")},
    "pauses of r": replace(PROMPT, stalls=StallModel(r=0.97)),  # there are most beats
    "one burst at a time": replace(PROMPT, max_reads=1, max_writes=1, read_latency=300,
                                   write_latency=700),
    "the last beat comes late": replace(PROMPT, last_beat_delay=1000),
    "reads overtake each other": replace(PROMPT, reorder=True, interleave=True,
                                         read_latency_most=3000, write_latency=3000),
}

MIXED = (
    Call(experts=2, ids=((-1,), (0,)), activation_bits=16),
    Call(d_in=64, experts=3, ids=((0, 1), (-1, 2), (5, -1), (2, 2), (1, 0)), weight_format="mxfp4"),
    Call(d_in=64, experts=3, ids=((-1,), (3,), (-1,))),
    Call(d_in=64, experts=3, ids=((0,), (1,), (-1,))),
    Call(experts=0, ids=((),) * 5, weight_format="mxint8"),
    Call(experts=2, ids=((1, 0),) * 6 + ((-1, -1),), activation_bits=16, weight_format="int4_g128"),
)


@pytest.mark.parametrize("slow", SLOW)
def test_one_thing_at_a_time(model_of, slow):
    """Rows of zeros, partial sums, a matrix: each alone, then all in flight together."""
    for calls in (*((call,) for call in MIXED), MIXED):
        hold(model_of, Case(calls=calls, memories=(SLOW[slow],)))


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("channels", "slow"), [
    *(((0,), slow) for slow in ("writes take 550 cycles", "writes take 5000 cycles",
                                "pauses of w")),
    *((channels, slow) for channels in ((0,), (1,), (0, 1)) for slow in (
        "reads take 20,000 cycles", "pauses of ar", "pauses of r", "the last beat comes late",
        "reads overtake each other")),
])
def test_some_channels_of_the_device(model_of, channels, slow):
    """Only the first is written to."""
    hold(model_of, Case(channels=TWO.channels, calls=MIXED, memories=tuple(
        SLOW[slow] if channel in channels else PROMPT for channel in range(TWO.channels))))


@pytest.mark.parametrize("end", ENDS[1:])
@pytest.mark.parametrize("slow", ["writes take 5000 cycles", "reads take 20,000 cycles",
                                  "pauses of w", "the last beat comes late"])
def test_the_next_command_after_an_end_is_right(model_of, slow, end):
    for after in (5, 70, 1000, 22_000):
        calls = (replace(MIXED[1], end=end, after=after), MIXED[0])
        hold(model_of, Case(calls=calls, memories=(SLOW[slow],)))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("config", "channels"), [("tiny", 1), ("small", 1), ("tiny", 4)])
def test_many_drawn(model_of, config, channels):
    for seed in range(1000, 1300):
        hold(model_of, draw_case(seed, config, channels, budget=8 * BUDGET[config]))
