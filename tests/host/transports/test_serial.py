"""SerialTransport against a model of the device behind a pseudo-terminal."""

import errno
import random

import numpy as np
import pytest
import serial

from moeaccel.config import PRESETS
from moeaccel.errors import ToolMissingError
from moeaccel.host import errors, open_device
from moeaccel.host.transports import serial as module
from moeaccel.host.transports.golden import GoldenTransport
from moeaccel.host.transports.serial import SerialTransport
from moeaccel.interface.link import MAX_PAYLOAD, Opcode
from moeaccel.interface.registers import ID_VALUE, REGISTERS
from tests.support.serial_device import LinkDevice, Noise, SerialStandIn

MEMORY = 1 << 20
ID, SCRATCH = REGISTERS["ID"].address, REGISTERS["WATCHDOG"].address


@pytest.fixture
def stand_in(tmp_path):
    """Return a function that makes a device at the end of a line."""
    made = []

    def make(**options):
        hello = options.pop("hello", {})
        device = LinkDevice(GoldenTransport(PRESETS["tiny"], memory_bytes=MEMORY), **hello)
        made.append(SerialStandIn(device, tmp_path / f"port{len(made)}", **options))
        return made[-1]

    yield make
    for one in made:
        one.unplug()


@pytest.fixture
def quick(monkeypatch):
    """Shorten every wait, for tests in which nothing comes."""
    monkeypatch.setattr(module, "_REPLY_S", 0.02)
    monkeypatch.setattr(module, "_NOTICE_S", 0.05)


def requests(one, opcode):
    return [r for r in one.device.executed if r.opcode == opcode]


def test_registers_and_memory(stand_in):
    one = stand_in()
    rng = np.random.default_rng(1)
    with SerialTransport(one.path) as transport:
        assert transport.memory_bytes == MEMORY
        assert transport.register_read(ID) == ID_VALUE
        transport.register_write(SCRATCH, 0xDEAD_BEEF)
        assert transport.register_read(SCRATCH) == 0xDEAD_BEEF
        for address, count in [(0, 1), (13, 700), (4091, 20_000), (MEMORY - 7, 7), (77, 0)]:
            data = rng.integers(0, 256, count, np.uint8)
            transport.memory_write(address, data)
            assert np.array_equal(transport.memory_read(address, count), data)
        transport.memory_write(9, b"bytes")
        assert transport.memory_read(9, 5).tobytes() == b"bytes"


def test_requests_are_posted_and_windowed(stand_in):
    """A device that answers nothing takes a window of writes without anyone waiting."""
    one = stand_in()
    with SerialTransport(one.path) as transport:
        before = len(requests(one, Opcode.REGISTER_WRITE))
        one.silent = True
        for value in range(module.WINDOW):
            transport.register_write(SCRATCH, value)
        one.silent = False
        assert transport.register_read(SCRATCH) == module.WINDOW - 1
        assert len(requests(one, Opcode.REGISTER_WRITE)) == before + module.WINDOW


def test_block_transfers_fill_the_line(stand_in):
    """Bytes on the line, both directions, for a block: at least 85 % are payload."""
    one = stand_in()
    sent = []
    one.to_host = lambda data: (sent.append(len(data)), data)[1]
    with SerialTransport(one.path) as transport:
        before = one.received
        transport.memory_write(0, bytes(1 << 16))
        transport.register_read(ID)
        assert (1 << 16) / (one.received - before) > 0.96
        sent.clear()
        transport.memory_read(0, 1 << 16)
        assert (1 << 16) / sum(sent) > 0.96


@pytest.mark.parametrize("rate", [3e-4, 2e-3])
def test_noise_costs_retries_never_data(stand_in, quick, rate):
    """Bytes flipped, lost and doubled in both directions; every write exactly once, in order."""
    noises = Noise(rate, 1), Noise(rate, 2)
    one = stand_in(to_device=noises[0], to_host=noises[1])
    rng = random.Random(3)
    image = bytearray(MEMORY)
    with SerialTransport(one.path) as transport:
        transport.memory_write(0, bytes(40_000))
        written = []
        for _ in range(60):
            address, count = rng.randrange(30_000), rng.randrange(1, 4 * MAX_PAYLOAD)
            if rng.random() < 0.5:
                data = rng.randbytes(count)
                transport.memory_write(address, data)
                image[address : address + count] = data
            else:
                assert transport.memory_read(address, count).tobytes() == \
                    image[address : address + count]
            value = rng.getrandbits(32)
            transport.register_write(SCRATCH, value)
            written.append(value)
        assert transport.register_read(SCRATCH) == written[-1]
        assert transport.memory_read(0, 40_000).tobytes() == image[:40_000]
    assert [int.from_bytes(r.payload, "little")
            for r in requests(one, Opcode.REGISTER_WRITE)] == written
    assert all(noise.count > 10 for noise in noises)
    assert one.device.damaged > 5


