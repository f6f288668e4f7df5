"""Whatever goes wrong has a name, touches nothing outside the window, and leaves a working device.

Every test ends with a call that must give the golden model's bits, see ``left_in_order``.
"""

import contextlib

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from moeaccel.activations import ACTIVATIONS
from moeaccel.formats import FORMATS
from moeaccel.host import errors
from moeaccel.host.device import Command
from moeaccel.host.registers import mask
from moeaccel.interface.commands import (
    EXPERT,
    LAYER,
    SUBMISSION,
    NonFinite,
    Opcode,
    Status,
    field_of,
)
from tests.support.layers import (
    CALL,
    D_MODEL,
    EXPERTS,
    LONG,
    SIZE,
    WEIGHTS,
    draw_call,
    left_in_order,
    open_layers,
    untouched,
)
from tests.support.pair import (
    Buffers,
    assert_same_bits,
    execute,
    place_layer,
    read_layer,
    read_register,
    write_register,
)

PAGE = 4096
MIDDLE = SIZE // 2
"""Commands of these tests live below it."""


@pytest.fixture(scope="module")
def opened(pair_of):
    with open_layers(pair_of) as pair:
        yield pair


@pytest.fixture
def pair(opened):
    with left_in_order(opened):
        yield opened


def buffers_of(device, call=CALL):
    """Return raw buffers whose y and workspace hold ones: nothing may depend on it."""
    buffers = Buffers(device, *call, d_out=D_MODEL)
    for name in ("y", "workspace"):
        device.transport.memory_write(
            buffers.addresses[name], np.full(buffers.sizes[name], 0xFF, np.uint8))
    return buffers


def result_of(command):
    return tuple(getattr(command.completion, name) for name in ("status", "detail", "address"))


# -- fields ----------------------------------------------------------------------------------------
BAD_ADDRESSES = [1, 32, PAGE + 63, (1 << 40) - 64, (1 << 40) - 1024, 1 << 40, 1 << 63,
                 (1 << 64) - 64]
SUBMISSIONS = {
    "opcode": [0, 3, 4, 77, 128, 255],
    "tokens": [0, 1, 6, 65, 1 << 16, (1 << 16) + 1, (1 << 32) - 1],
    "top_k": [0, 1, 2, 17, 37, 33, 1 << 16, (1 << 32) - 1],
    **{f.name: BAD_ADDRESSES for f in SUBMISSION if f.name.endswith("_address")},
}
LAYERS = {
    "planes": [0, 3, 255],
    "num_experts": [0, 17, (1 << 16) + 1, 1 << 31],
    "d_in": [0, 31, 33, 288, (1 << 16) + 64],
    "d_out": [0, 1, 257, 288, 1 << 20],
    "grid_exponent": [-101, 61, -(1 << 31), -60, 10],
    "table_address": BAD_ADDRESSES,
}
TABLES = {
    "sections": [0, 1, 3, 255],
    "activation": [1 + max(a.code for a in ACTIVATIONS.values()), 255],
    "flags": [1, 1 << 15],
    "d_expert": [0, 48, 64, 288, (1 << 31) + 32],
    "image_address": BAD_ADDRESSES,
    **{f"format{i}": [FORMATS["mxint8"].code, 1 + max(f.code for f in FORMATS.values()), 255]
       for i in range(2)},
    "operand0": [1, 255], "operand1": [0, 2], "sink0": [1, 2], "sink1": [0, 255],
    **{f"words{i}": [0, 1, 1 << 16, (1 << 32) - 1] for i in range(2)},
}


def changes(fields):
    """Draw values for one to three fields."""
    return st.lists(st.sampled_from(list(fields)), min_size=1, max_size=3, unique=True).flatmap(
        lambda names: st.fixed_dictionaries({n: st.sampled_from(fields[n]) for n in names}))


def test_bad_fields(pair):
    """Both devices find the same field, whatever else is wrong; good values run."""
    @settings(max_examples=200, deadline=None, derandomize=True)
    @given(changes(SUBMISSIONS), changes(LAYERS), changes(TABLES),
           st.integers(0, EXPERTS - 1), st.sampled_from(["both", "submission", "layer", "table"]))
    def holds(submission, layer, entry, expert, which):
        def script(device):
            buffers = buffers_of(device)
            descriptor, table = read_layer(device, pair.layers[device])
            if which == "table":
                table[expert] |= entry
            own = place_layer(device, descriptor, table,
                              **(layer if which in ("both", "layer") else {}))
            fields = buffers.fields(
                own.address, **(submission if which in ("both", "submission") else {}))
            try:
                command = execute(device, fields)
                if device is pair.rtl:
                    found.append((buffers.addresses["y"], buffers.sizes["y"]))
                    found.append((buffers.addresses["workspace"], buffers.sizes["workspace"]))
                seen.add(command.completion.status)
                # Then y is anything.
                undefined = command.completion.status in (Status.WINDOW, Status.BAD_EXPERT)
                return (*result_of(command), None if undefined else buffers.y().tobytes())
            finally:
                buffers.memory.free()
                own.free()

        found.clear()
        pair.same(script)

    seen, found = set(), []
    holds()
    assert seen >= {Status.OK, Status.BAD_OPCODE, Status.BAD_FIELD, Status.BAD_LAYER,
                    Status.BAD_EXPERT}


