"""Memory that is slow in one way at a time, and memory that nobody wrote."""

import numpy as np
import pytest

from moeaccel.sim import CoSimulation, MemoryModel
from moeaccel.sim.errors import ProtocolError
from tests.sim import copy_engine as engine
from tests.sim.cosim.test_simulation import SIZE, SOURCE, TARGET, copy, start

BURST = 16  # beats of the engine's


def memory(**fields):
    return MemoryModel(**{"size": SIZE, "read_latency": 1, "write_latency": 1} | fields)


@pytest.mark.parametrize("delay", [1, 50, 3000])
def test_the_last_beat_of_every_burst_comes_late(model64, delay):
    bursts = 5
    with CoSimulation(model64, memory=memory()) as cosim:
        plain = copy(cosim, beats=BURST * bursts)
    with CoSimulation(model64, memory=memory(last_beat_delay=delay)) as cosim:
        late = copy(cosim, beats=BURST * bursts)
    assert late - plain == pytest.approx(bursts * (delay - 1), abs=2)


def test_a_burst_of_one_beat_is_a_last_beat(model64):
    with CoSimulation(model64, memory=memory(last_beat_delay=700)) as cosim:
        copy(cosim, beats=1)
        assert cosim.stats().read_busy_cycles == 701


@pytest.mark.parametrize("name", ["read_latency", "write_latency"])
def test_each_burst_has_a_latency_of_its_own(model64, name):
    """Log-uniform: between the bounds, and most of them far from the upper one."""
    fields = {name: 8, f"{name}_most": 4096, "max_reads": 1, "max_writes": 1}
    found = []
    with CoSimulation(model64, memory=memory(**fields)) as cosim:
        for seed in range(200):
            found.append(copy(cosim, beats=1, seed=seed))
    with CoSimulation(model64, memory=memory(**{name: 8})) as cosim:
        least = copy(cosim, beats=1)
    extra = np.array(found) - least + 8
    assert 8 <= extra.min() < 16 and 2048 < extra.max() <= 4096
    assert 90 < np.median(extra) < 360  # the middle of 2^3 to 2^12
    with CoSimulation(model64, memory=memory(**fields)) as cosim:
        assert [copy(cosim, beats=1, seed=seed) for seed in range(200)] == found


def test_what_nobody_wrote_is_not_read(model64):
    with CoSimulation(model64, memory=memory(check_unwritten=True), strict=False) as cosim:
        copy(cosim, beats=BURST)  # the source was written by the back door
        start(cosim, beats=BURST, source=TARGET, target=TARGET + 8192)  # and that by the model
        cosim.wait_irq(max_cycles=10_000)
        cosim.check()
        cosim.reg_write(engine.STATUS, 0)
        start(cosim, beats=BURST, source=SOURCE + (1 << 16))
        cosim.wait_irq(max_cycles=10_000)
        with pytest.raises(ProtocolError, match="which nobody wrote"):
            cosim.check()
        assert cosim.violation_count == BURST


def test_a_write_of_a_part_of_a_block(model64):
    with (CoSimulation(model64, memory=memory(check_unwritten=True)) as cosim,
          pytest.raises(ProtocolError, match="write of a part of 64 bytes")):
        copy(cosim, beats=3)


def test_adversaries_are_reproducible_and_within_bounds():
    found = [MemoryModel.adversarial(seed) for seed in range(400)]
    assert found == [MemoryModel.adversarial(seed) for seed in range(400)]
    assert len(set(found)) == 400
    latencies = [max(m.read_latency, m.read_latency_most) for m in found]
    assert max(latencies) > 10_000 and max(latencies) <= 20_000
    assert sum(latency == 1 for latency in latencies) > 100
    stalls = [m.stalls for m in found]
    for name in ("ar", "r", "aw", "w", "b"):
        assert max(getattr(s, name) for s in stalls) == 0.99
    alone = [s for s in stalls if sum(getattr(s, n) > 0 for n in ("ar", "r", "aw", "w", "b")) == 1]
    assert len(alone) > 100 and {s.length for s in alone} >= {1, 100}
    assert any(m.max_reads == 1 for m in found) and any(m.max_writes == 1 for m in found)
    assert any(m.last_beat_delay for m in found) and any(m.interleave for m in found)
