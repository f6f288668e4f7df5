"""A reset of the accelerator at any time, while its memory goes on: the next command runs.

The simulation is strict: a burst that is dropped, changed or left half ends a test.
"""

import numpy as np
import pytest

from moeaccel.config import PRESETS
from moeaccel.sim import MemoryModel, StallModel
from tests.support.pair import assert_same_bits, draw_experts, read_register

TWO = PRESETS["tiny"].replace(name="tiny, two channels", channels=2, quantiser_lanes=1)
SIZE = 1 << 20
EXPERTS, D_MODEL = 3, 64
WEIGHTS = draw_experts(np.random.default_rng(0), EXPERTS, D_MODEL, 32)


def draw_call(tokens, seed):
    """Return a call of several passes with partial sums and a token without an expert."""
    rng = np.random.default_rng(seed)
    ids = np.tile(np.arange(EXPERTS), (tokens, 1))
    ids[1] = -1
    return (rng.standard_normal((tokens, D_MODEL), np.float32), ids,
            rng.standard_normal((tokens, EXPERTS)).astype(np.float32))


CALL, LONG = draw_call(7, 1), draw_call(20, 2)


def late_memory(seed):
    """Draw a memory that answers late, and may take long for what it takes."""
    rng = np.random.default_rng(seed)
    return MemoryModel(
        size=SIZE, seed=seed, read_latency=int(np.exp(rng.uniform(0, 7))),
        write_latency=int(np.exp(rng.uniform(0, 7))), reorder=True, interleave=bool(seed % 2),
        max_reads=int(rng.choice([1, 4, 64])), max_writes=int(rng.choice([1, 4])),
        stalls=StallModel(**{channel: rng.choice([0.0, 0.3, 0.9])
                             for channel in ("ar", "r", "aw", "w", "b")}, length=5))


@pytest.mark.timeout(900)  # the first run builds the model
@pytest.mark.parametrize("memory", [False, True], ids=["memory goes on", "memory is reset"])
@pytest.mark.parametrize("seed", [
    0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
@pytest.mark.parametrize("config", [PRESETS["tiny"], TWO], ids=["one channel", "two channels"])
def test_reset_at_any_time(pair_of, config, seed, memory):
    with pair_of(config, memory=late_memory(seed), watchdog_cycles=0) as pair:
        device, simulation = pair.rtl, pair.simulation
        layers = {d: d.load_experts(*WEIGHTS) for d in pair.devices}
        layer, expected = layers[device], layers[pair.golden](*CALL)
        rng = np.random.default_rng([seed, memory])
        assert_same_bits(layer(*LONG), layers[pair.golden](*LONG))
        length = layer.last.cycles
        moments = [*range(5 * seed, 180, 18), *rng.integers(100, length + 200, 14)]
        for moment in moments:
            layer.submit(*LONG)
            simulation.run(int(moment), until_irq=False)
            simulation.reset(cycles=int(rng.choice([2, 3, 40])), memory=memory)
            if moment % 2:
                simulation.run(int(rng.integers(1, 100)), until_irq=False)
                simulation.reset(memory=memory)
            device.reset()
            assert read_register(device, "STATUS") == 0
            assert_same_bits(layer(*CALL), expected)
        pair.reset()
        pair.same(lambda d: layers[d](*CALL))
        pair.check()
