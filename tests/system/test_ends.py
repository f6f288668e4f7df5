"""Abort, reset, watchdog and timeout may end a command at any moment: the next one is right.

Every test ends with a call that must give the golden model's bits, see ``left_in_order``.
"""

import numpy as np
import pytest

from moeaccel.host import errors
from moeaccel.sim import MemoryModel
from tests.support.layers import (
    CALL,
    LONG,
    SIZE,
    WEIGHTS,
    left_in_order,
    open_layers,
    untouched,
)
from tests.support.pair import assert_same_bits, write_register


@pytest.fixture(scope="module")
def opened(pair_of):
    with open_layers(pair_of) as pair:
        yield pair


@pytest.fixture
def pair(opened):
    with left_in_order(opened):
        yield opened


def length_of(pair):
    """Return the cycles of the long call."""
    layer = pair.layers[pair.rtl]
    assert_same_bits(layer(*LONG), pair.long)
    return layer.last.cycles


def moments(pair, count, seed):
    """Return cycles of the long call: early ones one by one, later ones at random."""
    rng = np.random.default_rng(seed)
    return [*range(1, 200, 23), *rng.integers(200, length_of(pair) + 100, count).tolist()]


def buffer_ranges(handles):
    """Return where calls in flight may write; once complete, they have given it back."""
    rings = handles[0]._layer.device._rings
    beside = rings._sides._outputs, rings._sides._inputs, rings._sides._workspace
    return [(where.address, where.size) for handle in handles for part in handle._parts
            for where in ([part.command.buffers] if part.command.buffers else beside)]


def test_abort(pair):
    """The running command ends, the one behind it runs; nothing else is written."""
    device, simulation = pair.rtl, pair.simulation
    layer = pair.layers[device]
    expected = pair.layers.call(pair.golden)
    aborted = 0
    times = moments(pair, 25, seed=0)
    for moment in times:
        handles = [layer.submit(*LONG), layer.submit(*CALL)]
        with untouched(pair, *buffer_ranges(handles)):
            simulation.run(moment, until_irq=False)
            device.abort()
            results = []
            for handle in handles:
                try:
                    results.append(layer.sync(handle))
                except errors.CommandAborted:
                    results.append(None)
        first, second = results
        if first is None:
            aborted += 1
            assert_same_bits(second, expected)
        else:  # it was over; then the abort may have met the second one
            assert_same_bits(first, pair.long)
    assert aborted > len(times) // 2
    device.reset()


def test_abort_of_nothing(pair):
    for _ in range(3):
        pair.rtl.abort()
        pair.simulation.run(50, until_irq=False)
        assert pair.same(pair.layers.call).any()


def test_soft_reset(pair):
    """At any moment it drops everything, clears the counters and leaves a working device."""
    device, simulation = pair.rtl, pair.simulation
    layer = pair.layers[device]
    expected = pair.layers.call(pair.golden)
    for moment in moments(pair, 25, seed=1):
        handles = [layer.submit(*LONG), layer.submit(*CALL)]
        with untouched(pair, *buffer_ranges(handles)):
            simulation.run(moment, until_irq=False)
            device.reset()
            simulation.run(3000, until_irq=False)
        counters = device.counters()
        assert not any(value for name, value in counters.items() if name != "idle")
        for handle in handles:
            with pytest.raises(errors.CommandAborted):
                layer.sync(handle)
        assert_same_bits(layer(*CALL), expected)


def test_abort_and_reset_together(pair):
    device, simulation = pair.rtl, pair.simulation
    layer = pair.layers[device]
    for moment in range(50, 4000, 397):
        handle = layer.submit(*LONG)
        simulation.run(moment, until_irq=False)
        write_register(device, "CONTROL", 2)
        simulation.run(moment % 13, until_irq=False)
        device.reset()
        with pytest.raises(errors.CommandAborted):
            layer.sync(handle)
        assert_same_bits(layer(*LONG), pair.long)


def test_watchdog(pair_of):
    """Memory that is slower than the watchdog ends every command; with a longer one they run."""
    slow = MemoryModel(size=SIZE, read_latency=1000, write_latency=20)
    with pair_of("tiny", memory=slow, watchdog_cycles=300) as pair:
        layers = {device: device.load_experts(*WEIGHTS) for device in pair.devices}
        for _ in range(3):
            with pytest.raises(errors.WatchdogExpired, match="larger watchdog_cycles"):
                layers[pair.rtl](*CALL)
        write_register(pair.rtl, "WATCHDOG", 2000)
        pair.same(lambda device: layers[device](*CALL))
        write_register(pair.rtl, "WATCHDOG", 0)
        pair.same(lambda device: layers[device](*CALL))
        pair.simulation.check()


def test_timeouts(pair):
    """A result that is late is no result lost; a reset gives it up."""
    device = pair.rtl
    layer = pair.layers[device]
    handle = layer.submit(*LONG)
    with pytest.raises(errors.DeviceTimeout, match=r"within 0.0005 s.*\(busy\)"):
        layer.sync(handle, timeout_s=0.0005)
    assert_same_bits(layer.sync(handle), pair.long)
    handle = layer.submit(*LONG)
    with pytest.raises(errors.DeviceTimeout):
        layer.sync(handle, timeout_s=0.0005)
    device.reset()
    with pytest.raises(errors.CommandAborted):
        layer.sync(handle)


def test_a_full_ring_waits_for_room(pair):
    """More calls than ring entries: the ring goes round, and every call gets its own result."""
    layer = pair.layers[pair.rtl]
    x, ids, weights = LONG
    handles = [layer.submit(x[t : t + 1], ids[t : t + 1], weights[t : t + 1]) for t in range(40)]
    y = np.concatenate([layer.sync(handle) for handle in handles])
    assert_same_bits(y, pair.long[:40])
