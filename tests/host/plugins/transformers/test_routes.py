"""Routes of a trace, or of an engine, in the place of routers' own: the same bits."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, OlmoeConfig

import moeaccel.host.transformers_plugin as plugin
from moeaccel.host import errors
from moeaccel.host.traces import ForeignTrace, InvalidTrace, TornTrace
from moeaccel.host.traces.recorder import record

LAYERS = 3


def model(**more):
    torch.manual_seed(3)
    config = OlmoeConfig(**({
        "vocab_size": 128, "hidden_size": 64, "intermediate_size": 32,
        "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 4,
        "num_experts": 8, "num_experts_per_tok": 2} | more))
    return AutoModelForCausalLM.from_config(config, experts_implementation="moeaccel").eval()


def scrambled(network):
    """Return the model with routers that choose something else."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if ".gate." in name:
                parameter.copy_(torch.randn(parameter.shape))
    return network


@torch.no_grad()
def generate(network, ids, count=4):
    return network.generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False,
                            pad_token_id=0, output_logits=True, return_dict_in_generate=True)


@torch.no_grad()
def read(network, ids):
    """Let a model read the first request twice."""
    for _ in range(2):
        network(ids[:1])


@pytest.fixture
def recorded(device, ids):
    """A model with routers that were exchanged, its trace before, and what it said before."""
    network = model()
    with torch.no_grad(), record(network) as recording:
        before = generate(network, ids)
    return scrambled(network), recording.trace(), before


def test_a_recorded_trace_gives_the_same_bits(device, ids, recorded, tmp_path):
    network, trace, before = recorded
    plugin.use_device(device, weight_format="mxint8", activation_bits=16)
    assert not torch.equal(generate(network, ids).logits[-1], before.logits[-1])
    trace.save(tmp_path / "trace.safetensors")
    for routes in (trace, tmp_path / "trace.safetensors",
                   (torch.from_numpy(trace.ids.copy()), trace.weights)):
        plugin.use_device(device, weight_format="mxint8", activation_bits=16, routes=routes)
        found = generate(network, ids)
        assert torch.equal(found.sequences, before.sequences)
        assert all(map(torch.equal, found.logits, before.logits))
        session = plugin.current_session()
        assert session.routes.tokens == (20, 20)  # the last token was not computed


def test_one_request_may_be_cut_into_any_passes(device, ids):
    """What was decoded token by token is read in one pass: the same routes, so the same bits."""
    network = model()
    with torch.no_grad(), record(network) as recording:
        generate(network, ids[:1])
    trace = recording.trace()
    text = torch.cat([ids[:1], torch.zeros(1, 3, dtype=torch.long)], dim=1)
    with torch.no_grad():
        network(text[:, :7])  # the device is as it was
    plugin.use_device(device, weight_format="mxint8", activation_bits=16, routes=trace)
    with torch.no_grad(), record(network) as again:
        network(text)
    # A recorder in front of the experts sees the routers; the device got the trace.
    assert plugin.current_session().routes.tokens == (10, 10)
    assert again.trace().ids.shape == trace.ids.shape


def test_padding_of_an_engine_adds_nothing(device, ids):
    network = model(num_hidden_layers=1)
    routes = np.zeros((14, 1, 2), np.int16), np.ones((14, 1, 2), np.float16)
    routes[0][:, :, 1] = 1
    routes[0][3] = -1
    plugin.use_device(device, routes=routes)
    seen = []
    layer = network.model.layers[0].mlp
    layer.register_forward_hook(lambda *a: seen.append(a[2]))
    with torch.no_grad():
        network(ids)
    y = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    zero = (y.reshape(14, -1) == 0).all(dim=1)
    assert zero.tolist() == [n == 3 for n in range(14)]