def test_a_lost_write_error_is_told_again(stand_in, quick):
    """The reply with the error gets lost; the repeated request, not executed, gives it again."""
    one = stand_in()
    with SerialTransport(one.path) as transport:
        one.to_host = lambda data: b""
        transport.register_write(0xFFC, 1)
        while not requests(one, Opcode.REGISTER_WRITE):
            pass
        one.to_host = bytes
        with pytest.raises(errors.AccessFailed, match="register write of 4 bytes at 0xffc"):
            transport.register_read(ID)
        assert len(requests(one, Opcode.REGISTER_WRITE)) == 1


def test_the_whole_driver(stand_in):
    """The same bits as on the golden model directly, on a bad line."""
    rng = np.random.default_rng(4)
    gate_up = rng.standard_normal((4, 64, 64), np.float32)
    down = rng.standard_normal((4, 64, 32), np.float32)
    x = rng.standard_normal((9, 64), np.float32)
    ids, weights = rng.integers(0, 4, (9, 2)), rng.random((9, 2), np.float32)
    one = stand_in(to_device=Noise(1e-4, 1), to_host=Noise(1e-4, 2))
    results = []
    for spec, options in (("golden", {"memory_bytes": MEMORY}), (f"serial:{one.path}", {})):
        with open_device(spec, config="tiny", timeout_s=5, **options) as device:
            experts = device.load_experts(gate_up, down)
            handles = [experts.submit(x[i : i + 3], ids[i : i + 3], weights[i : i + 3])
                       for i in range(0, 9, 3)]
            results.append(np.concatenate([experts.sync(handle) for handle in handles]))
            with pytest.raises(errors.NonFiniteInput):
                experts(x * np.nan, ids, weights)
            assert device.counters()["commands"] == 4
    assert np.array_equal(*results)


# -- interrupt -------------------------------------------------------------------------------------
class Interrupt(GoldenTransport):
    """A model whose interrupt the test sets."""

    level = False

    def wait_interrupt(self, timeout_s):
        return self.level


@pytest.mark.parametrize("noticed", [True, False])
def test_interrupt(tmp_path, quick, noticed):
    """With its notice, and when that gets lost."""
    model = Interrupt(PRESETS["tiny"], memory_bytes=MEMORY)
    one = SerialStandIn(LinkDevice(model), tmp_path / "port")
    try:
        with SerialTransport(one.path) as transport:
            assert not transport.wait_interrupt(0)
            assert not transport.wait_interrupt(0.08)
            reads = len(requests(one, Opcode.MEMORY_READ))
            if noticed:
                model.level = True
            else:
                transport.memory_read(0, 0)
                one.to_host = lambda data: b"" if model.level else data
                model.level = True
                while one.device.poll():
                    pass
                one.device._reported = True
                one.to_host = bytes
            assert transport.wait_interrupt(5)
            assert (len(requests(one, Opcode.MEMORY_READ)) == reads) is noticed
            assert transport.wait_interrupt(0)
            model.level = False
            transport.register_write(SCRATCH, 1)
            assert not transport.wait_interrupt(0)
    finally:
        one.unplug()


# -- errors ----------------------------------------------------------------------------------------
def test_no_port(tmp_path):
    with pytest.raises(errors.PortUnavailable, match="there is no such port; plug the board in"):
        open_device(f"serial:{tmp_path / 'nowhere'}")


def test_port_in_use(stand_in):
    one = stand_in()
    with SerialTransport(one.path), \
            pytest.raises(errors.PortUnavailable, match="another program uses it"):
        SerialTransport(one.path)
    SerialTransport(one.path).close()


@pytest.mark.parametrize(("number", "step"), [
    (errno.EACCES, "this user may not open it; join its group"),
    (errno.EIO, "list the ports with"),
])
def test_port_that_may_not_be_opened(monkeypatch, number, step):
    def refuse(*_, **__):
        raise serial.SerialException(number, "could not open port")

    monkeypatch.setattr(serial, "Serial", refuse)
    with pytest.raises(errors.PortUnavailable, match=step):
        SerialTransport("/dev/ttyUSB0")


def test_no_pyserial(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "serial", None)
    with pytest.raises(ToolMissingError, match="pip install pyserial"):
        SerialTransport("/dev/ttyUSB0")


def test_nothing_answers(stand_in, quick):
    one = stand_in()
    one.silent = True
    with pytest.raises(errors.DeviceNotFound, match="nothing answered; load the bitstream"):
        open_device(f"serial:{one.path}")


