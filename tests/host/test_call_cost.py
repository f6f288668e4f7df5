"""How often a call uses each verb, and that calls beside the rings are the same calls."""

import threading
from collections import Counter

import numpy as np
import pytest
import torch

from moeaccel.host import errors, open_device
from moeaccel.host.call_bench import PARTS, CallBenchError, bench_call
from moeaccel.host.transports.golden import GoldenTransport
from tests.support.device import TINY, draw_call, draw_weights, expected_of, layer_of

VERBS = ("register_read", "register_write", "memory_read", "memory_write", "wait_interrupt")


class Counted(GoldenTransport):
    """Counts verbs and remembers writes; refuses reads of what was never written, and writes and
    reads of parts of beats."""

    verb_bytes = 4096

    def __init__(self, **options):
        super().__init__(TINY, **options)
        self.count, self.written = Counter(), np.zeros(options["memory_bytes"], bool)

    def memory_write(self, address, data):
        self.count["memory_write"] += 1
        size = len(data)
        assert address % 64 == size % 64 == 0
        self.written[address : address + size] = True
        super().memory_write(address, data)

    def memory_read(self, address, count):
        self.count["memory_read"] += 1
        assert address % 64 == count % 64 == 0
        assert self.written[address : address + count].all()
        return super().memory_read(address, count)

    def register_read(self, address):
        self.count["register_read"] += 1
        return super().register_read(address)

    def register_write(self, address, value):
        self.count["register_write"] += 1
        super().register_write(address, value)

    def wait_interrupt(self, timeout_s):
        self.count["wait_interrupt"] += 1
        return super().wait_interrupt(timeout_s)


@pytest.fixture
def counted():
    return Counted(memory_bytes=1 << 20)


def opened(transport, **options):
    return open_device(transport, config=TINY, **options)


@pytest.mark.parametrize("polling", [False, True])
@pytest.mark.parametrize("tokens", [1, 7])
def test_verbs_of_a_call(counted, polling, tokens):
    """Over two times around the ring: each verb once, and at most 1.1 register writes, with the
    interrupt's acknowledgement besides."""
    rng = np.random.default_rng(0)
    weights, call = draw_weights(rng), draw_call(rng, tokens)
    with opened(counted, polling=polling) as device:
        experts = device.load_experts(*weights)
        expected = expected_of(experts, call, layer_of(*weights))
        for _ in range(16):  # both sides were used: where y goes was written once
            experts(*call)
        counted.count.clear()
        for _ in range(30):
            assert np.array_equal(experts(*call), expected)
        a_call = {verb: counted.count[verb] / 30 for verb in VERBS}
    assert a_call["memory_write"] == a_call["memory_read"] == 1
    assert a_call["wait_interrupt"] + a_call["register_read"] == 1
    assert a_call["register_write"] <= (1.1 if polling else 2.1)


def test_two_calls_in_flight_are_one_write_and_one_read_each(counted):
    """Of different layers and shapes, awaited in either order."""
    rng = np.random.default_rng(1)
    layers = [draw_weights(rng), draw_weights(rng, d_model=96)]
    calls = [draw_call(rng, 3), draw_call(rng, 2, d_model=96)]
    with opened(counted) as device:
        loaded = [device.load_experts(*weights) for weights in layers]
        expected = [expected_of(experts, call, layer_of(*weights))
                    for experts, call, weights in zip(loaded, calls, layers, strict=True)]
        for experts, call in zip(loaded, calls, strict=True):
            experts(*call)
        for order in ([0, 1], [1, 0]) * 20:
            counted.count.clear()
            handles = [experts.submit(*call) for experts, call in zip(loaded, calls, strict=True)]
            for which in order:
                assert np.array_equal(loaded[which].sync(handles[which]), expected[which])
            if counted.count["memory_write"] > 2:  # a larger y was never there: cleared once
                assert counted.count["memory_write"] <= 4
            assert counted.count["memory_read"] == 2
        assert counted.count["memory_write"] == 2


