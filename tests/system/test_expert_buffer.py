"""The expert buffer: the golden model's bits and counters in any order of commands, nothing stale.

Two channels share the model of ``test_channels``, a router that of ``test_routing``.
"""

from __future__ import annotations

import numpy as np
import pytest

from moeaccel.config import PRESETS
from moeaccel.formats import ALL_FORMATS, FORMATS
from moeaccel.host import errors, open_device
from moeaccel.host.buffering import PREDICTIONS, replay
from moeaccel.host.buffering.device import replay_on, with_buffer
from moeaccel.host.prefetch import Prefetches
from moeaccel.host.traces import RoutingTrace
from moeaccel.interface.commands import (
    EXPERT,
    LAYER,
    SUBMISSION,
    Opcode,
    Status,
    encode,
    field_of,
)
from moeaccel.interface.registers import BUFFER_COUNTERS
from moeaccel.sim import MemoryModel
from tests.support.pair import (
    Buffers,
    Pair,
    assert_same_bits,
    draw_experts,
    execute,
    place_layer,
    read_layer,
    read_register,
    write_register,
)
from tests.system.test_bits import random_memory
from tests.system.test_channels import TWO
from tests.system.test_moe import load as load_moe
from tests.system.test_routing import CONFIG as ROUTED

pytestmark = pytest.mark.timeout(900)  # the first test builds a model

SIZE = 1 << 22
SHAPES = ((3, 96, 160), (5, 64, 32), (2, 256, 64))
"""Experts, d_model, d_expert: images longer than a slot, and shorter."""


class Layers:
    """Layers of several shapes and formats, the same on all devices."""

    def __init__(self, devices, rng, names):
        self.layers = []
        for i, shape in enumerate(SHAPES):
            weights = draw_experts(rng, *shape)
            names_of = [names[(i + e) % len(names)] for e in range(shape[0])]
            self.layers.append({device: device.load_experts(
                *weights, weight_format=names_of, activation_bits=8 << i % 2,
                prune="magnitude" if any("+" in name for name in names_of) else None)
                for device in devices})

    def call(self, rng):
        """Return a call of one of them, drawn: what runs it on a device."""
        at = int(rng.integers(len(SHAPES)))
        experts, d_model, _ = SHAPES[at]
        tokens, top_k = int(rng.integers(1, 11)), int(rng.integers(1, experts + 1))
        x = rng.standard_normal((tokens, d_model)).astype(np.float32)
        ids = np.stack([rng.permutation(experts)[:top_k] for _ in range(tokens)])
        ids[rng.random(ids.shape) < 0.2] = -1
        weights = rng.random(ids.shape).astype(np.float32)
        return lambda device: self.layers[at][device](x, ids, weights)

    def prefetch(self, rng):
        """Return a PREFETCH, drawn; ids that there are not are skipped, doubled ones count once."""
        at = int(rng.integers(len(SHAPES)))
        shape = tuple(rng.integers(1, 5, 2).tolist())
        ids = rng.integers(-2, SHAPES[at][0] + 1, shape)
        return lambda device: prefetch(device, self.layers[at][device], ids)


def ones(d_model, ids):
    """Return x, ids and weights, all but the ids 1."""
    routes = np.array(ids)
    return (np.ones((len(routes), d_model), np.float32), routes,
            np.ones(routes.shape, np.float32))


