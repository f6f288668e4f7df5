"""A pair of devices with a layer, for tests after which both must be in order."""

from __future__ import annotations

import contextlib

import numpy as np

from moeaccel.sim import MemoryModel, StallModel
from tests.support.pair import draw_experts, read_register

SIZE = 1 << 20
EXPERTS, D_MODEL, D_EXPERT = 3, 64, 32
MEMORY = MemoryModel(size=SIZE, read_latency=20, write_latency=20, reorder=True, interleave=True,
                     stalls=StallModel.uniform(0.1, length=3), seed=5)
WEIGHTS = draw_experts(np.random.default_rng(0), EXPERTS, D_MODEL, D_EXPERT)


def draw_call(tokens, seed=1):
    """Return a call in which every token goes to every expert, in several passes."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((tokens, D_MODEL), np.float32),
            np.tile(np.arange(EXPERTS), (tokens, 1)),
            rng.standard_normal((tokens, EXPERTS)).astype(np.float32))


CALL = draw_call(7)
LONG = draw_call(64, seed=2)


class Layers(dict):
    """The layer on each device, by device."""

    def call(self, device):
        return self[device](*CALL)


@contextlib.contextmanager
def open_layers(pair_of):
    """Open a pair that has ``layers``, and of the long call the golden model's y: ``long``."""
    with pair_of("tiny", memory=MEMORY, register_stalls=StallModel.uniform(0.2)) as pair:
        pair.layers = Layers((device, device.load_experts(*WEIGHTS)) for device in pair.devices)
        pair.long = pair.layers[pair.golden](*LONG)
        yield pair


@contextlib.contextmanager
def left_in_order(pair):
    """Give two devices fresh from a reset; what is done to them must leave them in order."""
    pair.reset()
    yield
    pair.simulation.clear_errors()
    for restart in (False, True):
        if restart:
            pair.reset()
        pair.same(pair.layers.call)
    pair.check()
    assert read_register(pair.rtl, "STATUS") == 0


@contextlib.contextmanager
def untouched(pair, *allowed):
    """Assert that the RTL writes nothing but its completion ring and what is allowed."""
    simulation, sides = pair.simulation, pair.rtl._rings._sides
    before = simulation.mem_read(0, SIZE)
    yield
    changed = simulation.mem_view(0, SIZE) != before
    for ring in (sides.submissions, sides.completions):  # the driver writes the first
        changed[ring : ring + sides.ring_bytes] = False
    for first, count in allowed:
        changed[first : first + count] = False
    assert not changed.any(), f"written at {np.flatnonzero(changed)[:8]}"
