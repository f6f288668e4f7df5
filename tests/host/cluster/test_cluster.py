"""Experts on several devices: the bits of one, whoever has which; and devices that are lost."""

from contextlib import ExitStack

import numpy as np
import pytest
import torch

from moeaccel.host import errors, open_device
from moeaccel.host.cluster import Cluster
from moeaccel.host.policies.sharding import SHARDINGS
from moeaccel.host.policies.sharding.eplb import EPLB
from moeaccel.host.transports.golden import GoldenTransport
from tests.support.device import TINY, draw_call, draw_weights

EXPERTS, D_MODEL, D_EXPERT, SHARDS = 8, 64, 96, 3
GRID = -14  # coarse enough that float32 holds every part of a sum


class Losing(GoldenTransport):
    """Is gone when told so."""

    lost = False

    def memory_write(self, address, data):
        if self.lost:
            raise errors.LinkLost("device must answer, but does not")
        super().memory_write(address, data)


def weights():
    return draw_weights(np.random.default_rng(3), EXPERTS, D_MODEL, D_EXPERT)


def call(tokens=20, seed=0):
    x, ids, scores = draw_call(np.random.default_rng(seed), tokens, experts=EXPERTS,
                               d_model=D_MODEL, top_k=3)
    ids[:2] = -1
    ids[2, 1] = EXPERTS
    return x, ids, scores


@pytest.fixture
def devices():
    with ExitStack() as stack:
        yield [stack.enter_context(open_device(Losing(TINY, memory_bytes=1 << 22), config="tiny"))
               for _ in range(SHARDS)]


@pytest.fixture(scope="module")
def alone():
    """What one device gives, whole experts and in blocks, on the chosen grid and on a coarse one.
    """
    found = {}
    with open_device("golden", config="small", memory_bytes=1 << 24) as device:
        for blocks in (1, SHARDS):
            for grid in (None, GRID):
                experts = device.load_experts(*weights(), row_blocks=blocks, grid_exponent=grid)
                found[blocks, grid] = experts(*call()), experts.grid_exponent
        yield found


@pytest.mark.parametrize("share", SHARDINGS)
def test_every_sharding_gives_the_bits_of_one_device(devices, alone, share):
    with Cluster(devices) as cluster:
        experts = cluster.load_experts(*weights(), share=share, routes=call()[1] % EXPERTS,
                                       grid_exponent=GRID)
        blocks = SHARDS if share == "row-split" else 1
        assert np.array_equal(experts(*call()), alone[blocks, GRID][0])
        assert experts.last.rounded == 0 and experts.last.tokens == 20
        assert sum(experts.last.pairs) == blocks * int(
            ((call()[1] >= 0) & (call()[1] < EXPERTS)).sum())
        assert all(experts.last.pairs) and max(experts.last.rows) <= 18
        x, ids, scores = call()
        narrow = torch.from_numpy(x).bfloat16()
        y = experts(narrow, ids, scores)
        wide = experts(narrow.float(), ids, scores)
        assert y.dtype is torch.bfloat16 and torch.equal(y, wide.bfloat16())


@pytest.mark.parametrize("share", ["contiguous", "row-split"])
def test_the_grid_is_that_of_one_device(devices, alone, share):
    """Only elements of which a part has more than 24 bits may differ, in their last place."""
    with Cluster(devices) as cluster:
        experts = cluster.load_experts(*weights(), share=share)
        expected, grid = alone[SHARDS if share == "row-split" else 1, None]
        assert experts.grid_exponent == grid
        y = experts(*call())
        differ = y != expected
        assert int(differ.sum()) <= experts.last.rounded
        assert experts.last.rounded
        assert np.abs(y - expected).max() <= 2 * np.spacing(np.abs(expected).max())


def test_a_coarser_grid_leaves_nothing_to_round(devices):
    with Cluster(devices) as cluster:
        fine = cluster.load_experts(*weights())
        experts = cluster.load_experts(*weights(), coarser=6)
        assert experts.grid_exponent == fine.grid_exponent + 6
        fine.close()
        with open_device("golden", config="tiny", memory_bytes=1 << 22) as device:
            expected = device.load_experts(*weights(), grid_exponent=experts.grid_exponent)(*call())
        assert np.array_equal(experts(*call()), expected) and experts.last.rounded == 0
        assert np.abs(expected - fine_of_one()).max() < 2.0 ** -17


