"""How long device memory is held, how long a wait lasts, and whose a device is."""

import copy
import gc
import math
import pickle
import subprocess
import sys

import numpy as np
import pytest

from moeaccel.errors import MoeAccelError
from moeaccel.host import errors, open_device
from moeaccel.interface.registers import REGISTERS
from tests.host.test_interrupts import KINDS, TINY, opened, tokens, weights


def narrow(**options):
    """Open a device whose memory has room for the layer and a few calls of two tokens."""
    return open_device("golden", config=TINY, memory_bytes=1 << 15, **options)


@pytest.fixture
def small():
    with narrow() as device:
        yield device, device.load_experts(*weights())


# -- memory ----------------------------------------------------------------------------------------
def test_dropped_calls_do_not_fill_a_device(small):
    _, experts = small
    call = tokens(count=2)
    expected = experts(*call)
    for _ in range(200):
        experts.submit(*call)
    assert np.array_equal(experts(*call), expected)


def test_dropped_calls_give_their_buffers_back_without_another_call(small):
    device, experts = small
    device.fence()
    free = device.memory.free_bytes
    for _ in range(5):
        experts.submit(*tokens(count=2))
    device.fence()
    assert device.memory.free_bytes == free


def test_kept_calls_do_not_fill_a_device(small):
    """More handles than memory has buffers for: results wait in the host's memory."""
    _, experts = small
    calls = [tokens(seed, 2) for seed in range(100)]
    expected = [experts(*call) for call in calls]
    handles = [experts.submit(*call) for call in calls]
    for n in np.random.default_rng(0).permutation(100):
        assert np.array_equal(experts.sync(handles[n]), expected[n])


def test_a_handle_in_a_cycle_is_found_when_memory_runs_short(small):
    _, experts = small
    expected = experts(*tokens(count=2))
    gc.disable()
    try:
        for _ in range(100):
            handle = experts.submit(*tokens(count=2))
            handle.itself = handle
            del handle
        assert np.array_equal(experts(*tokens(count=2)), expected)
    finally:
        gc.enable()


def test_weights_find_room_that_calls_hold(small):
    """Handles hold all of it, until another layer needs some."""
    device, experts = small
    kept, layers = [], []
    while device.memory.largest_free_block > 1 << 12:
        layers.append(device.load_linear(np.eye(32, dtype=np.float32)))
    layers.pop().close()
    kept += [experts.submit(*tokens(count=2)) for _ in range(4)]
    assert device.load_linear(np.eye(32, dtype=np.float32)).shape
    for handle in kept:
        assert experts.sync(handle).shape[1] == 32


def test_a_call_is_cut_smaller_before_it_is_refused(monkeypatch):
    """With room for 1, 2, 3, ... tokens the bits are those of a large device."""
    config = TINY.replace(max_tokens=64)
    call = tokens(count=64)
    with open_device("golden", config=config, memory_bytes=1 << 20) as device:
        expected = device.load_experts(*weights())(*call)
    with open_device("golden", config=config, memory_bytes=1 << 20) as device:
        experts = device.load_experts(*weights())
        device.fence()
        holes = device.memory.free_bytes - device.memory.largest_free_block
        filled = device.memory.allocate(holes)  # before the first image
        commands = []
        monkeypatch.setattr(device._rings, "side", lambda shape: None)  # nothing beside them
        for room in (576, 640, 1024, 2560, 6400, 25_600):
            taken = device.memory.allocate(device.memory.free_bytes - room)
            if room < 640:
                with pytest.raises(errors.OutOfDeviceMemory, match="allocation of 640 bytes"):
                    experts(*call)
            else:
                assert np.array_equal(experts(*call), expected)
                commands.append(experts.last.commands)
            taken.free()
        filled.free()
        assert commands == sorted(commands, reverse=True)
        assert commands[0] == 64 and commands[-1] < 8


def test_a_failed_call_holds_no_memory_though_its_traceback_lives(small):
    device, experts = small
    device.fence()
    free = device.memory.free_bytes
    x, ids, scores = tokens(count=2)
    caught = []
    for _ in range(20):
        with pytest.raises(errors.NonFiniteInput) as error:
            experts(x * np.nan, ids, scores)
        caught.append(error)
    assert device.memory.free_bytes == free