def prefetch(device, layer, ids, **changes):
    """Run a raw PREFETCH and return how it ended."""
    raw = np.full((np.size(ids) + 15) // 16 * 16, -1, "<i4")
    raw[: np.size(ids)] = np.ravel(ids)
    memory = device.memory.allocate(raw.nbytes)
    device.transport.memory_write(memory.address, raw.view(np.uint8))
    tokens, top_k = np.shape(ids)
    command = execute(device, {
        "opcode": int(Opcode.PREFETCH), "tokens": tokens, "top_k": top_k,
        "layer_address": layer._descriptor.address, "ids_address": memory.address, **changes})
    memory.free()
    done = command.completion
    return int(done.status), done.detail, done.address


def forget(device):
    return int(execute(device, {"opcode": int(Opcode.FORGET)}).completion.status)


def same_counters(pair):
    """Hold the buffer's counters, and all others, to the golden device's; return the buffer's."""
    found = pair.check()
    expected = pair.golden.counters()
    of_buffer = {name: found[name] for name in BUFFER_COUNTERS}
    assert of_buffer == {name: expected[name] for name in BUFFER_COUNTERS}
    return of_buffer


def any_order(pair, names, seed, count):
    """Commands in any order: bits and counters of the golden model."""
    rng = np.random.default_rng(seed)
    layers = Layers(pair.devices, rng, names)
    for _ in range(count):
        kind = rng.random()
        if kind < 0.1:
            assert pair.same(forget) == Status.OK
        elif kind < 0.5:
            assert pair.same(layers.prefetch(rng))[0] == Status.OK
        else:
            pair.same(layers.call(rng))
    counted = same_counters(pair)
    assert all(counted.values()), counted


@pytest.mark.parametrize("seed", range(3))
def test_any_order_of_commands(pair_of, seed):
    """Each memory pauses in its own way."""
    with pair_of(TWO, memory=random_memory(seed)) as pair:
        any_order(pair, list(FORMATS)[seed:], seed, 40)


@pytest.mark.slow  # a model of its own
@pytest.mark.timeout(3600)
def test_passes_that_overlap_and_every_format(pair_of):
    """Sections are asked for one by one; patterns, zero points and minima are in what is held."""
    config = PRESETS["tiny"].replace(
        name="expert buffer, passes overlap", y_banks=2, hidden_banks=2, results_per_cycle=2,
        formats=tuple(ALL_FORMATS), buffer_slots=2, buffer_beats=128)
    for seed in range(6):
        with pair_of(config, memory=random_memory(seed)) as pair:
            any_order(pair, list(ALL_FORMATS)[3 * seed:] or list(ALL_FORMATS), seed, 40)
    hold_cycles(pair_of, config, 40)


@pytest.mark.parametrize("latency", [1, 100])
def test_the_model_predicts_the_rtl(pair_of, latency):
    hold_cycles(pair_of, TWO, latency)


def hold_cycles(pair_of, config, latency):
    """1 % or 16 cycles: calls of which much is held, and what brings it; where nothing is missing,
    too."""
    rng = np.random.default_rng(latency)
    memory = MemoryModel.ideal(latency, size=SIZE)
    with pair_of(config, memory=memory) as pair, open_device(
            "golden", config=config, memory_bytes=SIZE, timing=True, latency=latency) as golden:
        devices = pair.rtl, golden
        layers = Layers(devices, rng, list(config.formats))
        for i in range(24):
            script = layers.prefetch(rng) if i % 2 else layers.call(rng)
            before = [device.total_cycles for device in devices]
            for device in devices:
                script(device)
            found, expected = (device.total_cycles - begin
                               for device, begin in zip(devices, before, strict=True))
            assert abs(found - expected) <= max(16, found // 100), (i, found, expected)
        assert pair.rtl.counters()["bytes_buffered"] > 0


def test_what_is_held_takes_no_memory(pair_of):
    """An expert that fits is not read again; a call is the sooner done."""
    with pair_of(TWO, memory=MemoryModel.ideal(100, size=SIZE)) as pair:
        layer = pair.rtl.load_experts(*draw_experts(np.random.default_rng(0), 2, 64, 32))
        call = ones(64, [[0, 1]])
        y = layer(*call)
        cold, read = layer.last.cycles, pair.rtl.counters()["bytes_read_weights"]
        command = pair.rtl.prefetch(layer, [1, 0])
        assert pair.rtl.wait(command).status == Status.OK
        assert_same_bits(layer(*call), y)
        counters = pair.rtl.counters()
        assert counters["bytes_read_weights"] == 2 * read
        assert counters["bytes_prefetched"] == counters["bytes_buffered"] == read
        assert layer.last.cycles < 0.9 * cold
        # A second time there is nothing to bring.
        assert pair.rtl.wait(pair.rtl.prefetch(layer, [0, 1])).status == Status.OK
        assert pair.rtl.counters()["bytes_read_weights"] == 2 * read
        pair.simulation.check()


def test_another_image_in_its_place(pair_of, monkeypatch):
    """Uploads empty the buffer. Did they not, the next layer would have the old one's weights."""
    rng = np.random.default_rng(1)
    one, other = (draw_experts(rng, 2, 64, 32) for _ in range(2))
    call = ones(64, [[0, 1]])
    with pair_of(TWO, memory=random_memory(1)) as pair:
        def script(device):
            ys = []
            for weights in (one, other):
                with device.load_experts(*weights) as layer:
                    device.wait(device.prefetch(layer, [0, 1]))
                    ys.append(layer(*call))
            return np.stack(ys)

        y = pair.same(script)
        assert not np.array_equal(y[0], y[1])
        monkeypatch.setattr(Prefetches, "forget_experts", lambda device: None)
        assert_same_bits(script(pair.rtl), np.stack([y[1], y[1]]))  # of what is still held


@pytest.mark.parametrize("status", [Status.WINDOW, Status.BUS_ERROR])
def test_what_could_not_be_read_is_not_held(pair_of, status):
    """A fault empties the buffer, whatever command it ends."""
    rng = np.random.default_rng(2)
    weights = draw_experts(rng, 3, 96, 160)
    call = ones(96, [[0, 1, 2]])
    with pair_of(TWO, memory=random_memory(2)) as pair:
        layers = {device: device.load_experts(*weights) for device in pair.devices}
        y = pair.same(lambda device: layers[device](*call))
        device, layer = pair.rtl, layers[pair.rtl]
        where = layer._images.address + layer.shape.memory_bytes + layer.shape.header_bytes
        assert prefetch(device, layer, [[0]]) == (Status.OK, 0, 0)
        if status is Status.WINDOW:
            where &= -512  # a whole burst
            write_register(device, "WINDOW_LIMIT", where)
            found = prefetch(device, layer, [[0, 1, 2]])
            write_register(device, "WINDOW_LIMIT", 4096 + device.memory.size)
        else:
            pair.simulation.inject_error(where, 64, writes=False, port=1)
            found = prefetch(device, layer, [[0, 1, 2]])
            pair.simulation.clear_errors(port=1)
        assert found[0] == status
        before = device.counters()
        assert_same_bits(layer(*call), y)
        after = device.counters()
        assert after["buffer_hits"] == before["buffer_hits"]
        assert after["buffer_misses"] == before["buffer_misses"] + 3


def test_what_is_held_asks_for_no_burst(pair_of):
    """So an image outside the window may be used as long as it is held, and no longer."""
    weights = draw_experts(np.random.default_rng(2), 2, 64, 32)
    with pair_of(TWO, memory=random_memory(3)) as pair:
        def script(device):
            buffers = Buffers(device, *ones(64, [[0]]), d_out=64)
            own = device.memory.allocate(64 * 3)  # all but images lies below them
            layer = device.load_experts(*weights)
            descriptor, table = read_layer(device, layer)
            raw = b"".join((encode(LAYER, {**descriptor, "table_address": own.address + 64}),
                            *(encode(EXPERT, entry) for entry in table)))
            device.transport.memory_write(own.address, np.frombuffer(raw, np.uint8))
            device.wait(device.prefetch(layer, [0]))
            found = []
            for held in (True, False):
                if not held:
                    forget(device)
                write_register(device, "WINDOW_LIMIT", layer._images.address)
                done = execute(device, buffers.fields(own.address)).completion
                write_register(device, "WINDOW_LIMIT", 4096 + device.memory.size)
                found.append((int(done.status), done.address - table[0]["image_address"]))
            return found

        found = pair.same(script)
        assert found[0][0] == Status.OK
        assert found[1] == (Status.WINDOW, 0)


@pytest.mark.parametrize("what", ["abort", "soft reset"])
def test_ending_a_prefetch_at_any_moment(pair_of, what):
    """What was under way is not taken for what is there."""
    weights = draw_experts(np.random.default_rng(4), 3, 96, 160)
    call = ones(96, [[0, 1, 2]] * 2)
    with pair_of(TWO, memory=random_memory(5)) as pair:
        device, simulation = pair.rtl, pair.simulation
        layer = device.load_experts(*weights)
        y = layer(*call)
        device.wait(device.prefetch(layer, [0, 1, 2]))
        longest = device.total_cycles - layer.last.cycles
        device.forget_experts()
        for moment in np.linspace(1, longest, 12).astype(int).tolist():
            command = device.prefetch(layer, [0, 1, 2])
            simulation.run(moment, until_irq=False)
            if what == "abort":
                device.abort()
                ended = device.wait(command).status
                assert ended in (Status.OK, Status.ABORTED)
            else:
                device.reset()
            assert_same_bits(layer(*call), y)
            device.forget_experts()
        simulation.check()


def test_the_watchdog_ends_a_prefetch(pair_of):
    """Memory that is slower than it: nothing is held then; with a longer one all is brought."""
    weights, call = draw_experts(np.random.default_rng(9), 2, 64, 32), ones(64, [[0, 1]])
    slow = MemoryModel(size=SIZE, read_latency=1000, write_latency=20)
    with pair_of(TWO, memory=slow, watchdog_cycles=300) as pair:
        layers = {device: device.load_experts(*weights) for device in pair.devices}
        device, layer = pair.rtl, layers[pair.rtl]
        for _ in range(3):
            command = device.prefetch(layer, [0, 1])
            assert device.wait(command).status == Status.WATCHDOG
            with pytest.raises(errors.WatchdogExpired, match="larger watchdog_cycles"):
                raise command.error()
        write_register(device, "WATCHDOG", 3000)
        pair.same(lambda device: layers[device](*call))
        assert device.counters()["buffer_hits"] == 0
        assert device.wait(device.prefetch(layer, [0, 1])).status == Status.OK
        pair.same(lambda device: layers[device](*call))
        assert device.counters()["buffer_hits"] == 2
        pair.simulation.check()


def test_bad_entries_and_fields(pair_of):
    """The same completions as of EXPERTS; experts ahead of a bad one are there."""
    weights = draw_experts(np.random.default_rng(6), 3, 64, 32)
    with pair_of(TWO, memory=random_memory(6)) as pair:
        layers = {device: device.load_experts(*weights) for device in pair.devices}

        def bad(word, **changes):
            def script(device):
                descriptor, table = read_layer(device, layers[device])
                table[1][word] = 77
                own = place_layer(device, descriptor, table, **changes)
                layer = type("Layer", (), {"_descriptor": own})
                found = prefetch(device, layer, [[0, 1, 2]])
                own.free()
                return found[:2]
            return pair.same(script)

        pair.reset()
        assert bad("activation") == (Status.BAD_EXPERT, 1)
        assert same_prefetched(pair) == 2 * (layers[pair.rtl].shape.image_bytes
                                             - layers[pair.rtl].shape.header_bytes)
        assert bad("activation", d_in=33) == (Status.BAD_LAYER, field_of(LAYER, "d_in").word)
        for name, value in (("tokens", 0), ("top_k", 17), ("ids_address", 8)):
            assert pair.same(lambda device, name=name, value=value: prefetch(
                device, layers[device], [[0]], **{name: value})) == (
                    Status.BAD_FIELD, field_of(SUBMISSION, name).word, 0)


def same_prefetched(pair):
    found = [device.counters()["bytes_prefetched"] for device in pair.devices]
    assert found[0] == found[1]
    return found[0]


def test_a_trace(pair_of):
    """The hardware counts what the model of a trace does."""
    ids = np.random.default_rng(8).integers(0, 6, (8, 2, 2))
    ids[..., 1] = (ids[..., 0] + 1) % 6
    trace = RoutingTrace.of_requests([(ids, None)], n_experts=6)
    kind = PREDICTIONS["popularity"]
    _, call = with_buffer(TWO, TWO.buffer_slots)
    model = replay(trace, call, slots=TWO.buffer_slots, gap=None, prediction=kind).counts
    with pair_of(TWO, memory=random_memory(8)) as pair:
        assert replay_on(pair.rtl, trace, kind) == model
        assert model.hits and model.wasted_bytes
        pair.simulation.check()


def test_a_routed_layer(pair_of):
    """A MOE takes what is held as any command does."""
    x = np.random.default_rng(7).standard_normal((3, 64)).astype(np.float32)
    with pair_of(ROUTED, memory=random_memory(7)) as pair:
        layers = {device: load_moe(device, experts=8) for device in pair.devices}
        y = pair.same(lambda device: layers[device](x))
        for ids in ([0, 1], [2, 5], [7]):
            pair.same(lambda device, ids=ids: int(device.wait(
                device.prefetch(layers[device].experts, ids)).status))
            assert_same_bits(pair.same(lambda device: layers[device](x)), y)
        assert same_counters(pair)["buffer_hits"]


def test_the_device_says_what_it_has(pair_of):
    with pair_of(TWO, memory=random_memory(0)) as pair:
        assert pair.same(lambda device: read_register(device, "EXPERT_BUFFER")) == 3 | 8 << 8


def test_a_device_without_one_refuses(tiny: Pair):
    for opcode in (Opcode.PREFETCH, Opcode.FORGET):
        done = tiny.same_completion(
            lambda device, opcode=opcode: execute(device, {"opcode": int(opcode)}))
        assert (done.status, done.detail) == (Status.BAD_OPCODE, opcode)
    tiny.reset()
    assert tiny.same(lambda device: read_register(device, "EXPERT_BUFFER")) == 0
    with tiny.rtl.load_experts(*draw_experts(np.random.default_rng(0), 2, 64, 32)) as layer:
        with pytest.raises(errors.LimitExceeded, match="must have an expert buffer, and 'tiny'"):
            tiny.rtl.prefetch(layer, [0])
        tiny.rtl.fence()
