"""Several memory channels: the golden model's bits, errors of every channel, the same cycles.

The configuration of the quick tests has more channels than quantiser lanes; among the slow ones are
some whose tiles are short.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given

from moeaccel.config import PRESETS
from moeaccel.formats import ALL_FORMATS, FORMATS
from moeaccel.host import errors
from moeaccel.interface.commands import Status
from moeaccel.sim import MemoryModel, StallModel
from tests.support.pair import (
    Buffers,
    assert_same_bits,
    draw_experts,
    execute,
    place_layer,
    read_layer,
    write_register,
)
from tests.system.test_bits import cases, property_of, random_memory, seeds, stalls
from tests.system.test_cycles import Case, compare, hold

TWO = PRESETS["tiny"].replace(name="tiny, two channels", channels=2, quantiser_lanes=1,
                              buffer_slots=3, buffer_beats=256)
SIZE = 1 << 20
EXPERTS, D_MODEL, D_EXPERT = 3, 96, 160
WEIGHTS = draw_experts(np.random.default_rng(0), EXPERTS, D_MODEL, D_EXPERT)


def draw_call(tokens, seed):
    """Return a call in which every token goes to every expert, in several passes."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((tokens, D_MODEL), np.float32),
            np.tile(np.arange(EXPERTS), (tokens, 1)),
            rng.standard_normal((tokens, EXPERTS)).astype(np.float32))


CALL, LONG = draw_call(7, 1), draw_call(32, 2)


@pytest.fixture(scope="module")
def opened(pair_of):
    memory = MemoryModel(size=SIZE, read_latency=20, write_latency=20, reorder=True, seed=5,
                         stalls=StallModel.uniform(0.1, length=3))
    with pair_of(TWO, memory=memory) as pair:
        pair.layers = {device: device.load_experts(*WEIGHTS) for device in pair.devices}
        yield pair


@pytest.fixture
def pair(opened):
    """Two devices fresh from a reset; the test's errors must leave them in order."""
    opened.reset()
    yield opened
    for port in range(TWO.channels):
        opened.simulation.clear_errors(port=port)
    for restart in (False, True):
        if restart:
            opened.reset()
        opened.same(lambda device: opened.layers[device](*CALL))
    opened.check()


@pytest.mark.timeout(900)  # the first run builds the model
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format(pair_of, name, bits):
    """Experts and a matrix; memories that stall each in its own way."""
    for seed in range(2):
        with pair_of(TWO, memory=random_memory(seed)) as pair:
            def experts(device):
                with device.load_experts(
                        *WEIGHTS, weight_format=name, activation_bits=bits) as loaded:
                    return loaded(*CALL)

            def linear(device):
                with device.load_linear(
                        WEIGHTS[1][0], weight_format=name, activation_bits=bits) as loaded:
                    return loaded(np.resize(CALL[0], (9, D_EXPERT)))

            pair.same(experts)
            pair.same(linear)
            pair.check()


@pytest.mark.slow  # a model of its own
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", [n for n in ALL_FORMATS if n not in FORMATS])
def test_formats_that_presets_have_not(pair_of, name):
    """Rows that share a multiplier, and a pattern, are others than on one channel."""
    with pair_of(TWO.replace(name="two channels, all formats", formats=tuple(ALL_FORMATS)),
                 memory=random_memory(1)) as pair:
        for bits in (8, 16):
            def experts(device, bits=bits):
                with device.load_experts(*WEIGHTS, weight_format=name, activation_bits=bits,
                                         prune="magnitude" if "+" in name else None) as loaded:
                    return loaded(*CALL)

            pair.same(experts)
        pair.check()


@property_of(15)
@given(cases(TWO, beats=4000), seeds, stalls)
def test_any_case(pair_of, case, seed, pauses):
    with pair_of(TWO, memory=random_memory(seed), register_stalls=pauses) as pair:
        case.run(pair)


def test_channels_do_not_change_bits(pair_of, pair, tiny):
    """One channel and two give the same y, and read the same weights."""
    for bits in (8, 16):
        found = []
        for one in (tiny, pair):
            with one.rtl.load_experts(*WEIGHTS, activation_bits=bits) as loaded:
                found.append(loaded(*CALL))
        assert_same_bits(*found)


@pytest.mark.parametrize(("latency", "count"), [(1, 6), (40, 10), (300, 6)])
def test_the_model_predicts_the_rtl(pair_of, latency, count):
    compare(pair_of, TWO, latency, count=count, seed=latency, most_cycles=20_000)


