"""The XDMA transport: over stand-ins for the driver's files, and over real files."""

import errno
import mmap
import os
import signal
import threading
import time

import numpy as np
import pytest

from moeaccel.config import PRESETS
from moeaccel.host import open_device
from moeaccel.host.errors import (
    AccessFailed,
    ConfigMismatch,
    DeviceClosed,
    DeviceNotFound,
    DeviceTimeout,
    InvalidOption,
    LinkLost,
    PortUnavailable,
    UnsupportedTransport,
    UploadError,
)
from moeaccel.host.transports.golden import GoldenTransport
from moeaccel.host.transports.xdma import CHUNK_BYTES, XdmaTransport
from moeaccel.interface.registers import ID_VALUE, REGISTERS, VERSION_VALUE
from tests.support.xdma_files import StandIn

TINY = PRESETS["tiny"]
SIZE = 1 << 24


@pytest.fixture
def files():
    with GoldenTransport(TINY, memory_bytes=SIZE) as card:
        yield StandIn(card)


def opened(files, **options):
    return open_device("xdma:0", files=files, memory_bytes=SIZE, **options)


def call(device):
    """Run one linear layer and return its result."""
    rng = np.random.default_rng(3)
    linear = device.load_linear(rng.standard_normal((64, 96)))
    return linear(rng.standard_normal((5, 96)).astype(np.float32))


@pytest.fixture
def expected():
    with open_device("golden", config=TINY) as device:
        return call(device)


# -- opening ---------------------------------------------------------------------------------------
def test_the_configuration_is_found(files, expected):
    with opened(files) as device:
        assert device.config is TINY
        assert np.array_equal(call(device), expected)
    assert not files.opened and not files.locked


def test_another_configuration(files):
    with pytest.raises(ConfigMismatch, match="config 'small'"):
        opened(files, config="small")
    with GoldenTransport(TINY.replace(max_tokens=32), memory_bytes=SIZE) as card:
        other = StandIn(card)
        with pytest.raises(ConfigMismatch, match="CONFIG_HASH must be that of a preset"):
            opened(other)
        with opened(other, config=TINY.replace(max_tokens=32)) as device:
            assert device.config.max_tokens == 32
    assert not files.opened and not other.opened


def test_something_else_answers(files):
    files.card.register_read = lambda address: 0x1234
    with pytest.raises(DeviceNotFound, match="this is no moeaccel device"):
        opened(files)
    assert not files.opened


@pytest.mark.parametrize(("name", "code", "match"), [
    ("user", errno.EACCES, "xdma0_user.*udev rule"),
    ("h2c_0", errno.ENOENT, "xdma0_h2c_0.*modprobe xdma"),
    ("c2h_0", errno.EBUSY, "xdma0_c2h_0.*another process"),
    ("events_0", errno.ENODEV, "xdma0_events_0.*rescan the PCIe bus"),
    ("map", errno.EINVAL, "xdma0_user.*register BAR"),
    ("user", errno.EMFILE, "xdma0_user.*Too many open files"),
])
def test_files_that_cannot_be_opened(files, name, code, match):
    files.fail[name] = code
    with pytest.raises(PortUnavailable, match=match):
        opened(files)
    assert not files.opened


def test_one_process_at_a_time(files):
    with opened(files), pytest.raises(PortUnavailable, match="another process uses the card"):
        opened(files)


def test_options(files):
    with pytest.raises(UnsupportedTransport, match="'xdma:N' with the N of /dev/xdmaN_user"):
        open_device("xdma:/dev/xdma0_user")
    with pytest.raises(InvalidOption, match="memory_bytes must be a positive multiple of 4096"):
        XdmaTransport(0, TINY, memory_bytes=100, files=files)


@pytest.mark.parametrize(("config", "expected"), [
    (TINY, 8 << 30), (TINY.replace(address_bits=32), 4 << 30), (PRESETS["hbm32"], 1 << 29)])
def test_memory_of_the_card(config, expected):
    with GoldenTransport(config, memory_bytes=1 << 20) as card, \
            XdmaTransport(0, config, files=StandIn(card)) as transport:
        assert transport.memory_bytes == expected


