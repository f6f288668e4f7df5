"""One copy of each image: where it is, and that it is never lost."""

import numpy as np
import pytest
import torch

from moeaccel.host import errors, open_device
from moeaccel.host.hybrid import Hybrid
from moeaccel.host.hybrid.images import read_expert
from moeaccel.host.hybrid.places import Places, bring_home, image_parts
from moeaccel.host.policies.costs import machine
from moeaccel.host.policies.errors import PolicyFailed
from moeaccel.host.transports.golden import GoldenTransport
from tests.host.hybrid.test_hybrid import EXPERTS, RESIDENT, RUNNING, alone, calls, layers_of, run
from tests.support.device import TINY


@pytest.fixture
def layers(device):
    return layers_of(device)


def hybrid_of(policy="mixtral-offloading", **options):
    return Hybrid(policy, gpu_bytes=6 * RESIDENT, resident_math="exact", on=machine("h100"),
                  single_copy=True, **options)


@pytest.mark.parametrize("policy", RUNNING)
def test_residency_alone_decides_where_an_image_is(device, layers, policy):
    expected = alone(layers)
    before, size = device.memory.free_bytes, layers[0].shapes[0].memory_bytes
    hybrid = hybrid_of(policy)
    for y, one in zip(run(hybrid, layers), expected, strict=True):
        assert torch.equal(y, one)
    resident = [hybrid.residents(experts) for experts in layers]
    assert [Places.of(experts).away for experts in layers] == resident
    assert device.memory.free_bytes == before + size * sum(map(len, resident))
    for experts in layers:
        bring_home(experts)
    assert device.memory.free_bytes == before
    assert all(map(torch.equal, alone(layers), expected))


def test_images_come_back_as_they_were_wherever_there_is_room(device, layers):
    experts = layers[0]
    before = [image_parts(experts, e) for e in range(EXPERTS)]
    places = Places.of(experts)
    for e in (2, 5):
        places.take(experts, e)
    x, _, weights = next(iter(calls()))
    with pytest.raises(errors.WindowViolation):  # nobody computes with what is not there
        experts(x, torch.full((20, 2), 5), weights)
    taken = device.memory.allocate(experts.shapes[0].memory_bytes)  # another has a place by now
    for e in range(EXPERTS):
        assert all(map(np.array_equal, image_parts(experts, e), before[e]))
        read_expert(experts, e)
    bring_home(experts)
    assert places.away == []
    for e in range(EXPERTS):
        assert all(map(np.array_equal, image_parts(experts, e), before[e]))
    taken.free()
    layers[1].close()
    with pytest.raises(errors.DeviceClosed):
        bring_home(layers[1])
    free = device.memory.free_bytes
    experts.close()
    assert device.memory.free_bytes > free


def test_a_device_without_room_for_both_exchanges(device, layers):
    """Who comes in makes room for who leaves."""
    expected = alone(layers)
    hybrid = hybrid_of()
    first = next(iter(calls()))
    for experts in layers:
        hybrid(experts, *first, layers=2)
    rest = device.memory.allocate(device.memory.largest_free_block - (1 << 16))
    for y, one in zip(run(hybrid, layers), expected, strict=True):
        assert torch.equal(y, one)
    assert sum(c.promoted + c.moved for c in hybrid.counters) > 6
    while device.memory.largest_free_block >= layers[0].shapes[0].memory_bytes:
        rest = rest, device.memory.allocate(layers[0].shapes[0].memory_bytes)
    away = [Places.of(experts).away for experts in layers]
    with pytest.raises(errors.OutOfDeviceMemory):
        bring_home(layers[0])
    assert [Places.of(experts).away for experts in layers] == away
    del rest
    bring_home(layers[0])
    assert all(map(torch.equal, alone(layers[:1]), expected[::2]))


def test_another_policy_goes_on_with_what_is_there(device, layers):
    expected = alone(layers)
    hybrid = hybrid_of()
    run(hybrid, layers)

    def fails(*_, **__):
        raise ValueError("no")

    hybrid._keep.use = fails
    with pytest.raises(PolicyFailed):
        run(hybrid, layers)
    for other in (hybrid_of("static-hot-set"), Hybrid("fiddler", gpu_bytes=6 * RESIDENT,
                                                      resident_math="exact")):
        assert all(map(torch.equal, run(other, layers), expected))
    assert all(not Places.of(experts).away for experts in layers)


class Losing(GoldenTransport):
    """Loses the device at one of its accesses to memory."""

    left = 1 << 62

    def _count(self):
        self.left -= 1
        if self.left < 0:
            raise errors.LinkLost("device must answer, but does not")

    def memory_read(self, address, count):
        self._count()
        return super().memory_read(address, count)

    def memory_write(self, address, data):
        self._count()
        super().memory_write(address, data)

    def reconnect(self):
        lost, self.left = self.left < 0, 1 << 62
        return lost


def test_a_device_lost_at_any_step_loses_no_image():
    transport = Losing(TINY, memory_bytes=1 << 22)
    with open_device(transport, config="tiny") as device:
        layers = layers_of(device)
        expected = alone(layers)
        before = [[image_parts(experts, e) for e in range(EXPERTS)] for experts in layers]
        hybrid, lost = hybrid_of(), 0
        for after in (*range(24), 40, 60):
            transport.left = after
            try:
                run(hybrid, layers, count=3, seed=after)
            except errors.LinkLost:
                lost += 1
            device.reset()
            for experts, images in zip(layers, before, strict=True):
                for e, parts in enumerate(images):
                    assert all(map(np.array_equal, image_parts(experts, e), parts))
        assert lost > 20
        assert all(map(torch.equal, run(hybrid, layers), expected))


class Lazy(GoldenTransport):
    """Computes when it is waited for."""

    awaited = False

    def _execute_ring(self):
        if self.awaited:
            super()._execute_ring()

    def wait_interrupt(self, timeout_s):
        self.awaited = True
        raised = super().wait_interrupt(timeout_s)
        self.awaited = False
        return raised


def test_calls_in_flight_find_what_they_need():
    with open_device(Lazy(TINY, memory_bytes=1 << 22), config="tiny") as device:
        experts, other = layers_of(device)
        call = next(iter(calls()))
        expected = [layer(*call) for layer in (experts, other)]
        handle = experts.submit(*call)
        assert device.in_flight
        for e in range(EXPERTS):
            Places.of(experts).take(experts, e)
        assert torch.equal(experts.sync(handle), expected[0])
        handle = other.submit(*call)
        Places.of(other)  # from now on images have places of their own
        other.close()
        assert not device.in_flight
        assert torch.equal(other.sync(handle), expected[1])


def test_what_single_copy_must_be():
    with pytest.raises(errors.InvalidOption, match="single_copy must be True or False, not 1"):
        Hybrid(single_copy=1)