# -- timeouts --------------------------------------------------------------------------------------
def stopped(device):
    device.transport.register_write(REGISTERS["ENABLE"].address, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_timeout_of_zero_looks_once(tmp_path, kind):
    """It neither waits for the device's own timeout, of 20 s, nor misses what is there."""
    call = tokens(count=1)
    with opened(kind, tmp_path) as device:
        experts = device.load_experts(*weights())
        expected = experts(*call)
        handle = experts.submit(*call)
        device.counters()  # what was posted has been done
        assert np.array_equal(experts.sync(handle, timeout_s=0), expected)
        stopped(device)
        handle = experts.submit(*call)
        seen = []
        wait = device.transport.wait_interrupt
        device.transport.wait_interrupt = lambda timeout_s: (seen.append(timeout_s),
                                                             wait(timeout_s))[1]
        with pytest.raises(errors.DeviceTimeout, match="within 0 s"):
            experts.sync(handle, timeout_s=0)
        assert set(seen) == {0} and len(seen) < 3  # once more if an old interrupt was still there
        device.transport.register_write(REGISTERS["ENABLE"].address, 1)
        assert np.array_equal(experts.sync(handle, timeout_s=math.inf), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("timeout_s", [-1, -1e-9, math.nan, -math.inf, "1", "soon", [], True])
def test_timeouts_that_are_none(tmp_path, kind, timeout_s):
    with opened(kind, tmp_path) as device:
        experts = device.load_experts(*weights())
        handle = experts.submit(*tokens())
        with pytest.raises(errors.InvalidOption, match="timeout_s must be 0 seconds or more, not"):
            experts.sync(handle, timeout_s=timeout_s)
        assert experts.sync(handle).shape == (3, 32)


@pytest.mark.parametrize("timeout_s", [0, -1, math.nan, "1", None, True])
def test_a_device_needs_a_timeout(timeout_s):
    with pytest.raises(errors.InvalidOption, match="timeout_s must be"):
        narrow(timeout_s=timeout_s)


# -- wrong types -----------------------------------------------------------------------------------
@pytest.mark.parametrize("spec", [None, 3, b"golden", ["golden"], object(), "", "golden ", "rtl:1"])
def test_a_specification_of_another_type(spec):
    with pytest.raises(errors.UnsupportedTransport, match="device must be 'golden', 'replay"):
        open_device(spec)


@pytest.mark.parametrize("options", [
    {"config": 3}, {"config": []}, {"memory_bytes": "1G"}, {"memory_bytes": 0},
    {"memory_bytes": 1.5}, {"memory_bytes": -4096}, {"timeout_s": "x"}, {"ring_log2": 1.5},
    {"ring_log2": "4"}, {"ring_log2": True}, {"watchdog_cycles": None}, {"watchdog_cycles": 1e3},
    {"record": 3}, {"record": b"name"}, {"latency": "fast"}, {"latency": -1},
    {"cache_bytes": None}, {"baud": 9600}, {"no_such_option": 1}])
def test_options_of_another_type(options):
    with pytest.raises(MoeAccelError, match=rf"{next(iter(options))}\b"):
        open_device("golden", **({"config": TINY, "memory_bytes": 1 << 15} | options))


@pytest.mark.parametrize("handle", [None, 3, "handle", np.zeros(3)])
def test_a_handle_of_another_type(small, handle):
    with pytest.raises(errors.InvalidOption, match=r"handle must be what submit\(\) returned, not"):
        small[1].sync(handle)


# -- copies and forks ------------------------------------------------------------------------------
COPIES = {"copy": copy.copy, "deepcopy": copy.deepcopy, "pickle": pickle.dumps,
          "old pickle": lambda what: pickle.dumps(what, 0)}


@pytest.mark.parametrize("way", COPIES)
def test_nothing_of_a_device_is_copied(small, way):
    device, experts = small
    linear = device.load_linear(np.eye(32, dtype=np.float32))
    for what in (device, experts, linear, experts.submit(*tokens()), device.transport,
                 device.memory.allocate(64)):
        for inside in (what, [what], {"a": what})[: 1 if way == "copy" else 3]:
            with pytest.raises(errors.NotCopyable, match=f"{type(what).__name__} must not be"):
                COPIES[way](inside)


FORK = """
import os, signal, sys, threading
import numpy as np
import moeaccel.host.transformers_plugin as plugin
from moeaccel.host import open_device
from moeaccel.host.errors import DeviceClosed
from moeaccel.host.plugins.transformers import session
from moeaccel.host.transports.golden import GoldenTransport

sys.path.insert(0, sys.argv[1])
from tests.host.test_interrupts import TINY, tokens, weights

with open_device("golden", config=TINY, memory_bytes=1 << 18) as device:
    experts = device.load_experts(*weights())
    expected = experts(*tokens())
    handle = experts.submit(*tokens())
    held = threading.Event()
    done = threading.Event()

    def hold():
        # Another thread is in the middle of a call.
        with device._lock, device.memory._lock.held, session.lock.held:
            held.set()
            done.wait()

    plugin.use_device(device)
    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    child = os.fork()
    if not child:
        signal.alarm(30)
        actions = (lambda: experts(*tokens()), lambda: experts.sync(handle), device.counters,
                   device.reset, device.fence, device.abort, lambda: device.transport,
                   lambda: device.load_experts(*weights()),
                   lambda: plugin.current_session().device.fence())
        refused = 0
        for action in actions:
            try:
                action()
            except DeviceClosed as error:
                refused += "open another one here" in str(error)
        device.memory.free_bytes
        experts.close()
        device.close()
        with open_device("golden", config=TINY, memory_bytes=1 << 18) as own:
            refused += own.counters()["commands"] == 0
        os._exit(0 if refused == len(actions) + 1 and device.closed else 1)
    done.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert np.array_equal(experts.sync(handle), expected)
    assert np.array_equal(experts(*tokens()), expected)
"""


def test_a_fork_finds_its_device_closed(request):
    """At once, also while another thread of the parent is in a call; the parent goes on."""
    done = subprocess.run([sys.executable, "-c", FORK, str(request.config.rootpath)],
                          capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
