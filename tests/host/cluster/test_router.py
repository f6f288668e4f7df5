"""Layers of a cluster that route: the bits of one device, whichever shard says where x goes."""

from contextlib import ExitStack

import numpy as np
import pytest
import torch

from moeaccel.config import preset
from moeaccel.host import Router, errors, open_device
from moeaccel.host.cluster import Cluster
from tests.host.cluster.test_cluster import D_MODEL, EXPERTS, GRID, SHARDS, SHARED, Losing, weights

CONFIG = preset("tiny").replace(name="tiny with a router", router=("softmax",))
SETTINGS = {"top_k": 3, "renormalize": "sum"}


def router(seed=0, experts=EXPERTS, d_model=D_MODEL, **more):
    rng = np.random.default_rng(seed)
    return Router(rng.standard_normal((experts, d_model)).astype(np.float32) / 4,
                  **SETTINGS | more)


def tokens(count=20):
    return np.random.default_rng(9).standard_normal((count, D_MODEL)).astype(np.float32)


def opened(stack, *configs):
    return [stack.enter_context(open_device(Losing(config, memory_bytes=1 << 22), config=config))
            for config in configs]


@pytest.fixture
def devices():
    with ExitStack() as stack:
        yield opened(stack, *[CONFIG] * SHARDS)


@pytest.fixture(scope="module")
def alone():
    """What one device gives: y, ids and weights."""
    with open_device("golden", config=CONFIG, memory_bytes=1 << 24) as device:
        moe = device.load_moe(router(), *weights(), grid_exponent=GRID)
        return moe.compute(tokens())


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert np.array_equal(one, other)


@pytest.mark.parametrize("share", ["contiguous", "eplb"])
def test_it_has_the_bits_of_one_device(devices, alone, share):
    with Cluster(devices) as cluster:
        moe = cluster.load_moe(router(), *weights(), share=share, grid_exponent=GRID)
        assert moe.router_shard == 0 and moe.router.settings.top_k == 3
        before = [device.counters()["commands"] for device in devices]
        found = moe.compute(tokens())
        assert_same(found, alone)
        # One command more where it is routed.
        assert [device.counters()["commands"] - count
                for device, count in zip(devices, before, strict=True)] == [2, 1, 1]
        assert_same((moe(tokens()), *moe.route(tokens())), alone)
        narrow = torch.from_numpy(tokens()).bfloat16()
        y, ids, scores = moe.compute(narrow)
        assert (y.dtype, ids.dtype, scores.dtype) == (torch.bfloat16, torch.int64, torch.float32)
        wide = moe.compute(narrow.float())
        assert torch.equal(y, wide[0].bfloat16())
        assert_same((ids, scores), wide[1:])


def test_shared_experts_are_on_every_device(devices):
    with open_device("golden", config=CONFIG, memory_bytes=1 << 24) as device:
        expected = device.load_moe(router(), *weights(), **SHARED, grid_exponent=GRID)(tokens())
    with Cluster(devices) as cluster:
        moe = cluster.load_moe(router(), *weights(), **SHARED, grid_exponent=GRID)
        assert np.array_equal(moe(tokens()), expected)
        assert sum(piece.shared for piece in moe.experts.pieces) == 2 * SHARDS


def test_layers_are_routed_in_turn(devices):
    before = [device.memory.free_bytes for device in devices]
    with Cluster(devices) as cluster:
        layers = [cluster.load_moe(router(), *weights()) for _ in range(4)]
        assert [layer.router_shard for layer in layers] == [0, 1, 2, 0]
        layers[1].close()
        assert layers[1].closed and layers[1].router_shard is None
        assert cluster.load_moe(router(), *weights()).router_shard == 1
        with pytest.raises(errors.DeviceClosed, match="layer must not be used after it was closed"):
            layers[1](tokens())
    assert [device.memory.free_bytes for device in devices] == before


