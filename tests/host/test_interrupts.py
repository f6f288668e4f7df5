"""A call is interrupted at any moment: the next one works, and nothing is lost or left behind."""

import contextlib
import gc
import signal
from types import SimpleNamespace

import numpy as np
import pytest

from moeaccel.config import PRESETS
from moeaccel.host import errors, open_device
from moeaccel.host.residents import Residents
from moeaccel.host.transports import serial as serial_module
from moeaccel.host.transports.golden import GoldenTransport
from moeaccel.host.transports.rtl import RtlTransport
from tests.support.interrupts import Alarm, Interrupter, lines_of
from tests.support.serial_device import LinkDevice, SerialStandIn
from tests.support.xdma_files import StandIn

TINY = PRESETS["tiny"].replace(name="few tokens", max_tokens=2)
SIZE = 1 << 18


def golden():
    return GoldenTransport(TINY, memory_bytes=SIZE)


class Simulation:
    """The interface of a co-simulation, with the golden model inside."""

    def __init__(self):
        self.golden = golden()
        self.memory_models = (SimpleNamespace(size=SIZE),)
        self.reg_read, self.reg_write = self.golden.register_read, self.golden.register_write

    def mem_read(self, address, count, *, port):
        return self.golden.memory_read(address, count)

    def mem_write(self, address, data, *, port):
        self.golden.memory_write(address, data)

    def run(self, max_cycles):
        self.golden.wait_interrupt(0)

    @property
    def irq(self):
        return self.golden.wait_interrupt(0)

    def close(self):
        pass


@contextlib.contextmanager
def opened(kind, folder, **options):
    """Open a device of two tokens a command behind a transport."""
    with contextlib.ExitStack() as stack:
        config = TINY
        if kind == "golden":
            transport = golden()
        elif kind == "rtl":
            transport = RtlTransport(TINY, simulation=Simulation())
        elif kind == "recorded":
            transport, options = golden(), options | {"record": folder / "session"}
        elif kind == "xdma":
            files = StandIn(stack.enter_context(golden()))
            transport, options = "xdma:0", options | {"files": files, "memory_bytes": SIZE}
        else:
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            patch.setattr(serial_module, "_REPLY_S", 0.002)
            patch.setattr(serial_module, "_NOTICE_S", 0.002)
            # Short waits are for speed; the line is never lost, however busy the machine is.
            patch.setattr(serial_module, "_SILENT_ROUNDS", 1000)
            patch.setattr(serial_module, "_ROUNDS", 10000)
            board = SerialStandIn(LinkDevice(stack.enter_context(golden())), folder / "port")
            stack.callback(board.unplug)
            transport = f"serial:{board.path}"
        yield stack.enter_context(open_device(transport, config, timeout_s=20, ring_log2=1,
                                              **options))


KINDS = ("golden", "rtl", "recorded", "xdma", "serial")
"""Transports."""

STEPS = [
    ("golden", 67), ("rtl", 499), ("recorded", 997), ("xdma", 499), ("serial", 997),
    *(pytest.param(kind, step, marks=pytest.mark.slow)
      for kind, step in zip(KINDS, (7, 23, 23, 23, 41), strict=True))]
"""Every how many-th line is tried on each: all of them take minutes."""


def weights(seed=0):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((2, 64, 32), np.float32),
            rng.standard_normal((2, 32, 32), np.float32))


def tokens(seed=1, count=3):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((count, 32), np.float32), rng.integers(0, 2, (count, 2)),
            rng.random((count, 2), np.float32))


def free_bytes(device):
    gc.collect()
    device.fence()
    return device.memory.free_bytes


