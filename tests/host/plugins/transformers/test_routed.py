"""Whole MoE blocks on the device: x in, y out."""

import copy
import functools
import pickle

import pytest
import torch

import moeaccel.host.transformers_plugin as plugin
from moeaccel.config import PRESETS, preset
from moeaccel.formats import quantise
from moeaccel.host import errors, open_device
from moeaccel.host.plugins.transformers import blocks
from moeaccel.host.plugins.transformers.blocks import experts_in
from moeaccel.host.plugins.transformers.choice import buffer_bytes
from moeaccel.host.plugins.transformers.routed import needs
from moeaccel.host.policies.costs import machine
from moeaccel.host.traces.recorder import record
from tests.support.experts import relative
from tests.support.flavours import modelling, quantised, small_block, small_config
from tests.support.models import BLOCKS, FOUR, MODELS, config_of, make

ALL = MODELS | BLOCKS

TORCH_WARNS_ITSELF = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


@pytest.fixture
def device():
    config = preset("small").replace(name="small with modes", router_modes=("mixer", "gates"))
    with open_device("golden", config=config, memory_bytes=1 << 28) as opened:
        use(opened)
        yield opened
        plugin.release()
        plugin.use_device(None)


def use(device, **options):
    plugin.use_device(device, **({"weight_format": "mxint8", "route": True} | options))


@torch.no_grad()
def model_of(name):
    """Return a model whose weights, those of shared experts, too, are what the device makes of
    them; its routers have tables that matter."""
    model = make(config_of(name, **ALL[name][1]), "moeaccel")
    for module in blocks_in(model):
        experts = experts_in(module)
        quantised(getattr(module, experts))
        for key, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if "shared" in key and len(tensor) > 1:
                tensor.copy_(torch.from_numpy(quantise(tensor.numpy(), "mxint8").dequantise()))
            elif "bias" in key and not key.startswith(experts):
                tensor.copy_(torch.linspace(-0.1, 0.1, tensor.numel()).view(tensor.shape))
    return model


def blocks_in(model):
    return [module for module in model.modules() if experts_in(module)]


def never(*_):
    raise AssertionError("the host routes")


@pytest.fixture
def no_router_on_the_host(monkeypatch):
    """Return what makes the class of a model's routers fail when it is called."""
    def forbid(model):
        for module in blocks_in(model):
            router = getattr(module, "gate", None) or module.router
            monkeypatch.setattr(type(router), "forward", never)
    return forbid


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_a_block_is_one_command_and_gives_what_the_host_routes(
        device, ids, name, no_router_on_the_host):
    layers = ALL[name][0]
    model = model_of(name)
    use(device, route=False)
    expected = model(ids).logits
    plugin.release()
    use(device)
    found = plugin.routing(model)
    assert [block.on_device for block in found] == [True] * layers
    assert found[0].router.experts in (4, 8)
    assert found[0].path.endswith(("mlp", "moe"))
    assert plugin.check_model(model) == layers
    before = device.counters()["commands"]
    no_router_on_the_host(model)
    logits = model(ids).logits
    assert device.counters()["commands"] - before == layers
    assert relative(logits, expected) < 1e-3
    assert torch.equal(model(ids).logits, logits)
    assert torch.equal(model(ids[:1]).logits, logits[:1])  # whatever the batch


def cohere(module):
    config = small_config(module.Cohere2MoeConfig, num_experts_per_tok=2)
    config.num_shared_experts, config.shared_expert_combination_strategy = 2, "average"
    return module.Cohere2MoeSparseMoeBlock(config)


def laguna(module):
    config = small_config(module.LagunaConfig, num_experts_per_tok=2)
    config.moe_routed_scaling_factor = 3.0
    return module.LagunaSparseMoeBlock(config)


def of_class(name):
    return lambda module: small_block(getattr(module, name))


