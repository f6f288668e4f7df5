"""No bit depends on when memory answers: one AXI channel at a time is slow to the extreme.

Every call has tokens without an expert, whose rows of zeros are still on their way when the first
results come, beside tokens whose partial sums go through the workspace.
"""

from __future__ import annotations

import numpy as np
import pytest

from moeaccel.config import PRESETS
from moeaccel.sim import MemoryModel, StallModel
from tests.support.pair import draw_experts
from tests.system.test_channels import TWO

SIZE = 1 << 20
EXPERTS, D_MODEL, D_EXPERT = 3, 64, 32
WEIGHTS = draw_experts(np.random.default_rng(0), EXPERTS, D_MODEL, D_EXPERT)

SLOW = {
    **{f"write latency {n}": {"write_latency": n} for n in (100, 450, 500, 550, 600, 5000, 20_000)},
    **{f"read latency {n}": {"read_latency": n} for n in (300, 5000)},
    **{f"{name} pauses": {"stalls": StallModel(**{name: 0.9}, length=30)}
       for name in ("ar", "r", "aw", "w", "b")},
    "one at a time": {"max_reads": 1, "max_writes": 1, "read_latency": 200, "write_latency": 700},
    "reads overtake": {"reorder": True, "interleave": True, "write_latency": 3000,
                       "stalls": StallModel(r=0.5, length=9)},
}
"""What memory does, apart from answering at once."""

IDS = {
    "none, then one": [[-1], [0]],
    "none at the end": [[0], [1], [-1]],
    "none among partial sums": [[0, 1], [-1, 1], [-1, -1], [2, 2], [0, 2], [1, 0], [-1, 9]],
    "nowhere": [[-1], [EXPERTS], [-1]],
}
"""Experts of each call."""


def memory(slow):
    return MemoryModel(
        **{"size": SIZE, "read_latency": 1, "write_latency": 1, "seed": 3} | SLOW.get(slow, {}))


def calls():
    """Return the arguments of each call."""
    rng = np.random.default_rng(1)
    for ids in IDS.values():
        ids = np.array(ids)
        yield (rng.standard_normal((len(ids), D_MODEL), np.float32), ids,
               rng.standard_normal(ids.shape).astype(np.float32))


def hold(pair):
    """Run every call alone, then all of them in flight together, on both devices."""
    def script(device):
        with device.load_experts(*WEIGHTS) as experts:
            alone = [experts(*call) for call in calls()]
            handles = [experts.submit(*call) for call in calls() for _ in range(2)]
            return np.concatenate(alone + [experts.sync(handle) for handle in handles])

    y = pair.same(script)
    pair.check()
    one_by_one = sum(map(len, IDS.values()))
    assert np.array_equal(y[:2], y[one_by_one:one_by_one + 2]) and y.any(axis=1).sum() >= 3 * 7


@pytest.mark.timeout(900)  # the first run builds the model
@pytest.mark.parametrize("slow", SLOW)
def test_one_channel(pair_of, slow):
    with pair_of(PRESETS["tiny"], memory=memory(slow)) as pair:
        hold(pair)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("port", "slow"), [
    *((0, slow) for slow in ("write latency 550", "write latency 5000", "w pauses")),
    *((port, slow) for slow in ("read latency 5000", "ar pauses", "r pauses", "reads overtake")
      for port in (0, 1, "all")),
])
def test_two_channels(pair_of, port, slow):
    models = [memory(slow if port in (i, "all") else None) for i in range(TWO.channels)]
    with pair_of(TWO, memory=models) as pair:
        hold(pair)
