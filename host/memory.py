"""Device memory: who owns which bytes.

What lives long (expert images, rings) is allocated from the bottom up, what lives for one command
from the top down, so that short-lived buffers leave no holes between images. Both are first fit;
freed neighbours are merged at once: when everything is freed there is one free block again.
"""

from __future__ import annotations

import threading
import weakref
from bisect import bisect_left
from collections import deque
from collections.abc import Callable

from moeaccel.host.errors import DeviceClosed, InvalidOption, OutOfDeviceMemory

__all__ = ["COMMAND_ALIGNMENT", "PAGE", "Allocation", "Allocator"]

COMMAND_ALIGNMENT = 64
"""Alignment of everything that a command names."""

PAGE = 4096
"""Alignment of expert images."""


class Allocation:
    """Bytes of device memory; freed by :meth:`free`, or when the last reference is gone.

    Parameters
    ----------
    allocator : :class:`Allocator`
    address, size : :class:`int`
        First byte and number of bytes, rounded up by the allocator.
    """

    def __init__(self, allocator: Allocator, address: int, size: int) -> None:
        self._allocator = allocator
        self._address = address
        self._size = size
        # A finaliser may run in the middle of anything, so it only leaves a note.
        self._finalizer = weakref.finalize(self, allocator._garbage.append, address)
        self._finalizer.atexit = False

    @property
    def address(self) -> int:
        """First byte.

        Raises
        ------
        DeviceClosed
            If it was freed.
        """
        if not self.live:
            raise DeviceClosed(
                f"device memory at {self._address:#x} must not be used after it was freed")
        return self._address

    @property
    def size(self) -> int:
        """Number of bytes."""
        return self._size

    @property
    def live(self) -> bool:
        """Whether it was not freed yet."""
        return self._finalizer.alive

    def free(self) -> None:
        """Give the bytes back; a second call does nothing."""
        if self._finalizer.detach() is not None:
            self._allocator._release(self._address)


class Allocator:
    """First-fit allocator of ``[base, base + size)``, usable from several threads.

    Parameters
    ----------
    base, size : :class:`int`
        Multiples of 64.
    before_use : callable, optional
        Called with address and size of every allocation that will not keep what it holds.
    """

    def __init__(self, base: int, size: int, *,
                 before_use: Callable[[int, int], None] | None = None) -> None:
        for name, value in (("base", base), ("size", size)):
            if value < 0 or value % COMMAND_ALIGNMENT:
                raise InvalidOption(
                    f"{name} must be a multiple of {COMMAND_ALIGNMENT}, not {value}")
        self._base, self._size = base, size
        self._before_use = before_use
        self._starts = [base] if size else []  # of the free blocks, ascending
        self._ends = [base + size] if size else []
        self._used: dict[int, int] = {}  # address -> size
        self._garbage: deque[int] = deque()
        self._lock = threading.Lock()

    @property
    def size(self) -> int:
        """Bytes in all."""
        return self._size

    @property
    def free_bytes(self) -> int:
        """Bytes that are not allocated."""
        with self._lock:
            self._collect()
            return self._size - sum(self._used.values())

    @property
    def largest_free_block(self) -> int:
        """Bytes of the largest free block."""
        with self._lock:
            self._collect()
            return self._largest()

    @property
    def free_blocks(self) -> int:
        """Number of free blocks."""
        with self._lock:
            self._collect()
            return len(self._starts)

    def allocate(self, size: int, *, alignment: int = COMMAND_ALIGNMENT,
                 top: bool = False, keeps: bool = False) -> Allocation:
        """Return bytes that nobody else owns.

        Parameters
        ----------
        size : :class:`int`
            At least 1; rounded up to a multiple of 64.
        alignment : :class:`int`
            Of the first byte: a power of two, at least 64.
        top : :class:`bool`
            From the top down instead of from the bottom up.
        keeps : :class:`bool`
            What the bytes hold may be used again.

        Raises
        ------
        InvalidOption
            For a size or an alignment out of range.
        OutOfDeviceMemory
            If no free block is large enough.
        """
        if size < 1:
            raise InvalidOption(f"size must be at least 1 byte, not {size}")
        if alignment < COMMAND_ALIGNMENT or alignment & (alignment - 1):
            raise InvalidOption(
                f"alignment must be a power of two from {COMMAND_ALIGNMENT} on, not {alignment}")
        size = -(-size // COMMAND_ALIGNMENT) * COMMAND_ALIGNMENT
        allocation = self._find(size, alignment, top)
        if self._before_use is not None and not keeps:
            try:
                self._before_use(allocation.address, size)
            except BaseException:
                allocation.free()
                raise
        return allocation

    def _find(self, size: int, alignment: int, top: bool) -> Allocation:
        with self._lock:
            self._collect()
            order = range(len(self._starts))
            for i in reversed(order) if top else order:
                start, end = self._starts[i], self._ends[i]
                if top:
                    address = (end - size) // alignment * alignment
                else:
                    address = -(-start // alignment) * alignment
                if start <= address and address + size <= end:
                    self._take(i, address, address + size)
                    self._used[address] = size
                    return Allocation(self, address, size)
            raise OutOfDeviceMemory(
                f"allocation of {size:,} bytes must fit the device's free memory: "
                f"{self._size - sum(self._used.values()):,} of {self._size:,} bytes are free, the "
                f"largest block has {self._largest():,}; close experts that are no longer needed, "
                "or open the device with more memory_bytes")

    def _take(self, i: int, address: int, end: int) -> None:
        """Cut ``[address, end)`` out of free block i."""
        pieces = [(self._starts[i], address), (end, self._ends[i])]
        pieces = [(low, high) for low, high in pieces if low < high]
        self._starts[i : i + 1] = [low for low, _ in pieces]
        self._ends[i : i + 1] = [high for _, high in pieces]

    def _release(self, address: int) -> None:
        with self._lock:
            self._collect()
            self._merge(address)

    def _collect(self) -> None:
        while self._garbage:
            self._merge(self._garbage.popleft())

    def _merge(self, address: int) -> None:
        start, end = address, address + self._used.pop(address)
        i = bisect_left(self._starts, start)
        if i < len(self._starts) and self._starts[i] == end:
            end = self._ends[i]
            del self._starts[i], self._ends[i]
        if i and self._ends[i - 1] == start:
            self._ends[i - 1] = end
        else:
            self._starts.insert(i, start)
            self._ends.insert(i, end)

    def _largest(self) -> int:
        return max((end - start for start, end in zip(self._starts, self._ends, strict=True)),
                   default=0)
