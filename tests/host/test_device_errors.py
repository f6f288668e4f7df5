"""What the driver refuses, what a device reports, and what helps after it."""

import gc

import numpy as np
import pytest
import torch

from moeaccel import golden
from moeaccel.errors import FormatError, MoeAccelError
from moeaccel.host import errors, open_device
from moeaccel.host.device import Command
from moeaccel.image import Expert
from moeaccel.interface.commands import EXPERT, LAYER, Opcode, Status, decode, encode
from moeaccel.interface.registers import REGISTERS
from tests.support.device import draw_call, draw_weights, expected_of, layer_of

# -- errors before anything is sent ----------------------------------------------------------------
X = np.zeros((3, 64), np.float32)
IDS = np.zeros((3, 2), np.int64)
WEIGHTS = np.zeros((3, 2), np.float32)


@pytest.mark.parametrize(("x", "ids", "weights", "error", "message"), [
    ([[0.0]], IDS, WEIGHTS, errors.InvalidTensor, r"x must be a torch.Tensor .*not list"),
    (X[0], IDS, WEIGHTS, errors.InvalidTensor, r"x must have the shape \(T, 64\), not \(64,\)"),
    (X[:, :32], IDS, WEIGHTS, errors.InvalidTensor, r"x must have the shape \(T, 64\) of this"),
    (X.astype(int), IDS, WEIGHTS, errors.InvalidTensor, "x must be floating point, not int64"),
    (torch.zeros(3, 64, device="meta"), IDS, WEIGHTS, errors.InvalidTensor, "x must be dense, wi"),
    (torch.zeros(3, 64).to_sparse(), IDS, WEIGHTS, errors.InvalidTensor, "not torch.sparse_coo"),
    (torch.zeros(3, 64, dtype=torch.int8), IDS, WEIGHTS, errors.InvalidTensor, "torch.int8"),
    (X, IDS[:2], WEIGHTS, errors.InvalidTensor, r"ids must have the shape .* T = 3, not \(2, 2\)"),
    (X, IDS.astype(float), WEIGHTS, errors.InvalidTensor, "ids must be integers"),
    (X, IDS.astype(bool), WEIGHTS, errors.InvalidTensor, "ids must be integers"),
    (X, torch.zeros(3, 2, dtype=torch.bfloat16), WEIGHTS, errors.InvalidTensor, "integers"),
    (X, IDS, WEIGHTS[:, :1], errors.InvalidTensor, r"weights must have the shape of ids, \(3, 2\)"),
    (X, IDS, IDS, errors.InvalidTensor, "weights must be floating point"),
    (X, np.zeros((3, 17), int), np.zeros((3, 17)), errors.LimitExceeded, "at most 16 experts"),
])
def test_calls_are_checked_before_they_are_sent(device, experts, x, ids, weights, error, message):
    with pytest.raises(error, match=message) as caught:
        experts(x, ids, weights)
    assert isinstance(caught.value, MoeAccelError)
    assert device.counters()["commands"] == 0


def zeros(*shape):
    return np.zeros(shape, np.float32)


