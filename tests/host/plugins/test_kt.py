"""kt-kernel's wrapper, driven by callbacks as an engine does."""

import numpy as np
import pytest
import torch

from moeaccel.host import errors, open_device
from moeaccel.host.plugins.kt import MoEWrapper
from tests.support.device import draw_call, draw_weights

EXPERTS, WIDTH, INNER = 8, 32, 32


@pytest.fixture(scope="module")
def device():
    with open_device("golden", config="tiny", memory_bytes=1 << 22) as opened:
        yield opened


def wrapper(device, layer=0, **options):
    made = MoEWrapper(layer, EXPERTS, 2, WIDTH, INNER, device=device, grid_exponent=-14,
                      cpuinfer_threads=4, threadpool_count=1, weight_path="", **options)
    gate_up, down = draw_weights(np.random.default_rng(layer), EXPERTS, WIDTH, INNER)
    weights = (torch.from_numpy(gate_up[:, :INNER]), torch.from_numpy(gate_up[:, INNER:]),
               torch.from_numpy(down))
    return made, weights


def call(seed=0, tokens=3):
    x, ids, weights = draw_call(np.random.default_rng(seed), tokens, experts=EXPERTS,
                                d_model=WIDTH)
    return torch.from_numpy(x), torch.from_numpy(ids), torch.from_numpy(weights)


def test_an_engine_calls_layers_by_hooks(device):
    """Experts 0 and 1 are the engine's; ids of -1 are nobody's."""
    layers, plain = [], []
    for n in range(3):
        layer, (gate, up, down) = wrapper(device, n, num_gpu_experts=2)
        layer.load_weights_from_tensors(gate, up, down)
        layers.append(layer)
        plain.append(device.load_experts(torch.cat((gate, up), 1), down, grid_exponent=-14))

    def before(n, x, ids, weights):
        layers[n].submit_forward(x, ids, weights)

    def behind(n, x, y):
        return y + layers[n].sync_forward(x)

    for n in range(3):
        x, ids, weights = call(n)
        ids[0, 0] = -1
        before(n, x, ids, weights)
        own = torch.ones_like(x)  # what the engine computes meanwhile
        y = behind(n, x, own)
        assert torch.equal(y, own + plain[n](x, torch.where(ids < 2, -1, ids), weights))


def test_deferred_experts_come_with_the_next_layer(device):
    first, weights = wrapper(device, 0, max_deferred_experts_per_token=1)
    first.load_weights_from_tensors(*weights)
    last, weights = wrapper(device, 1)
    last.load_weights_from_tensors(*weights)
    x, _, scores = call(5)
    ids = torch.tensor([[0, 1], [2, 3], [-1, 4]])
    now, later = first.select_deferred_experts(ids, scores)
    assert ((now == -1) != (later == -1)).sum() == 5
    strongest = scores.argmax(1)
    assert torch.equal(now.gather(1, strongest[:, None]), ids.gather(1, strongest[:, None]))
    y = first.forward(x, ids, scores)
    behind = last.forward(x, ids, scores)
    assert torch.equal(y, first._experts(x, now, scores))
    assert torch.equal(behind, last._experts(x, ids, scores) + first._experts(x, later, scores))
    assert torch.equal(last.forward(x, ids, scores), last._experts(x, ids, scores))  # once


def test_physical_experts_are_where_the_map_says(device):
    layer, weights = wrapper(device)
    order = torch.tensor([3, 1, 2, 0, 4, 5, 7, 6])
    layer.load_weights_from_tensors(*weights, order)
    x, ids, scores = call(6)
    assert torch.equal(layer.forward(x, ids, scores), layer._experts(x, order[ids], scores))


def test_what_is_refused(device):
    layer, (gate, up, down) = wrapper(device)
    x, ids, scores = call()
    with pytest.raises(errors.InvalidOption, match="layer 0 must have weights"):
        layer.submit_forward(x, ids, scores)
    with pytest.raises(errors.InvalidTensor, match=r"down_proj must have the shape \(8, 32, 32\)"):
        layer.load_weights_from_tensors(gate, up, down[:4])
    with pytest.raises(errors.InvalidTensor, match="physical_to_logical_map_cpu must be 8 numbers"):
        layer.load_weights_from_tensors(gate, up, down, torch.full((8,), 8))
    layer.load_weights_from_tensors(gate, up, down)
    with pytest.raises(errors.HandleConsumed, match="by submit_forward"):
        layer.sync_forward(x)
    layer.submit_forward(x, ids, scores)
    with pytest.raises(errors.HandleConsumed, match="must be taken by sync_forward"):
        layer.submit_forward(x, ids, scores)
    layer.sync_forward(x)
    with pytest.raises(errors.InvalidOption, match="num_gpu_experts must be from 0 to 8"):
        wrapper(device, num_gpu_experts=9)