def test_something_else_answers(stand_in, quick):
    one = stand_in(to_host=lambda data: b"login: " * bool(data))
    with pytest.raises(errors.DeviceNotFound, match=r"\d+ bytes came, none of them an answer"):
        open_device(f"serial:{one.path}")


@pytest.mark.parametrize("hello", [{"version": 2}, {"window": 8}, {"max_payload": 1024}])
def test_another_version(stand_in, hello):
    one = stand_in(hello=hello)
    with pytest.raises(errors.DeviceNotFound, match="must speak version 1 of the link"):
        open_device(f"serial:{one.path}")


def test_another_configuration(stand_in):
    one = stand_in()
    with pytest.raises(errors.ConfigMismatch, match="config 'tiny'"):
        open_device(f"serial:{one.path}")  # ulx3s, when nothing is said
    open_device(f"serial:{one.path}", config="tiny").close()


def test_answers_to_an_earlier_session_are_not_taken(stand_in, monkeypatch):
    """Both sessions begin with the same number; the old answer has another nonce."""
    one = stand_in()
    monkeypatch.setattr(module.secrets, "randbelow", lambda _: 7)
    old = []
    one.to_host = lambda data: (old.append(data), data)[1]
    SerialTransport(one.path).close()
    assert old
    late = [old[0]]
    one.to_host = lambda data: (late.pop() if late else b"") + data
    with SerialTransport(one.path) as transport:
        assert transport.register_read(ID) == ID_VALUE
    assert not late


@pytest.mark.parametrize("baud", [0, -1, "fast"])
def test_bad_options(stand_in, baud):
    with pytest.raises(errors.InvalidOption, match="baud must be a positive number"):
        SerialTransport("port", baud=baud)
    with pytest.raises(errors.InvalidOption, match="memory_bytes must be left out"):
        open_device("serial:port", memory_bytes=1 << 20)


def test_accesses_that_fail(stand_in):
    one = stand_in()
    with SerialTransport(one.path) as transport:
        for address in (0xFFC, 2, 1 << 20):
            with pytest.raises(errors.AccessFailed, match=f"register read .* at {address:#x} must"):
                transport.register_read(address)
        with pytest.raises(errors.UploadError, match="memory access must be within 0x100000 bytes"):
            transport.memory_write(MEMORY - 4, bytes(5))
        with pytest.raises(errors.InvalidOption, match="must fit 32 bits"):
            transport.register_write(SCRATCH, 1 << 32)
        one.device.hang = True
        transport.memory_write(0, bytes(3 * MAX_PAYLOAD))
        with pytest.raises(errors.AccessFailed, match=r"write of 512 bytes .* bus did not answer"):
            transport.wait_interrupt(0)
        one.device.hang = False
        assert transport.register_read(ID) == ID_VALUE
    with pytest.raises(errors.DeviceClosed):
        transport.register_read(ID)
    transport.close()


def test_an_error_of_the_last_write_comes_from_close(stand_in):
    transport = SerialTransport(stand_in().path)
    transport.register_write(0xFFC, 1)
    with pytest.raises(errors.AccessFailed, match="register write"):
        transport.close()
    transport.close()


@pytest.mark.parametrize("cut", ["silence", "unplugged"])
def test_a_cut_link_is_usable_again_after_reset(stand_in, quick, cut):
    """In the middle of an upload: every call says so until reset(); then everything works."""
    one = stand_in()
    rng = np.random.default_rng(5)
    weight = rng.standard_normal((64, 64), np.float32)
    x = rng.standard_normal((3, 64), np.float32)
    with open_device(f"serial:{one.path}", config="tiny") as device:
        linear = device.load_linear(weight)
        y = linear(x)
        if cut == "silence":
            one.to_device = lambda data: data[: len(data) // 2]
            one.to_host = lambda data: b""
        else:
            one.unplug()
        with pytest.raises(errors.LinkLost, match=r"line to .* call device\.reset\(\)"):
            device.transport.memory_write(MEMORY // 2, bytes(MEMORY // 2))
        with pytest.raises(errors.LinkLost):
            linear(x)
        if cut == "silence":
            one.to_device = one.to_host = bytes
        else:
            with pytest.raises(errors.PortUnavailable, match="plug the board in"):
                device.reset()
            with pytest.raises(errors.LinkLost):
                device.counters()
            one.plug()
        device.reset()
        assert np.array_equal(linear(x), y)


def test_a_device_that_vanished_can_be_closed(stand_in, quick):
    one = stand_in()
    device = open_device(f"serial:{one.path}", config="tiny")
    one.unplug()
    device.close()
    assert device.closed