@pytest.mark.parametrize(("gate_up", "down", "options", "error", "message"), [
    (zeros(2, 64, 64), zeros(2, 64, 64), {}, errors.InvalidTensor, r"down must .* \(2, 64, 32\)"),
    (zeros(2, 64), zeros(2, 64, 32), {}, errors.InvalidTensor, r"\(E, 2 I, H\), not \(2, 64\)"),
    (zeros(2, 0, 64), zeros(2, 64, 0), {}, FormatError, "d_expert must be at least 1, not 0"),
    (zeros(2, 64, 0), zeros(2, 0, 32), {}, FormatError, "d_model must be at least 1, not 0"),
    (zeros(0, 64, 64), zeros(0, 64, 32), {}, errors.InvalidTensor, "at least 1"),
    ([zeros(64, 64), zeros(128, 64)], [zeros(64, 32)] * 2, {}, errors.InvalidTensor, "expert 1"),
    (zeros(17, 64, 64), zeros(17, 64, 32), {}, errors.LimitExceeded,
     "^number of experts must be from 1 to 16 in config 'tiny', not 17; presets that can: small"),
    (zeros(2, 64, 512), zeros(2, 512, 32), {}, errors.LimitExceeded,
     "^d_model must be a multiple of 32 from 32 to 256 in config 'tiny', not 512; presets that"),
    (zeros(2, 64, 500), zeros(2, 500, 32), {}, errors.LimitExceeded,
     r"^d_model must .* not 500 \(512 in whole blocks\); presets"),
    (zeros(2, 4096, 64), zeros(2, 64, 2048), {}, errors.LimitExceeded,
     "^d_expert must .* 256 in config 'tiny', not 2048; presets that can: ulx3s, ulx3s-router, "),
    (zeros(1, 64, 65536), zeros(1, 65536, 32), {}, errors.LimitExceeded, "no preset can, make"),
    (zeros(2, 64, 64).astype(int), zeros(2, 64, 32), {}, errors.InvalidTensor, "floating point"),
    (zeros(2, 64, 64) * np.nan, zeros(2, 64, 32), {}, FormatError,
     "^expert 0: gate_up: weights must be finite"),
    (zeros(2, 64, 64), [zeros(64, 32), zeros(64, 32) + np.inf], {}, FormatError,
     "^expert 1: down: weights must be finite"),
    (zeros(2, 64, 64), zeros(2, 64, 32), {"shared": (zeros(64, 64) + np.nan, zeros(64, 32))},
     FormatError, "^a shared expert: gate_up: weights must be finite"),
    (zeros(2, 64, 64), zeros(2, 64, 32), {"shared": [(zeros(64, 64), zeros(64, 32))] * 16},
     errors.LimitExceeded, "^shared must be at most 15 experts, .*, not 16"),
    (zeros(2, 64, 64), zeros(2, 64, 32), {"weight_format": "int3"}, FormatError, "not 'int3'"),
    (zeros(2, 64, 64), zeros(2, 64, 32), {"weight_format": None}, FormatError, "not None"),
    (zeros(2, 64, 64), zeros(2, 64, 32), {"weight_format": ["mxint8"]}, errors.InvalidOption,
     "^weight_format must be one name, or one for each of 2 experts, not 1"),
    (zeros(2, 64, 64), zeros(2, 64, 32), {"weight_format": ["mxint8", "int3"]}, FormatError,
     "not 'int3'"),
    (zeros(2, 64, 64), zeros(2, 64, 32), {"activation": "mish"}, FormatError,
     "activation must be one of silu, .*, not 'mish'"),
    (zeros(2, 64, 64), zeros(2, 64, 32), {"limit": 0.0}, FormatError, "limit must be a positive"),
    (zeros(2, 64, 64), zeros(2, 64, 32), {"limit": -7.0}, FormatError, "limit must be a positive"),
    (zeros(2, 64, 64), zeros(2, 64, 32), {"limit": 7.01}, FormatError, "not 7.01"),
    (zeros(2, 64, 64), zeros(2, 64, 32), {"limit": "7"}, FormatError, "not '7'"),
    (zeros(2, 64, 64), zeros(2, 64, 32), {"limit": float("inf")}, FormatError, "not inf"),
    (zeros(2, 64, 64), zeros(2, 64, 32), {"limit": 7.0, "limit_behind": "no"},
     errors.InvalidOption, "limit_behind must be True or False, not 'no'"),
    (zeros(2, 64, 64), zeros(2, 64, 32), {"second_up": "no"}, errors.InvalidOption, "not 'no'"),
    (zeros(2, 64, 64), zeros(2, 64, 32), {"gated": "no"}, errors.InvalidOption, "not 'no'"),
    (zeros(2, 64, 64), zeros(2, 64, 32), {"shared": 7}, errors.InvalidTensor,
     r"shared must be a pair \(gate_up, down\) .*, not int"),
    (torch.zeros(2, 64, 64, device="meta"), zeros(2, 64, 32), {}, errors.InvalidTensor,
     "gate_up must be dense, with values, not on the meta device"),
    (zeros(2, 64, 64), zeros(2, 64, 32), {"gated": False}, errors.InvalidTensor,
     r"\(E, H, I\) = \(2, 64, 64\) for gate_up \(2, 64, 64\) = \(E, I, H\)"),
    (zeros(2, 64, 64), zeros(2, 64, 32), {"activation_bits": 4}, errors.InvalidOption, "8 or 16"),
    (zeros(2, 64, 64), zeros(2, 64, 32), {"activation_bits": 16.0}, errors.InvalidOption, "16.0"),
    (zeros(2, 64, 64), zeros(2, 64, 32), {"row_blocks": 1.0}, errors.InvalidOption,
     "row_blocks must be a whole number, at least 1, not 1.0"),
    (zeros(2, 64, 64), zeros(2, 64, 32), {"identity": True}, errors.InvalidOption, "not True"),
    (zeros(2, 64, 64), zeros(2, 64, 32), {"progress": 3}, errors.InvalidOption,
     "progress must be callable"),
    (zeros(2, 64, 64), zeros(2, 64, 32), {"grid_exponent": 61}, errors.InvalidOption, "-100 to 60"),
])
def test_weights_are_checked(device, gate_up, down, options, error, message):
    with pytest.raises(error, match=message) as caught:
        device.load_experts(gate_up, down, **options)
    assert isinstance(caught.value, MoeAccelError)
    assert device.memory.free_blocks == 1