# -- memory ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("short", [False, True])
def test_transfers_are_aligned_and_exact(files, short):
    """Any start and length, also beyond a chunk, leaves its neighbours alone."""
    rng = np.random.default_rng(5)
    reference = rng.integers(0, 256, SIZE, np.uint8)
    files.card.memory_write(0, reference)
    files.rng = rng if short else None
    with XdmaTransport(0, TINY, memory_bytes=SIZE, files=files) as transport:
        ranges = [(0, 1), (63, 2), (64, 64), (65, 62), (100, CHUNK_BYTES), (7, CHUNK_BYTES + 200),
                  (SIZE - 1, 1), (SIZE - 200, 200), (0, 0)]
        ranges += [(int(a), int(n)) for a, n in zip(
            rng.integers(0, SIZE - 9000, 40), rng.integers(0, 9000, 40), strict=True)]
        for address, count in ranges:
            data = rng.integers(0, 256, count, np.uint8)
            transport.memory_write(address, data.tobytes() if count % 2 else data)
            reference[address : address + count] = data
            around = slice(max(0, address - 100), address + count + 100)
            found = transport.memory_read(around.start, min(SIZE, around.stop) - around.start)
            assert np.array_equal(found, reference[around])
    assert max(count for _, count, _ in files.calls) == CHUNK_BYTES
    if not short:
        assert all(count % 64 == position % 64 == 0 for _, count, position in files.calls)
    files.rng = None
    assert np.array_equal(files.card.memory_read(0, SIZE), reference)


def test_memory_outside_is_refused(files):
    with XdmaTransport(0, TINY, memory_bytes=SIZE, files=files) as transport:
        for address, count in ((SIZE, 1), (SIZE - 1, 2), (-1, 1), (1 << TINY.address_bits, 1)):
            with pytest.raises(UploadError, match="memory access must be within"):
                transport.memory_read(address, count)


def test_register_writes_come_before_memory(files):
    """A read pushes posted writes through before a transfer starts."""
    with XdmaTransport(0, TINY, memory_bytes=SIZE, files=files) as transport:
        seen = []
        real = files.card.register_read
        files.card.register_read = lambda address: (seen.append(address), real(address))[1]
        transport.memory_read(0, 64)
        assert not seen
        transport.register_write(REGISTERS["WATCHDOG"].address, 5)
        transport.memory_read(0, 64)
        assert seen == [REGISTERS["ID"].address]


def test_registers_are_checked(files):
    with XdmaTransport(0, TINY, memory_bytes=SIZE, files=files) as transport:
        for address in (2, 4096, -4):
            with pytest.raises(InvalidOption, match="register address"):
                transport.register_read(address)
        with pytest.raises(InvalidOption, match="register write must be 32 bits"):
            transport.register_write(0x68, 1 << 32)
        transport.register_write(REGISTERS["WATCHDOG"].address, 0xFFFF_FFFF)
        assert transport.register_read(REGISTERS["WATCHDOG"].address) == 0xFFFF_FFFF  # no loss


# -- failures --------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["c2h_0", "h2c_0"])
def test_a_transfer_that_fails_once(files, expected, name):
    with opened(files) as device:
        files.fail[name] = errno.EIO
        with pytest.raises(AccessFailed, match=f"xdma0_{name}.*Input/output error.*dmesg"):
            device.transport.memory_write(64, bytes(10))
        assert np.array_equal(call(device), expected)


def test_a_transfer_that_moves_nothing(files):
    with opened(files, timeout_s=0.05) as device:
        files._part = lambda *_: 0
        with pytest.raises(AccessFailed, match=r"must move some of them within 0.05 s, but the "
                                               r"driver moved nothing, \d+ times in a row"):
            device.transport.memory_read(64, 64)


