"""Devices in actors of Ray, on a cluster of this machine."""

import os
import signal

import numpy as np
import pytest

from moeaccel.errors import ToolMissingError
from moeaccel.host import errors
from moeaccel.host.cluster import actors, ray_cluster
from tests.host.cluster.test_cluster import GRID, SHARDS, alone, call, weights  # noqa: F401

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


@pytest.mark.slow
@pytest.mark.filterwarnings(  # Ray's own, as it starts and ends
    "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::ResourceWarning",
    "ignore::pytest.PytestUnraisableExceptionWarning")
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
    with pytest.raises(errors.InvalidOption, match="placement must have options for each"):
        ray_cluster(["golden"], placement=[{}, {}])
    with pytest.raises(errors.InvalidOption):
        ray_cluster(["golden"], config="tiny", memory_bytes=1).load_experts(*weights())
