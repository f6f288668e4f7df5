"""A PCIe card behind the character devices of AMD's stock XDMA driver.

Of card N these files are used: ``xdmaN_user`` (the registers, mapped), ``xdmaN_h2c_0`` and
``xdmaN_c2h_0`` (memory, by positioned writes and reads; device addresses are file positions) and
``xdmaN_events_0`` (the interrupt: readable when there was one, four bytes each time).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import logging
import mmap
import os
import select
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from moeaccel.config import AcceleratorConfig
from moeaccel.host.errors import (
    AccessFailed,
    DeviceClosed,
    InvalidOption,
    LinkLost,
    PortUnavailable,
    UnsupportedTransport,
    UploadError,
)
from moeaccel.host.identity import check_config, check_version, detect_config
from moeaccel.host.options import seconds
from moeaccel.host.registers import RegisterAccess
from moeaccel.host.transports.base import Bytes, DeviceSpec, Scheme, Transport
from moeaccel.interface.registers import ADDRESS_BITS, REGISTERS

__all__ = ["SCHEME", "DeviceFiles", "SystemFiles", "Words", "XdmaTransport"]

logger = logging.getLogger(__name__)

ALIGNMENT = 64
"""Transfers start and end at multiples of it: a beat of the card's 512-bit DMA."""

CHUNK_BYTES = 4 << 20
"""Most bytes of one transfer."""

_VERB_BYTES = 64 << 10
"""What PCIe 3.0 x16 moves in the 6 microseconds that a small DMA takes."""

_HBM_STACK_BYTES = 8 << 30
_GONE = 0xFFFF_FFFF  # what PCIe reads where nothing answers
_LEVEL_S = 0.1  # the interrupt's level is looked at this often while no event comes
_MEMORY_PAGE = 4096
_VANISHED = (errno.ENODEV, errno.ENXIO, errno.ESHUTDOWN)
_TRANSIENT = (errno.EINTR, errno.EAGAIN, errno.EWOULDBLOCK)
_PAUSE_S = 0.01  # longest between two tries
_NEXT_STEP = ("is it programmed and on the bus ('lspci -d 10ee:')? Once it is back, device.reset() "
              "connects again; a card that was programmed anew has lost its weights")


_Result = TypeVar("_Result")


class Words(Protocol):
    """Registers as 32-bit words: each access is one access of the bus."""

    def __getitem__(self, index: int) -> int: ...

    def __setitem__(self, index: int, value: int) -> None: ...

    def close(self) -> None:
        """Take the mapping back."""
        ...


class DeviceFiles(Protocol):
    """What is asked of the operating system; failures are :class:`OSError`."""

    def open(self, path: Path, flags: int) -> int:
        """Return a handle."""
        ...

    def lock(self, handle: int) -> None:
        """Keep other processes out, or raise :class:`BlockingIOError`."""
        ...

    def map(self, handle: int, count: int) -> Words:
        """Map the first bytes."""
        ...

    def read(self, handle: int, buffer: memoryview, position: int) -> int:
        """Read into a buffer and return how many bytes, perhaps fewer than it holds."""
        ...

    def write(self, handle: int, buffer: memoryview, position: int) -> int:
        """Write from a buffer and return how many bytes, perhaps fewer than it holds."""
        ...

    def wait_event(self, handle: int, timeout_s: float) -> bool:
        """Wait for an event and consume it; False when the time is over."""
        ...

    def close(self, handle: int) -> None:
        """Let a handle go."""
        ...