def learned(module):
    """A layer of DeepSeek-V4 behind those with ids by token."""
    config = small_config(module.DeepseekV4Config, num_experts_per_tok=2)
    return module.DeepseekV4SparseMoeBlock(config, config.mlp_layer_types.index("moe"))


KINDS = {
    "cohere2_moe": cohere,  # the average of both
    "laguna": laguna,  # experts times a number, shared ones not
    "afmoe": of_class("AfmoeSparseMoeBlock"),  # a bias of the block's
    "nemotron_h": of_class("NemotronHMoE"),  # no up rows
    "minimax_m3_vl": of_class("MiniMaxM3VLSparseMoeBlock"),  # gate and up in one, a limit
    "kolibri1": of_class("Kolibri1SparseMoeBlock"),  # a bias of logits, for the choice
    "deepseek_v4": learned,  # square root of softplus
}


def drawn_block(name):
    """Return a block with drawn values, x, and what its class makes of it."""
    module = KINDS[name](modelling(name)).eval()
    generator = torch.Generator().manual_seed(2)
    for key, tensor in [*module.named_parameters(), *module.named_buffers()]:
        large = 1.0 if tensor.ndim == 1 else 1.5 / tensor.shape[-1] ** 0.5
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * large * (
            0.1 if "bias" in key else 1.0))
    x = torch.randn(2, 9, 64, generator=generator)
    expected = type(module).forward(module, x)
    return module, x, expected


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_blocks_give_what_their_class_does(device, name):
    module, x, expected = drawn_block(name)
    (block,) = plugin.routing(module)
    assert block.on_device, block.reason
    before = device.counters()["commands"]
    assert relative(module(x), expected) < 0.03  # quantised shared experts
    assert device.counters()["commands"] - before == 1


# -- with a policy
@pytest.mark.parametrize("more", [{}, {"single_copy": True}], ids=["two copies", "one"])
@pytest.mark.parametrize("name", ["Olmoe", "GptOss"])
@torch.no_grad()
def test_a_policy_decides_on_what_the_device_routes(device, ids, name, more, no_router_on_the_host):
    model = model_of(name)
    coarse = {"grid_exponent": -16}  # sums of parts are exact
    use(device, route=False, **coarse)
    by_host = model.generate(ids, max_new_tokens=3, do_sample=False)
    plugin.release()
    use(device, **coarse)
    expected, logits = model.generate(ids, max_new_tokens=3, do_sample=False), model(ids).logits
    free, layers = device.memory.free_bytes, ALL[name][0]
    use(device, policy="all-on-torch" if more else "moeaccel", gpu_bytes=1 << 18,
        resident_math="exact", on=machine("h100"), **coarse, **more)
    assert all(block.on_device for block in plugin.routing(model))
    no_router_on_the_host(model)
    for _ in range(2):  # with residents of before
        found = model.generate(ids, max_new_tokens=3, do_sample=False)
        assert torch.equal(found, expected) and torch.equal(found, by_host)
        assert torch.equal(model(ids).logits, logits)
    counters = plugin.current_session().hybrid.counters
    assert len(counters) == layers and all(layer.on_torch for layer in counters)
    assert (device.memory.free_bytes > free) == bool(more)  # the images are those of before
    use(device, **coarse)  # all of them are on the device again
    assert torch.equal(model(ids).logits, logits)
    assert device.memory.free_bytes == free


SHARED = ["Qwen2Moe", "DeepseekV3", "DeepseekV2", "Ernie4_5_Moe"]