def fine_of_one():
    with open_device("golden", config="tiny", memory_bytes=1 << 22) as device:
        return device.load_experts(*weights())(*call())


def test_tokens_with_one_shard_are_never_rounded_twice(devices, alone):
    with Cluster(devices) as cluster:
        experts = cluster.load_experts(*weights())
        x, ids, scores = call()
        ids = ids[:, :1]
        with open_device("golden", config="tiny", memory_bytes=1 << 22) as device:
            expected = device.load_experts(*weights())(x, ids, scores[:, :1])
        assert np.array_equal(experts(x, ids, scores[:, :1]), expected)
        assert experts.last.rounded == 0


def test_replicas_take_turns(devices):
    with Cluster(devices) as cluster:
        routes = np.zeros((100, 1), int)
        policy = EPLB(n_devices=SHARDS, spare=4)
        experts = cluster.load_experts(*weights(), share=policy, routes=routes)
        assert sum(0 in piece.experts for piece in experts.pieces) > 1
        experts(call(30)[0], np.zeros((30, 1), int), np.ones((30, 1), np.float32))
        of = [piece.shard for piece in experts.pieces if 0 in piece.experts]
        assert [experts.last.pairs[shard] for shard in of] == [30 // len(of)] * len(of)


def test_a_lost_device_is_named_and_its_experts_move_when_asked(devices, alone):
    expected = alone[1, GRID][0]
    with Cluster(devices) as cluster:
        layers = [cluster.load_experts(*weights(), grid_exponent=GRID) for _ in range(2)]
        devices[1].transport.lost = True
        with pytest.raises(errors.ShardLost, match=r"shard 1, device of config 'tiny'.* is lost: "
                                                   "device must answer") as found:
            layers[0](*call())
        assert found.value.shard == 1 and cluster.lost == {1}
        with pytest.raises(errors.ShardLost, match="was lost before"):
            layers[0](*call())
        x, _, scores = call()  # without its experts the layer works
        layers[0](x, np.zeros((20, 3), int), scores)
        cluster.reload(1)
        for layer in layers:
            assert {piece.shard for piece in layer.pieces} == {0, 2}
            assert np.array_equal(layer(*call()), expected)
        devices[0].transport.lost = True
        devices[2].transport.lost = True
        with pytest.raises(errors.ShardLost):
            layers[0](*call())
        with pytest.raises(errors.ShardLost, match="shard 2"):
            cluster.reload(0)  # the last is gone, too
        with pytest.raises(errors.ShardLost, match="but no other of 3 is left"):
            cluster.reload(2)


def test_a_device_that_works_is_emptied(devices, alone):
    before = devices[1].memory.free_bytes
    with Cluster(devices) as cluster:
        moving = cluster.load_experts(*weights(), grid_exponent=GRID)
        cluster.reload(1)
        assert devices[1].memory.free_bytes == before and cluster.lost == {1}
        assert {piece.shard for piece in moving.pieces} == {0, 2}
        assert np.array_equal(moving(*call()), alone[1, GRID][0])
    with Cluster(devices) as cluster:  # what cannot be moved stays, and works
        staying = cluster.load_experts(*weights(), grid_exponent=GRID, keep_host_weights=False)
        with pytest.raises(errors.ShardLost, match="keep_host_weights=True"):
            cluster.reload(1)
        assert not cluster.lost and devices[1].memory.free_bytes < before
        assert np.array_equal(staying(*call()), alone[1, GRID][0])
    with Cluster(devices[:1]) as cluster, pytest.raises(
            errors.ShardLost, match="must not be the last, but no other of 1 is left"):
        cluster.reload(0)
    with Cluster(devices) as cluster:
        for name in ("second_up", "limit_behind", "identity", "calibration"):
            with pytest.raises(errors.InvalidOption, match=f"not {name}"):
                cluster.load_experts(*weights(), **{name: None})


def test_a_cluster_that_reloads_goes_on(devices, alone):
    for share in ("contiguous", "row-split"):
        expected = alone[SHARDS if share == "row-split" else 1, GRID][0]
        devices[1].transport.lost = False
        with Cluster(devices, on_loss="reload") as cluster:
            experts = cluster.load_experts(*weights(), share=share, grid_exponent=GRID)
            devices[1].transport.lost = True
            assert np.array_equal(experts(*call()), expected)
            assert cluster.lost == {1} and not experts.last.pairs[1]


def test_weights_that_were_not_kept_cannot_move(devices):
    with Cluster(devices, on_loss="reload") as cluster:
        experts = cluster.load_experts(*weights(), keep_host_weights=False)
        devices[1].transport.lost = True
        with pytest.raises(errors.ShardLost, match="keep_host_weights=True"):
            experts(*call())


def test_errors_of_a_shard_name_the_callers_token(devices):
    with Cluster(devices) as cluster:
        experts = cluster.load_experts(*weights())
        x, ids, scores = call()
        ids[:, :] = 0
        ids[:7] = -1
        x[12, 3] = np.nan
        with pytest.raises(errors.NonFiniteInput) as found:
            experts(x, ids, scores)
        assert found.value.token == 12
        x[12, 3] = 0
        experts(x, ids, scores)
        assert all(not device.in_flight for device in devices)


def test_memory_comes_back(devices):
    before = [device.memory.free_bytes for device in devices]
    with Cluster(devices) as cluster:
        experts = cluster.load_experts(*weights())
        assert [device.memory.free_bytes for device in devices] != before
        del experts
        assert [device.memory.free_bytes for device in devices] == before
        kept = cluster.load_experts(*weights())
    assert [device.memory.free_bytes for device in devices] == before
    with pytest.raises(errors.DeviceClosed, match="layer must not be used after it was closed"):
        kept(*call())


def test_what_is_refused(devices):
    for given in ([], [devices[0], devices[0]]):
        with pytest.raises(errors.InvalidOption, match="devices of a cluster must be one or more"):
            Cluster(given)
    for given, what in ((None, "not NoneType"), (devices[0], "not Device"),
                        ([devices[0], "golden"], r"not \['Device', 'str'\]")):
        with pytest.raises(errors.InvalidOption, match=f"must be a sequence of Device, .*{what}"):
            Cluster(given)
    with pytest.raises(errors.InvalidOption, match="on_loss must be 'error' or 'reload'"):
        Cluster(devices, on_loss="retry")
    cluster = Cluster(devices)
    for options, why in [
        ({"share": EPLB(n_devices=2)}, "share must be for the 3 devices of this cluster, not for"),
        ({"share": np.ones((3, EXPERTS))}, r"share must be \(3 devices, 8 experts\) and add up"),
        ({"coarser": -1}, "coarser must be at least 0, not -1"),
        ({"row_blocks": 2}, "options of a layer on a cluster must be among .* shared, .*, not ro"),
        ({"weight_format": ["int4_g32"]}, "one for each of 8 experts, not 1"),
    ]:
        with pytest.raises(errors.InvalidOption, match=why):
            cluster.load_experts(*weights(), **options)
    gate_up, down = draw_weights(np.random.default_rng(0), 2, 32, 32)
    with pytest.raises(errors.InvalidOption, match="must divide I = 32"):
        cluster.load_experts(gate_up, down, share="row-split")
    with pytest.raises(errors.InvalidTensor, match=r"gate_up_bias must have the shape \(8, 192\)"):
        cluster.load_experts(*weights(), gate_up_bias=np.zeros((EXPERTS, 64)))
    with pytest.raises(errors.InvalidTensor, match="shared expert 0 must have gate_up"):
        cluster.load_experts(*weights(), shared=(np.zeros((64, 64)), np.zeros((64, 64))))
    with pytest.raises(errors.InvalidTensor, match="must be of as many experts, one or more"):
        cluster.load_experts(gate_up, down[:1])
    with pytest.raises(errors.InvalidOption, match="shard must be from 0 to 2"):
        cluster.reload(3)
    with pytest.raises(errors.InvalidOption, match="shard must be a whole number, from 0 to 2, no"):
        cluster.reload("1")
    with pytest.raises(errors.InvalidTensor, match=r"routes must be integers .*, not float64"):
        cluster.load_experts(*weights(), share="eplb", routes=np.zeros((4, 2)))
    experts = cluster.load_experts(*weights())
    x, ids, scores = call()
    with pytest.raises(errors.InvalidTensor, match=r"x must have the shape \(T, 64\)"):
        experts(x[:, :32], ids, scores)
    with pytest.raises(errors.InvalidTensor, match="ids and weights must have one shape"):
        experts(x, ids[:3], scores)


# -- experts that differ, biases, shared experts
RNG = np.random.default_rng(5)


def drawn(*shape):
    return (RNG.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)


BIASES = {"gate_up_bias": drawn(EXPERTS, 2 * D_EXPERT), "down_bias": drawn(EXPERTS, D_MODEL)}
MIXED = {"weight_format": ["int4_g32", "mxint8"] * (EXPERTS // 2)}
SHARED = {"shared": [(drawn(2 * 64, D_MODEL), drawn(D_MODEL, 64)),
                     (drawn(2 * 160, D_MODEL), drawn(D_MODEL, 160))]}
LAYERS = {
    "biases": BIASES, "mixed": MIXED, "shared": SHARED,
    "all": BIASES | MIXED | SHARED | {"shared_format": "mxfp4", "activation": "gpt_oss",
                                      "limit": 2.0}}


@pytest.mark.parametrize("name", LAYERS)
def test_all_kinds_of_layers_have_the_bits_of_one_device(devices, name):
    options = LAYERS[name]
    with open_device("golden", config="small", memory_bytes=1 << 24) as device:
        chosen = device.load_experts(*weights(), **options).grid_exponent
        alone = device.load_experts(*weights(), **options, grid_exponent=chosen + 6)
        expected = alone(*call())
    for share in ("contiguous", "eplb"):
        with Cluster(devices) as cluster:
            layer = cluster.load_experts(*weights(), share=share, coarser=6, **options)
            assert layer.grid_exponent == chosen + 6
            y = layer(*call())
            assert layer.last.rounded == 0
            assert np.array_equal(y, expected)
            routed = (call()[1] >= 0) & (call()[1] < EXPERTS)
            assert sum(layer.last.pairs) == routed.sum() + 20 * len(options.get("shared", ()))


@pytest.mark.parametrize("names", [("gate_up_bias",), ("down_bias",), tuple(BIASES)],
                         ids="+".join)
def test_a_row_split_has_each_bias_once(devices, alone, names):
    options = {name: 4 * BIASES[name] for name in names}
    with open_device("golden", config="small", memory_bytes=1 << 24) as device:
        chosen = device.load_experts(*weights(), **options, row_blocks=SHARDS)
        layer = device.load_experts(*weights(), **options, row_blocks=SHARDS, grid_exponent=GRID)
        expected = layer(*call())
        first = layer(*call(), leading_blocks=1)
        whole = device.load_experts(*weights(), **options, grid_exponent=GRID)(*call())
    unbiased = alone[SHARDS, GRID][0]
    assert np.linalg.norm(expected - unbiased) > 0.1 * np.linalg.norm(unbiased)
    # As far from whole experts as blocks' own rounding is, and what one block gives is not all.
    assert np.linalg.norm(expected - whole) < 2e-3 * np.linalg.norm(whole)
    assert np.linalg.norm(first - whole) > 0.1 * np.linalg.norm(whole)
    with Cluster(devices, on_loss="reload") as cluster:
        assert (cluster.load_experts(*weights(), share="row-split", **options).grid_exponent
                == chosen.grid_exponent)
        split = cluster.load_experts(*weights(), share="row-split", grid_exponent=GRID, **options)
        assert np.array_equal(split(*call()), expected) and split.last.rounded == 0
        devices[0].transport.lost = True  # that of the down biases
        assert np.array_equal(split(*call()), expected)


def test_shared_experts_stay_whole_in_a_row_split(devices):
    with open_device("golden", config="small", memory_bytes=1 << 24) as device:
        alone = device.load_experts(*weights(), **SHARED, row_blocks=SHARDS, grid_exponent=GRID)
        expected = alone(*call())
    with Cluster(devices) as cluster:
        layer = cluster.load_experts(*weights(), share="row-split", **SHARED, grid_exponent=GRID)
        assert np.array_equal(layer(*call()), expected)


def test_tokens_go_to_replicas_of_shared_experts_in_turn(devices):
    with Cluster(devices, on_loss="reload") as cluster:
        layer = cluster.load_experts(*weights(), **SHARED, grid_exponent=GRID)
        assert sum(piece.shared for piece in layer.pieces) == 2 * SHARDS
        x, ids, scores = call(9)
        ids[:] = -1
        y = layer(x, ids, scores)
        assert layer.last.pairs == (6, 6, 6)
        devices[1].transport.lost = True
        assert np.array_equal(layer(x, ids, scores), y)
        assert sum(piece.shared for piece in layer.pieces) == 4
        assert sorted(layer.last.pairs) == [0, 9, 9]
        assert {e for piece in layer.pieces if not piece.shared for e in piece.experts} == set(
            range(EXPERTS))
        assert np.array_equal(layer(x[:0], ids[:0], scores[:0]), y[:0])
