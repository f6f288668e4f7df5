"""The whole board behind a pseudo-terminal: the driver's bits, noise, cut lines, the process."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from moeaccel.config import PRESETS
from moeaccel.host import open_device
from moeaccel.host.demo.run import run as run_demo
from moeaccel.host.errors import ConfigMismatch
from moeaccel.sim.board.bench import measure_board
from moeaccel.sim.board.board import Board, BoardProcess, LineNoise

# The smallest accelerator that fits the board: it is built in a fraction of the time.
CONFIG = PRESETS["tiny"].replace(name="tiny-board", address_bits=32)


def layer(seed):
    """Return a small layer and its input."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((3, 2 * 32, 64), np.float32) / 8,
            rng.standard_normal((3, 64, 32), np.float32) / 6,
            rng.standard_normal((5, 64), np.float32),
            rng.integers(0, 3, (5, 2)), rng.random((5, 2), np.float32))


def answer(device, seed):
    gate_up, down, x, ids, weights = layer(seed)
    experts = device.load_experts(gate_up, down, weight_format="int4_g32")
    return experts(x, ids, weights)


@pytest.fixture(scope="module")
def golden():
    with open_device("golden", config=CONFIG) as device:
        return {seed: answer(device, seed) for seed in range(3)}


@pytest.mark.slow  # a minute of SDRAM; the noisy line below is one of the same boards
def test_bits_equal_golden_and_the_sdram_keeps_its_rules(golden):
    with Board(CONFIG) as board:
        with open_device(f"serial:{board.port}", config=CONFIG) as device:
            y = answer(device, 0)
            counters = device.counters()
        state = board.state
    assert np.array_equal(y, golden[0])
    assert counters["commands"] == 1
    assert state.violation == "NONE"
    assert state.flipped == state.lost == state.repeated == 0
    assert state.bytes_received > 1000


def test_noise_costs_retries_and_no_bits(golden):
    noise = LineNoise(flip=4e-4, lose=4e-4, repeat=4e-4, seed=5)
    with Board(CONFIG, noise=noise) as board:
        with open_device(f"serial:{board.port}", config=CONFIG) as device:
            y = answer(device, 1)
        state = board.state
    assert np.array_equal(y, golden[1])
    assert min(state.flipped, state.lost, state.repeated) > 0


def test_a_line_cut_in_a_transfer_leaves_a_usable_board(golden):
    """The next session works whatever the first one left half done."""
    with Board(CONFIG) as board:
        first = open_device(f"serial:{board.port}", config=CONFIG)
        descriptor = first.transport._port.fd
        first.transport.memory_write(0x10000, bytes(3000))
        os.write(descriptor, b"\x55" * 700)  # a frame that never ends
        first.transport._port.close()
        with open_device(f"serial:{board.port}", config=CONFIG) as device:
            y = answer(device, 2)
    assert np.array_equal(y, golden[2])


def test_the_back_door_is_the_memory_of_the_bus():
    data = np.random.default_rng(1).integers(0, 256, 3000, np.uint8)
    with Board(CONFIG) as board, open_device(f"serial:{board.port}", config=CONFIG) as device:
        address = (1 << 25) - 4096 + 5
        device.transport.memory_write(address, data)
        assert np.array_equal(device.transport.memory_read(address, len(data)), data)
        assert np.array_equal(board.memory[address:address + len(data)], data)


def test_time_stands_still_while_nothing_is_asked():
    with Board(CONFIG) as board:
        before = -1
        for _ in range(200):
            time.sleep(0.2)
            if board.state.cycles == before:
                break
            before = board.state.cycles
        begin = time.process_time()
        time.sleep(0.5)
        assert board.state.cycles == before
        assert time.process_time() - begin < 0.25
        with open_device(f"serial:{board.port}", config=CONFIG):  # and it wakes up
            assert board.state.cycles > before


def test_another_configuration_is_refused():
    with Board(CONFIG) as board, pytest.raises(ConfigMismatch, match="CONFIG_HASH"):
        open_device(f"serial:{board.port}", config="ulx3s")


def test_a_process_ends_when_it_is_closed():
    process = BoardProcess(CONFIG)
    with open_device(f"serial:{process.port}", config=CONFIG) as device:
        assert device.counters()["commands"] == 0
    assert process.close() == 0
    assert not os.path.exists(process.port)


def test_a_process_ends_with_its_parent():
    """Its standard input closes, however the parent ends."""
    script = ("import time; from moeaccel.sim.board.board import BoardProcess; "
              "from tests.sim.board.test_board import CONFIG; board = BoardProcess(CONFIG); "
              "print(board.pid, flush=True); time.sleep(600)")
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}) as parent:
        board = int(parent.stdout.readline())
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    for _ in range(100):
        try:
            os.kill(board, 0)
        except ProcessLookupError:
            return
        with open(f"/proc/{board}/stat", encoding="ascii") as file:
            if file.read().rsplit(")", 1)[1].split()[0] == "Z":
                return
        time.sleep(0.1)
    pytest.fail("the board's process outlives its parent")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_demo_model_generates_through_it():
    """On the preset of the real board; its build alone takes minutes."""
    with Board("ulx3s") as board:
        result = run_demo(["27+85="], right_answers=["112"], device=f"serial:{board.port}",
                          config="ulx3s")
        state = board.state
    assert result.logits_equal
    assert result.device_answers == ["112"]
    assert state.violation == "NONE"
    assert state.bytes_received > 300_000  # the experts of all layers


def test_the_ridge_is_measured():
    """One token leaves the array idle most of the time; a second one is nearly free."""
    ridge = measure_board(CONFIG, tokens=[2], d_model=128, d_expert=64)
    one, two = ridge.points
    assert one.equal
    assert two.equal
    assert (one.passes, two.passes) == (1, 1)
    assert 0 < one.bus_share < 1
    assert two.cycles < 1.5 * one.cycles
    assert two.array_share > one.array_share
    assert ridge.resident_tokens == CONFIG.max_slots
    assert ridge.tokens == pytest.approx(2 * CONFIG.multipliers / one.weights_per_cycle)


@pytest.mark.parametrize(("name", "value"), [("flip", 1.0), ("lose", -0.1), ("repeat", 2)])
def test_chances_are_checked(name, value):
    with pytest.raises(ValueError, match=rf"{name} must be in \[0, 1\)"):
        LineNoise(**{name: value})