@pytest.mark.parametrize("name", SHARED)
@torch.no_grad()
def test_with_a_policy_shared_experts_are_torchs_and_the_device_routes(
        device, ids, name, no_router_on_the_host):
    model, layers = model_of(name), ALL[name][0]
    options = {"gpu_bytes": 1 << 18, "resident_math": "exact", "on": machine("h100"),
               "grid_exponent": -16}
    use(device, route=False, policy="moeaccel", **options)
    by_host = model.generate(ids, max_new_tokens=3, do_sample=False)
    expected, counted = model(ids).logits, plugin.current_session().hybrid._costs.n_shared
    plugin.release()
    use(device, policy="all-on-device", **options)
    assert plugin.check_model(model) == layers
    no_router_on_the_host(model)
    bits = []
    for policy in ("all-on-device", "moeaccel"):
        use(device, policy=policy, **options)
        found = plugin.routing(model)
        assert [block.on_device for block in found] == [True] * layers, found[0].reason
        assert not any(block.router.shared for block in found)
        asked = watched(model)
        before = device.counters()["commands"]
        bits.append(model(ids).logits)
        # Routed in one command, and computed in at most one more; nothing of shared experts.
        assert layers <= device.counters()["commands"] - before <= 2 * layers
        assert len(asked) == layers and all(y.abs().max() > 0.01 for y in asked)
        assert relative(bits[-1], expected) < 1e-3
        assert torch.equal(model.generate(ids, max_new_tokens=3, do_sample=False), by_host)
    hybrid = plugin.current_session().hybrid
    assert len(hybrid.counters) == layers and all(one.on_torch for one in hybrid.counters)
    assert hybrid._costs.n_shared == counted > 0
    assert torch.equal(*bits)


def watched(model):
    """Return a list of what the shared experts of a model will answer."""
    found = []
    for module in blocks_in(model):
        child = getattr(module, "shared_expert", None) or module.shared_experts
        child.register_forward_hook(lambda *args: found.append(args[2]))
    return found


@torch.no_grad()
def test_changed_shared_experts_need_not_be_uploaded_with_a_policy(device, ids):
    model = model_of("Qwen2Moe")
    use(device, policy="all-on-device")
    before = model(ids).logits
    model.model.layers[0].mlp.shared_expert.down_proj.weight.mul_(2)
    assert plugin.refresh(model) == 0
    assert not torch.equal(model(ids).logits, before)
    model.model.layers[0].mlp.gate.weight.mul_(-1)
    assert plugin.refresh(model) == 1


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_blocks_give_what_their_class_does_with_a_policy(device, name):
    """Factors, gates, limits of shared experts are those of the class, whose modules compute
    them."""
    module, x, expected = drawn_block(name)
    use(device, policy="all-on-device")
    (block,) = plugin.routing(module)
    assert block.on_device, block.reason
    assert relative(module(x), expected) < 0.03


# -- which are taken
@torch.no_grad()
def test_a_model_need_not_be_announced(device, ids, no_router_on_the_host):
    model = make(config_of("Olmoe", **MODELS["Olmoe"][1]), "moeaccel")
    model(ids)
    no_router_on_the_host(model)
    model(ids)
    copied = copy.deepcopy(model)
    assert torch.equal(copied(ids).logits, model(ids).logits)
    assert copied.model.layers[0].mlp.forward.__self__ is copied.model.layers[0].mlp


@torch.no_grad()
def test_another_device_has_blocks_as_they_were(device, ids):
    model = make(config_of("Olmoe", **MODELS["Olmoe"][1]), "moeaccel")
    copied = copy.deepcopy(model)
    plugin.routing(model)
    taken = copy.deepcopy(model)  # has the forward, too
    use(device, route=False)
    expected = model(ids).logits
    assert "forward" not in vars(model.model.layers[0].mlp)
    assert torch.equal(copied(ids).logits, expected)
    assert torch.equal(taken(ids).logits, expected)
    assert torch.nn.modules.module._global_forward_pre_hooks == {}
    (block, _) = plugin.routing(model)
    assert block.reason == "use_device() must be called with route=True, but was not"
    assert block.router is None


