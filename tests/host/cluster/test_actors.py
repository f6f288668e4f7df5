"""Devices in actors of Ray, on a cluster of this machine."""

import os
import signal

import numpy as np
import pytest

from moeaccel.errors import ToolMissingError
from moeaccel.host import errors, open_device
from moeaccel.host.cluster import actors, ray_cluster
from tests.host.cluster.test_cluster import GRID, SHARDS, alone, call, weights  # noqa: F401
from tests.host.cluster.test_router import CONFIG, assert_same, router, tokens

OPTIONS = {"config": "tiny", "memory_bytes": 1 << 22}


def test_ray_is_asked_for_by_name(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(actors.importlib, "import_module", missing)
    with pytest.raises(ToolMissingError, match=r"ray must be installed .* 'moeaccel\[ray\]'"):
        ray_cluster(["golden"])


def test_errors_travel():
    error = errors.NonFiniteInput("x must be finite", status=4, detail=3, address=0)
    again = actors._Raised(type(error), error.args, error.__dict__).again()
    assert type(again) is errors.NonFiniteInput and str(again) == str(error)
    assert (again.token, again.what) == (3, "x")


@pytest.fixture
def ray():
    found = pytest.importorskip("ray", reason="ray is not installed: pip install 'moeaccel[ray]'")
    found.init(num_cpus=SHARDS, include_dashboard=False, log_to_driver=False)
    yield found
    found.shutdown()


def with_ray(test):
    """Mark a test slow, and let it pass with Ray's own warnings, as it starts and ends."""
    quiet = pytest.mark.filterwarnings(
        "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::ResourceWarning",
        "ignore::pytest.PytestUnraisableExceptionWarning")
    return pytest.mark.slow(quiet(test))


@with_ray
def test_actors_give_the_bits_of_one_device(ray, alone):  # noqa: F811
    with ray_cluster(["golden"] * SHARDS, **OPTIONS) as cluster:
        for share, blocks in (("eplb", 1), ("row-split", SHARDS)):
            experts = cluster.load_experts(*weights(), share=share, grid_exponent=GRID)
            assert np.array_equal(experts(*call()), alone[blocks, GRID][0])
        x, ids, scores = call()
        x[5, 0] = np.nan
        with pytest.raises(errors.NonFiniteInput) as found:
            experts(x, ids, scores)
        assert found.value.token == 5
        # An actor whose process dies is named, and the others take over when asked.
        shard = cluster._shards[1]
        os.kill(shard.process, signal.SIGKILL)
        with pytest.raises(errors.ShardLost, match=f"shard 1, 'golden' in process {shard.process}"):
            experts(*call())
        cluster.reload(1)
        assert np.array_equal(experts(*call()), alone[SHARDS, GRID][0])
        assert cluster.lost == {1} and not experts.last.pairs[1]


@with_ray
def test_an_actor_routes(ray):
    with open_device("golden", config=CONFIG, memory_bytes=1 << 24) as device:
        expected = device.load_moe(router(), *weights(), grid_exponent=GRID).compute(tokens())
    with ray_cluster(["golden"] * SHARDS, config=CONFIG, memory_bytes=1 << 22) as cluster:
        moe = cluster.load_moe(router(), *weights(), grid_exponent=GRID)
        assert_same(moe.compute(tokens()), expected)
        shard = cluster._shards[moe.router_shard]
        os.kill(shard.process, signal.SIGKILL)
        with pytest.raises(errors.ShardLost, match=(
                f"shard 0, 'golden' in process {shard.process} .* must route a layer")):
            moe(tokens())
        cluster.reload(0)
        assert moe.router_shard == 1
        assert_same(moe.compute(tokens()), expected)


@with_ray
def test_actors_that_do_not_start(ray):
    with pytest.raises(errors.InvalidOption, match="placement must have options for each"):
        ray_cluster(["golden"], placement=[{}, {}])
    with pytest.raises(errors.PortUnavailable, match="/dev/xdma9_user") as found:
        ray_cluster(["golden", "xdma:9"])
    assert found.value.__notes__[0].startswith("raised by shard 1, 'xdma:9' in process ")
    # A place that no machine has; those that had one are free again, as the next cluster shows.
    with pytest.raises(errors.ShardUnplaced, match=r"shard 2, 'golden' must start .*'board': 1"):
        ray_cluster(["golden"] * 3, placement=[{}, {}, {"resources": {"board": 1}}],
                    start_timeout=5, **OPTIONS)
    cluster = ray_cluster(["golden"] * SHARDS, **OPTIONS)
    layer = cluster.load_experts(*weights())
    ray.shutdown()  # before the cluster is closed
    with pytest.raises(errors.ShardLost, match="Ray was shut down"):
        layer(*call())
    cluster.close()
    assert not ray.is_initialized()


@pytest.fixture
def nodes():
    """A cluster of three nodes, as `ray start` makes one of three machines; the second has
    something that the others have not, and so has the third."""
    found = pytest.importorskip("ray", reason="ray is not installed: pip install 'moeaccel[ray]'")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True,
                      head_node_args={"num_cpus": 1, "include_dashboard": False})
    others = [cluster.add_node(num_cpus=1, resources={name: 1}) for name in ("second", "third")]
    found.init(address=cluster.address, log_to_driver=False)
    yield cluster, others
    found.shutdown()
    cluster.shutdown()


@with_ray
def test_a_node_may_go(nodes, alone):  # noqa: F811
    cluster, others = nodes

    def gone(shard, node):
        """End a node as a machine ends: with all that runs there. Its actor alone would see a while
        later that its node is gone."""
        cluster.remove_node(node, allow_graceful=False)
        os.kill(shard.process, signal.SIGKILL)

    placement = [{}, {"resources": {"second": 1}}, {"resources": {"third": 1}}]
    with ray_cluster(["golden", "rtl", "golden"], placement=placement, **OPTIONS) as shards:
        experts = shards.load_experts(*weights(), grid_exponent=GRID)
        assert np.array_equal(experts(*call()), alone[1, GRID][0])
        assert all(experts.last.pairs)
        gone(shards._shards[1], others[0])
        with pytest.raises(errors.ShardLost, match=r"shard 1, 'rtl' in .* is lost") as found:
            experts(*call())
        assert "\n" not in str(found.value)
        shards.reload(1)
        assert np.array_equal(experts(*call()), alone[1, GRID][0])
        shards.on_loss_reload = True  # and the next one is not even noticed
        gone(shards._shards[2], others[1])
        assert np.array_equal(experts(*call()), alone[1, GRID][0])
        assert shards.lost == {1, 2} and not any(experts.last.pairs[1:])
