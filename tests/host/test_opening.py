"""Opening and closing a device."""

import numpy as np
import pytest

from moeaccel.errors import MoeAccelError
from moeaccel.host import errors, open_device
from moeaccel.host.transports.golden import GoldenTransport
from moeaccel.interface.registers import REGISTERS
from tests.support.device import TINY, draw_call, draw_weights


def test_a_closed_device_says_so(device, experts):
    call = draw_call(np.random.default_rng(0), 3)
    handle = experts.submit(*call)
    device.close()
    device.close()
    assert device.closed
    for action in (lambda: experts(*call), lambda: experts.sync(handle), device.counters,
                   device.reset, device.abort, device.fence,
                   lambda: device.load_experts(*draw_weights(np.random.default_rng(0)))):
        with pytest.raises((errors.DeviceClosed, errors.CommandAborted)):
            action()
    experts.close()


def test_a_closed_layer_says_so(experts):
    with experts:
        pass
    experts.close()
    with pytest.raises(errors.DeviceClosed, match="load it again"):
        experts(*draw_call(np.random.default_rng(0), 3))


def test_another_configuration_is_refused():
    with pytest.raises(errors.ConfigMismatch, match=r"config 'small'\), not .*config 'tiny'"):
        open_device(GoldenTransport(TINY, memory_bytes=1 << 20), config="small")
    odd = TINY.replace(name="odd", max_dim=64)
    with pytest.raises(errors.ConfigMismatch, match="no preset"):
        open_device(GoldenTransport(odd, memory_bytes=1 << 20), config="small")


@pytest.mark.parametrize(("register", "value", "message"), [
    ("ID", 0xFFFFFFFF, "ID must read 0x41454f4d, not 0xffffffff"),
    ("VERSION", 0x0002_0001, r"VERSION must be 1\.2, or a later 1\.x, not 2\.1"),
    ("VERSION", 0x0001_0000, r"not 1\.0; .* load the bitstream of this driver"),
])
def test_something_else_is_refused(register, value, message):
    transport = GoldenTransport(TINY, memory_bytes=1 << 20)
    transport._registers[REGISTERS[register].address] = value
    with pytest.raises(errors.DeviceNotFound, match=message):
        open_device(transport, config="tiny")


@pytest.mark.parametrize(("spec", "message"), [
    ("serial:", "'serial:PORT', 'xdma:N' or 'replay:FILE', not 'serial:'"),
    ("xdma:", "'xdma:N' with the N of /dev/xdmaN_user, not 'xdma:'"),
    ("replay:", "not 'replay:'"),
    ("gold", "must be 'golden', 'rtl', 'serial:PORT', 'xdma:N' or 'replay:FILE', not 'gold'"),
])
def test_other_devices_are_not_supported_yet(spec, message):
    with pytest.raises(errors.UnsupportedTransport, match=message):
        open_device(spec)


@pytest.mark.parametrize(("options", "message"), [
    ({"timeout_s": 0}, "timeout_s"),
    ({"ring_log2": 0}, "ring_log2 must be from 1 to 8, not 0"),
    ({"ring_log2": 9}, "ring_log2"),
    ({"watchdog_cycles": -1}, "watchdog_cycles"),
    ({"memory_bytes": 4096}, "memory_bytes must be more than 4096"),
    ({"memory_bytes": 1 << 50}, "memory_bytes must"),
    ({"config": "huge"}, "config must be one of"),
])
def test_options_are_checked(options, message):
    with pytest.raises(MoeAccelError, match=message):
        open_device("golden", **({"config": "tiny", "memory_bytes": 1 << 20} | options))