@pytest.mark.parametrize(("kind", "step"), STEPS)
def test_a_call_interrupted_anywhere(tmp_path, kind, step):
    """Two commands through a ring that has room for one; then another call, all bits right."""
    call, other = tokens(), tokens(2, 1)
    with opened(kind, tmp_path) as device:
        experts = device.load_experts(*weights())
        expected, expected_other = experts(*call), experts(*other)
        free = free_bytes(device)
        lines = lines_of(lambda: experts(*call))
        places = []
        for at in range(0, lines, step):
            with Interrupter(at) as interrupter:
                experts(*call)
            assert np.array_equal(experts(*other), expected_other), interrupter.where
            assert free_bytes(device) == free, interrupter.where
            places.append(interrupter.where)
        # How often one looks for an answer on the line differs from call to call.
        assert places.count(None) <= (len(places) // 4 if kind == "serial" else 0)
        assert np.array_equal(experts(*call), expected)


@pytest.mark.parametrize(("kind", "step"), STEPS)
def test_a_handle_outlives_an_interrupted_sync(tmp_path, kind, step):
    """Its result can be taken by another sync, unless the interrupted one was at its very end."""
    call = tokens()
    with opened(kind, tmp_path) as device:
        experts = device.load_experts(*weights())
        expected, free, late = experts(*call), free_bytes(device), 0
        first, cycles = experts.submit(*call), experts.last.cycles
        lines = lines_of(lambda: experts.sync(first))
        for at in range(0, lines, step):
            handle = experts.submit(*call)
            with Interrupter(at) as interrupter:
                experts.sync(handle)
            if handle._consumed:
                late += interrupter.where is not None
            else:
                assert np.array_equal(experts.sync(handle), expected), interrupter.where
                assert experts.last.cycles == cycles, interrupter.where
        del handle
        assert late < 4
        assert free_bytes(device) == free


@pytest.mark.parametrize(("kind", "step"), STEPS)
def test_opening_loading_resetting_and_closing_interrupted_anywhere(tmp_path, kind, step):
    call = tokens()
    with opened(kind, tmp_path) as device:
        experts = device.load_experts(*weights())
        expected, free = experts(*call), free_bytes(device)

        def load_and_close():
            device.load_experts(*weights(3)).close()

        for action in (load_and_close, device.reset, device.counters):
            lines = lines_of(action)
            for at in range(0, lines, 3 * step):
                pending = experts.submit(*call)
                with Interrupter(at) as interrupter:
                    action()
                assert np.array_equal(experts(*call), expected), interrupter.where
                with contextlib.suppress(errors.CommandAborted):  # by the reset
                    assert np.array_equal(experts.sync(pending), expected), interrupter.where
                del pending
                assert free_bytes(device) == free, interrupter.where
        other = device.load_experts(*weights(3))
        assert not np.array_equal(other(*call), expected)


def test_interrupts_one_after_another(tmp_path):
    """Also the calls that clean up after an interrupted one are interrupted."""
    rng = np.random.default_rng(5)
    call = tokens()
    with opened("golden", tmp_path) as device:
        experts = device.load_experts(*weights())
        expected, free = experts(*call), free_bytes(device)
        lines = lines_of(lambda: experts(*call))
        for _ in range(20):
            for at in rng.integers(0, lines, rng.integers(1, 6)):
                with Interrupter(at):
                    experts(*call)
            assert np.array_equal(experts(*call), expected)
            assert free_bytes(device) == free


@pytest.mark.parametrize("kind", [
    kind if kind in ("golden", "rtl") else pytest.param(kind, marks=pytest.mark.slow)
    for kind in KINDS])
def test_a_timer_signal_that_raises(tmp_path, kind):
    """The real thing: a handler that raises, at times that nobody chose."""
    def ring(*_):
        raise Alarm

    call = tokens()
    before = signal.signal(signal.SIGALRM, ring)
    try:
        with opened(kind, tmp_path) as device:
            experts = device.load_experts(*weights())
            expected, free = experts(*call), free_bytes(device)
            for n in range(20):
                with contextlib.suppress(Alarm):
                    signal.setitimer(signal.ITIMER_REAL, 2e-4 + n * 5e-5)
                    try:
                        experts(*call)
                    finally:
                        signal.setitimer(signal.ITIMER_REAL, 0)
                assert np.array_equal(experts(*call), expected)
                assert free_bytes(device) == free
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_callback_that_raises(device):
    """Memory goes back at once, though the traceback lives; the next load works."""
    free = device.memory.free_bytes

    def progress(done, count):
        raise Alarm

    with pytest.raises(Alarm) as caught:
        device.load_experts(*weights(), progress=progress)
    assert device.memory.free_bytes == free
    del caught
    call = tokens()
    assert device.load_experts(*weights())(*call).shape == call[0].shape


def test_memory_never_lists_what_is_used_for_something_else():
    """Whenever striking out is interrupted: doing it again strikes out."""
    def listed(transport):
        return Residents(transport)._ranges

    with golden() as transport:
        lines = None
        for at in range(100):
            residents = Residents(transport)
            residents.enter(1 << 14, [4096, 4096])
            assert len(listed(transport)) == 1
            lines = lines or lines_of(lambda: Residents(transport).forget(1 << 14, 64))
            residents.enter(1 << 14, [4096, 4096])
            with Interrupter(at):
                residents.forget(1 << 14, 64)
            residents.forget(1 << 14, 64)
            assert not listed(transport), at
            if at > lines:
                break


def test_an_interrupted_session_is_replayed_as_far_as_it_came(tmp_path):
    """Then every call says that the driver asks something else; no hang, no wrong result."""
    call = tokens()
    with opened("recorded", tmp_path) as device:
        experts = device.load_experts(*weights())
        expected = experts(*call)
        for _ in range(3):
            assert np.array_equal(experts(*call), expected)
    with open_device(f"replay:{tmp_path / 'session'}", TINY, ring_log2=1) as device:
        experts = device.load_experts(*weights())
        lines = lines_of(lambda: experts(*call))
        with Interrupter(lines // 2) as interrupter:
            experts(*call)
        assert interrupter.where is not None
        for _ in range(2):
            with pytest.raises(errors.ReplayMismatch, match="record the session again"):
                experts(*call)
        with contextlib.suppress(errors.ReplayMismatch):
            device.close()