@torch.no_grad()
def test_what_is_not_taken_says_why_and_runs_by_the_routes_of_the_host(ids, caplog):
    names = {"Qwen2Moe": ("gates must be none without 'gates' in router_modes, not 'sigmoid' in co"
                          "nfig 'small'"),
             "Phimoe": "mixer must be None without 'mixer' in router_modes, not 0.02"}
    for name, reason in names.items():
        model = model_of(name)
        with open_device("golden", config="small", memory_bytes=1 << 28) as small:
            use(small, route=False)
            expected = model(ids).logits
            use(small)
            caplog.clear()
            assert plugin.check_model(model) == 2
            assert torch.equal(model(ids).logits, expected)
            assert [record.getMessage() for record in caplog.records] == [
                f"blocks are routed by the host: {plugin.routing(model)[0].reason}"]
            assert reason in caplog.text
            plugin.release()
            plugin.use_device(None)


@torch.no_grad()
def test_blocks_of_others_are_left_alone(device, ids):
    model = make(config_of("Mixtral", **FOUR), "moeaccel")
    first, second = blocks_in(model)
    first._hf_hook = object()
    second.forward = functools.partial(type(second).forward, second)
    reasons = [block.reason for block in plugin.routing(model)]
    assert "must have parameters that stay where they are, but has hooks of acc" in reasons[0]
    assert "but has another setting, or was given another forward" in reasons[1]
    assert plugin.check_model(model) == 2
    eager = make(config_of("Mixtral", **FOUR))
    eager(ids)
    assert "must be one of experts_implementation='moeaccel'" in plugin.routing(eager)[0].reason
    before = device.counters()["commands"]
    eager.set_experts_implementation("moeaccel")
    assert all(block.on_device for block in plugin.routing(eager))
    eager(ids)
    assert device.counters()["commands"] - before == 2
    with pytest.raises(errors.InvalidOption, match="model must be a Module, not str"):
        plugin.routing("mixtral")


@torch.no_grad()
def test_the_plug_in_chooses_a_device_with_the_modes_that_there_must_be(environment, ids):
    plugin.use_device(None, route=True)
    olmoe, qwen = (make(config_of(name, **ALL[name][1]), "moeaccel")
                   for name in ("Olmoe", "Qwen2Moe"))
    olmoe(ids)
    assert plugin.current_session().device.config is PRESETS["small"]
    assert plugin.choose_config(qwen).config.router_modes == ("gates",)
    qwen(ids)
    config = plugin.current_session().device.config
    assert (config.name, config.router_modes) == ("small with gates", ("gates",))
    assert all(block.on_device for block in plugin.routing(qwen))


@pytest.mark.parametrize(("options", "message"), [
    ({"routes": (torch.zeros(1, 1, 2, dtype=torch.long), None)}, "must be False with routes, whi"),
    ({"route": "yes"}, "route must be True or False, not 'yes'"),
])
def test_options_that_do_not_go_together(device, options, message):
    with pytest.raises(errors.InvalidOption, match=message):
        use(device, **options)
    assert plugin.current_session().route  # what was set stays


# -- who else looks
@torch.no_grad()
def test_router_logits_are_there_for_those_who_ask(device, ids):
    model = model_of("DeepseekV3")
    use(device, route=False)
    expected = model(ids, output_router_logits=True)
    use(device)
    found = model(ids, output_router_logits=True)
    assert len(found.router_logits) == 1
    assert torch.equal(found.router_logits[0], expected.router_logits[0])
    assert torch.equal(found.logits, model(ids).logits)


@torch.no_grad()
def test_a_recorder_sees_what_the_device_has_chosen(device, ids):
    model = model_of("GptOss")
    plain = model(ids).logits
    with record(model) as recording:
        assert torch.equal(model(ids).logits, plain)
    trace = recording.trace()
    use(device, route=False)
    with record(model) as host:
        model(ids)
    assert trace.ids.shape == (14, 2, 2)
    assert (trace.ids == host.trace().ids).all()
    assert abs(trace.weights - host.trace().weights).max() < 2e-3


