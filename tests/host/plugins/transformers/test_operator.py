import copy

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.activations import ReLUSquaredActivation

import moeaccel.host.transformers_plugin as plugin
from moeaccel.config import PRESETS
from moeaccel.errors import FormatError
from moeaccel.formats import quantise
from moeaccel.host import errors, open_device
from tests.support.experts import CALL, fp8, limited, relative, toy
from tests.support.models import FOUR, MODELS, config_of, make

TORCH_WARNS_ITSELF = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


def quantised(model):
    """Return a copy of a model whose experts' weights are what the device's memory holds."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "_is_expert_parallel"):
                for parameter in (module.gate_up_proj, module.down_proj):
                    for matrix in parameter:
                        matrix.copy_(torch.from_numpy(
                            quantise(matrix.numpy(), "mxint8").dequantise()))
    return model


# -- models
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_models_run_on_the_device(device, ids, name):
    layers, more = MODELS[name]
    model = make(config_of(name, **more))
    # The device adds next to nothing to what the weights' format costs.
    exact, reference = model(ids).logits, quantised(model)(ids).logits
    model.set_experts_implementation("moeaccel")
    assert plugin.check_model(model) == layers
    assert device.counters()["commands"] == 0
    logits = model(ids).logits
    assert device.counters()["commands"] == layers
    assert relative(logits, reference) < 1e-3
    assert relative(logits, exact) < 0.06
    free = device.memory.free_bytes
    tokens = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(tokens[:, :8], torch.cat([ids, logits[:, -1].argmax(-1, True)], 1))
    # Each module was uploaded once.
    assert device.memory.free_bytes == free


@torch.no_grad()
def test_one_argument_of_from_pretrained_is_enough(device, ids, tmp_path):
    model = make(config_of("Mixtral", **FOUR))
    model.save_pretrained(tmp_path)
    expected = quantised(model)(ids).logits
    model = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="moeaccel")
    assert plugin.check_model(model) == 2
    assert relative(model(ids).logits, expected) < 1e-3
    assert model.get_experts_implementation()[""] == "moeaccel"


@torch.no_grad()
def test_bits_do_not_depend_on_the_batch(device):
    generator = torch.Generator().manual_seed(0)
    experts = next(m for m in make(config_of("Olmoe", **MODELS["Olmoe"][1]), "moeaccel").modules()
                   if hasattr(m, "_is_expert_parallel"))
    x = torch.randn(300, 64, generator=generator)
    index = torch.randint(0, 8, (300, 2), generator=generator)
    weights = torch.rand(300, 2, generator=generator)
    whole = experts(x, index, weights)
    assert torch.equal(whole[17:18], experts(x[17:18], index[17:18], weights[17:18]))


@torch.no_grad()
def test_bfloat16_models_and_expert_parallel_ids(device):
    model = make(config_of("Qwen3Moe", **MODELS["Qwen3Moe"][1]), "moeaccel").bfloat16()
    experts = model.model.layers[0].mlp.experts
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    index = torch.tensor([[0, 1], [8, 8], [7, 8], [2, 2], [3, 4]])
    y = experts(x, index, torch.full((5, 2), 0.5))
    assert y.dtype is torch.bfloat16
    assert not y[1].any()
    assert y[[0, 2, 3, 4]].any(dim=1).all()
    assert experts(x[:0], index[:0], torch.zeros(0, 2)).shape == (0, 64)


@torch.inference_mode()
def test_inference_mode(device, ids):
    model = make(config_of("Mixtral", **FOUR), "moeaccel")
    assert torch.equal(model(ids).logits, model(ids).logits)


# -- gradients
NAMES = ("x", "weights", "gate_up_proj", "down_proj")


def wanting(name):
    """Return an experts module and the arguments of a call; only one tensor wants a gradient."""
    module = toy()
    x, ids, weights = CALL[0].clone(), CALL[1], CALL[2].clone()
    tensors = {"x": x, "weights": weights, **dict(module.named_parameters())}
    for key, tensor in tensors.items():
        tensor.requires_grad_(key == name)
    return module, (x, ids, weights)


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_works_with_gradients_on_and_backward_is_refused(device, name):
    module, call = wanting(name)
    with torch.no_grad():
        expected = module(*call)
    y = module(*call)
    assert torch.equal(y, expected)
    with pytest.raises(errors.TrainingUnsupported, match="computes no gradients: evaluate under"):
        y.sum().backward()


@pytest.mark.parametrize("name", NAMES)
def test_training_mode_is_refused_at_once(device, name):
    module, call = wanting(name)
    module.train()
    with pytest.raises(errors.TrainingUnsupported, match=r"not in training.*model\.eval"):
        module(*call)
    assert device.counters()["commands"] == 0
    with torch.no_grad():
        module(*call)


def test_a_loss_of_a_whole_model_is_computed_and_its_gradient_refused(device, ids):
    model = make(config_of("Mixtral", **FOUR), "moeaccel")
    loss = model(ids, labels=ids).loss
    with torch.no_grad():
        assert torch.equal(loss, model(ids, labels=ids).loss)
    with pytest.raises(errors.TrainingUnsupported):
        loss.backward()


def test_the_refusal_is_not_hidden_by_a_later_write_to_x(device):
    module, (x, ids, weights) = wanting("x")
    hidden = x * 1
    y = module(hidden, ids, weights)
    hidden.add_(1)
    with pytest.raises(errors.TrainingUnsupported):
        (y + hidden).sum().backward()


@TORCH_WARNS_ITSELF
@torch.no_grad()
def test_forward_mode_gradients_are_refused(device):
    module, (x, ids, weights) = wanting("")
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(errors.TrainingUnsupported, match="no dual tensors"):
            module(dual, ids, weights)


# -- compiled
@pytest.fixture
def compiled():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@torch.no_grad()
def test_generate_compiles_the_forward_pass(device, ids, compiled):
    model = make(config_of("Mixtral", **FOUR), "moeaccel")
    expected = model.generate(ids, max_new_tokens=4, do_sample=False)
    before = device.counters()["commands"]
    # What generate does by default on a GPU, without the wait for a C++ compiler.
    compile_config = transformers.CompileConfig(backend="aot_eager", mode=None, fullgraph=True)
    compile_config._compile_all_devices = True
    found = model.generate(ids, max_new_tokens=4, do_sample=False, cache_implementation="static",
                           compile_config=compile_config)
    assert torch.equal(found, expected)
    assert device.counters()["commands"] - before == 4 * 2
    stats = torch._dynamo.utils.counters
    assert stats["stats"]["unique_graphs"] == 1
    assert not stats["graph_break"]


@TORCH_WARNS_ITSELF
@pytest.mark.slow
@pytest.mark.timeout(1800)
@torch.no_grad()
def test_generate_with_the_default_compiler(device, ids, compiled):
    model = make(config_of("Mixtral", **FOUR), "moeaccel")
    compile_config = transformers.CompileConfig()
    compile_config._compile_all_devices = True
    found = model.generate(ids, max_new_tokens=4, do_sample=False, cache_implementation="static",
                           compile_config=compile_config)
    assert torch.equal(found, model.generate(ids, max_new_tokens=4, do_sample=False))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_evaluation_without_no_grad(device, compiled, backend):
    module = toy()
    expected = module(*CALL)
    y = torch.compile(module, backend=backend, fullgraph=True)(*CALL)
    assert torch.equal(y, expected)
    with pytest.raises(errors.TrainingUnsupported):
        y.sum().backward()


def test_compiled_code_refuses_what_the_module_refuses(device, compiled):
    with pytest.raises(errors.TrainingUnsupported, match="not in training"):
        torch.compile(toy().train(), backend="eager")(*CALL)
    with pytest.raises(errors.UnsupportedExperts, match="has_post_expert_norm is True"):
        torch.compile(toy(has_post_expert_norm=True), backend="eager")(*CALL)


FLAVOURS = {
    "limit": lambda: limited(0.5),
    "gelu": lambda: toy(lambda m: setattr(m, "act_fn", torch.nn.GELU())),
    "relu2, no up rows": lambda: toy(
        lambda m: setattr(m, "act_fn", ReLUSquaredActivation()), has_gate=False),
    "fp8 with a limit": lambda: fp8(swiglu_limit=0.5),
}


@pytest.mark.parametrize("name", FLAVOURS)
@torch.no_grad()
def test_compiled_and_exported_code_of_every_flavour(device, compiled, name):
    module = FLAVOURS[name]()
    call = torch.randn(6, module.down_proj.shape[1]), *CALL[1:]
    expected = module(*call)
    fresh = FLAVOURS[name]()  # nobody looked at its gate yet
    assert torch.equal(torch.compile(fresh, backend="aot_eager", fullgraph=True)(*call), expected)
    for strict in (False, True):
        program = torch.export.export(FLAVOURS[name](), call, strict=strict)
        assert torch.equal(program.module()(*call), expected)


@torch.no_grad()
def test_compiled_code_tells_limits_apart(device, compiled):
    forward = torch.compile(lambda module: module(*CALL), backend="eager", fullgraph=True)
    first, second = limited(0.5), limited(7.0)
    for module in (first, second, first):
        assert torch.equal(forward(module), module(*CALL))
    assert not torch.equal(forward(first), forward(second))


@torch.no_grad()
def test_compiled_code_sees_changed_weights_and_tells_layers_apart(device, compiled):
    first, second = toy(), toy()
    second.down_proj.mul_(2)
    forward = torch.compile(lambda module: module(*CALL), backend="eager")
    for module in (first, second, first):
        assert torch.equal(forward(module), module(*CALL))
    before = forward(first)
    first.down_proj.data.mul_(-2)
    assert relative(forward(first), -2 * before) < 1e-3


@torch.no_grad()
def test_exported_programs_need_no_module(device, compiled):
    module = toy()
    dynamic = ({0: torch.export.Dim.DYNAMIC},) * 3
    program = torch.export.export(module, CALL, dynamic_shapes=dynamic)
    x, ids, weights = CALL
    expected = module(*CALL)
    del module
    assert torch.equal(program.module()(x[:4], ids[:4], weights[:4]), expected[:4])
    with torch.device("meta"):
        assert torch.ops.moeaccel.experts(
            x.to("meta"), ids.to("meta"), weights.to("meta"), torch.empty(4, 192, 64),
            torch.empty(4, 64, 96), None, None, False, False, None, 1).shape == x.shape


def test_a_cuda_graph_being_captured_is_refused(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(errors.GraphCaptureUnsupported, match="while a CUDA graph is captured"):
        toy()(*CALL)
    assert device.counters()["commands"] == 0
    # The compiler keeps it out of its own graphs.
    assert torch.Tag.cudagraph_unsafe in torch.ops.moeaccel.experts.default.tags


# -- layers that the device does not support
def lines(caplog):
    return [record.message for record in caplog.records if "run on the host" in record.message]


@torch.no_grad()
def test_unsupported_layers_run_eagerly_when_asked(device, caplog, compiled):
    plugin.use_device(device, weight_format="mxint8", unsupported="eager")
    x, ids, weights = CALL
    odd = toy(has_post_expert_norm=True)
    for _ in range(2):
        assert torch.equal(odd(*CALL), 2 * x)
    assert torch.equal(torch.compile(odd, backend="eager", fullgraph=True)(*CALL), 2 * x)
    assert len(lines(caplog)) == 1 and "has_post_expert_norm is True" in lines(caplog)[0]
    # Too many experts for a token: for the device, not for the module.
    many = ids.repeat(1, 9), weights.repeat(1, 9)
    assert torch.equal(toy()(x, *many), 2 * x)
    assert "at most 16 experts for each token, not 18" in lines(caplog)[1]
    assert device.counters()["commands"] == 0
    toy()(*CALL)
    assert device.counters()["commands"] == 1


@torch.no_grad()
def test_activations_that_a_configuration_has_not(caplog):
    module = toy(lambda m: setattr(m, "act_fn", torch.nn.ReLU()))
    config = PRESETS["tiny"].replace(name="silu-only", activations=("silu",))
    with open_device("golden", config=config, memory_bytes=1 << 22) as device:
        plugin.use_device(device, weight_format="mxint8")
        message = "activation must be one of silu in config 'silu-only', not 'relu'"
        with pytest.raises(FormatError, match=message):
            module(*CALL)
        plugin.use_device(device, weight_format="mxint8", unsupported="eager")
        assert torch.equal(module(*CALL), 2 * CALL[0])
        assert message in lines(caplog)[0]
        plugin.release()
        plugin.use_device(None)


@torch.no_grad()
def test_layers_beyond_the_device_run_eagerly_when_asked(device, ids, caplog):
    model = make(config_of("Mixtral", **(FOUR | {"intermediate_size": 2048})), "moeaccel")
    with pytest.raises(errors.LimitExceeded, match=r"d_expert .*not 2048; presets that can: ulx3s"):
        model(ids)
    plugin.use_device(device, unsupported="eager")
    found = model(ids).logits
    assert plugin.check_model(model) == 0
    assert len(lines(caplog)) == 1
    model.set_experts_implementation("eager")
    assert torch.equal(found, model(ids).logits)
