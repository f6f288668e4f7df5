import pytest
import torch

from moeaccel.host.errors import UnsupportedExperts
from moeaccel.host.traces import InvalidTrace
from moeaccel.host.traces.recorder import record
from tests.support.models import EIGHT, FOUR, LATENT, MODELS, ROUTED, config_of, make

WITH_ROUTER = {
    "Mixtral": FOUR,
    "Qwen3Moe": MODELS["Qwen3Moe"][1],
    "Olmoe": EIGHT,
    "DeepseekV2": ROUTED | LATENT | {"n_group": 1, "topk_method": "greedy"},
    "DeepseekV3": ROUTED | LATENT | {"n_group": 2},
}


@pytest.fixture
def ids():
    return torch.randint(3, 128, (2, 7), generator=torch.Generator().manual_seed(0))


def routers(model):
    """Return what each router gives out, collected by itself."""
    found = []
    for name, module in model.named_modules():
        if name.endswith(".gate") and hasattr(module, "top_k"):
            module.register_forward_hook(lambda *a: found.append(a[2]))
    return found


@pytest.mark.parametrize("name", WITH_ROUTER)
@torch.no_grad()
def test_ids_and_weights_are_the_routers(name, ids):
    model = make(config_of(name, **WITH_ROUTER[name]))
    expected = model(ids).logits
    seen = routers(model)
    with record(model) as recording:
        logits = model(ids).logits
    assert torch.equal(logits, expected)
    trace = recording.trace()
    assert trace.layers == ((0, 1) if len(seen) == 2 else (1,))
    assert trace.ids.shape == (14, len(seen), 2)
    assert trace.n_experts == (4 if name == "Mixtral" else 8)
    for layer, (_, weights, index) in enumerate(seen):
        assert trace.ids[:, layer].tolist() == index.reshape(14, 2).tolist()
        assert trace.weights is not None
        assert trace.weights[:, layer].tolist() == weights.reshape(14, 2).float().tolist()
    assert trace.request.tolist() == [0] * 7 + [1] * 7
    assert trace.position.tolist() == [*range(7), *range(7)]


@torch.no_grad()
def test_generation_is_a_prefill_and_steps(ids):
    model = make(config_of("Olmoe", **EIGHT))
    with record(model) as recording:
        tokens = model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        model.generate(ids[:1], max_new_tokens=2, min_new_tokens=2, do_sample=False)
    trace = recording.trace()
    assert trace.requests.tolist() == [0, 1, 2]
    assert [len(step.ids) for step in trace.steps("prefill")] == [14, 7]
    assert [step.request.tolist() for step in trace.steps("decode")] == [[0, 1]] * 3 + [[2]]
    assert [step.position.tolist() for step in trace.steps("decode")] == [
        [7, 7], [8, 8], [9, 9], [7]]
    # The same tokens, all at once, are routed the same way.
    with record(model) as whole:
        model(tokens[:, :-1])
    again = dict(whole.trace().sequences())
    for request, routes in trace.select(requests=[0, 1]).sequences():
        assert routes.tolist() == again[request].tolist()
    assert not any(module._forward_pre_hooks for module in model.modules())


@torch.no_grad()
def test_padding_is_no_token(ids):
    model = make(config_of("Qwen3Moe", **WITH_ROUTER["Qwen3Moe"]))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with record(model) as recording:
        model.generate(ids, attention_mask=mask, max_new_tokens=2, min_new_tokens=2,
                       do_sample=False)
    trace = recording.trace()
    assert [len(routes) for _, routes in trace.sequences()] == [5, 8]
    assert trace.position[trace.request == 0].tolist() == [0, 1, 2, 3, 4]


@torch.no_grad()
def test_a_cache_that_the_model_made_is_known_again(ids):
    model = make(config_of("Mixtral", **FOUR))
    with record(model) as recording:
        first = model(ids)
        second = model(ids + 0)
        model(ids[:, :1], past_key_values=first.past_key_values)
        model(ids[:, :1], past_key_values=second.past_key_values)
    trace = recording.trace()
    assert [step.request.tolist() for step in trace.steps("decode")] == [[0, 1], [2, 3]]


@torch.no_grad()
def test_a_pass_that_fails_leaves_nothing_behind(ids):
    model = make(config_of("Mixtral", **FOUR))
    with record(model) as recording:
        down = model.model.layers[1].mlp.experts.down_proj
        model.model.layers[1].mlp.experts.down_proj = None
        with pytest.raises((AttributeError, TypeError)):
            model(ids)
        model.model.layers[1].mlp.experts.down_proj = down
        model(ids[:1])
    trace = recording.trace()
    assert len(trace) == 7
    assert trace.step.tolist() == [0] * 7


def test_models_without_the_interface_are_refused():
    with pytest.raises(UnsupportedExperts, match="Linear must send its experts through"):
        with record(torch.nn.Linear(2, 2)):
            pass
    with record(make(config_of("Mixtral", **FOUR))) as recording:
        with pytest.raises(InvalidTrace, match="must have a forward pass"):
            recording.trace()