@torch.no_grad()
def test_tuples_are_returned_as_the_class_does(device):
    module = blocks_in(model_of("GptOss"))[0]
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(1))
    expected = type(module).forward(module, x)
    plugin.routing(module)
    for values, tolerance in ((x, 1e-3), (x.bfloat16(), 3e-2)):
        found = module(values)
        assert [part.dtype for part in found] == [values.dtype] * 2
        assert [part.shape for part in found] == [part.shape for part in expected]
        for part, other in zip(found, expected, strict=True):
            assert relative(part, other) < tolerance
    assert torch.equal(module(hidden_states=x)[0], module(x)[0])


@torch.no_grad()
def test_hidden_states_are_found_by_their_name(device):
    module = blocks_in(model_of("Ernie4_5_Moe"))[0]
    plugin.routing(module)
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(module(input_ids=None, hidden_states=x), module(x))
    for args, kwargs, message in (
            ((), {"x": x}, "but there is x$"), ((), {}, "but there is no argument$"),
            ((x,), {"hidden_states": x}, "one by place and hidden_states$")):
        with pytest.raises(errors.InvalidOption, match=(
                f"hidden_states must be given to a MoE block, once, .*{message}")):
            module(*args, **kwargs)


@torch.no_grad()
def test_bfloat16_models(device, ids):
    model = model_of("Qwen2Moe").bfloat16()
    use(device, route=False)
    expected = model(ids).logits
    use(device)
    logits = model(ids).logits
    assert logits.dtype is torch.bfloat16
    assert relative(logits, expected) < 0.03


# -- weights
@torch.no_grad()
def test_changes_of_routers_and_shared_experts_are_seen(device, ids):
    model = model_of("DeepseekV3")
    module, = blocks_in(model)
    before = model(ids).logits
    for tensor in (module.gate.weight, module.gate.e_score_correction_bias,
                   module.shared_experts.down_proj.weight):
        tensor.data.view(-1)[0] += 3
        assert plugin.refresh(model) == 1
        after = model(ids).logits
        assert not torch.equal(after, before)
        before = after
    assert plugin.refresh(model) == 0


@torch.no_grad()
def test_changes_of_numbers_are_seen(device):
    module = blocks_in(model_of("DeepseekV3"))[0]
    plugin.routing(module)
    x = torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(1))
    for name, value in (("top_k", 3), ("routed_scaling_factor", 1.0)):
        before = module(x)
        setattr(module.gate, name, value)
        after = module(x)
        assert relative(after, type(module).forward(module, x)) < 1e-3 < relative(after, before)


@torch.no_grad()
def test_weights_that_are_given_up_come_back(device, ids):
    use(device, keep_host_weights=False)
    model = model_of("Qwen2Moe")
    wanted = {name: value.clone() for name, value in model.named_parameters()}
    logits = model(ids).logits
    assert torch.isnan(model.model.layers[0].mlp.experts.down_proj).all()
    assert torch.equal(model(ids).logits, logits)
    model.model.layers[0].mlp.gate.weight.data[0] += 1  # the host has it still
    assert not torch.equal(model(ids).logits, logits)
    free = device.memory.free_bytes
    plugin.release(model)
    assert device.memory.free_bytes > free
    wanted["model.layers.0.mlp.gate.weight"][0] += 1
    for name, value in model.named_parameters():
        assert torch.equal(value, wanted[name]), name


@torch.no_grad()
def test_memory_of_whole_blocks_is_counted(ids):
    model = make(config_of("Qwen2Moe", **(BLOCKS["Qwen2Moe"][1] | {
        "shared_expert_intermediate_size": 1024})), "moeaccel")
    config = preset("tiny").replace(
        name="tiny with a router", max_dim=1024, tile_words=64, router=("softmax",),
        router_modes=("gates",))
    with open_device("golden", config=config, memory_bytes=1 << 19) as small:
        use(small, route=False)
        assert plugin.check_model(model) == 2
        use(small)
        with pytest.raises(errors.OutOfDeviceMemory, match="layers of experts and one command's"):
            plugin.check_model(model)
        plugin.release()
        plugin.use_device(None)


