"""Models whose experts are on several devices."""

from contextlib import ExitStack

import pytest
import torch

import moeaccel.host.transformers_plugin as plugin
from moeaccel.host import errors, open_device
from moeaccel.host.cluster import Cluster
from moeaccel.host.plugins.transformers.blocks import experts_in
from moeaccel.host.traces.recorder import record
from tests.support.models import BLOCKS, FOUR, MODELS, config_of, make

OPTIONS = {"weight_format": "mxint8", "grid_exponent": -16}


@pytest.fixture
def devices():
    with ExitStack() as stack:
        yield [stack.enter_context(open_device("golden", config="small", memory_bytes=1 << 24))
               for _ in range(3)]
        plugin.release()
        plugin.use_device(None)


@pytest.mark.parametrize("name", ["Olmoe", "DeepseekV3", "GptOss"])  # GptOss: biases
@torch.no_grad()
def test_a_cluster_generates_what_one_device_does(device, devices, ids, name):
    layers, more = (MODELS | BLOCKS)[name]
    model = make(config_of(name, **more), "moeaccel")
    plugin.use_device(device, **OPTIONS)
    expected = model.generate(ids, max_new_tokens=3, do_sample=False, output_logits=True,
                              return_dict_in_generate=True)
    with Cluster(devices, on_loss="reload") as cluster:
        plugin.use_device(cluster, **OPTIONS)
        assert plugin.check_model(model) == layers
        found = model.generate(ids, max_new_tokens=3, do_sample=False, output_logits=True,
                               return_dict_in_generate=True)
        assert torch.equal(found.sequences, expected.sequences)
        assert all(map(torch.equal, found.logits, expected.logits))
        assert all(one.counters()["commands"] for one in devices)
        before = model(ids).logits
        devices[1].close()  # what it had is loaded on the others
        assert torch.equal(model(ids).logits, before)
        assert cluster.lost == {1}
        plugin.release(model)
        plugin.use_device(None)


@torch.no_grad()
def test_changed_weights_and_routes_from_elsewhere(devices, ids):
    model = make(config_of("Mixtral", **FOUR), "moeaccel")
    free = [one.memory.free_bytes for one in devices]
    with Cluster(devices) as cluster:
        plugin.use_device(cluster, **OPTIONS)
        with record(model) as recording:
            before = model(ids).logits
        plugin.use_device(cluster, routes=recording.trace(), **OPTIONS)
        assert torch.equal(model(ids).logits, before)
        plugin.use_device(cluster, **OPTIONS)
        model.model.layers[0].mlp.experts.down_proj.mul_(2)
        assert not torch.equal(model(ids).logits, before)
        assert plugin.refresh(model) == 0
        plugin.release(model)
        assert [one.memory.free_bytes for one in devices] == free


# -- routed by one of its devices
def routed(model):
    found = plugin.routing(model)
    assert all(block.on_device for block in found), found[0].reason
    return found


@pytest.mark.parametrize("name", ["Olmoe", "GptOss"])  # GptOss: biases of router and experts
@torch.no_grad()
def test_a_cluster_routes_as_one_device_does(device, devices, ids, name, monkeypatch):
    layers, more = (MODELS | BLOCKS)[name]
    model = make(config_of(name, **more), "moeaccel")
    plugin.use_device(device, route=True, **OPTIONS)
    expected = model.generate(ids, max_new_tokens=3, do_sample=False, output_logits=True,
                              return_dict_in_generate=True)
    plugin.release()
    with Cluster(devices) as cluster:
        plugin.use_device(cluster, route=True, **OPTIONS)
        assert len(routed(model)) == layers
        assert plugin.check_model(model) == layers
        for module in model.modules():
            if experts_in(module):
                router = getattr(module, "gate", None) or module.router
                monkeypatch.setattr(type(router), "forward", None)  # the host routes not
        found = model.generate(ids, max_new_tokens=3, do_sample=False, output_logits=True,
                               return_dict_in_generate=True)
        assert torch.equal(found.sequences, expected.sequences)
        assert all(map(torch.equal, found.logits, expected.logits))
        before = model(ids).logits
        plugin.release(model)
        free = [one.memory.free_bytes for one in devices]
        assert torch.equal(model(ids).logits, before)
        commands = [one.counters()["commands"] for one in devices]
        model(ids)
        # Both layers have experts on all three; the first is routed by one, the second by the next.
        assert [one.counters()["commands"] - count
                for one, count in zip(devices, commands, strict=True)] == [3, 3, 2]
        plugin.release(model)
        assert [one.memory.free_bytes for one in devices] == free


