"""The benches' memory layout against the golden device: what it places is what a device reads."""

import numpy as np
import pytest

from moeaccel import golden
from moeaccel.config import PRESETS
from moeaccel.formats import FORMATS, quantise
from moeaccel.host.transports.golden import GoldenTransport
from moeaccel.interface.commands import (
    COMPLETION,
    ENTRY_BYTES,
    SUBMISSION,
    Opcode,
    Status,
    decode,
    encode,
)
from moeaccel.sim.workload import Layout, random_experts, register_writes, start_writes

TINY = PRESETS["tiny"]


def run(layout, fields):
    """Run one command on the golden device; return its completion and the device."""
    submissions = layout.place(encode(SUBMISSION, {**fields, "tag": 5}) + bytes(ENTRY_BYTES))
    completions = layout.reserve(2 * ENTRY_BYTES)
    device = GoldenTransport(layout.config, memory_bytes=1 << 25)
    for address, data in layout.take():
        device.memory_write(address, data)
    for address, value in [
        *start_writes(layout, submissions=submissions, completions=completions, ring_log2=1),
        *register_writes(SQ_TAIL=1),
    ]:
        device.register_write(address, value)
    assert device.wait_interrupt(0)
    return decode(COMPLETION, device.memory_read(completions, ENTRY_BYTES).tobytes()), device


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("config", ["tiny", "small"])
def test_experts(config, weight_format):
    draw = np.random.default_rng(1)
    layout = Layout(PRESETS[config])
    experts = random_experts(draw, 3, 96, 64, weight_format)
    x = draw.standard_normal((4, 96)).astype(np.float32)
    ids = draw.integers(-1, 4, (4, 2))
    weights = draw.random((4, 2)).astype(np.float32)
    fields = layout.place_command(layout.place_experts(experts, planes=2), x, ids, weights)
    completion, device = run(layout, {"opcode": Opcode.EXPERTS, **fields})
    assert completion["status"] == Status.OK
    assert (completion["tag"], completion["phase"]) == (5, 1)
    wanted = golden.experts(x, ids, weights, experts).y
    y = device.memory_read(fields["y_address"], wanted.nbytes).view(np.float32)
    assert np.array_equal(y.reshape(wanted.shape), wanted)
    assert 0.1 < np.abs(wanted).max() < 100


def test_linear():
    draw = np.random.default_rng(2)
    layout = Layout(TINY)
    matrix = quantise(draw.standard_normal((32, 96)).astype(np.float32), "mxfp4")
    x = draw.standard_normal((3, 96)).astype(np.float32)
    fields = layout.place_command(layout.place_linear(matrix, planes=1), x)
    completion, device = run(layout, {"opcode": Opcode.GEMM, **fields})
    assert completion["status"] == Status.OK
    wanted = golden.gemm(x, matrix, planes=1).y
    y = device.memory_read(fields["y_address"], wanted.nbytes).view(np.float32)
    assert np.array_equal(y.reshape(wanted.shape), wanted)


def test_addresses():
    layout = Layout(TINY, base=0x1000, limit=0x3000)
    assert layout.reserve(1) == 0x1000
    assert layout.place(b"abc") == 0x1040
    assert layout.place(np.arange(3, dtype="<i4"), alignment=4096) == 0x2000
    assert layout.take() == [(0x1040, b"abc"), (0x2000, b"\0\0\0\0\1\0\0\0\2\0\0\0")]
    assert layout.take() == []
    with pytest.raises(ValueError, match="Layout must end below 0x3000, not at 0x3040"):
        layout.reserve(0x1000)


def test_register_writes():
    assert register_writes(SQ_TAIL=3, SQ_BASE=0x1_0000_0040) == [
        (0x44, 3), (0x30, 0x40), (0x34, 1)]