def test_the_window_holds_on_every_channel(pair):
    """No burst outside reaches any of the ports; golden and RTL name the same address."""
    limit = SIZE // 2
    inside = 4 * TWO.port_bytes * TWO.max_burst_beats  # of an image that begins there

    def script(device):
        buffers = Buffers(
            device, CALL[0][:1], CALL[1][:1, :1], CALL[2][:1, :1], d_out=D_MODEL)
        descriptor, table = read_layer(device, pair.layers[device])
        table[int(CALL[1][0, 0])]["image_address"] = limit - inside
        own = place_layer(device, descriptor, table)
        write_register(device, "WINDOW_LIMIT", limit)
        command = execute(device, buffers.fields(own.address))
        write_register(device, "WINDOW_LIMIT", SIZE)
        own.free()
        buffers.memory.free()
        return int(command.completion.status), command.completion.address

    assert pair.same(script) == (Status.WINDOW, limit)
    for port in range(1, TWO.channels):
        assert pair.simulation.stats(port=port).bytes_read == inside


def test_a_bus_error_names_the_channel(pair):
    channel = 1
    device, simulation = pair.rtl, pair.simulation
    layer = pair.layers[device]
    where = layer._images.address + layer.shape.memory_bytes + layer.shape.header_bytes
    simulation.inject_error(where, 64, writes=False, port=channel)
    with pytest.raises(errors.BusError) as caught:
        layer(*CALL)
    assert caught.value.address == TWO.device_address(channel, where)
    simulation.clear_errors(port=channel)
    assert_same_bits(layer(*CALL), pair.layers[pair.golden](*CALL))


def test_the_lowest_channel_with_an_error_is_named(pair):
    simulation, layer = pair.simulation, pair.layers[pair.rtl]
    first = layer._images.address
    for channel in (1, 0):
        simulation.inject_error(first, SIZE - first, writes=False, port=channel)
    simulation.inject_error(0, SIZE, writes=False, port=1)
    with pytest.raises(errors.BusError) as caught:
        layer(*CALL)
    assert caught.value.address >> TWO.address_bits == 0


@pytest.mark.parametrize("what", ["abort", "soft reset"])
def test_ending_a_command_at_any_moment(pair, what):
    device, simulation = pair.rtl, pair.simulation
    layer = pair.layers[device]
    expected = [pair.layers[pair.golden](*call) for call in (LONG, CALL)]
    assert_same_bits(layer(*LONG), expected[0])
    moments = np.random.default_rng(3).integers(1, layer.last.cycles, 12)
    for moment in [*range(1, 200, 40), *moments.tolist()]:
        handles = [layer.submit(*LONG), layer.submit(*CALL)]
        simulation.run(moment, until_irq=False)
        if what == "abort":
            device.abort()
        else:
            device.reset()
        ended = 0
        for handle, y in zip(handles, expected, strict=True):
            try:
                assert_same_bits(layer.sync(handle), y)
            except errors.CommandAborted:
                ended += 1
        assert ended == (1 if what == "abort" else 2)
        assert_same_bits(layer(*CALL), expected[1])
    device.reset()
    simulation.check()


def test_images_that_do_not_read_back_name_the_channel(pair_of, monkeypatch):
    with pair_of(TWO) as pair:
        transport = pair.golden.transport
        write = transport.memory_write
        monkeypatch.setattr(transport, "memory_write", lambda address, data: write(
            address, data if address >> TWO.address_bits != 1 else np.zeros_like(data)))
        with pytest.raises(errors.UploadError, match="expert 0 on channel 1"):
            pair.golden.load_experts(*WEIGHTS)


MANY = {
    "two channels": PRESETS["tiny"].replace(channels=2),
    "four channels": PRESETS["tiny"].replace(channels=4),
    "32 channels, short tiles": PRESETS["tiny"].replace(channels=32),
    "four channels, eight rows": PRESETS["tiny"].replace(channels=4, row_multipliers=8,
                                                         tile_words=32),
    "four wide channels": PRESETS["small"].replace(channels=4),
}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("variant", MANY)
def test_other_numbers_of_channels(pair_of, variant):
    config = MANY[variant].replace(name=variant)

    @property_of(25)
    @given(cases(config, beats=3000), seeds, stalls)
    def holds(case, seed, pauses):
        with pair_of(config, memory=random_memory(seed), register_stalls=pauses) as pair:
            case.run(pair)

    holds()
    compare(pair_of, config, 40, count=10, seed=1, most_cycles=20_000)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("latency", [1, 100])
def test_a_row_that_leaves_waits_for_sums_of_the_next(pair_of, latency):
    """With one lane a row leaves for longer than memory takes to bring the next one's sums."""
    some = (0, 1), (0, 1), (-1, 0), (1, 0), (0, 1)
    hold(pair_of, TWO, latency, [
        Case(256, 64, name, 1, len(ids), 2, ids)
        for name in TWO.formats[:2] for ids in (some, (*some[1:4], (0, -1)), (*some, *some))])
