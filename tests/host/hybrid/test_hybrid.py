"""Hybrid layers on golden: the same bits, whoever computes what."""

import json
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from moeaccel.activations import ACTIVATIONS as ALL_ACTIVATIONS
from moeaccel.formats import ALL_FORMATS, prune, quantise
from moeaccel.host import errors, open_device
from moeaccel.host.hybrid import Hybrid
from moeaccel.host.hybrid.grouped import ACTIVATIONS, _decoded
from moeaccel.host.hybrid.images import read_expert
from moeaccel.host.hybrid.lanes import CudaLane
from moeaccel.host.policies.costs import machine
from moeaccel.host.policies.errors import (
    BudgetTooSmall,
    PolicyError,
    PolicyFailed,
    UnknownPolicy,
    UnsupportedPolicy,
)
from moeaccel.host.policies.placement.measured import MeasuredScan
from moeaccel.host.policies.placement.scan import Scan
from moeaccel.host.policies.systems import SYSTEMS
from moeaccel.host.transports.golden import GoldenTransport
from moeaccel.image import Expert
from tests.support.device import TINY, draw_call, draw_weights

EXPERTS, D_MODEL, D_EXPERT = 8, 32, 32
RESIDENT = 3 * D_MODEL * D_EXPERT * 2  # bytes of one in bfloat16
GRID = -14  # coarse enough that float32 holds the accelerator's part exactly

RUNNING = [name for name, row in SYSTEMS.items() if row.lossless and name != "belady"]


def layers_of(device, count=2, **options):
    rng = np.random.default_rng(3)
    return [device.load_experts(*draw_weights(rng, EXPERTS, D_MODEL, D_EXPERT),
                                grid_exponent=GRID, quantiser="amax", **options)
            for _ in range(count)]


@pytest.fixture(scope="module")
def loaded():
    """Two layers, whatever runs them, and what the device alone makes of all calls."""
    with open_device("golden", config="tiny", memory_bytes=1 << 22) as device:
        layers = layers_of(device)
        yield layers, alone(layers)


def calls(count=12, seed=0, dtype=torch.float32):
    """A prompt, then single tokens that prefer some experts."""
    rng = np.random.default_rng(seed)
    for n in range(count):
        x, ids, weights = draw_call(rng, 20 if not n else 1, experts=EXPERTS, d_model=D_MODEL)
        ids = np.where(rng.random(ids.shape) < 0.5, ids % 3, ids)
        ids[:, 1] = np.where(ids[:, 1] == ids[:, 0], -1, ids[:, 1])
        yield (torch.from_numpy(x).to(dtype), torch.from_numpy(ids),
               torch.from_numpy(weights).to(dtype))


def run(hybrid, layers, **options):
    return [hybrid(experts, *call, layers=len(layers)) for call in calls(**options)
            for experts in layers]


def alone(layers, **options):
    return [experts(*call) for call in calls(**options) for experts in layers]


@pytest.mark.parametrize("policy", RUNNING)
def test_every_lossless_policy_gives_the_bits_of_the_device_alone(loaded, policy):
    layers, alone_y = loaded
    hybrid = Hybrid(policy, gpu_bytes=6 * RESIDENT, resident_math="exact", on=machine("h100"))
    for y, expected in zip(run(hybrid, layers), alone_y, strict=True):
        assert torch.equal(y, expected)
    counters = hybrid.counters
    assert all(c.calls == 12 and c.tokens == 31 for c in counters)
    if policy != "all-on-torch":
        assert sum(c.residents for c in counters) <= 6
    assert [len(hybrid.residents(experts)) for experts in layers] == [
        c.residents for c in counters]
    if SYSTEMS[policy].residency is not None:
        assert sum(c.on_torch for c in counters)
    else:
        assert not sum(c.residents for c in counters)


