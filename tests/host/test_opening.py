"""Opening and closing a device."""

import re
from pathlib import Path

import numpy as np
import pytest

from moeaccel.errors import MoeAccelError
from moeaccel.host import errors, open_device, transports
from moeaccel.host.transports.golden import GoldenTransport
from moeaccel.interface.registers import REGISTERS
from tests.support.device import TINY, draw_call, draw_weights


def test_a_closed_device_says_so(device, experts):
    call = draw_call(np.random.default_rng(0), 3)
    handle = experts.submit(*call)
    device.close()
    device.close()
    assert device.closed
    with pytest.raises(errors.CommandAborted, match=r"or close\(\); submit it again"):
        experts.sync(handle)
    for action in (lambda: experts(*call), lambda: experts.sync(handle), device.counters,
                   device.reset, device.abort, device.fence,
                   lambda: device.load_experts(*draw_weights(np.random.default_rng(0)))):
        with pytest.raises((errors.DeviceClosed, errors.HandleConsumed)):
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
    ("VERSION", 0x0003_0001, r"VERSION must be 2\.\d+, or a later 2\.x, not 3\.1"),
    ("VERSION", 0x0001_0002, r"not 1\.2; .* load the bitstream of this driver"),
])
def test_something_else_is_refused(register, value, message, monkeypatch):
    transport = GoldenTransport(TINY, memory_bytes=1 << 20)
    read = transport.register_read
    monkeypatch.setattr(transport, "register_read", lambda address: (
        value if address == REGISTERS[register].address else read(address)))
    with pytest.raises(errors.DeviceNotFound, match=message):
        open_device(transport, config="tiny")


@pytest.mark.parametrize("spec", [
    "serial:", "serial", "xdma:", "replay:", "gold", "golden:", "rtl:1", "base", "record:x", "",
    "../golden", 7])
def test_other_devices_are_refused(spec):
    """The message names them all: what a file says of itself, and no other modules."""
    with pytest.raises(errors.UnsupportedTransport, match=re.escape(
            "device must be 'golden', 'replay:FILE', 'rtl', 'serial:PORT' or 'xdma:N', "
            f"not {spec!r}")):
        open_device(spec)


def test_cards_have_numbers():
    with pytest.raises(errors.UnsupportedTransport, match=r"the N of /dev/xdmaN_user, not 'xdma:x"):
        open_device("xdma:x")


def test_a_transport_is_one_file(monkeypatch, tmp_path):
    """It is found by its name, and says what stands behind it, its options and its config."""
    (tmp_path / "elsewhere.py").write_text("""
from moeaccel.host.transports.base import Scheme
from moeaccel.host.transports.golden import GoldenTransport

class Elsewhere(GoldenTransport):
    def __init__(self, config, *, place="here"):
        super().__init__(config, memory_bytes=1 << 20)
        self.place = place

def _open(spec):
    assert spec.argument == "1:2"
    return Elsewhere(spec.config, **spec.options), spec.config

SCHEME = Scheme(argument="PLACE", help="elsewhere", time="none", config="tiny", sized=True,
                options=(Elsewhere,), open=_open)
""")
    monkeypatch.setattr(transports, "__path__", [*transports.__path__, str(tmp_path)])
    with open_device("elsewhere:1:2", place="there") as device:
        assert device.config == TINY
        assert device.transport.place == "there"
    with pytest.raises(errors.InvalidOption, match="option of elsewhere:PLACE must be one of"):
        open_device("elsewhere:1:2", baud=1)
    with pytest.raises(errors.InvalidOption, match=r"left out for elsewhere:\.\.\., which says"):
        open_device("elsewhere:1:2", memory_bytes=1 << 20)
    with pytest.raises(errors.UnsupportedTransport, match=r"'elsewhere:PLACE', 'golden'"):
        open_device("elsewhere")


def test_what_one_transport_needs_hides_no_other(monkeypatch):
    """Without torch there is no golden model, but a wrong name is named all the same."""
    find = transports.importlib.import_module

    def without_torch(name):
        if name.endswith(".golden"):
            raise ModuleNotFoundError("No module named 'torch'", name="torch")
        return find(name)

    monkeypatch.setattr(transports.importlib, "import_module", without_torch)
    with pytest.raises(errors.UnsupportedTransport, match="'golden', 'replay:FILE'"):
        open_device("gold")


def test_the_page_lists_every_transport():
    page = (Path(transports.__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    for name, usage in transports.names().items():
        _, found, _ = transports.scheme(usage)
        assert f"| `{usage}` | {found.help} | {found.time} |" in page, name


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