class _Mapping:
    """32-bit words of a mapped file.

    An access of a ctypes item is a copy of constant size, which compilers turn into one 32-bit load
    or store; nothing keeps a value.
    """

    def __init__(self, handle: int, count: int) -> None:
        self._pages = mmap.mmap(handle, count)
        self._words: ctypes.Array[ctypes.c_uint32] | None = (
            ctypes.c_uint32 * (count // 4)).from_buffer(self._pages)

    def __getitem__(self, index: int) -> int:
        assert self._words is not None
        return self._words[index]

    def __setitem__(self, index: int, value: int) -> None:
        assert self._words is not None
        self._words[index] = value

    def close(self) -> None:
        self._words = None  # which lets the pages go
        self._pages.close()


class SystemFiles:
    """The files of this machine."""

    def open(self, path: Path, flags: int) -> int:
        return os.open(path, flags | os.O_CLOEXEC)

    def lock(self, handle: int) -> None:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def map(self, handle: int, count: int) -> Words:
        return _Mapping(handle, count)

    def read(self, handle: int, buffer: memoryview, position: int) -> int:
        return os.preadv(handle, [buffer], position)

    def write(self, handle: int, buffer: memoryview, position: int) -> int:
        return os.pwritev(handle, [buffer], position)

    def wait_event(self, handle: int, timeout_s: float) -> bool:
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        found = poll.poll(max(0.0, timeout_s) * 1000)
        if not found:
            return False
        if not found[0][1] & select.POLLIN:
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
        os.read(handle, 4)
        return True

    def close(self, handle: int) -> None:
        os.close(handle)


class XdmaTransport(Transport):
    """The five verbs over a card's character devices.

    Memory is moved in aligned pieces through a page-aligned buffer; where a write does not start or
    end at ALIGNMENT, the rest of that block is read first and written back, so that nobody else may
    write there meanwhile (every allocation of the driver has its blocks for itself). A write is in
    memory when the call returns.

    System calls that were interrupted or are to be tried again, and transfers that are short or
    move nothing, are tried again until nothing has moved for ``timeout_s``.

    After :class:`LinkLost` every call raises it, until :meth:`reconnect`.

    Parameters
    ----------
    number : :class:`int`
        N of ``/dev/xdmaN_user``.
    config : :class:`AcceleratorConfig`, optional
        What the card was built from; when left out, the preset that it names.
    memory_bytes : :class:`int`, optional
        Of each channel; a multiple of 4096. When left out that of an Alveo U55C: all that a channel
        of several can address, at most 8 GiB for a single one.
    timeout_s : :class:`float`
        How long to try again.
    folder : path
        Where the files are.
    files : :class:`DeviceFiles`
        Opens, reads and writes them.

    Raises
    ------
    PortUnavailable
        If a file is not there, may not be opened, or is in use.
    LinkLost
        If nothing answers behind it.
    DeviceNotFound, ConfigMismatch
        If something else answers, or an unknown configuration.
    """

    def __init__(self, number: int, config: AcceleratorConfig | None = None, *,
                 memory_bytes: int | None = None, timeout_s: float = 30.0,
                 folder: str | Path = "/dev", files: DeviceFiles | None = None) -> None:
        if memory_bytes is not None and (memory_bytes <= 0 or memory_bytes % _MEMORY_PAGE):
            raise InvalidOption(f"memory_bytes must be a positive multiple of {_MEMORY_PAGE}, not "
                                f"{memory_bytes}")
        self._timeout_s = seconds("timeout_s", timeout_s)
        self._prefix = Path(folder) / f"xdma{number}"
        self._files = files if files is not None else SystemFiles()
        self._handles: dict[str, int] = {}
        self._words: Words | None = None
        self._closed = False
        self._lost: str | None = None
        self._posted = False
        self._buffer = mmap.mmap(-1, CHUNK_BYTES)
        self._view = memoryview(self._buffer)
        self._bytes = np.frombuffer(self._buffer, np.uint8)
        self._open()
        try:
            registers = RegisterAccess(self)
            self._config = config or detect_config(registers)
        except BaseException:
            self.close()
            raise
        if memory_bytes is None:
            memory_bytes = 1 << self._config.address_bits
            if self._config.channels == 1:
                memory_bytes = min(memory_bytes, _HBM_STACK_BYTES)
        self._memory_bytes = memory_bytes

    @property
    def config(self) -> AcceleratorConfig:
        """What the card was built from."""
        return self._config

    # -- files -------------------------------------------------------------------------------------
    def _open(self) -> None:
        try:
            for name, flags in (("user", os.O_RDWR | os.O_SYNC), ("h2c_0", os.O_WRONLY),
                                ("c2h_0", os.O_RDONLY), ("events_0", os.O_RDONLY)):
                path = Path(f"{self._prefix}_{name}")
                try:
                    self._handles[name] = self._again(self._files.open, path, flags)
                    if name == "user":
                        self._files.lock(self._handles[name])  # EAGAIN: it is another's
                        self._words = self._again(
                            self._files.map, self._handles[name], 1 << ADDRESS_BITS)
                except OSError as error:
                    raise _unavailable(path, error) from error
        except BaseException:
            self._release()
            raise

    def _again(self, call: Callable[..., _Result], *arguments: Any) -> _Result:
        """Return a system call's result, calling again while its error is a transient one."""
        patience = _Patience(self._timeout_s)
        while True:
            try:
                return call(*arguments)
            except OSError as error:
                if error.errno not in _TRANSIENT or not patience.more():
                    raise

    def _release(self) -> None:
        """Close every file."""
        if self._words is not None:
            self._words.close()
            self._words = None
        for name, handle in list(self._handles.items()):
            try:
                with contextlib.suppress(OSError):  # of a card that is gone
                    self._files.close(handle)
            finally:
                del self._handles[name]  # whatever comes: its number may soon be another file's

    def reconnect(self) -> bool:
        """Open a vanished card again; see :class:`Transport`.

        Raises
        ------
        PortUnavailable, LinkLost
            If it is not back.
        DeviceNotFound, ConfigMismatch
            If another came back.
        """
        self._check_open()
        if self._lost is None:
            return False
        self._release()
        self._open()
        before, self._lost = self._lost, None
        try:
            registers = RegisterAccess(self)
            check_version(registers)
            check_config(registers, self._config)
        except BaseException:
            self._lost = self._lost or before
            raise
        logger.info("%s is back", self._prefix)
        return True

    def close(self) -> None:
        self._closed = True
        self._release()

    def _check_open(self) -> None:
        if self._closed:
            raise DeviceClosed("transport must not be used after it was closed; open a new device")

    def _check_link(self) -> None:
        self._check_open()
        if self._lost is not None:
            raise LinkLost(self._lost)

    def _gone(self, what: str) -> LinkLost:
        self._lost = f"card {self._prefix} must answer, but {what}; {_NEXT_STEP}"
        return LinkLost(self._lost)

    def _failure(self, what: str, error: OSError) -> LinkLost | AccessFailed:
        """Return the error for a call that failed: the card is gone, or it refused."""
        if error.errno in _VANISHED or self._word("ID") == _GONE:
            return self._gone(f"{what} gave {error.strerror or error}")
        return AccessFailed(f"{what} must succeed, but the driver answered "
                            f"{error.strerror or error}; does the card have that memory? See dmesg")

    # -- registers ---------------------------------------------------------------------------------
    def _word(self, name: str) -> int:
        if self._words is None:
            return _GONE
        return self._words[REGISTERS[name].address // 4]

    @staticmethod
    def _index(address: int) -> int:
        if not 0 <= address < 1 << ADDRESS_BITS or address % 4:
            raise InvalidOption(f"register address must be a multiple of 4 below "
                                f"{1 << ADDRESS_BITS:#x}, not {address:#x}")
        return address // 4

    def register_read(self, address: int) -> int:
        self._check_link()
        index = self._index(address)
        assert self._words is not None
        value = self._words[index]
        self._posted = False
        if value == _GONE and self._word("ID") == _GONE:
            raise self._gone("every register reads 0xffffffff")
        return value

    def register_write(self, address: int, value: int) -> None:
        self._check_link()
        index = self._index(address)
        if not 0 <= value < 1 << 32:
            raise InvalidOption(f"register write must be 32 bits, not {value:#x}")
        assert self._words is not None
        self._posted = True
        self._words[index] = value

    # -- memory ------------------------------------------------------------------------------------
    @property
    def memory_bytes(self) -> int:
        return self._memory_bytes

    @property
    def verb_bytes(self) -> int:
        return _VERB_BYTES

    def _check_memory(self, address: int, count: int) -> None:
        self._check_link()
        channel = address >> self._config.address_bits
        first = self._config.device_address(channel, 0)
        if not 0 <= channel < self._config.channels or count < 0 or (
                address + count > first + self._memory_bytes):
            raise UploadError(
                f"memory access must be within {self._memory_bytes:#x} bytes of one of "
                f"{self._config.channels} channels, not {count} bytes at {address:#x}")
        if self._posted:  # reading pushes register writes through before memory changes
            self.register_read(REGISTERS["ID"].address)

    def _transfer(self, name: str, address: int, first: int, last: int) -> None:
        """Move bytes [first, last) of the buffer; its byte 0 belongs at the address."""
        call: Callable[[int, memoryview, int], int] = (
            self._files.read if name == "c2h_0" else self._files.write)
        what = f"{'reading' if name == 'c2h_0' else 'writing'} {self._prefix}_{name}"
        patience = _Patience(self._timeout_s)
        while first < last:
            which = f"{what}, {last - first} bytes at {address + first:#x},"
            try:
                moved = call(self._handles[name], self._view[first:last], address + first)
                why = "the driver moved nothing"
            except OSError as error:
                if error.errno not in _TRANSIENT or self._word("ID") == _GONE:
                    raise self._failure(which, error) from error
                moved, why = 0, f"the driver answered {error.strerror or error}"
            if not 0 <= moved <= last - first:
                raise AccessFailed(f"{which} must move at most that, not {moved}; see dmesg")
            if moved:
                first += moved - moved % ALIGNMENT or moved  # at a beat, if there was one
                patience = _Patience(self._timeout_s)
            elif not patience.more():
                raise AccessFailed(f"{which} must move some of them within {self._timeout_s:g} s, "
                                   f"but {why}, {patience.tries:,} times in a row; see dmesg")

    def memory_read(self, address: int, count: int) -> Bytes:
        self._check_memory(address, count)
        result = np.empty(count, np.uint8)
        for base, length, start, done, part in _pieces(address, count):
            self._transfer("c2h_0", base, 0, length)
            result[done : done + part] = self._bytes[start : start + part]
        return result

    def memory_write(self, address: int, data: bytes | Bytes) -> None:
        raw = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else data.reshape(-1)
        self._check_memory(address, raw.size)
        for base, length, start, done, part in _pieces(address, raw.size):
            partial = {0} if start else set()
            if start + part < length:
                partial.add(length - ALIGNMENT)
            for block in sorted(partial):
                self._transfer("c2h_0", base, block, block + ALIGNMENT)
            self._bytes[start : start + part] = raw[done : done + part]
            self._transfer("h2c_0", base, 0, length)

    # -- interrupt ---------------------------------------------------------------------------------
    @property
    def waits_beside(self) -> bool:
        return True

    def _raised(self, name: str) -> int:
        """Return a register, beside whatever another thread does."""
        self._check_link()
        value = self._word(name)
        if value == _GONE and self._word("ID") == _GONE:
            self._check_link()  # closed meanwhile
            raise self._gone("every register reads 0xffffffff")
        return value

    def wait_interrupt(self, timeout_s: float) -> bool:
        # Events are edges, and one that rises while its predecessor is cleared is no new one: so
        # the level is what counts, and an event only says when to look.
        end = time.monotonic() + timeout_s
        while True:
            if self._raised("IRQ_STATUS") & self._raised("IRQ_ENABLE"):
                return True
            left = end - time.monotonic()
            if left <= 0:
                return False
            handle = self._handles.get("events_0")
            if handle is None:
                continue  # closed meanwhile, which the registers say
            try:
                self._files.wait_event(handle, min(left, _LEVEL_S))
            except OSError as error:
                if error.errno not in _TRANSIENT:
                    raise self._failure(f"waiting for {self._prefix}_events_0", error) from error
                time.sleep(max(0.0, min(end - time.monotonic(), _PAUSE_S)))


class _Patience:
    """Counts tries, waits between them, longer each time, and knows when it is enough."""

    def __init__(self, timeout_s: float) -> None:
        self.tries = 0
        self._end = time.monotonic() + timeout_s

    def more(self) -> bool:
        """Wait for a moment and return True, or False when the time is over."""
        self.tries += 1
        left = self._end - time.monotonic()
        if left > 0:
            time.sleep(min(left, _PAUSE_S, self.tries * 1e-5))
        return left > 0


def _pieces(address: int, count: int) -> list[tuple[int, int, int, int, int]]:
    """Return aligned transfers that cover a range.

    Each is (aligned address, aligned length, first byte of the range in it, bytes of the range
    before it, bytes of the range in it).
    """
    pieces, done = [], 0
    while done < count:
        start = address + done
        base = start - start % ALIGNMENT
        length = min(CHUNK_BYTES, -(-(address + count - base) // ALIGNMENT) * ALIGNMENT)
        part = min(base + length, address + count) - start
        pieces.append((base, length, start - base, done, part))
        done += part
    return pieces


def _unavailable(path: Path, error: OSError) -> PortUnavailable:
    """Return the error for a file that cannot be opened, with what to do."""
    match error.errno:
        case errno.ENOENT:
            step = ("there is no such file; is the card programmed and on the bus "
                    "('lspci -d 10ee:'), and AMD's XDMA driver loaded ('modprobe xdma')?")
        case errno.EACCES | errno.EPERM:
            step = "this user may not open it; give it to a group by a udev rule, or be root"
        case errno.EAGAIN | errno.EBUSY:
            step = "another process uses the card; close that process"
        case errno.ENODEV | errno.ENXIO:
            step = "the driver has lost the card; load its bitstream and rescan the PCIe bus"
        case errno.EINVAL:
            step = "it cannot be mapped; has the bitstream a register BAR of 4 KiB or more?"
        case _:
            step = f"it gave {error.strerror or error}; see dmesg"
    return PortUnavailable(f"device file must be one that can be opened, not {str(path)!r}: {step}")


def _open(spec: DeviceSpec) -> tuple[Transport, AcceleratorConfig]:
    if not spec.argument.isdecimal():
        raise UnsupportedTransport("device must be 'xdma:N' with the N of /dev/xdmaN_user, not "
                                   f"'xdma:{spec.argument}'")
    transport = XdmaTransport(
        int(spec.argument), spec.config, memory_bytes=spec.memory_bytes,
        timeout_s=spec.timeout_s, **spec.options)
    return transport, transport.config


SCHEME = Scheme(
    argument="N",
    help="a PCIe card behind AMD's XDMA driver, `/dev/xdmaN_*`, config that of the card",
    time="the card's", config=None, options=(XdmaTransport,), open=_open)
