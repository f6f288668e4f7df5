"""Devices and layers through the golden transport: bits, results in any order, and counters."""

import gc
import threading
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from moeaccel import golden
from moeaccel.formats import FORMATS, quantise
from moeaccel.host import errors, layer, open_device
from moeaccel.interface.registers import REGISTERS
from tests.support.device import TINY, draw_call, draw_weights, expected_of, layer_of


@pytest.fixture(scope="module")
def shared():
    with open_device("golden", config="tiny", memory_bytes=1 << 24) as device:
        yield device


# -- bits ------------------------------------------------------------------------------------------
ROUTINGS = {
    "free": lambda rng, shape, experts: rng.integers(0, experts, shape),
    "one expert": lambda rng, shape, experts: np.full(shape, rng.integers(experts)),
    "half of the experts": lambda rng, shape, experts: rng.integers(0, max(1, experts // 2), shape),
    "invalid ids too": lambda rng, shape, experts: rng.integers(-3, experts + 3, shape),
    "nothing": lambda rng, shape, experts: np.full(shape, -1),
    "far out": lambda rng, shape, experts: rng.choice([-(1 << 62), 1 << 62, 1 << 32, 0], shape),
}


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 1 << 30), experts=st.integers(1, 6), steps=st.integers(1, 4),
    hidden=st.integers(1, 4), tokens=st.sampled_from([0, 1, 2, 5, 17, 64, 65, 131]),
    top_k=st.sampled_from([1, 2, 5, 16]), name=st.sampled_from(list(FORMATS)),
    bits=st.sampled_from([8, 16]), routing=st.sampled_from(list(ROUTINGS)))
def test_experts_are_the_golden_model_bit_for_bit(shared, seed, experts, steps, hidden, tokens,
                                                  top_k, name, bits, routing):
    rng = np.random.default_rng(seed)
    weights = draw_weights(rng, experts, 32 * steps, 32 * hidden)
    x, _, scores = draw_call(rng, tokens, top_k, experts, 32 * steps)
    ids = ROUTINGS[routing](rng, (tokens, top_k), experts)
    with shared.load_experts(*weights, weight_format=name, activation_bits=bits) as loaded:
        y = loaded(x, ids, scores)
        expected = golden.experts(x, ids, scores, layer_of(*weights, name), planes=bits // 8,
                                  grid_exponent=loaded.grid_exponent)
        assert y.dtype == np.float32
        assert np.array_equal(y, expected.y)
        parts = -(-tokens // min(TINY.max_tokens, TINY.max_assignments // top_k))
        assert loaded.last.commands == parts
        assert loaded.last.tokens == tokens
    assert shared.memory.free_blocks == 1


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1 << 30), d_in=st.integers(1, 8), d_out=st.integers(1, 8),
    tokens=st.sampled_from([0, 1, 64, 65, 200]), name=st.sampled_from(list(FORMATS)),
    bits=st.sampled_from([8, 16]))