class Unsteady(StandIn):
    """Every call is interrupted or refused some times before it is served; transfers are short."""

    def __init__(self, card, rng):
        super().__init__(card)
        self.noise = rng
        self.refused = dict.fromkeys(("h2c_0", "c2h_0", "events_0", "user", "map"), 0)
        self._left = 3

    def _check(self, name, code=errno.EIO):
        if self._left:
            self._left -= 1
            self.refused[name] += 1
            code = int(self.noise.choice([errno.EINTR, errno.EAGAIN]))
            raise OSError(code, os.strerror(code))
        self._left = int(self.noise.integers(0, 8))
        super()._check(name, code)

    def _part(self, buffer, position, name):
        count = super()._part(buffer, position, name)
        return count // 64 // int(self.noise.integers(1, 4)) * 64


def test_transient_errors_are_tried_again(expected):
    """Interrupted and try-again calls of any number, short and empty transfers: the same bits."""
    with GoldenTransport(TINY, memory_bytes=SIZE) as card:
        files = Unsteady(card, np.random.default_rng(9))
        with opened(files) as device:
            for _ in range(5):
                assert np.array_equal(call(device), expected)
        assert all(files.refused[name] for name in ("h2c_0", "c2h_0", "user", "map"))
        assert not files.opened and not files.locked


@pytest.mark.parametrize(("code", "match"), [(errno.EAGAIN, "Resource temporarily unavailable"),
                                             (errno.EINTR, "Interrupted system call")])
def test_what_stays_transient_is_named_after_the_timeout(files, expected, code, match):
    with opened(files, timeout_s=0.05) as device:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(files, "_check", lambda *_: (_ for _ in ()).throw(
                OSError(code, os.strerror(code))))
            for name, action in (("c2h_0", lambda: device.transport.memory_read(64, 64)),
                                 ("h2c_0", lambda: device.transport.memory_write(64, bytes(64)))):
                with pytest.raises(AccessFailed, match=rf"xdma0_{name}, 64 bytes at 0x40, must "
                                                       rf"move .* within 0.05 s, .*{match}, \d+"):
                    action()
            assert not device.transport.wait_interrupt(0.01)
        assert np.array_equal(call(device), expected)


def test_a_card_that_vanishes_while_it_is_tried_again(files):
    with opened(files) as device:
        def check(*_):
            files.gone = True
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

        files._check = check
        with pytest.raises(LinkLost, match="must answer"):
            device.transport.memory_read(64, 64)


@pytest.mark.parametrize("action", [
    lambda t: t.register_read(0), lambda t: t.memory_read(64, 64),
    lambda t: t.memory_write(64, bytes(64)), lambda t: t.wait_interrupt(1.0)])
def test_a_card_that_vanishes_and_comes_back(files, expected, action):
    """Whatever notices it first; reset connects again, weights and all."""
    with opened(files) as device:
        assert np.array_equal(call(device), expected)
        files.gone = True
        with pytest.raises(LinkLost, match="card /dev/xdma0 must answer, but"):
            action(device.transport)
        with pytest.raises(LinkLost):
            call(device)
        with pytest.raises(PortUnavailable, match="driver has lost the card"):
            device.reset()
        files.gone = False
        with pytest.raises(LinkLost):
            call(device)
        device.reset()
        assert np.array_equal(call(device), expected)
    assert not files.opened


def test_another_card_comes_back(files):
    with opened(files) as device:
        files.gone = True
        with pytest.raises(LinkLost):
            device.counters()
        files.gone = False
        with GoldenTransport(PRESETS["ulx3s"], memory_bytes=SIZE) as other:
            files.card = other
            with pytest.raises(ConfigMismatch, match="config 'ulx3s'"):
                device.reset()
            with pytest.raises(LinkLost):
                device.counters()


def test_a_device_that_vanished_can_be_closed(files):
    device = opened(files)
    files.gone = True
    device.close()
    assert not files.opened
    assert device.closed
    files.gone = False
    with opened(files) as again:
        assert again.config is TINY


def test_a_closed_transport_says_so(files):
    transport = XdmaTransport(0, TINY, memory_bytes=SIZE, files=files)
    transport.close()
    transport.close()
    for action in (lambda: transport.register_read(0), lambda: transport.memory_read(0, 1),
                   transport.reconnect):
        with pytest.raises(DeviceClosed, match="closed"):
            action()