@pytest.mark.parametrize("name", ["Qwen2Moe", "DeepseekV3"])
@torch.no_grad()
def test_a_cluster_routes_and_torch_computes_shared_experts(device, devices, ids, name):
    model = make(config_of(name, **(MODELS | BLOCKS)[name][1]), "moeaccel")
    plugin.use_device(device, route=True, policy="all-on-device", **OPTIONS)
    routed(model)
    expected = model(ids).logits
    plugin.release()
    with Cluster(devices) as cluster:
        plugin.use_device(cluster, **OPTIONS)
        tokens = model.generate(ids, max_new_tokens=3, do_sample=False)
        plugin.use_device(cluster, route=True, **OPTIONS)
        routed(model)
        assert torch.equal(model(ids).logits, expected)
        assert torch.equal(model.generate(ids, max_new_tokens=3, do_sample=False), tokens)
        plugin.release(model)


@torch.no_grad()
def test_the_device_that_routes_may_be_lost(devices, ids):
    model = make(config_of("Olmoe", **MODELS["Olmoe"][1]), "moeaccel")
    with Cluster(devices) as cluster:
        plugin.use_device(cluster, route=True, **OPTIONS)
        expected = model(ids).logits
        devices[1].close()  # routes the second layer
        with pytest.raises(errors.ShardLost, match="shard 1, device of config 'small'") as found:
            model(ids)
        assert found.value.shard == 1
        cluster.reload(1)
        assert torch.equal(model(ids).logits, expected)
        cluster.on_loss_reload = True
        devices[0].close()
        assert torch.equal(model(ids).logits, expected)
        assert cluster.lost == {0, 1}
        plugin.release(model)


@torch.no_grad()
def test_changed_routers_are_loaded_again(devices, ids):
    model = make(config_of("Olmoe", **MODELS["Olmoe"][1]), "moeaccel")
    with Cluster(devices) as cluster:
        plugin.use_device(cluster, route=True, **OPTIONS)
        before = model(ids).logits
        model.model.layers[0].mlp.gate.weight.mul_(-1)
        assert plugin.refresh(model) == 1
        after = model(ids).logits
        assert not torch.equal(after, before)
        plugin.use_device(cluster, **OPTIONS)  # by the host's routes
        assert torch.allclose(model(ids).logits, after, atol=1e-3)
        plugin.release(model)


@torch.no_grad()
def test_a_cluster_without_routers_is_routed_by_the_host(ids):
    model = make(config_of("Mixtral", **FOUR), "moeaccel")
    with ExitStack() as stack:
        tiny = [stack.enter_context(open_device("golden", config="tiny", memory_bytes=1 << 22))
                for _ in range(2)]
        with Cluster(tiny) as cluster:
            plugin.use_device(cluster, **OPTIONS)
            expected = model(ids).logits
            plugin.use_device(cluster, route=True, **OPTIONS)
            for block in plugin.routing(model):
                assert "there is no router in config 'tiny'" in block.reason
            assert torch.equal(model(ids).logits, expected)
            plugin.release(model)
            plugin.use_device(None)


@torch.no_grad()
def test_limits_and_memory_are_those_of_each_device(devices, ids):
    model = make(config_of("Olmoe", num_experts=130, num_experts_per_tok=2, intermediate_size=32,
                           num_hidden_layers=1), "moeaccel")
    for device, error in ((devices[0], "number of experts must be from 1 to 128"), (None, "")):
        with Cluster(devices if device is None else [device]) as cluster:
            plugin.use_device(cluster)
            if error:
                with pytest.raises(errors.LimitExceeded, match=error):
                    plugin.check_model(model)
            else:
                assert plugin.check_model(model) == 1
            plugin.release()
    with ExitStack() as stack:
        tiny = [stack.enter_context(open_device("golden", config="tiny", memory_bytes=1 << 17))
                for _ in range(2)]
        model = make(config_of("Mixtral", **FOUR), "moeaccel")
        plugin.use_device(Cluster(tiny), weight_format="mxint8")
        with pytest.raises(errors.OutOfDeviceMemory, match="2 layers of experts and one command's"):
            plugin.check_model(model)
        plugin.use_device(None)


def test_what_is_for_one_device_is_refused(devices):
    with Cluster(devices) as cluster:
        for options, name in (({"policy": "all-on-device"}, "policy"),
                              ({"keep_host_weights": False}, "keep_host_weights=False")):
            with pytest.raises(errors.InvalidOption, match=f"one Device with {name}.*not a Clust"):
                plugin.use_device(cluster, **options)
    with pytest.raises(errors.InvalidOption, match="a Cluster of some, or None, not list"):
        plugin.use_device(devices)