def test_quantised_weights_are_checked(device):
    one = layer_of(*draw_weights(np.random.default_rng(0), 1))
    other = layer_of(*draw_weights(np.random.default_rng(0), 1, 96, 64))
    with pytest.raises(errors.InvalidTensor, match=r"of one d_model, not \[64, 96\]"):
        device.load_quantised(one + other)
    with pytest.raises(errors.InvalidTensor, match="at least one"):
        device.load_quantised([])
    with pytest.raises(errors.InvalidTensor,
                       match=r"down of expert 1 must have .* \(64, 96\), .* not \(96, 64\)"):
        device.load_quantised([*one, Expert(one[0].gate_up, other[0].down)])


def test_linear_weights_are_checked(device):
    with pytest.raises(errors.LimitExceeded, match="d_out"):
        device.load_linear(zeros(512, 64))
    with pytest.raises(FormatError, match="d_in"):
        device.load_linear(zeros(64, 0))
    with pytest.raises(errors.InvalidTensor, match=r"\(N, K\)"):
        device.load_linear(zeros(64))
    with pytest.raises(errors.InvalidTensor, match="of this layer"):
        device.load_linear(zeros(64, 32))(zeros(1, 64))


@pytest.mark.parametrize("ring_log2", [4, 8])
def test_memory_without_room_for_the_rings(ring_log2):
    with pytest.raises(errors.OutOfDeviceMemory, match="open the device with more memory_bytes"):
        open_device("golden", config="tiny", memory_bytes=4096 + 64, ring_log2=ring_log2)