@pytest.mark.parametrize("policy", ["moeaccel", "all-on-torch", "plain-offloading", "fiddler"])
def test_bfloat16_is_near(loaded, policy):
    layers, alone_y = loaded
    hybrid = Hybrid(policy, gpu_bytes=6 * RESIDENT)
    for y, expected in zip(run(hybrid, layers, dtype=torch.bfloat16), alone_y, strict=True):
        assert y.dtype is torch.bfloat16
        error = (y.float() - expected).norm() / expected.norm()
        assert error < 0.02


def test_bfloat16_rounds_once(loaded):
    layers, _ = loaded
    hybrid = Hybrid("static-hot-set", gpu_bytes=6 * RESIDENT, resident_math="exact")
    for y, expected in zip(run(hybrid, layers, dtype=torch.bfloat16),
                           alone(layers, dtype=torch.bfloat16), strict=True):
        assert torch.equal(y, expected)


@pytest.mark.parametrize("name", ALL_ACTIVATIONS)
def test_grouped_activations_are_the_devices(device, name):
    layers = layers_of(device, 1, activation=name, limit=7.0)
    assert set(ACTIVATIONS) == set(ALL_ACTIVATIONS)
    hybrid = Hybrid("all-on-torch", gpu_bytes=16 * RESIDENT)
    for y, expected in zip(run(hybrid, layers, count=1), alone(layers, count=1), strict=True):
        assert (y - expected).norm() / expected.norm() < 0.02


@pytest.mark.parametrize("name", ALL_FORMATS)
def test_every_format_is_decoded(name):
    weights = np.random.default_rng(5).standard_normal((64, 256)).astype(np.float32)
    matrix = quantise(prune(weights, ALL_FORMATS[name], "magnitude"), name)
    found = _decoded(matrix, torch.device("cpu"))
    exact = torch.from_numpy(matrix.dequantise())
    assert (found - exact).abs().max() <= 2**-8 * exact.abs().max()


def test_images_read_back_are_what_was_loaded(device):
    rng = np.random.default_rng(3)
    gate_up, down = draw_weights(rng, EXPERTS, d_model=50)
    experts = device.load_experts(gate_up, down, weight_format="int4_g64")
    for e in (0, 5):
        found = read_expert(experts, e)
        expected = Expert.quantise(gate_up[e], down[e], "int4_g64").filled()
        for matrix, other in ((found.gate_up, expected.gate_up), (found.down, expected.down)):
            assert np.array_equal(matrix.dequantise(), other.dequantise())


class Order:
    """A stand-in stream, and a transport's calls, in one list."""

    def __init__(self):
        self.said = []

    def move(self, work):
        self.said.append("move")
        return work()

    def ready(self):
        self.said.append("ready")


class Stream:
    """A stream of a stand-in for torch.cuda, which says what it is asked."""

    def __init__(self, name, said):
        self.name, self.said = name, said

    def wait_stream(self, other):
        self.said.append(f"{self.name} waits for {other.name}")


class Cuda:
    """The stand-in."""

    def __init__(self):
        self.said = []
        self.main = self.current = Stream("main", self.said)

    def Stream(self, device):
        return Stream(f"lane of {device}", self.said)

    def current_stream(self, device):
        return self.current

    @contextmanager
    def stream(self, stream):
        self.current, before = stream, self.current
        yield
        self.current = before


class Remembered:
    """A stand-in for a tensor on a GPU."""

    is_cuda = True
    by = None

    def record_stream(self, stream):
        self.by = stream


def test_moves_run_on_a_stream_of_their_own():
    cuda = Cuda()
    lane = CudaLane("cuda:0", cuda)

    def work():
        cuda.said.append(f"move on {cuda.current.name}")
        return [Remembered(), Remembered()]

    moved = lane.move(work)
    lane.ready()
    assert cuda.said == ["lane of cuda:0 waits for main", "move on lane of cuda:0",
                         "main waits for lane of cuda:0"]
    assert [one.by for one in moved] == [cuda.main] * 2  # not free before main has read them


