"""Layers and calls at random, what the golden model says of them, and a device that hangs."""

import numpy as np

from moeaccel import golden
from moeaccel.config import PRESETS
from moeaccel.host.transports.golden import GoldenTransport
from moeaccel.image import Expert

TINY = PRESETS["tiny"]


def draw_weights(rng, experts=4, d_model=64, d_expert=96):
    gate_up = rng.standard_normal((experts, 2 * d_expert, d_model), np.float32) / 8
    down = rng.standard_normal((experts, d_model, d_expert), np.float32) / 8
    return gate_up, down


def draw_call(rng, tokens, top_k=2, experts=4, d_model=64):
    x = rng.standard_normal((tokens, d_model), np.float32)
    ids = rng.integers(0, experts, (tokens, top_k))
    return x, ids, rng.random((tokens, top_k), np.float32)


def layer_of(gate_up, down, name="int4_g32"):
    return [Expert.quantise(g, d, name) for g, d in zip(gate_up, down, strict=True)]


def expected_of(loaded, call, layer):
    """Return what the golden model says on the grid of a loaded layer."""
    return golden.experts(*call, layer, grid_exponent=loaded.grid_exponent).y


class Hung(GoldenTransport):
    """A device that stops fetching while ``hang`` is set, until it is reset."""

    hang = False

    def _execute_ring(self):
        if not self.hang:
            super()._execute_ring()

    def _soft_reset(self):
        self.hang = False
        super()._soft_reset()