def test_ids_alone_take_the_routers_weights(device, ids):
    network = model()
    with torch.no_grad(), record(network) as recording:
        before = network(ids).logits
        trace = recording.trace()
        backwards = trace.ids[:, :, ::-1]
        plugin.use_device(device, weight_format="mxint8", activation_bits=16,
                          routes=(backwards, None))
        assert torch.equal(network(ids).logits, before)
        plugin.use_device(device, routes=((trace.ids + 1) % 8, None))
        with pytest.raises(InvalidTrace, match=r"token 0 has expert \d in layer 0 where the rout"):
            network(ids)


def test_routes_of_no_token_are_used_up(device, ids):
    plugin.use_device(device, routes=(np.zeros((0, 3, 2), np.int16), None))
    with torch.no_grad(), pytest.raises(InvalidTrace, match="of 0 there are 0 left for a pass of"):
        model()(ids)


def test_a_policy_goes_by_them_too(device, ids, recorded):
    network, trace, before = recorded
    plugin.use_device(device, weight_format="mxint8", activation_bits=16, routes=trace,
                      policy="static-hot-set", gpu_bytes=1 << 20, resident_math="exact")
    assert all(map(torch.equal, generate(network, ids).logits, before.logits))


def test_routes_of_another_model_are_refused(device, ids, recorded):
    _, trace, _ = recorded
    one = trace.select(requests=[0])
    cases = [
        (one, {"num_experts": 4}, "with 4 experts, top-2, in at most 3 layers, but are of 8 exp"),
        (one, {"num_experts_per_tok": 1}, "top-1, in at most 3 layers, but are of 8 experts, top-"),
        (one, {"num_hidden_layers": 2}, "in at most 2 layers, but are of 8 experts, top-2, in 3"),
        ((one.ids, one.weights), {"num_experts": 4}, "must name experts below 4, but name [4-7]"),
        (one.select(layers=[0, 1]), {}, "of 2 layers number 0 was to come and another"),
        (trace, {}, "pass 0 must have the 14 tokens of its step in the trace, not 7"),
    ]
    for routes, sizes, why in cases:
        plugin.use_device(device, routes=routes)
        with pytest.raises(ForeignTrace, match=why):
            read(model(**sizes), ids)
        plugin.release()
    plugin.use_device(device, routes=one)
    with pytest.raises(InvalidTrace, match="of 10 there are 3 left for a pass of 7"):
        read(model(), ids)


def test_what_is_no_trace_is_refused(device, tmp_path):
    ids = np.zeros((3, 1, 2), np.int16)
    for routes, why, error in [
        (ids, "routes must be a RoutingTrace, the path of one, or a pair", errors.InvalidOption),
        ((ids[0], None), "ids of routes must be integers", InvalidTrace),
        ((ids, ids), "weights of routes must be floats", InvalidTrace),
        ((ids, np.ones((3, 1, 1))), r"must have the shape of ids, \(3, 1, 2\)", InvalidTrace),
        (tmp_path / "none", "none", TornTrace),
    ]:
        with pytest.raises(error, match=why):
            plugin.use_device(device, routes=routes)
    with pytest.raises(errors.InvalidOption, match="unsupported must be 'refuse' with routes"):
        plugin.use_device(device, routes=(ids, None), unsupported="eager")


class Loading:
    """As accelerate's AlignDevicesHook: parameters are other tensors in each call, here those that
    another layer had before."""

    offload = True


@torch.no_grad()
def test_parameters_that_are_loaded_for_each_call_are_those_of_their_layer(device, ids):
    network = model()
    with record(network) as recording:
        before = network(ids[:1]).logits
        network(ids[:1])
    plugin.use_device(device, weight_format="mxint8", activation_bits=16,
                      routes=recording.trace())
    places = {}  # one for all layers

    def load(module, _):
        for name, values in module.kept.items():
            place = places.setdefault(name, torch.empty_like(values))
            setattr(module, name, torch.nn.Parameter(place.copy_(values)))

    for layer in network.model.layers:
        experts = layer.mlp.experts
        experts._hf_hook = Loading()
        experts.kept = {name: p.detach().clone() for name, p in experts.named_parameters()}
        experts.register_forward_pre_hook(load)
    for _ in range(2):
        assert torch.equal(network(ids[:1]).logits, before)
