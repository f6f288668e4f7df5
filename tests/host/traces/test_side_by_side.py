"""Caches side by side against one cache after the other."""

import numpy as np
import pytest

from moeaccel.host.policies.residency import LFU, LRU, Belady, DecayedLFU, replay
from moeaccel.host.traces.presets import generate
from moeaccel.host.traces.statistics.sample import Sample
from moeaccel.host.traces.statistics.side_by_side import best_hits, hits, residents


@pytest.mark.parametrize("model", ["deepseek-v2-lite", "mixtral-8x7b"])
def test_every_cache_hits_as_often_as_alone(model):
    """Of equal experts the same goes, so that counts are the same, and not nearly."""
    stream = Sample(generate(model, requests=1, tokens=60, seed=1)).stream(60, layers=3)
    _, layers, experts = stream.shape
    slots = [0, 1, 2, 3, experts // 4, experts // 2, experts - 1, experts]
    found, best = hits(stream, slots), best_hits(stream, slots)
    assert found[:, -1].min() > found[:, 1].max() > 0
    for index, size in enumerate(slots):
        options = {"n_layers": layers, "n_experts": experts, "slots": size}
        alone = [replay(policy, stream).hits.sum() for policy in (
            LRU(**options), LFU(**options), DecayedLFU(**options),
            Belady(future=stream, slots=size))]
        assert [*found[:, index], best[index]] == alone, size


def test_who_is_resident_and_for_how_long():
    """Long enough for the decayed scores to be scaled down, with steps that use nothing."""
    random = np.random.default_rng(5)
    stream = random.random((600, 2, 8)) < 0.2
    policy = DecayedLFU(n_layers=2, n_experts=8, slots=4)
    for used, found in zip(stream, residents(stream, [4], ["decayed LFU"]), strict=True):
        assert (found[0, 0] == policy.resident).all()
        policy.step(used)