def test_a_lost_device_that_routes_is_named_and_its_router_moves_when_asked(devices, alone):
    with Cluster(devices) as cluster:
        cluster.load_moe(router(), *weights())
        moe = cluster.load_moe(router(), *weights(), grid_exponent=GRID)
        assert moe.router_shard == 0  # the first is gone with its name
        devices[0].transport.lost = True
        with pytest.raises(errors.ShardLost, match=(
                r"shard 0, device of .* must route a layer, but is lost: device must answer.*"
                r"cluster\.reload\(shard\) loads its experts and routers elsewhere")) as found:
            moe(tokens())
        assert found.value.shard == 0 and cluster.lost == {0}
        with pytest.raises(errors.ShardLost, match="must route a layer, but was lost before"):
            moe.route(tokens())
        cluster.reload(0)
        assert moe.router_shard == 1
        assert_same(moe.compute(tokens()), alone)


def test_a_cluster_that_reloads_goes_on(devices, alone):
    with Cluster(devices, on_loss="reload") as cluster:
        moe = cluster.load_moe(router(), *weights(), grid_exponent=GRID)
        for lost in (0, 1):
            devices[lost].transport.lost = True
            assert_same(moe.compute(tokens()), alone)
            assert moe.router_shard == lost + 1
        assert cluster.lost == {0, 1}
        devices[2].transport.lost = True
        with pytest.raises(errors.ShardLost, match="but no other of 3 is left"):
            moe(tokens())


def test_a_device_that_works_gives_its_router_away(devices, alone):
    before = devices[0].memory.free_bytes
    with Cluster(devices) as cluster:
        moe = cluster.load_moe(router(), *weights(), grid_exponent=GRID)
        cluster.reload(0)
        assert devices[0].memory.free_bytes == before and moe.router_shard == 1
        assert_same(moe.compute(tokens()), alone)


def test_the_router_is_what_it_was_when_it_was_loaded(devices, alone):
    given = router()
    with Cluster(devices) as cluster:
        moe = cluster.load_moe(given, *weights(), grid_exponent=GRID)
        given.weight[:] = 0
        cluster.reload(0)
        assert_same(moe.compute(tokens()), alone)


def test_only_devices_with_a_router_route(alone):
    with ExitStack() as stack:
        devices = opened(stack, preset("tiny"), CONFIG, preset("tiny"))
        with Cluster(devices, on_loss="reload") as cluster:
            moe = cluster.load_moe(router(), *weights(), grid_exponent=GRID)
            assert moe.router_shard == 1
            assert_same(moe.compute(tokens()), alone)
            devices[1].transport.lost = True
            with pytest.raises(errors.LimitExceeded, match="there is no router in config 'tiny'"):
                moe(tokens())


def test_what_is_refused(devices):
    before = [device.memory.free_bytes for device in devices]
    with Cluster(devices) as cluster:
        for given, error, message in (
                (router(gates="sigmoid", shared=1, experts=EXPERTS + 1), errors.InvalidOption,
                 "gates must be none, not those of 1 shared experts"),
                (router(weight_on="input"), errors.LimitExceeded, "weight_on must be 'output'"),
                (Router(experts=EXPERTS, top_k=2), errors.InvalidOption, "router must have a"),
                (router(score="sigmoid"), errors.LimitExceeded, "score must be one of softmax"),
                (router(experts=4), errors.InvalidTensor, "must have E = 4 experts and H = 64"),
                (router(d_model=32), errors.InvalidTensor, "must have E = 8 experts and H = 32")):
            with pytest.raises(error, match=message):
                cluster.load_moe(given, *weights())
        assert [device.memory.free_bytes for device in devices] == before
        moe = cluster.load_moe(router(), *weights())
        with pytest.raises(errors.InvalidTensor, match=r"x must have the shape \(T, 64\)"):
            moe(tokens()[:, :32])
        bad = tokens()
        bad[12, 3] = np.inf
        with pytest.raises(errors.NonFiniteInput) as found:
            moe(bad)
        assert found.value.token == 12
