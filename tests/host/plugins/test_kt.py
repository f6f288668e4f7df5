"""kt-kernel's wrapper, driven by callbacks as an engine does."""

import numpy as np
import pytest
import torch

from moeaccel.host import errors, open_device
from moeaccel.host.importers import import_checkpoint, open_checkpoint
from moeaccel.host.plugins.kt import MoEWrapper
from tests.support.checkpoints import expert_stems, float_experts, write_safetensors
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


def test_what_is_computed_now_for_one_token_is_for_all(device):
    layer, _ = wrapper(device, max_deferred_experts_per_token=1)
    ids = torch.tensor([[0, 1], [2, 0], [3, -1]])
    scores = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7]])
    now, later = layer.select_deferred_experts(ids, scores)
    assert now.tolist() == [[0, -1], [2, 0], [-1, -1]]  # 0 is read for the first token
    assert later.tolist() == [[-1, 1], [-1, -1], [3, -1]]
    now, later = layer.select_deferred_experts(ids, scores, 0)
    assert (now == -1).all() and torch.equal(later, ids)


def test_weights_come_from_a_checkpoint_or_a_file_of_its_images(device, tmp_path):
    stacks = float_experts(EXPERTS, WIDTH, INNER, seed=3)
    path = write_safetensors(tmp_path / "model", {
        f"{stem}.weight": stacks[part][e] for part, e, stem in expert_stems(EXPERTS, 5)})
    with open_checkpoint(path) as checkpoint:
        import_checkpoint(checkpoint, tmp_path / "images", config="tiny")
    order = torch.tensor([3, 1, 2, 0, 4, 5, 7, 6])
    x, ids, scores = call(6)
    found = []
    for place in (path, tmp_path / "images"):
        layer = MoEWrapper(5, EXPERTS, 2, WIDTH, INNER, device=device, grid_exponent=-14,
                           weight_path=place)
        layer.load_weights(order)
        found.append(layer.forward(x, ids, scores))
        other = MoEWrapper(4, EXPERTS, 2, WIDTH, INNER, device=device, weight_path=place)
        with pytest.raises(errors.InvalidTensor, match=r"layer 4 of .* must have .*be missing"):
            other.load_weights()
    plain = device.load_experts(
        torch.cat([torch.from_numpy(stacks[part]) for part in ("gate", "up")], 1),
        torch.from_numpy(stacks["down"]), grid_exponent=-14)
    expected = plain(x, order[ids], scores)
    assert torch.equal(found[0], expected) and torch.equal(found[1], expected)
    with pytest.raises(errors.InvalidOption, match=r"weight_path must be given for load_weights"):
        wrapper(device)[0].load_weights()


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
