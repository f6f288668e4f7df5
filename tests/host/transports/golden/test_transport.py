"""What a driver may do to the golden device without going through the driver."""

import numpy as np
import pytest

from moeaccel.config import PRESETS
from moeaccel.formats import quantise
from moeaccel.host.errors import DeviceClosed, InvalidOption, UploadError
from moeaccel.host.registers import mask
from moeaccel.host.transports.golden import GoldenTransport
from moeaccel.interface.commands import COMPLETION, SUBMISSION, Opcode, Status, decode, encode
from moeaccel.interface.registers import COUNTERS, REGISTERS, Access
from tests.support.golden_bench import GoldenBench

SQ, CQ = 0x1000, 0x2000


@pytest.fixture
def golden():
    with GoldenTransport(PRESETS["tiny"], memory_bytes=1 << 20) as transport:
        yield transport


def write(transport, **values):
    for name, value in values.items():
        transport.register_write(REGISTERS[name].address, value)


def read(transport, name):
    return transport.register_read(REGISTERS[name].address)


def start(transport, log2=2, limit=1 << 20):
    write(transport, SQ_BASE_LO=SQ, CQ_BASE_LO=CQ, RING_LOG2=log2, WINDOW_LIMIT_LO=limit,
          IRQ_ENABLE=3, ENABLE=1)


def completion(transport, index):
    return decode(COMPLETION, transport.memory_read(CQ + 64 * index, 64).tobytes())


def test_registers_at_power_on(golden):
    assert read(golden, "CONFIG_HASH") == PRESETS["tiny"].digest
    for name, register in REGISTERS.items():
        if name != "CONFIG_HASH":
            assert read(golden, name) == register.reset
    assert not golden.wait_interrupt(10)


def test_registers_keep_what_their_access_says(golden):
    for name, register in REGISTERS.items():
        before = read(golden, name)
        if name not in ("CONTROL", "IRQ_STATUS"):
            write(golden, **{name: 0xFFFF_FFFF})
            used = sum(((1 << f.bits) - 1) << f.offset for f in register.fields) or 0xFFFF_FFFF
            expected = used if register.access is Access.RW else before
            assert read(golden, name) == expected
            if name == "ENABLE":
                write(golden, ENABLE=0)


@pytest.mark.parametrize("address", [0xFFC, 0x00C, 2])
def test_other_addresses_are_refused(golden, address):
    with pytest.raises(InvalidOption, match="register map"):
        golden.register_read(address)
    with pytest.raises(InvalidOption, match="register map"):
        golden.register_write(address, 0)


def test_nothing_happens_while_disabled(golden):
    start(golden)
    write(golden, ENABLE=0, SQ_TAIL=1)
    assert read(golden, "SQ_HEAD") == 0
    write(golden, ENABLE=1)
    assert read(golden, "SQ_HEAD") == 1
    assert golden.wait_interrupt(0)
    write(golden, IRQ_STATUS=1)
    assert not golden.wait_interrupt(0)


def test_phase_inverts_on_every_round_and_a_full_ring_waits(golden):
    start(golden)
    done = 0
    for tag in range(40):
        entry = encode(SUBMISSION, {"opcode": Opcode.FENCE, "tag": tag})
        golden.memory_write(SQ + 64 * (tag % 4), entry)
        write(golden, SQ_TAIL=(tag + 1) % 4)
        if tag % 3 == 2:  # three completions fill a ring of four
            while done <= tag:
                found = completion(golden, done % 4)
                assert (found["tag"], found["phase"]) == (done, 1 - done // 4 % 2)
                done += 1
            write(golden, CQ_HEAD=done % 4)
    assert read(golden, "CQ_TAIL") == 0
    assert read(golden, "COMMANDS_LO") == 40


def test_a_full_completion_ring_stops_the_device(golden):
    start(golden)
    write(golden, SQ_TAIL=3)
    write(golden, SQ_TAIL=1)  # five more, but no room for their completions
    assert read(golden, "SQ_HEAD") == 3
    write(golden, CQ_HEAD=2)
    assert read(golden, "SQ_HEAD") == 1


def test_a_soft_reset_empties_the_rings(golden):
    start(golden)
    write(golden, SQ_TAIL=3, IRQ_STATUS=3, CONTROL=1)
    for name in ("SQ_HEAD", "SQ_TAIL", "CQ_HEAD", "CQ_TAIL"):
        assert read(golden, name) == 0
    assert read(golden, "IRQ_STATUS") == 2
    assert read(golden, "COMMANDS_LO") == 0
    assert read(golden, "CONTROL") == 0


def test_rings_outside_the_window(golden):
    start(golden, limit=SQ)
    write(golden, SQ_TAIL=1)
    assert read(golden, "CQ_TAIL") == 0
    assert read(golden, "ERROR_STATUS") == mask("ERROR_STATUS", "completion_window")
    assert not golden.memory_read(CQ, 64).any()
    write(golden, WINDOW_LIMIT_LO=1 << 20, ERROR_STATUS=mask("ERROR_STATUS"))
    assert read(golden, "CQ_TAIL") == 1 and completion(golden, 0)["status"] == Status.WINDOW
    start(golden, limit=SQ + 64)
    write(golden, WINDOW_LIMIT_LO=CQ + 4096, WINDOW_BASE_LO=CQ, SQ_TAIL=2)
    found = completion(golden, 1)
    assert found["status"] == Status.WINDOW
    assert found["address"] == SQ + 64


def test_x_of_a_token_without_an_expert_is_not_asked_for():
    """It may lie behind the end of memory; the command runs, and so does the next."""
    rng, end = np.random.default_rng(0), 1 << 22
    bench = GoldenBench(memory_bytes=end)
    layer = bench.layer([quantise(rng.standard_normal((32, 32)).astype(np.float32), "mxint8")])
    x, weights = rng.standard_normal((1, 32)).astype(np.float32), np.ones((2, 1), np.float32)
    expected = bench.run(layer, x, np.array([[0]]), weights[:1])[2]
    bench.device.memory_write(end - 128, x.view(np.uint8))
    completion, _, y = bench.run(
        layer, np.zeros((2, 32), np.float32), np.array([[0], [-1]]), weights, x_address=end - 128)
    assert completion["status"] == Status.OK
    assert np.array_equal(y, np.concatenate([expected, np.zeros_like(expected)]))


def test_memory_outside_is_refused(golden):
    for action in (lambda: golden.memory_read(1 << 20, 1), lambda: golden.memory_read(-1, 1),
                   lambda: golden.memory_write((1 << 20) - 1, b"ab")):
        with pytest.raises(UploadError, match="memory access must be within 0x100000 bytes"):
            action()


def test_memory_is_lazy_and_reads_back():
    with GoldenTransport(PRESETS["small"], memory_bytes=1 << 36) as transport:
        data = np.arange(10000, dtype=np.uint8)
        transport.memory_write((1 << 36) - 10000, data)
        assert np.array_equal(transport.memory_read((1 << 36) - 10000, 10000), data)
        assert not transport.memory_read(1 << 35, 64).any()


def test_a_closed_transport_says_so(golden):
    golden.close()
    with pytest.raises(DeviceClosed, match="closed"):
        golden.memory_read(0, 1)


def test_counters_are_48_bits(golden):
    golden._registers.counters["tokens"] = (1 << 48) + (5 << 32) + 7
    assert read(golden, "TOKENS_HI") == 5
    assert read(golden, "TOKENS_LO") == 7
    assert {f"{name.upper()}_LO" for name, _ in COUNTERS} <= set(REGISTERS)