def test_lack_of_device_memory_leaves_the_device_usable():
    with open_device("golden", config="tiny", memory_bytes=1 << 17) as device:
        rng = np.random.default_rng(0)
        loaded = device.load_experts(*draw_weights(rng, 2, d_model=224, d_expert=32))
        with pytest.raises(errors.OutOfDeviceMemory, match="memory_bytes"):
            device.load_experts(*draw_weights(rng, 16))
        call = draw_call(rng, 2, experts=2, d_model=224)  # no row of it fits beside the rings
        expected = loaded(*call)
        taken = [device.memory.allocate(64) for _ in range(device.memory.free_bytes // 64 - 8)]
        with pytest.raises(errors.OutOfDeviceMemory, match="allocation of 3,712 bytes"):
            loaded(*call)
        with pytest.raises(errors.OutOfDeviceMemory):
            loaded.submit(*call)
        del taken
        assert np.array_equal(loaded(*call), expected)


# -- errors of the device --------------------------------------------------------------------------
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("token", [0, 63, 64, 149])
def test_values_that_are_not_finite_name_their_token(device, experts, value, token):
    x, ids, weights = draw_call(np.random.default_rng(0), 150)
    x[token, 17] = value
    with pytest.raises(errors.NonFiniteInput, match=f"token {token} holds NaN") as caught:
        experts(x, ids, weights)
    assert caught.value.token == token
    assert caught.value.status is Status.NONFINITE
    x[token, 17] = 0
    assert np.isfinite(experts(x, ids, weights)).all()


@pytest.mark.parametrize("token", [0, 63, 64, 149])
def test_routing_weights_that_are_not_finite_name_their_token(experts, token):
    x, ids, weights = draw_call(np.random.default_rng(0), 150)
    weights[token, 1], ids[token, 1] = np.nan, 0
    with pytest.raises(errors.NonFiniteInput,
                       match=f"^routing weight must be .* token {token} holds NaN") as caught:
        experts(x, ids, weights)
    assert (caught.value.token, caught.value.what) == (token, "routing weight")
    ids[token, 1] = -1
    assert np.isfinite(experts(x, ids, weights)).all()
    x[token, 0] = np.inf
    with pytest.raises(errors.NonFiniteInput, match=f"^x must be .* token {token} ") as caught:
        experts(x, ids, weights)
    assert (caught.value.token, caught.value.what) == (token, "x")


def test_underflows_are_reported_with_the_call(device, experts):
    x, ids, weights = draw_call(np.random.default_rng(0), 150)
    before = device.counters()["underflows"]
    experts(x, ids, weights)
    assert experts.last.commands > 1
    few = experts.last.underflows
    experts(x, ids, weights * np.float32(1e-25))
    assert experts.last.underflows == 64 * int(((ids >= 0) & (ids < 4)).sum()) > few
    assert device.counters()["underflows"] == before + few + experts.last.underflows


def test_values_too_large_for_float32_are_not_finite(experts):
    x, ids, weights = draw_call(np.random.default_rng(0), 3)
    x = x.astype(np.float64)
    x[2, 0] = 1e300
    with pytest.raises(errors.NonFiniteInput, match="token 2"):
        experts(x, ids, weights)


def test_tokens_without_experts_may_hold_anything(experts):
    x, ids, weights = draw_call(np.random.default_rng(0), 3)
    x[1], ids[1] = np.nan, -1
    assert not experts(x, ids, weights)[1].any()


def test_overflow_of_the_grid_suggests_a_larger_one(device):
    weights = draw_weights(np.random.default_rng(0))
    call = draw_call(np.random.default_rng(0), 3)
    loaded = device.load_experts(*weights, grid_exponent=-60)
    with pytest.raises(errors.GridOverflow, match="larger grid_exponent") as caught:
        loaded(*call)
    assert caught.value.overflows == device.counters()["overflows"] > 0
    coarse = device.load_experts(*weights, grid_exponent=-20)
    expected = golden.experts(*call, layer_of(*weights), grid_exponent=-20).y
    assert np.array_equal(coarse(*call), expected)


def test_a_window_violation_names_its_address(device, experts):
    call = draw_call(np.random.default_rng(0), 3)
    good = experts(*call)
    end = experts._images.address + 4096
    for name, value in (("WINDOW_LIMIT_LO", end), ("WINDOW_LIMIT_HI", 0)):
        device.transport.register_write(REGISTERS[name].address, value)
    with pytest.raises(errors.WindowViolation, match="must be inside the memory window") as caught:
        experts(*call)
    assert caught.value.address >= end
    device.reset()
    assert np.array_equal(experts(*call), good)


RAW = {"opcode": Opcode.EXPERTS, "tokens": 1, "top_k": 1}


@pytest.mark.parametrize(("change", "error", "message"), [
    ({"opcode": 77}, errors.CommandRejected, "opcode .*not 77"),
    ({"tokens": 0}, errors.CommandRejected, "submission field tokens must be from 1 to max_"),
    ({"tokens": 65}, errors.CommandRejected, "submission field tokens must be"),
    ({"top_k": 17}, errors.CommandRejected, "submission field top_k must be"),
    ({"tokens": 64, "top_k": 5}, errors.CommandRejected, "submission field top_k must be"),
    ({"x_address": 32}, errors.CommandRejected, "submission field x_address must be"),
    ({"y_address": 1 << 50}, errors.CommandRejected, "submission field y_address must be"),
    ({"layer_address": 0}, errors.WindowViolation, "burst at 0x0 "),
    ({"layer_address": 1 << 30}, errors.WindowViolation, "burst at 0x40000000"),
    ({"ids_address": 64}, errors.WindowViolation, "burst at 0x40 "),
    ({"y_address": 1 << 24}, errors.WindowViolation, "burst at 0x1000000"),
    ({"opcode": Opcode.GEMM, "top_k": 2}, errors.CommandRejected,
     "submission field top_k must be from 1 to 16; 1 where opcode is 2; nothing"),
])
def test_bad_commands_are_rejected_and_the_next_one_runs(device, experts, change, error, message):
    buffer = device.memory.allocate(1 << 16)
    addresses = {f"{name}_address": buffer.address + 4096 * i for i, name in
                 enumerate(("x", "ids", "weights", "y", "workspace"))}
    fields = RAW | addresses | {"layer_address": experts._descriptor.address} | change
    command = device.submit(fields, Command("test"))
    device.wait(command)
    with pytest.raises(error, match=message):
        raise command.error()
    call = draw_call(np.random.default_rng(0), 3)
    layer = layer_of(*draw_weights(np.random.default_rng(7)))
    assert np.array_equal(experts(*call), expected_of(experts, call, layer))


@pytest.mark.parametrize(("change", "fields", "message"), [
    ({"d_expert": 0}, ("d_expert",), "field d_expert must be a multiple of 32 from 32 to max_dim"),
    ({"words1": 7}, ("words1",), "field words1 must be what the other fields give"),
    ({"format0": 77}, ("format0", "operand0", "sink0", "bias0"),
     "format0 must be one of format_codes, op"),
    ({"flags": 1}, ("sections", "activation", "flags"), "flags must be 0; y is undefined"),
    ({"image_address": (1 << 40) - 64}, ("image_address",), "max_address, where all that is there"),
])
def test_a_bad_table_entry_is_named_and_the_next_command_runs(device, change, fields, message):
    weights = draw_weights(np.random.default_rng(7))
    experts = device.load_experts(*weights)
    x, _, scores = draw_call(np.random.default_rng(0), 3)
    ids = np.array([[0, 1], [1, 3], [2, 0]])
    good = experts(x, ids, scores)
    where = experts._descriptor.address + 64 * (1 + 2)
    entry = device.transport.memory_read(where, 64).tobytes()
    device.transport.memory_write(where, encode(EXPERT, decode(EXPERT, entry) | change))
    with pytest.raises(errors.ExpertRejected, match="entry of expert 2: .*" + message) as caught:
        experts(x, ids, scores)
    assert (caught.value.expert, caught.value.fields) == (2, fields)
    assert caught.value.status is Status.BAD_EXPERT
    experts(x, np.minimum(ids, 1), scores)  # it has no tokens
    device.transport.memory_write(where, entry)
    assert np.array_equal(experts(x, ids, scores), good)


def test_a_table_is_written_behind_its_descriptor_at_once(device, monkeypatch):
    writes = []
    write = device.transport.memory_write
    monkeypatch.setattr(device.transport, "memory_write", lambda address, data: (
        writes.append((address, bytes(data))), write(address, data)))
    experts = device.load_experts(*draw_weights(np.random.default_rng(7)))
    address, raw = writes[-1]
    assert address == experts._descriptor.address
    assert len(raw) == 64 * (1 + 4)
    layer = decode(LAYER, raw)
    assert layer["table_address"] == address + 64
    assert (layer["num_experts"], layer["d_in"], layer["d_out"]) == (4, 64, 64)
    shape, images = experts.shape, experts._images.address
    assert [decode(EXPERT, raw[64 * (1 + e):])["image_address"] for e in range(4)] == [
        images + e * shape.memory_bytes + shape.header_bytes for e in range(4)]


@pytest.mark.parametrize("status", list(Status))
def test_every_status_has_an_error(status):
    error = errors.command_error(status, 3, 0x40)
    assert isinstance(error, errors.CommandFailed)
    assert error.status is status
    assert "must be" in str(error) or "ended" in str(error) or ";" in str(error)


def test_an_unknown_status_is_reported():
    with pytest.raises(errors.CommandFailed, match="not 99"):
        raise errors.command_error(99, 0, 0)


# -- timeouts, reset, abort ------------------------------------------------------------------------
def test_a_hung_device_times_out_and_is_usable_after_a_reset(hung):
    weights = draw_weights(np.random.default_rng(0))
    loaded = hung.load_experts(*weights)
    call = draw_call(np.random.default_rng(0), 3)
    hung.transport.hang = True
    handle = loaded.submit(*call)
    message = r"completion of EXPERTS must come within 0.1 s.*STATUS is 0x0 \(idle\), SQ_HEAD 0 of"
    for _ in range(2):
        with pytest.raises(errors.DeviceTimeout, match=message):
            loaded.sync(handle)
    with pytest.raises(TimeoutError, match=r"within 0.05 s"):
        loaded.sync(handle, timeout_s=0.05)
    hung.reset()
    with pytest.raises(errors.CommandAborted, match="submit it again"):
        loaded.sync(handle)
    assert np.array_equal(loaded(*call), expected_of(loaded, call, layer_of(*weights)))


def test_a_full_ring_of_a_hung_device_times_out(hung):
    loaded = hung.load_experts(*draw_weights(np.random.default_rng(0)))
    hung.transport.hang = True
    handles = [loaded.submit(*draw_call(np.random.default_rng(0), 3)) for _ in range(15)]
    with pytest.raises(errors.DeviceTimeout, match="room in the submission ring for EXPERTS"):
        loaded.submit(*draw_call(np.random.default_rng(0), 3))
    hung.reset()
    for handle in handles:
        with pytest.raises(errors.CommandAborted):
            loaded.sync(handle)
    loaded.close()
    gc.collect()
    assert hung.memory.free_blocks == 1


def test_a_device_that_recovers_keeps_its_commands(hung):
    weights = draw_weights(np.random.default_rng(0))
    loaded = hung.load_experts(*weights)
    call = draw_call(np.random.default_rng(0), 3)
    hung.transport.hang = True
    handle = loaded.submit(*call)
    with pytest.raises(errors.DeviceTimeout):
        loaded.sync(handle)
    hung.transport.hang = False
    hung.transport.register_write(REGISTERS["ENABLE"].address, 1)
    assert np.array_equal(loaded.sync(handle), expected_of(loaded, call, layer_of(*weights)))


def test_closing_waits_for_what_is_in_flight(hung):
    loaded = hung.load_experts(*draw_weights(np.random.default_rng(0)))
    hung.transport.hang = True
    handle = loaded.submit(*draw_call(np.random.default_rng(0), 3))
    with pytest.raises(errors.DeviceTimeout):
        loaded.close()
    assert not loaded.closed
    hung.reset()
    loaded.close()
    assert loaded.closed
    with pytest.raises(errors.CommandAborted):
        loaded.sync(handle)


def test_a_lost_interrupt_is_no_timeout(device, experts):
    handle = experts.submit(*draw_call(np.random.default_rng(0), 3))
    device.transport.register_write(REGISTERS["IRQ_STATUS"].address, 3)
    assert experts.sync(handle).shape == (3, 64)


def test_an_interrupt_without_completions_is_a_timeout(hung, monkeypatch):
    loaded = hung.load_experts(*draw_weights(np.random.default_rng(0)))
    hung.transport.hang = True
    handle = loaded.submit(*draw_call(np.random.default_rng(0), 3))
    monkeypatch.setattr(hung.transport, "wait_interrupt", lambda timeout_s: True)
    with pytest.raises(errors.DeviceTimeout):
        loaded.sync(handle)


def test_reset_and_abort_leave_weights_alone(device, experts):
    call = draw_call(np.random.default_rng(0), 70)
    expected = experts(*call)
    handle = experts.submit(*call)
    device.abort()  # nothing runs any more: the golden model is done before submit returns
    assert np.array_equal(experts.sync(handle), expected)
    for _ in range(3):
        device.reset()
        assert np.array_equal(experts(*call), expected)
