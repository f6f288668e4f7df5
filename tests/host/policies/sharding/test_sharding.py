import itertools

import numpy as np
import pytest

from moeaccel.host.errors import InvalidOption
from moeaccel.host.policies.errors import UnknownPolicy
from moeaccel.host.policies.sharding import SHARDINGS, sharding
from moeaccel.host.policies.sharding.affinity import Affinity
from moeaccel.host.policies.sharding.base import Shards, packed
from moeaccel.host.policies.sharding.contiguous import Contiguous
from moeaccel.host.policies.sharding.eplb import EPLB
from moeaccel.host.policies.sharding.row_split import RowSplit
from moeaccel.host.traces.presets import generate


def routes(seed=0, tokens=400, layers=3, experts=8, k=2):
    rng = np.random.default_rng(seed)
    ids = np.argsort(rng.random((tokens, layers, experts)) * np.arange(1, experts + 1), axis=2)
    return ids[..., :k]


@pytest.mark.parametrize("name", list(SHARDINGS))
def test_every_expert_is_somewhere_once(name):
    ids = routes()
    ids[0, 0, 1] = -1
    shards = SHARDINGS[name](n_devices=4).shard(ids, 8)
    assert shards.share.shape == (3, 4, 8) and np.allclose(shards.share.sum(1), 1)
    counts = SHARDINGS[name].counts(ids, 8)
    assert np.allclose(shards.loads(counts).sum(1), counts.sum(1)) and counts.sum() == 400 * 6 - 1


def test_contiguous_and_row_split():
    ids = routes()
    uses = Contiguous.counts(ids, 8)
    found = Contiguous(n_devices=2).shard(ids, 8)
    assert found.share[0].tolist() == [[1] * 4 + [0] * 4, [0] * 4 + [1] * 4]
    assert found.loads(uses)[0].tolist() == [uses[0, :4].sum(), uses[0, 4:].sum()]
    assert found.imbalance(uses) > 1.2
    assert RowSplit(n_devices=4).shard(ids, 8).imbalance(uses) == pytest.approx(1)
    assert found.imbalance(uses * 0) == 1


def test_packs_are_even_and_have_room():
    weights = np.array([9.0, 1, 1, 1, 5, 5, 1, 1])
    pack = packed(weights, 2, 4)
    assert np.bincount(pack).tolist() == [4, 4]
    loads = np.bincount(pack, weights)
    assert abs(loads[0] - loads[1]) <= 2


def test_replicas_make_the_busiest_lighter():
    ids = routes()
    uses = EPLB.counts(ids, 8)
    plain = EPLB(n_devices=4).shard(ids, 8)
    spare = EPLB(n_devices=4, spare=4).shard(ids, 8)
    assert Contiguous(n_devices=4).shard(ids, 8).imbalance(uses) > plain.imbalance(uses)
    assert plain.imbalance(uses) > spare.imbalance(uses) >= 1
    busiest = uses[0].argmax()
    assert (spare.share[0, :, busiest] > 0).sum() >= 2 or spare.share[0, :, busiest].max() == 1
    # Slots: no device has more than its part.
    replicas = (spare.share[0] > 0).sum(1)
    assert replicas.max() <= 3


def test_affinity_keeps_followers_together():
    """Expert 7 - e always follows expert e: nothing need cross."""
    first = np.random.default_rng(0).integers(0, 8, (300, 1, 1))
    ids = np.concatenate((first, 7 - first, first), axis=1)
    assert Affinity(n_devices=4).shard(ids, 8).stays(ids) == 1
    assert Contiguous(n_devices=4).shard(ids, 8).stays(ids) < 0.5


def test_affinity_is_near_the_best_of_all():
    ids = routes(1, layers=2, experts=6)
    found = Affinity(n_devices=2).shard(ids, 6)
    first = found.share[0]
    best = 0.0
    for chosen in itertools.combinations(range(6), 3):
        second = np.zeros((2, 6))
        second[0, list(chosen)] = 1
        second[1] = 1 - second[0]
        best = max(best, Shards(np.stack((first, second))).stays(ids))
    assert found.stays(ids) == pytest.approx(best, abs=1e-9)


def test_routes_of_a_model_have_affinity():
    trace = generate("deepseek-v2-lite", requests=4, tokens=128, seed=5)
    learn, test = (trace.select(requests=part, layers=range(8, 12)).ids
                   for part in ([0, 1, 2], [3]))
    stays = {name: SHARDINGS[name](n_devices=4).shard(learn, 64).stays(test)
             for name in ("contiguous", "affinity")}
    assert stays["affinity"] > stays["contiguous"] + 0.03


def test_what_is_out_of_range_is_named():
    with pytest.raises(InvalidOption, match="n_devices must be at least 1, not 0"):
        Contiguous(n_devices=0)
    with pytest.raises(InvalidOption, match="n_devices must be at most the 8 experts"):
        Contiguous(n_devices=9).shard(routes(), 8)
    with pytest.raises(InvalidOption, match="spare must be at least 0"):
        EPLB(n_devices=2, spare=-1)
    with pytest.raises(UnknownPolicy, match=r"sharding must be one of affinity, contiguous, eplb"):
        sharding("exflow")
    assert sharding("eplb") is EPLB