@torch.no_grad()
def test_no_numbers_are_named(device):
    module = blocks_in(model_of("Olmoe"))[0]
    plugin.routing(module)
    x = torch.ones(1, 3, 64)
    module(x)
    x[0, 2, 5] = torch.nan
    with pytest.raises(errors.NonFiniteInput, match="x must be finite, but token 2 holds NaN"):
        module(x)
    module.gate.weight.data[1, 2] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        module(torch.ones(1, 3, 64))


# -- gradients, compilers
@TORCH_WARNS_ITSELF
def test_gradients_are_refused(device, ids):
    model = model_of("Olmoe")
    loss = model(ids, labels=ids).loss
    with pytest.raises(errors.TrainingUnsupported, match="computes no gradients"):
        loss.backward()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    x = torch.randn(1, 2, 64)
    module = blocks_in(model)[0]
    module.gate.weight.requires_grad_(True)
    y = module(x)
    with pytest.raises(errors.TrainingUnsupported, match="computes no gradients"):
        y.sum().backward()
    with torch.autograd.forward_ad.dual_level(), torch.no_grad():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        with pytest.raises(errors.TrainingUnsupported, match="no dual tensors"):
            module(dual)


def test_in_training_mode_a_block_is_what_it_was(device, ids):
    model = model_of("Olmoe").train()
    with pytest.raises(errors.TrainingUnsupported, match="must be in evaluation mode"):
        model(ids)
    before = device.counters()["commands"]
    with torch.no_grad():
        model(ids)
    assert device.counters()["commands"] - before == 2


@pytest.mark.filterwarnings("ignore:Using `torch.compile.module.`:UserWarning")
@TORCH_WARNS_ITSELF
@torch.no_grad()
def test_compiled_code(device):
    module = blocks_in(model_of("GptOss"))[0]
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(1))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    compiled(x)  # what it is is found out while it is compiled
    expected = module(x)
    before = device.counters()["commands"]
    assert all(map(torch.equal, compiled(x), expected))
    assert device.counters()["commands"] - before == 1
    use(device, route=False)
    assert all(map(torch.equal, compiled(x), module(x)))
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:Using `torch.compile.module.`:UserWarning")
@TORCH_WARNS_ITSELF
@torch.no_grad()
def test_compiled_code_with_shared_experts_of_torchs(device):
    use(device, policy="all-on-device")
    module = blocks_in(model_of("Qwen2Moe"))[0]
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(1))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), module(x))
    assert plugin.routing(module)[0].on_device
    torch._dynamo.reset()


@torch.no_grad()
def test_a_model_can_be_pickled(device, ids):
    model = model_of("Olmoe")
    expected = model(ids).logits
    assert torch.equal(pickle.loads(pickle.dumps(model))(ids).logits, expected)


@torch.no_grad()
def test_the_memory_of_routers_is_asked_for(device, ids):
    """What a layer is said to take is what it takes, but for what alignment leaves."""
    model = model_of("DeepseekV3")  # with shared experts and a selection bias
    blocks._known.clear()
    layers = needs(model)  # looks at blocks before the hook has seen the model
    free = device.memory.free_bytes
    model(ids)
    assert [block.on_device for block in plugin.routing(model)] == [True]
    used = free - device.memory.free_bytes
    need = sum(layer.image_bytes(device.config, "mxint8") for layer in layers)
    assert 0 <= need - used < 4096
    plugin.release()
    need += buffer_bytes(device.config, layers)
    fill = device.memory.allocate(device.memory.largest_free_block - need + 4096)
    with pytest.raises(errors.OutOfDeviceMemory, match="layers of experts and one command's buff"):
        plugin.check_model(model, {"input_ids": ids})
    fill.free()
    fill = device.memory.allocate(device.memory.largest_free_block - need)
    assert plugin.check_model(model, {"input_ids": ids}) == 1
    fill.free()