@pytest.mark.parametrize(("fields", "layer"), [
    ({"opcode": 77}, {}), ({"tokens": 0}, {}), ({"top_k": 37}, {}), ({"workspace_address": 32}, {}),
    ({}, {"planes": 7}), ({}, {"table_address": 1})])
def test_a_rejected_command_writes_its_completion_and_nothing_else(pair, fields, layer):
    device = pair.rtl
    buffers = buffers_of(device)
    own = place_layer(device, *read_layer(device, pair.layers[device]), **layer)
    with untouched(pair):
        command = execute(device, buffers.fields(own.address, **fields))
    assert isinstance(command.error(), errors.CommandRejected)


def test_an_entry_of_an_expert_without_tokens_may_hold_anything(pair):
    def script(device):
        descriptor, table = read_layer(device, pair.layers[device])
        table[EXPERTS - 1] = dict.fromkeys(("sections", "format0", "sink1"), 255)
        own = place_layer(device, descriptor, table)
        x, ids, weights = CALL
        buffers = buffers_of(device, (x, np.where(ids == EXPERTS - 1, -1, ids), weights))
        command = execute(device, buffers.fields(own.address))
        y = buffers.y()
        own.free()
        buffers.memory.free()
        assert command.error() is None
        return y

    pair.same(script)


def test_every_layer_runs_under_either_opcode(pair):
    """GEMM is the layer's expert 0 for every token; EXPERTS of a matrix routes to it."""
    def script(device):
        x, ids, _ = CALL
        buffers = buffers_of(device)
        found = []
        with device.load_linear(WEIGHTS[0][0]) as linear:
            for layer, opcode in ((pair.layers[device], Opcode.GEMM), (linear, Opcode.EXPERTS)):
                changes = {"top_k": 1} if opcode is Opcode.GEMM else {}
                command = execute(device, buffers.fields(
                    layer._descriptor.address, opcode=int(opcode), **changes))
                assert command.error() is None
                found.append(buffers.y())
        buffers.memory.free()
        one = np.ones((len(x), 1), np.float32)
        assert_same_bits(found[0], pair.layers[device](x, 0 * ids[:, :1], one))
        return np.concatenate(found)

    pair.same(script)


# -- the window ------------------------------------------------------------------------------------
PLACES = {
    "at address 0": lambda limit: 0,
    "below the base": lambda limit: PAGE - 8 * 7 * 64,  # not into the rings, which are above
    "right behind the limit": lambda limit: -(-limit // 64) * 64,
    "across the limit": lambda limit: limit // 64 * 64 - 64,
    "at the end of memory": lambda limit: SIZE,
    "far away": lambda limit: 1 << 39,
}


@pytest.mark.parametrize("limit", [MIDDLE, MIDDLE + 0x140, MIDDLE + 0x1C8])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "what", ["x", "ids", "weights", "y", "workspace", "layer", "table", "image"])
def test_outside_the_window(pair, what, place, limit):
    """The first burst outside is named, and not issued; the rest of memory stays as it is."""
    address = PLACES[place](limit)
    if what in ("layer", "table") and place == "across the limit":
        address += 64  # a descriptor, and an entry, is not larger than 64 bytes

    def script(device):
        buffers = buffers_of(device)
        assert buffers.memory.address + buffers.memory.size < MIDDLE
        descriptor, table = read_layer(device, pair.layers[device])
        if what == "image":
            table[0]["image_address"] = address
        own = place_layer(device, descriptor, table,
                          **({"table_address": address} if what == "table" else {}))
        fields = buffers.fields(own.address)
        if what not in ("image", "table"):
            fields[f"{what}_address"] = address
        write_register(device, "WINDOW_LIMIT", limit)
        allowed = [(buffers.addresses[name], buffers.sizes[name]) for name in ("y", "workspace")]
        if what in ("y", "workspace") and PAGE <= address < limit:
            allowed.append((address, limit - address))
        guard = untouched(pair, *allowed) if device is pair.rtl else contextlib.nullcontext()
        with guard:
            command = execute(device, fields)
        write_register(device, "WINDOW_LIMIT", SIZE)
        own.free()
        buffers.memory.free()
        return command

    found = pair.same_completion(script)
    assert found.status == Status.WINDOW
    assert found.address < PAGE or found.address + 512 > limit
    # Only one stream is at fault, bar that y has two.
    assert len(pair.golden.transport.possible_faults) == 1