def test_more_calls_in_flight_than_sides(counted):
    rng = np.random.default_rng(2)
    weights = draw_weights(rng)
    with opened(counted) as device:
        experts = device.load_experts(*weights)
        calls = [draw_call(rng, 1 + n % 5) for n in range(14)]
        handles = [experts.submit(*call) for call in calls]
        for n in rng.permutation(len(calls)):
            expected = expected_of(experts, calls[n], layer_of(*weights))
            assert np.array_equal(experts.sync(handles[n]), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_torch_tensors_beside_the_rings(device, dtype):
    rng = np.random.default_rng(3)
    weights = draw_weights(rng)
    experts = device.load_experts(*weights)
    x, ids, routing = (torch.from_numpy(value) for value in draw_call(rng, 5))
    x, routing = x.to(dtype).requires_grad_(), routing.to(dtype)
    wide = ids.clone()
    wide[0, 0] += 1 << 32  # not expert 0 in 32 bits
    ids[0, 0] = -1
    y = experts(x, wide, routing)
    assert y.dtype is dtype and not y.requires_grad
    expected = expected_of(experts, (x.detach().float().numpy(), ids.numpy(),
                                     routing.float().numpy()), layer_of(*weights))
    assert torch.equal(y, torch.from_numpy(expected).to(dtype))


def test_a_result_belongs_to_the_caller(experts, device):
    """Later calls, on the same side, do not change it; and it may be written."""
    call = draw_call(np.random.default_rng(4), 2)
    first = experts(*call)
    kept = first.copy()
    for seed in range(5, 9):
        experts(*draw_call(np.random.default_rng(seed), 2))
    assert np.array_equal(first, kept)
    first += 1
    assert np.array_equal(experts(*call), kept)


def test_rows_that_are_no_whole_blocks_hold_nothing_of_the_call_before(device):
    rng = np.random.default_rng(5)
    narrow, full = draw_weights(rng, d_model=50), draw_weights(rng, d_model=64)
    loaded, other = device.load_experts(*narrow), device.load_experts(*full)
    call = draw_call(rng, 3, d_model=50)
    expected = loaded(*call)
    x, ids, weights = draw_call(rng, 3)
    other(20 * x, ids, weights)
    assert np.array_equal(loaded(*call), expected)


def test_an_error_beside_the_rings_leaves_them_in_order(experts):
    x, ids, weights = draw_call(np.random.default_rng(6), 2)
    expected = experts(x, ids, weights)
    bad = x.copy()
    bad[1, 3] = np.nan
    for _ in range(20):
        handles = [experts.submit(value, ids, weights) for value in (bad, x)]
        with pytest.raises(errors.NonFiniteInput, match="token 1"):
            experts.sync(handles[0])
        assert np.array_equal(experts.sync(handles[1]), expected)


class Slow(GoldenTransport):
    """Completes only when told, while somebody waits beside other calls."""

    waits_beside = True

    def __init__(self):
        super().__init__(TINY, memory_bytes=1 << 20)
        self.go, self.waiting = threading.Event(), threading.Event()

    def _execute_ring(self):
        if self.go.is_set():
            super()._execute_ring()

    def wait_interrupt(self, timeout_s):
        self.waiting.set()
        self.go.wait(timeout_s)
        return super().wait_interrupt(timeout_s)


def test_no_lock_is_held_while_a_thread_waits():
    transport = Slow()
    transport.go.set()
    rng = np.random.default_rng(7)
    call = draw_call(rng, 2)
    with opened(transport) as device:
        experts = device.load_experts(*draw_weights(rng))
        expected = experts(*call)
        transport.go.clear()
        transport.waiting.clear()
        found = []
        thread = threading.Thread(target=lambda: found.append(experts(*call)))
        thread.start()
        assert transport.waiting.wait(30)
        handle = experts.submit(*call)  # would wait for the other's result
        assert thread.is_alive() and len(device.in_flight) == 2
        transport.go.set()
        thread.join(30)
        assert np.array_equal(experts.sync(handle), expected)
        assert np.array_equal(found[0], expected)


def test_a_call_is_measured():
    cost = bench_call(tokens=2, d_model=64, top_k=2, config="tiny", calls=20, polling=True)
    assert cost.verbs["memory_write"] == cost.verbs["memory_read"] == 1
    assert cost.verbs["register_write"] <= 1.15
    assert tuple(cost.parts) == PARTS
    # x, ids and weights in whole beats, the entry, and entries on the way to the nearer end
    assert 512 + 3 * 64 <= cost.bytes_written <= 512 + 3 * 64 + 7 * 64
    with pytest.raises(CallBenchError, match="dtype must be one of bfloat16"):
        bench_call(tokens=1, dtype="int8")