def test_a_lane_gives_the_same_bits(loaded):
    layers, alone_y = loaded
    cuda = Cuda()
    hybrid = Hybrid("mixtral-offloading", gpu_bytes=6 * RESIDENT, resident_math="exact",
                    lane=lambda device: CudaLane(device, cuda))
    for y, expected in zip(run(hybrid, layers), alone_y, strict=True):
        assert torch.equal(y, expected)
    waits = [said.split()[0] for said in cuda.said]
    assert waits == ["lane", "main"] * (len(waits) // 2) and waits


def test_shared_experts_are_work_of_the_torch_device(loaded, monkeypatch):
    """The more of it there is beside the call, the less of the call is left to the torch device."""
    # As believed: what this machine takes depends on what else it does.
    monkeypatch.setattr(MeasuredScan, "measured", lambda *_: None)
    layers, alone_y = loaded
    on_torch = []
    for shared in (0, 1000):
        hybrid = Hybrid("moeaccel", gpu_bytes=8 * RESIDENT, resident_math="exact",
                        on=machine("h100"))
        found = [hybrid(experts, *call, layers=2, shared=shared) for call in calls()
                 for experts in layers]
        assert all(map(torch.equal, found, alone_y))
        on_torch.append(sum(c.on_torch for c in hybrid.counters))
    assert on_torch[1] < on_torch[0]


class Half(Scan):
    """Computes every resident, and moves one of the others."""

    name = "half"

    def _place(self, work):
        from moeaccel.host.policies.placement.base import ALL, Plan
        return Plan(ALL, slice(1))


def test_the_device_is_asked_first_and_awaited_last(device, monkeypatch):
    experts, = layers_of(device, 1)
    order = Order()
    hybrid = Hybrid("static-hot-set", gpu_bytes=2 * RESIDENT, resident_math="exact",
                    lane=lambda _: order)
    x, ids, weights = next(iter(calls()))
    expected = experts(x, ids, weights)
    hybrid(experts, x, ids, weights, layers=1)
    hybrid._place = Half(hybrid._costs)
    layer = hybrid._by_experts[experts]
    for what, owner in (("submit", experts), ("sync", experts), ("compute", layer.math)):
        method = getattr(owner, what)
        monkeypatch.setattr(owner, what, lambda *a, m=method, w=what: (
            order.said.append(w), m(*a))[1], raising=False)
    order.said.clear()
    assert torch.equal(hybrid(experts, x, ids, weights, layers=1), expected)
    assert order.said == ["submit", "move", "compute", "ready", "compute", "sync"]


def test_tokens_without_an_expert_on_the_device_are_not_sent(device):
    experts, = layers_of(device, 1)
    hybrid = Hybrid("static-hot-set", gpu_bytes=2 * RESIDENT, resident_math="exact")
    x, _, weights = (value[:9] for value in next(iter(calls())))
    ids = torch.tensor([[0, 1]] * 6 + [[0, 5], [6, -1], [-1, -1]])  # 0 and 1 are resident
    expected = experts(x, ids, weights)
    assert torch.equal(hybrid(experts, x, ids, weights, layers=1), expected)
    counters, = hybrid.counters
    assert (counters.rows, counters.on_torch, counters.on_device) == (2, 2, 2)
    assert json.loads(json.dumps(counters.as_dict()))["rows"] == 2
    assert hybrid.table().splitlines()[-1].split()[:3] == ["all", "1", "9"]


def test_a_policy_that_raises_can_be_replaced(loaded):
    layers, expected = loaded
    device = layers[0].device
    hybrid = Hybrid("moeaccel", gpu_bytes=6 * RESIDENT, resident_math="exact")
    run(hybrid, layers)
    before = [hybrid.residents(experts) for experts in layers]

    def fails(*_, **__):
        raise ValueError("no")

    hybrid._place.place = fails
    call = next(iter(calls()))
    with pytest.raises(PolicyFailed, match="must plan layer 0, but raised ValueError: no"):
        hybrid(layers[0], *call, layers=2)
    del hybrid._place.place
    hybrid._keep.use = fails
    with pytest.raises(PolicyFailed, match="must look back on layer 0"):
        hybrid(layers[0], *call, layers=2)
    assert [hybrid.residents(experts) for experts in layers] == before
    assert device.in_flight == ()
    other = Hybrid("fiddler", gpu_bytes=6 * RESIDENT, resident_math="exact")
    for y, one in zip(run(other, layers), expected, strict=True):
        assert torch.equal(y, one)


class Losing(GoldenTransport):
    """Loses the device at a memory read of so many bytes or more."""

    lost = False
    at = 1 << 62

    def memory_read(self, address, count):
        if count >= self.at:
            self.lost = True
        if self.lost:
            raise errors.LinkLost("device must answer, but does not")
        return super().memory_read(address, count)

    def reconnect(self):
        lost, self.lost, self.at = self.lost, False, 1 << 62
        return lost


def test_a_device_lost_in_the_middle_of_a_move():
    transport = Losing(TINY, memory_bytes=1 << 22)
    with open_device(transport, config="tiny") as device:
        layers = layers_of(device)
        expected = alone(layers)
        hybrid = Hybrid("mixtral-offloading", gpu_bytes=6 * RESIDENT, resident_math="exact")
        call = next(iter(calls()))
        transport.at = 512  # of images, in the first call
        with pytest.raises(errors.LinkLost):
            hybrid(layers[0], *call, layers=2)
        assert hybrid.residents(layers[0]) == []
        device.reset()
        for y, one in zip(run(hybrid, layers), expected, strict=True):
            assert torch.equal(y, one)


def test_an_expert_that_moved_for_a_call_moves_once(device):
    experts, = layers_of(device, 1)
    hybrid = Hybrid("mixtral-offloading", gpu_bytes=3 * RESIDENT, resident_math="exact")
    x, ids, weights = (value[:1] for value in next(iter(calls())))
    ids = torch.tensor([[4, 6]])
    for _ in range(4):
        hybrid(experts, x, ids, weights, layers=1)
    counters, = hybrid.counters
    assert hybrid.residents(experts) == [4, 6]
    assert (counters.moved, counters.promoted, counters.hits, counters.misses) == (2, 0, 6, 2)


def test_what_cannot_be_asked(device):
    layers = layers_of(device)
    with pytest.raises(UnknownPolicy, match="did you mean fiddler"):
        Hybrid("fidler")
    for name, why in (("lynx", "changes them"), ("belady", "but belady knows")):
        with pytest.raises(UnsupportedPolicy, match=why):
            Hybrid(name)
    with pytest.raises(errors.InvalidOption, match="resident_math must be one of bf16, exact"):
        Hybrid(resident_math="fp8")
    with pytest.raises(errors.InvalidOption, match="gpu_bytes must be a number of bytes"):
        Hybrid(gpu_bytes=-1)
    call = next(iter(calls()))
    with pytest.raises(BudgetTooSmall, match=f"at least {RESIDENT:,}"):
        Hybrid(gpu_bytes=RESIDENT - 1)(layers[0], *call, layers=2)
    hybrid = Hybrid(gpu_bytes=4 * RESIDENT)
    hybrid(layers[0], *call, layers=1)
    with pytest.raises(PolicyError, match="at most 1 layers"):
        hybrid(layers[1], *call, layers=1)
    rng = np.random.default_rng(0)
    foreign = device.load_experts(*draw_weights(rng, 4))
    with pytest.raises(PolicyError, match="must be alike, 8 experts of 32 by 32, not 4"):
        hybrid(foreign, *call, layers=1)


def test_layers_that_are_gone_make_room(device):
    layers = layers_of(device)
    hybrid = Hybrid(gpu_bytes=4 * RESIDENT, resident_math="exact")
    call = next(iter(calls()))
    hybrid(layers[0], *call, layers=1)
    del layers[0]
    again = layers[0]
    assert torch.equal(hybrid(again, *call, layers=1), again(*call))