def test_no_interrupt_is_a_timeout(files, monkeypatch):
    """The device hangs: nothing comes, and the driver says so in time."""
    with opened(files, timeout_s=0.3) as device:
        monkeypatch.setattr(files.card, "_execute_ring", lambda: None)
        with pytest.raises(DeviceTimeout, match=r"within 0.3 s"):
            call(device)


def test_a_level_without_an_edge_is_seen(files):
    """A completion while the one before is cleared leaves the interrupt high: no event comes."""
    with opened(files) as device:
        transport = device.transport
        files.card._registers.set(IRQ_STATUS=1)
        files._level, files._events = True, 0
        assert transport.wait_interrupt(0)


# -- real files ------------------------------------------------------------------------------------
class Card:
    """Regular files and a pipe in the place of a card's."""

    def __init__(self, folder):
        self.folder = folder
        (folder / "xdma0_user").write_bytes(bytes(4096))
        (folder / "memory").write_bytes(bytes(1 << 20))
        for name in ("h2c_0", "c2h_0"):
            (folder / f"xdma0_{name}").symlink_to(folder / "memory")
        os.mkfifo(folder / "xdma0_events_0")
        self.events = os.open(folder / "xdma0_events_0", os.O_RDWR)
        with (folder / "xdma0_user").open("r+b") as file:
            self.pages = mmap.mmap(file.fileno(), 4096)
        self.set(ID=ID_VALUE, VERSION=VERSION_VALUE, CONFIG_HASH=TINY.digest, IRQ_ENABLE=1)

    def set(self, **values):
        for name, value in values.items():
            where = REGISTERS[name].address
            self.pages[where : where + 4] = value.to_bytes(4, "little")

    def interrupt(self):
        self.set(IRQ_STATUS=1)
        os.write(self.events, (1).to_bytes(4, "little"))


@pytest.fixture
def card(tmp_path):
    card = Card(tmp_path)
    yield card
    os.close(card.events)
    card.pages.close()


def test_real_files(card):
    rng = np.random.default_rng(7)
    with XdmaTransport(0, folder=card.folder, memory_bytes=1 << 20) as transport:
        assert transport.config is TINY
        data = rng.integers(0, 256, 10_001, np.uint8)
        transport.memory_write(4099, data)
        assert np.array_equal(transport.memory_read(4099, 10_001), data)
        assert (card.folder / "memory").read_bytes()[4099 : 4099 + 10_001] == data.tobytes()
        transport.register_write(REGISTERS["WATCHDOG"].address, 0xDEADBEEF)
        where = REGISTERS["WATCHDOG"].address
        assert card.pages[where : where + 4] == bytes.fromhex("efbeadde")
        with pytest.raises(PortUnavailable, match="another process uses the card"):
            XdmaTransport(0, folder=card.folder)
    with XdmaTransport(0, folder=card.folder, memory_bytes=1 << 20,
                       timeout_s=0.05) as transport:
        os.truncate(card.folder / "memory", 0)
        with pytest.raises(AccessFailed, match="moved nothing"):
            transport.memory_read(0, 64)


def test_a_real_event(card):
    """An interrupt ends the wait, a signal does not, and the event is consumed."""
    with XdmaTransport(0, folder=card.folder) as transport:
        beats = []
        before = signal.signal(signal.SIGALRM, lambda *_: beats.append(time.monotonic()))
        signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
        try:
            assert not transport.wait_interrupt(0.1)
            assert beats
            timer = threading.Timer(0.05, card.interrupt)
            timer.start()
            assert transport.wait_interrupt(30)
            timer.join()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        card.set(IRQ_STATUS=0)
        transport._files.wait_event(transport._handles["events_0"], 0)
        assert not transport._files.wait_event(transport._handles["events_0"], 0)


def test_no_card(tmp_path):
    with pytest.raises(PortUnavailable, match=r"xdma3_user.*lspci"):
        open_device("xdma:3", folder=tmp_path)
