"""Device memory: who owns which bytes.

What lives long (expert images, rings) is allocated from the bottom up, what lives for one command
from the top down, so that short-lived buffers leave no holes between images. Both are first fit;
freed neighbours are merged at once: when everything is freed there is one free block again.
"""

from __future__ import annotations

import contextlib
import itertools
import weakref
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from moeaccel.host.errors import DeviceClosed, InvalidOption, OutOfDeviceMemory
from moeaccel.host.process import Bound, Lock

__all__ = ["COMMAND_ALIGNMENT", "PAGE", "Allocation", "Allocator"]

COMMAND_ALIGNMENT = 64
"""Alignment of everything that a command names."""

PAGE = 4096
"""Alignment of expert images."""


class _Claim(weakref.ref["Allocation"]):
    """An allocation's entry in the books; says when nobody holds the allocation any more."""

    address = -1  # until it is known
    size = 0


class _Books(NamedTuple):
    """Who owns what. Never changed, only replaced as a whole: so there is no half-done change."""

    starts: tuple[int, ...]  # of the free blocks, ascending
    ends: tuple[int, ...]
    used: dict[int, _Claim]  # by address

    def with_claim(self, block: int, claim: _Claim) -> _Books:
        """Cut a claim out of a free block."""
        address, end = claim.address, claim.address + claim.size
        pieces = [(self.starts[block], address), (end, self.ends[block])]
        pieces = [(low, high) for low, high in pieces if low < high]
        return _Books(
            (*self.starts[:block], *(low for low, _ in pieces), *self.starts[block + 1 :]),
            (*self.ends[:block], *(high for _, high in pieces), *self.ends[block + 1 :]),
            self.used | {address: claim})

    def with_parts(self, claim: _Claim, parts: Sequence[_Claim]) -> _Books:
        """Give the bytes of a claim to others that have them together."""
        used = {address: one for address, one in self.used.items() if one is not claim}
        return _Books(self.starts, self.ends, used | {part.address: part for part in parts})

    def place(self, size: int, alignment: int, top: bool) -> tuple[int, int] | None:
        """Return the first free block that has room, and the address in it."""
        order = range(len(self.starts))
        for block in reversed(order) if top else order:
            start, end = self.starts[block], self.ends[block]
            if top:
                address = (end - size) // alignment * alignment
            else:
                address = -(-start // alignment) * alignment
            if start <= address and address + size <= end:
                return block, address
        return None

    def without_claim(self, claim: _Claim) -> _Books:
        """Make a claim's bytes free, and one block with free neighbours."""
        if self.used.get(claim.address) is not claim:
            return self  # never entered, or gone already
        start, end = claim.address, claim.address + claim.size
        first = last = bisect_left(self.starts, start)
        if last < len(self.starts) and self.starts[last] == end:
            end = self.ends[last]
            last += 1
        if first and self.ends[first - 1] == start:
            first -= 1
            start = self.starts[first]
        return _Books(
            (*self.starts[:first], start, *self.starts[last:]),
            (*self.ends[:first], end, *self.ends[last:]),
            {address: one for address, one in self.used.items() if one is not claim})

    @property
    def largest(self) -> int:
        """Bytes of the largest free block."""
        return max((end - start for start, end in zip(self.starts, self.ends, strict=True)),
                   default=0)

    @property
    def free(self) -> int:
        """Bytes of all free blocks."""
        return sum(self.ends) - sum(self.starts)


class Allocation(Bound):
    """Bytes of device memory; freed by :meth:`free`, or when the last reference is gone.

    Parameters
    ----------
    allocator : :class:`Allocator`
    address, size : :class:`int`
        First byte and number of bytes, rounded up by the allocator.
    """

    def __init__(self, allocator: Allocator, address: int, size: int) -> None:
        self._allocator = allocator
        # The end of an object may come in the middle of anything, also of an allocation: it only
        # leaves a note, by a function that no signal can interrupt.
        self._claim = _Claim(self, allocator._garbage.append)
        self._claim.address, self._claim.size = address, size

    @property
    def address(self) -> int:
        """First byte.

        Raises
        ------
        DeviceClosed
            If it was freed.
        """
        if not self.live:
            raise DeviceClosed(f"device memory at {self._claim.address:#x} must not be used after "
                               "it was freed")
        return self._claim.address

    @property
    def size(self) -> int:
        """Number of bytes."""
        return self._claim.size

    @property
    def live(self) -> bool:
        """Whether it was not freed yet."""
        return self._allocator._books.used.get(self._claim.address) is self._claim

    def free(self) -> None:
        """Give the bytes back; a second call does nothing."""
        self._allocator._release(self._claim)

    def split(self, sizes: Sequence[int]) -> list[Allocation]:
        """Return allocations of these sizes, multiples of 64, one behind the other, that have the
        bytes instead of this one.

        Raises
        ------
        DeviceClosed
            If it was freed.
        InvalidOption
            If they are not all of its bytes.
        """
        if sum(sizes) != self.size or any(size < 1 or size % COMMAND_ALIGNMENT for size in sizes):
            raise InvalidOption(f"sizes must be multiples of {COMMAND_ALIGNMENT} and add up to "
                                f"{self.size}, not to {sum(sizes)}")
        starts = itertools.accumulate(sizes[:-1], initial=self.address)
        parts = [Allocation(self._allocator, start, size)
                 for start, size in zip(starts, sizes, strict=True)]
        self._allocator._split(self._claim, [part._claim for part in parts])
        return parts


class Allocator:
    """First-fit allocator of ``[base, base + size)``, usable from several threads.

    A call that is interrupted, whenever that is, has either been done or not. A signal's handler
    that interrupts one may make others.

    Parameters
    ----------
    base, size : :class:`int`
        Multiples of 64.
    before_use : callable, optional
        Called with address and size of every allocation that will not keep what it holds.
    make_room : callable, optional
        Called when an allocation does not fit; returns whether it is worth trying again. It may be
        set later.
    """

    def __init__(self, base: int, size: int, *,
                 before_use: Callable[[int, int], None] | None = None,
                 make_room: Callable[[], bool] | None = None) -> None:
        for name, value in (("base", base), ("size", size)):
            if value < 0 or value % COMMAND_ALIGNMENT:
                raise InvalidOption(
                    f"{name} must be a multiple of {COMMAND_ALIGNMENT}, not {value}")
        self._size = size
        self._before_use = before_use
        self.make_room = make_room
        self._books = _Books((base,), (base + size,), {}) if size else _Books((), (), {})
        self._garbage: deque[_Claim] = deque()
        self._lock = Lock()

    @property
    def size(self) -> int:
        """Bytes in all."""
        return self._size

    @property
    def free_bytes(self) -> int:
        """Bytes that are not allocated."""
        with self._lock.held:
            return self._swept().free

    @property
    def largest_free_block(self) -> int:
        """Bytes of the largest free block."""
        with self._lock.held:
            return self._swept().largest

    @property
    def free_blocks(self) -> int:
        """Number of free blocks."""
        with self._lock.held:
            return len(self._swept().starts)

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
        while (allocation := self._find(size, alignment, top)) is None:
            if self.make_room is None or not self.make_room():
                raise self._no_room(size)
        if self._before_use is not None and not keeps:
            try:
                self._before_use(allocation.address, size)
            except BaseException:
                allocation.free()
                raise
        return allocation

    def _find(self, size: int, alignment: int, top: bool) -> Allocation | None:
        with self._lock.held:
            while True:
                books = self._swept()
                if (place := books.place(size, alignment, top)) is None:
                    return None
                block, address = place
                allocation = Allocation(self, address, size)
                if self._replace(books, books.with_claim(block, allocation._claim)):
                    return allocation

    def _no_room(self, size: int) -> OutOfDeviceMemory:
        with self._lock.held:
            books = self._swept()
        return OutOfDeviceMemory(
            f"allocation of {size:,} bytes must fit the device's free memory: {books.free:,} of "
            f"{self._size:,} bytes are free, the largest block has {books.largest:,}; close "
            "experts that are no longer needed, or open the device with more memory_bytes")

    def _release(self, claim: _Claim) -> None:
        with self._lock.held:
            self._remove(claim)
            self._swept()

    def _split(self, claim: _Claim, parts: Sequence[_Claim]) -> None:
        with self._lock.held:
            while not self._replace(books := self._books, books.with_parts(claim, parts)):
                pass

    def _remove(self, claim: _Claim) -> None:
        while not self._replace(books := self._books, books.without_claim(claim)):
            pass

    def _swept(self) -> _Books:
        """Return the books without what nobody holds any more."""
        while True:
            try:
                claim = self._garbage[0]
            except IndexError:
                return self._books
            self._remove(claim)
            with contextlib.suppress(ValueError):  # a signal's handler has done it
                self._garbage.remove(claim)

    def _replace(self, old: _Books, new: _Books) -> bool:
        """Replace the books, unless a signal's handler did so since they were looked at."""
        # One statement without a call: a handler comes before or behind all of it.
        self._books, done = (new, True) if self._books is old else (self._books, False)
        return done