@pytest.mark.parametrize("seed", range(60))
def test_several_faults(pair, seed):
    """Whatever is outside the window or beyond the memory, and in whatever order it is touched."""
    rng = np.random.default_rng(seed)
    tokens = int(rng.integers(1, 20))
    x, _, weights = draw_call(tokens, seed)
    ids = rng.integers(-1, EXPERTS, (tokens, EXPERTS))
    ids[rng.random(tokens) < 0.3] = -1
    names = ["x", "ids", "weights", "y", "workspace", "image"]
    wrong = rng.choice(names, int(rng.integers(1, 5)), replace=False)
    limit = int(rng.choice([SIZE // 2, SIZE, SIZE + 4096, SIZE + 64 * int(rng.integers(1, 64))]))
    begin = min(limit, SIZE) - 64 * int(rng.integers(0, 100))

    def script(device):
        buffers = buffers_of(device, (x, ids, weights))
        descriptor, table = read_layer(device, pair.layers[device])
        image = pair.layers[device].shape.memory_bytes
        sizes = buffers.sizes | {"image": EXPERTS * image}
        where, address = {}, begin
        for name in wrong:  # one behind the other
            where[name] = address
            address += sizes[name] + 64 * gaps[name]
        for name in ("ids", "weights"):
            if where.get(name, SIZE) + buffers.sizes[name] <= SIZE:
                buffers.write(name, where[name])
        if "image" in where:
            for expert, entry in enumerate(table):
                entry["image_address"] = where["image"] + expert * image
        own = place_layer(device, descriptor, table)
        fields = buffers.fields(own.address) | {
            f"{name}_address": address for name, address in where.items() if name != "image"}
        write_register(device, "WINDOW_LIMIT", limit)
        command = execute(device, fields)
        write_register(device, "WINDOW_LIMIT", SIZE)
        own.free()
        buffers.memory.free()
        return command

    gaps = {name: int(rng.integers(0, 80)) for name in wrong}
    pair.same_completion(script)


def test_the_window_is_as_large_as_it_says(pair):
    """A command that fills its window to the last byte runs, also when the window is tight."""
    def script(device):
        buffers = buffers_of(device)
        write_register(device, "WINDOW_LIMIT",
                       buffers.addresses["workspace"] + buffers.sizes["workspace"])
        command = execute(device, buffers.fields(pair.layers[device]._descriptor.address))
        write_register(device, "WINDOW_LIMIT", SIZE)
        buffers.memory.free()
        assert command.error() is None
        return buffers.y()

    assert_same_bits(pair.same(script), pair.layers.call(pair.golden))


def test_rings_outside_the_window(pair):
    """Nothing is read or written; the device comes back with a reset."""
    for device in pair.devices:
        write_register(device, "WINDOW_LIMIT", 0)
        sides = pair.rtl._rings._sides  # the driver writes what is beside the rings
        with untouched(pair, *((side.address, side.size)
                               for side in (sides._inputs, sides._outputs))):
            handle = pair.layers[device].submit(*CALL)
            with pytest.raises(errors.DeviceStopped, match=r"0x8 \(completion_window\)"):
                pair.layers[device].sync(handle)
        device.reset()
        with pytest.raises(errors.CommandAborted):
            pair.layers[device].sync(handle)


@pytest.mark.parametrize(("place", "error"), [
    (MIDDLE, "completion_window"), (SIZE, "completion_bus")])
def test_a_completion_that_cannot_be_written(pair, place, error):
    """The device does not say that it has completed; with the ring mended it does, rightly."""
    expected = pair.layers.call(pair.golden)
    for device in pair.devices:
        write_register(device, "WINDOW_LIMIT", MIDDLE if place == MIDDLE else SIZE + 4096)
        write_register(device, "CQ_BASE", place)
        buffers = buffers_of(device)
        command = Command("raw")
        fields = buffers.fields(pair.layers[device]._descriptor.address)
        allowed = [(buffers.addresses[name], buffers.sizes[name]) for name in ("y", "workspace")]
        tail = read_register(device, "CQ_TAIL")
        with untouched(pair, *allowed):
            device.submit(fields, command)
            for _ in range(2):  # clearing the error alone does not help
                with pytest.raises(errors.DeviceStopped) as caught:
                    device.wait(command)
                assert caught.value.errors == (error,)
                assert read_register(device, "CQ_TAIL") == tail
                assert read_register(device, "IRQ_STATUS") == 0
                assert read_register(device, "STATUS") == (device is pair.rtl)
                write_register(device, "ERROR_STATUS", 0xFFFF_FFFF)
            with pytest.raises(errors.DeviceStopped):
                device.wait(command)
        write_register(device, "CQ_BASE", device._rings._sides.completions)
        write_register(device, "ERROR_STATUS", 0xFFFF_FFFF)
        assert device.wait(command).status == Status.OK
        assert read_register(device, "ERROR_STATUS") == 0
        assert_same_bits(buffers.y(), expected)
        buffers.memory.free()
        write_register(device, "WINDOW_LIMIT", SIZE)
        pair.layers[device](*CALL)  # the ring goes on


@pytest.mark.parametrize(("register", "values", "error"), [
    ("RING_LOG2", [0, 9, 15, 1 << 31], "ring_log2"),
    ("SQ_BASE", [PAGE + 32, 1 << 40, PAGE | 1 << 63, (1 << 40) - 64], "sq_base"),
    ("CQ_BASE", [PAGE + 4, 1 << 45, (1 << 40) - 1024 + 64], "cq_base"),
])
def test_registers_that_describe_no_rings(pair, register, values, error):
    for device in pair.devices:
        rings = device._rings
        good = {"RING_LOG2": 4, "SQ_BASE": rings._sides.submissions,
                "CQ_BASE": rings._sides.completions}[register]
        for value in values:
            write_register(device, register, value)
            handle = pair.layers[device].submit(*CALL)
            with pytest.raises(errors.DeviceStopped) as caught:
                pair.layers[device].sync(handle)
            assert caught.value.errors == (error,)
            assert read_register(device, "SQ_HEAD") == (rings._submitted - 1) % rings.entries
            write_register(device, "ERROR_STATUS", 0xFFFF_FFFF)
            assert read_register(device, "ERROR_STATUS") == mask("ERROR_STATUS", error)
            write_register(device, register, good)
            assert read_register(device, "ERROR_STATUS") == mask("ERROR_STATUS", error)
            write_register(device, "ERROR_STATUS", 0xFFFF_FFFF)
            assert_same_bits(pair.layers[device].sync(handle), pair.layers.call(pair.golden))


@pytest.mark.parametrize("what", ["x", "ids", "weights", "y", "workspace", "table", "image"])
def test_nothing_wraps_at_the_top_of_the_address_space(pair, what):
    """What begins below the top and ends beyond it is refused before anything is touched."""
    def script(device):
        buffers = buffers_of(device)
        descriptor, table = read_layer(device, pair.layers[device])
        changes, fields = {}, {}
        if what == "image":
            table[1]["image_address"] = (1 << 40) - 64
        elif what == "table":  # that of the last experts only
            changes = {"table_address": (1 << 40) - 64}
        else:
            fields = {f"{what}_address": (1 << 40) - 64}
        own = place_layer(device, descriptor, table, **changes)
        write_register(device, "WINDOW_LIMIT", 1 << 40)
        allowed = [(buffers.addresses[name], buffers.sizes[name]) for name in ("y", "workspace")
                   if what == "image"]  # what other experts may have come to
        guard = untouched(pair, *allowed) if device is pair.rtl else contextlib.nullcontext()
        with guard:
            command = execute(device, buffers.fields(own.address, **fields))
        write_register(device, "WINDOW_LIMIT", SIZE)
        said["image"], said["table"] = 1, own.address
        own.free()
        buffers.memory.free()
        return result_of(command)

    said = {}
    structure, status = {"image": (EXPERT, Status.BAD_EXPERT), "table": (LAYER, Status.BAD_LAYER)
                         }.get(what, (SUBMISSION, Status.BAD_FIELD))
    word = field_of(structure, f"{what}_address").word
    found = pair.same(script)
    where = said.get(what, 0)  # an expert, or the address of a descriptor
    assert found == (status, *((where, word) if what == "image" else (word, where)))


# -- numbers ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("tokens", [[0], [6], [63], [64], [69], [5, 3], [69, 66], [66, 2]])
def test_values_that_are_not_finite(pair, tokens, value):
    x, ids, weights = draw_call(70)
    x[tokens, np.arange(len(tokens)) * 9] = value
    result = pair.same(lambda device: pair.layers[device](x, ids, weights))
    assert result == ("NonFiniteInput", Status.NONFINITE, min(tokens), NonFinite.X)
    pair.check()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("tokens", [[0], [63], [64], [69], [5, 3], [69, 66], [66, 2]])
def test_routing_weights_that_are_not_finite(pair, tokens, value):
    """Also in the call's second command; x comes first, whatever its token."""
    x, ids, weights = draw_call(70)
    weights[tokens, np.arange(len(tokens))] = value
    found = pair.same(lambda device: pair.layers[device](x, ids, weights))
    assert found == (
        "NonFiniteInput", Status.NONFINITE, min(tokens), NonFinite.ROUTING_WEIGHT)
    x[60, 3] = np.inf
    found = pair.same(lambda device: pair.layers[device](x, ids, weights))
    assert found == ("NonFiniteInput", Status.NONFINITE, 60, NonFinite.X)
    pair.check()


def test_weights_of_skipped_ids_may_hold_anything(pair):
    x, ids, weights = (array.copy() for array in CALL)
    skipped = [0, 0, 3, 5], [0, 2, 1, 0]
    ids[skipped], weights[skipped] = [-1, EXPERTS, -7, 1 << 30], [np.nan, np.inf, -np.inf, np.nan]
    y = pair.same(lambda device: pair.layers[device](x, ids, weights))
    weights[skipped] = 0
    assert_same_bits(y, pair.layers[pair.golden](x, ids, weights))


def test_tokens_without_experts_may_hold_anything(pair):
    x, ids, weights = (array.copy() for array in CALL)
    x[4], ids[4] = np.nan, -1
    y = pair.same(lambda device: pair.layers[device](x, ids, weights))
    assert not y[4].any() and y[3].any()


@pytest.mark.parametrize("grid_exponent", [-41, -44, -60, -100])
def test_grid_overflow(pair, grid_exponent):
    def script(device):
        with device.load_experts(*WEIGHTS, grid_exponent=grid_exponent) as loaded:
            return loaded(*LONG)

    name, status, count, _ = pair.same(script)
    assert (name, status) == ("GridOverflow", Status.OVERFLOW)
    assert pair.check()["overflows"] == count > 0


# -- the bus ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("response", ["SLVERR", "DECERR"])
@pytest.mark.parametrize("what", ["x", "ids", "weights", "y", "workspace read",
                                  "workspace write", "layer", "table", "image",
                                  "image end"])
def test_bus_errors(pair, what, response):
    """The command names the burst (0 for a write), whatever it was for."""
    device, simulation = pair.rtl, pair.simulation
    layer = pair.layers[device]
    buffers = buffers_of(device)
    name = what.split()[0]
    writes = what in ("y", "workspace write")
    if name == "layer":
        address, count = layer._descriptor.address, 64
    elif name == "table":
        address, count = layer._descriptor.address + 64 * 2, 64  # of expert 1
    elif name == "image":
        payload = layer.shape.image_bytes - layer.shape.header_bytes
        address = layer._images.address + layer.shape.header_bytes + layer.shape.memory_bytes
        address, count = (address + payload - 8, 8) if "end" in what else (address, 64)
    else:
        address, count = buffers.addresses[name], buffers.sizes[name]
        address, count = address + count // 2 // 64 * 64, 64  # in its middle
    simulation.inject_error(address, count, response=response, reads=not writes, writes=writes)
    allowed = [(buffers.addresses[n], buffers.sizes[n]) for n in ("y", "workspace")]
    with untouched(pair, *allowed):
        command = execute(device, buffers.fields(layer._descriptor.address))
    error = command.error()
    assert isinstance(error, errors.BusError)
    if writes:
        assert error.address == 0
    else:
        assert address - 512 < error.address < address + count
    # The error is gone with its cause.
    simulation.clear_errors()
    assert execute(device, buffers.fields(layer._descriptor.address)).error() is None
    assert_same_bits(buffers.y(), pair.layers.call(pair.golden))
    buffers.memory.free()


def test_an_unreadable_submission(pair):
    """The device cannot know the tag: it says what happened all the same, and goes on."""
    device, simulation = pair.rtl, pair.simulation
    simulation.inject_error(device._rings._sides.submissions, 64, writes=False)
    head = device._rings._sides.completions
    handle = pair.layers[device].submit(*CALL)
    simulation.run(20_000)
    assert simulation.mem_read(head, 64)[2] == Status.BUS_ERROR
    simulation.clear_errors()
    device.reset()
    with pytest.raises(errors.CommandAborted):
        pair.layers[device].sync(handle)
