"""A whole machine does the same, in every cycle, whether its C++ is rewritten or not."""

import dataclasses
import hashlib
import re

import numpy as np
import pytest

from moeaccel.config import PRESETS
from moeaccel.formats import FORMATS
from moeaccel.hdl.core import BUSY
from moeaccel.host import open_device
from moeaccel.host.transports.rtl import RtlTransport
from moeaccel.interface.commands import Opcode, Status
from moeaccel.sim import CoSimulation, MemoryModel, StallModel, build_accelerator_model
from moeaccel.sim.cosim import verilator
from moeaccel.sim.cosim.accelerator import accelerator_verilog, busy
from moeaccel.sim.speedup.gating import gate
from moeaccel.sim.speedup.vectorise import vectorise
from tests.support.pair import Buffers, draw_experts, execute
from tests.support.verilated import translate

CONFIG = PRESETS["tiny"]
SIZE = 1 << 20
EXPERTS, D_MODEL, D_EXPERT, TOKENS = 4, 96, 64, 11

# Late, out of order, with pauses of every channel.
MEMORY = MemoryModel(
    size=SIZE, seed=3, read_latency=1, read_latency_most=60, write_latency=9, max_reads=6,
    reorder=True, interleave=True, stalls=StallModel(ar=.2, r=.3, aw=.4, w=.3, b=.5, length=4))


@pytest.fixture(scope="module")
def rewritten():
    return build_accelerator_model(CONFIG)


@pytest.fixture(scope="module")
def text(rewritten):
    return rewritten.library.with_name(verilator.VERILOG_NAME).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def plain(text):
    return verilator.build_model(text, speedup=False, flags=("-O1",))


def history(model):
    """Return everything that can be seen from outside after each of some commands.

    That is the completion, all counters, what the bus counted, the cycle, and all of memory.
    """
    rng = np.random.default_rng(7)
    simulation = CoSimulation(model, memory=MEMORY, register_stalls=StallModel.uniform(0.3), seed=5)
    seen = []

    def look(completion=None):
        seen.append((completion, device.counters(), dataclasses.astuple(simulation.stats()),
                     simulation.irq, simulation.cycle,
                     hashlib.sha256(simulation.mem_read(0, SIZE)).hexdigest()))

    transport = RtlTransport(CONFIG, simulation=simulation)
    with open_device(transport, config=CONFIG, watchdog_cycles=0) as device:
        def command(layer, wrong=(), **fields):
            x = rng.standard_normal((TOKENS, D_MODEL), np.float32)
            x.reshape(-1)[list(wrong)] = np.nan
            ids = rng.integers(-1, EXPERTS, (TOKENS, 3))
            weights = rng.standard_normal((TOKENS, 3), np.float32)
            if fields.get("top_k") == 1:
                ids, weights = ids[:, :1], weights[:, :1]
            buffers = Buffers(device, x, ids, weights, d_out=D_MODEL)
            done = execute(device, buffers.fields(layer._descriptor.address, **fields)).completion
            look(done)
            return done.status

        gate_up, down = draw_experts(rng, EXPERTS, D_MODEL, D_EXPERT, spread=4)
        for name in FORMATS:
            for bits in (8, 16):
                layer = device.load_experts(gate_up, down, weight_format=name,
                                            activation_bits=bits)
                assert command(layer) == Status.OK
        assert command(layer, wrong=(5, 700)) == Status.NONFINITE
        assert command(layer, top_k=0) not in (Status.OK, Status.NONFINITE)
        linear = device.load_linear(draw_experts(rng, 1, D_MODEL, 48)[0][0])
        assert command(linear, opcode=int(Opcode.GEMM), top_k=1) == Status.OK
        for moment in rng.integers(50, 1500, 5):  # a reset in the midst of a command
            call = rng.standard_normal((TOKENS, D_MODEL), np.float32)
            layer.submit(call, rng.integers(0, EXPERTS, (TOKENS, 2)),
                         rng.random((TOKENS, 2), np.float32))
            simulation.run(int(moment), until_irq=False)
            look()
            device.reset()
            assert command(layer) == Status.OK
        simulation.check()
    return seen


@pytest.mark.timeout(900)  # the first run builds the models
def test_the_rewritten_machine_does_the_same_in_every_cycle(rewritten, plain):
    assert rewritten.library != plain.library
    found, expected = history(rewritten), history(plain)
    assert len(found) == len(expected) > 20
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one == other, f"first difference after step {number}"


@pytest.mark.timeout(900)
def test_the_rewriters_find_what_verilator_writes(rewritten, plain):
    """Fewer than here, and this Verilator writes something that they no longer recognise."""
    assert rewritten.looped > 1300
    assert rewritten.skippable > 750
    assert (plain.looped, plain.skippable) == (0, 0)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("config", [
    config if config == "tiny" else pytest.param(config, marks=pytest.mark.slow)
    for config in PRESETS])
def test_every_preset_is_made_faster(config, tmp_path, request):
    verilog = (request.getfixturevalue("text") if config == "tiny" else
               accelerator_verilog(PRESETS[config]))
    translate(verilog, tmp_path)
    assert vectorise(tmp_path / "obj") > 1000
    names = set(re.findall(r"\b\w+__DOT__\w+", "".join(
        path.read_text(encoding="utf-8") for path in (tmp_path / "obj").glob("*root.h"))))
    # No name is handed in that is not there.
    assert {match[1] for match in (re.search(busy(), name) for name in names) if match} == {*BUSY}
    assert gate(tmp_path / "obj", busy=busy()) > 300


def test_a_text_without_the_patterns_is_told(tmp_path, caplog):
    (tmp_path / "obj").mkdir()
    (tmp_path / "obj" / "Vtop___024root.h").write_text("class Vtop___024root {};\n")
    build = verilator._Build(work=tmp_path, runtime=tmp_path, root=tmp_path, compiler="",
                             flags=(), waves=False)
    assert build.rewrite("") == (0, 0)
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert "found no statements for loops" in caplog.text
    assert "found no groups to be skipped" in caplog.text
