"""Memory of all channels, the window in front of it, and what bursts find there."""

from __future__ import annotations

import mmap
import sys
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from moeaccel.arithmetic import from_bfloat16
from moeaccel.config import AcceleratorConfig
from moeaccel.host.errors import DeviceClosed, InvalidOption, UploadError
from moeaccel.host.transports.base import Bytes
from moeaccel.host.transports.golden.register_file import RegisterFile
from moeaccel.interface.commands import ElementType, Status

_PAGE_BITS = 12
# Python 3.11's mmap does not name this flag.
_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x40 if sys.platform == "darwin" else 0x4000)


class Fault(Exception):
    """Ends a command with a status."""

    def __init__(self, status: Status, *, detail: int = 0, address: int = 0) -> None:
        super().__init__(status.name)
        self.status, self.detail, self.address = status, detail, address


class Memory:
    """Bytes whose pages cost nothing until they are touched, and when they last changed."""

    def __init__(self, size: int) -> None:
        try:
            pages = mmap.mmap(-1, size,
                              flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
        except (OSError, OverflowError, ValueError) as error:
            raise InvalidOption(
                f"memory_bytes must be an amount that the system grants, not {size}: {error}"
            ) from error
        self._bytes = np.frombuffer(pages, np.uint8)
        self._changed = np.zeros(-(-size >> _PAGE_BITS), np.int64)
        self._version = 0

    def __len__(self) -> int:
        return len(self._bytes)

    def read(self, address: int, count: int) -> Bytes:
        """Return a copy of bytes."""
        return self._bytes[address : address + count].copy()

    def view(self, address: int, count: int) -> Bytes:
        """Return bytes as they are now."""
        return self._bytes[address : address + count]

    def write(self, address: int, data: Bytes) -> None:
        """Change bytes."""
        if data.size:
            self._version += 1
            last = address + data.size - 1
            self._changed[address >> _PAGE_BITS : (last >> _PAGE_BITS) + 1] = self._version
            self._bytes[address : last + 1] = data

    def version(self, address: int, count: int) -> int:
        """Return a number that grows when something in the range changes."""
        pages = self._changed[address >> _PAGE_BITS : ((address + count - 1) >> _PAGE_BITS) + 1]
        return int(pages.max())


class MemoryPort:
    """The memories as host and device see them.

    Parameters
    ----------
    config : :class:`AcceleratorConfig`
    registers : :class:`RegisterFile`
        With the window.
    memory_bytes : :class:`int`
        Of each channel.
    """

    def __init__(self, config: AcceleratorConfig, registers: RegisterFile, memory_bytes: int
                 ) -> None:
        self._config = config
        self._registers = registers
        self._channels = tuple(Memory(memory_bytes) for _ in range(config.channels))
        self._size = memory_bytes
        self.possible_faults: list[Fault] = []
        """What the last command may have reported."""

    def close(self) -> None:
        """Give the memories back."""
        self._channels = ()

    @property
    def channels(self) -> tuple[Memory, ...]:
        """Memory of each channel."""
        if not self._channels:
            raise DeviceClosed("transport must not be used after it was closed; open a new device")
        return self._channels

    @property
    def ram(self) -> Memory:
        """Memory of channel 0, where all but weights is."""
        return self.channels[0]

    def locate(self, address: int, count: int) -> tuple[Memory, int]:
        """Return the memory that a device address is in, and the address there.

        Raises
        ------
        UploadError
            If there are no such bytes.
        """
        channels = self.channels
        channel = address >> self._config.address_bits
        inside = address & ((1 << self._config.address_bits) - 1)
        size = self._size
        if not 0 <= channel < len(channels) or count < 0 or inside + count > size:
            raise UploadError(f"memory access must be within {size:#x} bytes"
                              f"{'' if len(channels) == 1 else f' of {len(channels)} channels'}, "
                              f"not {count} bytes at {address:#x}")
        return channels[channel], inside

    def first_faults(self, requests: Iterable[tuple[int, int]], *,
                     write: bool = False) -> list[Fault]:
        """Return the faults of which one is the first of a stream of linear requests.

        Requests, (address, bytes), are cut into bursts at multiples of the longest one. Bursts
        outside the window are known when they would be issued, what memory refuses only later.
        """
        port = self._config.port_bytes
        block = port * self._config.max_burst_beats
        base = self._registers.get64("WINDOW_BASE")
        limit = self._registers.get64("WINDOW_LIMIT")
        size = self._size
        refused: list[Fault] = []
        for address, count in requests:
            end = address + -(-count // port) * port
            if base <= address and end <= min(limit, size):
                continue
            # The first burst that memory refuses, and the first one outside, if there is one.
            beyond, outside = (max(address, top // block * block) for top in (size, limit))
            if address < base:
                outside = address
            elif end <= limit:
                outside = end
            if end > size and beyond < outside and not refused:
                refused.append(Fault(Status.BUS_ERROR, address=0 if write else beyond))
            if outside < end:
                return [*refused, Fault(Status.WINDOW, address=outside)]
        return refused

    def raise_first(self, *streams: list[Fault]) -> None:
        """End the command if one of its streams has a fault."""
        self.possible_faults = [fault for stream in streams for fault in stream]
        if self.possible_faults:
            raise self.possible_faults[0]

    def beats(self, count: int) -> int:
        """Return the bytes of the beats that so many bytes take."""
        port = self._config.port_bytes
        return -(-count // port) * port

    def load(self, address: int, count: int) -> Bytes:
        """Return bytes that the device reads, unless they end the command."""
        self.raise_first(self.first_faults([(address, count)]))
        self._registers.count(bytes_read_other=self.beats(count))
        return self.ram.read(address, count)

    def floats(self, address: int, shape: tuple[int, int],
               element: ElementType = ElementType.FLOAT32) -> NDArray[np.float32]:
        """Return an array of memory; where there is none, which nobody asks for, zeros."""
        count = element.bytes * shape[0] * shape[1]
        raw = self.ram.read(address, count)
        raw = np.pad(raw, (0, count - raw.size))
        narrow = element is ElementType.BFLOAT16
        return (from_bfloat16(raw.view("<u2")) if narrow else raw.view("<f4")).reshape(shape)