def test_linear_is_the_golden_model_bit_for_bit(shared, seed, d_in, d_out, tokens, name, bits):
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((32 * d_out, 32 * d_in), np.float32)
    x = rng.standard_normal((tokens, 32 * d_in), np.float32)
    with shared.load_linear(weight, weight_format=name, activation_bits=bits) as loaded:
        expected = golden.gemm(x, quantise(weight, name), planes=bits // 8,
                               grid_exponent=loaded.grid_exponent)
        assert np.array_equal(loaded(x), expected.y)
        assert loaded.last.commands == -(-tokens // TINY.max_tokens)
    assert shared.memory.free_blocks == 1


def test_splitting_changes_no_bit(device, experts):
    rng = np.random.default_rng(0)
    call = draw_call(rng, 150)
    whole = experts(*call)
    assert experts.last.commands == 3
    pieces = [experts(*(array[t : t + 1] for array in call)) for t in range(150)]
    assert np.array_equal(whole, np.concatenate(pieces))


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_results_beyond_float16_are_said(kind):
    with open_device("golden", config="tiny", memory_bytes=1 << 20) as device:
        linear = device.load_linear(np.full((32, 32), 8.0), weight_format="mxint8")
        x = np.zeros((3, 32), np.float16)
        x[0], x[1] = 256, 255  # sums of 65,536 and 65,280
        told = x if kind == "numpy" else torch.from_numpy(x)
        with pytest.warns(RuntimeWarning, match="32 of 96 results lie beyond 65,504, the largest"):
            y = linear(told)
        assert np.isinf(np.asarray(y)).sum() == 32
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            linear(told[1:])
            linear(told.astype(np.float32) if kind == "numpy" else told.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("index", [torch.int64, torch.int32])
def test_torch_in_torch_out(experts, dtype, index):
    x, ids, weights = (torch.from_numpy(a) for a in draw_call(np.random.default_rng(1), 9))
    y = experts(x.to(dtype, copy=True).requires_grad_(), ids.to(index), weights.to(torch.bfloat16))
    assert y.dtype is dtype
    assert not y.requires_grad
    expected = experts(x.to(dtype).float().numpy(), ids.numpy(),
                       weights.to(torch.bfloat16).float().numpy())
    assert torch.equal(y, torch.from_numpy(expected).to(dtype))


def test_numpy_in_numpy_out(experts):
    x, ids, weights = draw_call(np.random.default_rng(1), 9)
    y = experts(x.astype(np.float16), ids.astype(np.int32), weights.astype(np.float64))
    assert isinstance(y, np.ndarray)
    assert y.dtype == np.float16
    mixed = experts(x.astype(np.float16), torch.from_numpy(ids), torch.from_numpy(weights))
    assert np.array_equal(y, mixed)


def test_weights_may_be_a_sequence_of_matrices_of_any_type(device, experts):
    gate_up, down = draw_weights(np.random.default_rng(7))
    tensors = [torch.from_numpy(g) for g in gate_up]
    call = draw_call(np.random.default_rng(1), 9)
    other = device.load_experts(tensors, list(down))
    assert np.array_equal(other(*call), experts(*call))
    half = device.load_experts(torch.from_numpy(gate_up).half(), torch.from_numpy(down).bfloat16())
    expected = golden.experts(*call, layer_of(torch.from_numpy(gate_up).half().float().numpy(),
                                              torch.from_numpy(down).bfloat16().float().numpy()),
                              grid_exponent=half.grid_exponent)
    assert np.array_equal(half(*call), expected.y)


def test_quantised_experts_load_as_they_are(device, experts):
    layer = layer_of(*draw_weights(np.random.default_rng(7)))
    seen = []
    loaded = device.load_quantised(layer, progress=lambda done, total: seen.append((done, total)))
    call = draw_call(np.random.default_rng(1), 9)
    assert np.array_equal(loaded(*call), experts(*call))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert loaded.shape == experts.shape
    assert loaded.num_experts == 4
    assert loaded.coarsened == sum(e.gate_up.coarsened + e.down.coarsened for e in layer)


def test_weights_live_in_device_memory(device, experts):
    """What the device computes follows the bytes of the image, not what the driver remembers."""
    x, ids, weights = draw_call(np.random.default_rng(3), 5)
    before = experts(x, ids, weights)
    transport, stride = device.transport, experts.shape.memory_bytes
    images = [transport.memory_read(experts._images.address + e * stride, stride) for e in range(4)]
    for e in range(4):
        transport.memory_write(experts._images.address + e * stride, images[3 - e])
    assert np.array_equal(experts(x, 3 - ids, weights), before)
    assert not np.array_equal(experts(x, ids, weights), before)


# -- asynchronous ----------------------------------------------------------------------------------
@settings(max_examples=15, deadline=None)
@given(st.permutations(range(9)), st.integers(1, 3))
def test_results_may_be_taken_in_any_order(order, ring_log2):
    with open_device("golden", config="tiny", memory_bytes=1 << 24, ring_log2=ring_log2) as device:
        weights = draw_weights(np.random.default_rng(0))
        layer, loaded = layer_of(*weights), device.load_experts(*weights)
        calls = [draw_call(np.random.default_rng(i), 3 + 9 * i) for i in range(9)]
        handles = [loaded.submit(*call) for call in calls]
        for i in order:
            y = loaded.sync(handles[i])
            assert np.array_equal(y, expected_of(loaded, calls[i], layer))
        loaded.close()
        assert device.memory.free_blocks == 1


def test_a_ring_goes_around_many_times():
    with open_device("golden", config="tiny", memory_bytes=1 << 24, ring_log2=1) as device:
        weights = draw_weights(np.random.default_rng(0))
        loaded = device.load_experts(*weights)
        call = draw_call(np.random.default_rng(1), 2)
        expected = expected_of(loaded, call, layer_of(*weights))
        for _ in range(30):
            handles = [loaded.submit(*call) for _ in range(3)]
            for handle in handles:
                assert np.array_equal(loaded.sync(handle), expected)
        assert device.counters()["commands"] == 90


def test_dropped_handles_give_their_buffers_back(device, experts):
    before = device.memory.free_bytes
    for _ in range(100):
        experts.submit(*draw_call(np.random.default_rng(0), 64))
    device.fence()
    gc.collect()
    experts(*draw_call(np.random.default_rng(0), 1))
    gc.collect()
    assert device.memory.free_bytes == before


def test_dropped_layers_give_their_memory_back(device):
    before = device.memory.free_bytes
    loaded = device.load_experts(*draw_weights(np.random.default_rng(0)))
    handle = loaded.submit(*draw_call(np.random.default_rng(0), 10))
    assert device.memory.free_bytes < before
    del loaded, handle
    gc.collect()
    device.fence()
    gc.collect()
    assert device.memory.free_bytes == before


def test_a_handle_is_used_once(device, experts):
    call = draw_call(np.random.default_rng(0), 3)
    handle = experts.submit(*call)
    experts.sync(handle)
    with pytest.raises(errors.HandleConsumed, match="already taken"):
        experts.sync(handle)
    other = device.load_experts(*draw_weights(np.random.default_rng(0)))
    with pytest.raises(errors.HandleConsumed, match="this layer"):
        other.sync(experts.submit(*call))


def test_a_call_larger_than_memory_goes_through_in_pieces():
    config = TINY.replace(name="odd", max_tokens=16)
    with open_device("golden", config=config, memory_bytes=1 << 17) as device:
        weights = draw_weights(np.random.default_rng(0), 2)
        loaded = device.load_experts(*weights)
        call = draw_call(np.random.default_rng(1), 300, experts=2)
        assert np.array_equal(loaded(*call), expected_of(loaded, call, layer_of(*weights)))
        assert loaded.last.commands == 19


def test_several_threads_share_a_device(device, experts):
    layer = layer_of(*draw_weights(np.random.default_rng(7)))
    wrong = []

    def work(seed):
        rng = np.random.default_rng(seed)
        for _ in range(8):
            call = draw_call(rng, int(rng.integers(1, 80)))
            if not np.array_equal(experts(*call), expected_of(experts, call, layer)):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_damaged_uploads_are_found(device, monkeypatch):
    read = device.transport.memory_read
    monkeypatch.setattr(device.transport, "memory_read", lambda *a: read(*a) ^ 1)
    with pytest.raises(errors.UploadError, match=r"header of expert 0 .* must read back"):
        device.load_experts(*draw_weights(np.random.default_rng(0)))


def test_counters_tell_what_was_done(device, experts):
    x, ids, weights = draw_call(np.random.default_rng(0), 70)
    ids[3] = -1
    experts(x, ids, weights)
    counters = device.counters()
    assert counters["commands"] == 2
    assert counters["tokens"] == 70
    assert counters["assignments"] == 2 * 69
    slots = TINY.max_slots // 2
    passes = sum(-(-int((part == e).sum()) // slots) for part in (ids[:64], ids[64:])
                 for e in range(4))
    assert counters["expert_passes"] == passes
    payload = experts.shape.image_bytes - experts.shape.header_bytes
    assert counters["bytes_read_weights"] == passes * payload
    assert counters["bytes_written"] >= 70 * 64 * 4 + 2 * 64
    assert counters["bytes_read_other"] >= 2 * 128 + 70 * 64 * 4
    assert device.last_cycles == experts.last.cycles


def test_a_command_asks_for_completions_once(hung, monkeypatch):
    """Each question is a round trip of a serial line."""
    experts = hung.load_experts(*draw_weights(np.random.default_rng(7)))
    hung.transport.hang = True
    read, asked = hung.transport.register_read, []

    def counting(address):
        asked.append(address)
        return read(address)

    monkeypatch.setattr(hung.transport, "register_read", counting)
    for number in range(3):
        experts.submit(*draw_call(np.random.default_rng(number), 2))
    assert asked.count(REGISTERS["CQ_TAIL"].address) == 2  # for the first, nothing is under way


def test_a_look_at_x_keeps_nobody_waiting(device, experts, monkeypatch):
    def look(*arguments, **options):
        thread = threading.Thread(target=device.counters, daemon=True)
        thread.start()
        thread.join(20)
        waited.append(thread.is_alive())
        return measure(*arguments, **options)

    measure, waited = layer.measure_activations, []
    monkeypatch.setattr(layer, "measure_activations", look)
    experts(*draw_call(np.random.default_rng(0), 2))
    assert waited == [False]
