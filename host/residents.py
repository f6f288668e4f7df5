"""Which images a device's memory still holds from an earlier session, so that they are not sent
again.

Page 0 of the memory, that of channel 0 where there are several, which no command can touch, lists
the ranges that hold images and nothing else: since a range was entered, only uploads wrote there,
and an upload clears the image's header first and writes it last. So within such a range a header
that is there is true, and its CRC-32 says which image follows it. A range is struck out before its
bytes are used for anything else.

The list is true as long as memory keeps its content. MEMORY_STATE.listed says so: it is set when
page 0 has been written, and 0 after whatever may have cost memory its content, as when an FPGA is
configured.

Layout, little-endian: magic u32, version u16, number of ranges u16, CRC-32 of everything else u32,
then for each range its address u64, its size in blocks of 64 bytes u32, and a CRC-32 u32 of the
sizes of its images, each in blocks of 64 bytes as u32; zeros up to the next multiple of 64. (Where
sizes differ, headers lie elsewhere: it is another range.) Memory with error correction must not be
read before it is written, nor be written in parts: only blocks that a list needs are written, and
read.
"""

from __future__ import annotations

import itertools
import logging
import struct
import zlib
from collections.abc import Sequence
from typing import NamedTuple, Self

import numpy as np

from moeaccel.host.memory import COMMAND_ALIGNMENT, PAGE
from moeaccel.host.registers import RegisterAccess, mask
from moeaccel.host.transports.base import Transport
from moeaccel.image import HEADER_BYTES

__all__ = ["Residents"]

logger = logging.getLogger(__name__)

_MAGIC = 0x5352_4F4D  # "MORS" in memory order
_VERSION = 2
_LISTED = mask("MEMORY_STATE", "listed")
_HEAD = struct.Struct("<IHH")
_CRC = struct.Struct("<I")
_RANGE = struct.Struct("<QII")
_MOST = (PAGE - _HEAD.size - _CRC.size) // _RANGE.size


def _blocks(size: int) -> int:
    """Return a size rounded up to whole blocks."""
    return -(-size // COMMAND_ALIGNMENT) * COMMAND_ALIGNMENT


class _Range(NamedTuple):
    """Bytes that hold images, one behind the other."""

    address: int
    blocks: int
    layout: int  # CRC-32 of the sizes of the images

    @classmethod
    def of(cls, address: int, sizes: Sequence[int]) -> Self:
        """Return the range of images with these sizes."""
        blocks = [size // COMMAND_ALIGNMENT for size in sizes]
        return cls(address, sum(blocks), zlib.crc32(struct.pack(f"<{len(blocks)}I", *blocks)))

    def overlaps(self, address: int, size: int) -> bool:
        end = self.address + self.blocks * COMMAND_ALIGNMENT
        return address < end and self.address < address + size


class Residents:
    """The list of a device's memory.

    Parameters
    ----------
    transport : :class:`Transport`
    channels : sequence of :class:`int`
        Where the memory of each channel begins; a range is the same on all of them.
    """

    def __init__(self, transport: Transport, channels: Sequence[int] = (0,)) -> None:
        self._transport = transport
        self._channels = tuple(channels)
        self._registers = RegisterAccess(transport)
        self._listed = bool(self._registers.read("MEMORY_STATE") & _LISTED)
        self._ranges = self._read() if self._listed else []
        if self._ranges:
            logger.debug("memory holds %d ranges of images", len(self._ranges))

    def _read(self) -> list[_Range]:
        """Return the list in memory, empty if it is damaged or of other content."""
        page = self._transport.memory_read(0, COMMAND_ALIGNMENT).tobytes()
        magic, version, count = _HEAD.unpack_from(page)
        if (magic, version) != (_MAGIC, _VERSION) or count > _MOST:
            return []
        begin = _HEAD.size + _CRC.size
        end = begin + count * _RANGE.size
        if end > len(page):
            page += self._transport.memory_read(len(page), _blocks(end) - len(page)).tobytes()
        body = page[begin:end]
        if _CRC.unpack_from(page, _HEAD.size)[0] != zlib.crc32(body, zlib.crc32(page[:_HEAD.size])):
            return []
        return [_Range(*fields) for fields in _RANGE.iter_unpack(body)]

    def _write(self, ranges: Sequence[_Range]) -> None:
        head = _HEAD.pack(_MAGIC, _VERSION, len(ranges))
        body = b"".join(_RANGE.pack(*entry) for entry in ranges)
        page = head + _CRC.pack(zlib.crc32(body, zlib.crc32(head))) + body
        self._transport.memory_write(0, page.ljust(_blocks(len(page)), b"\0"))
        if not self._listed:
            self._registers.write("MEMORY_STATE", _LISTED)
            self._listed = True

    def forget(self, address: int, size: int) -> None:
        """Strike out what overlaps ``size`` bytes at an address, before they are written."""
        left = [entry for entry in self._ranges if not entry.overlaps(address, size)]
        if len(left) < len(self._ranges):
            # Interrupted or not, memory never lists what is not known here.
            self._write(left)
            self._ranges = left

    def enter(self, address: int, sizes: Sequence[int]) -> None:
        """Enter a range, before its images are uploaded; every header in it is true from then on.

        Parameters
        ----------
        address : :class:`int`
            Of the first image.
        sizes : sequence of :class:`int`
            Bytes from each image to the one behind it, whole blocks of 64.
        """
        entry = _Range.of(address, sizes)
        if entry in self._ranges:
            return
        self.forget(address, sum(sizes))
        for channel in self._channels:
            for image in itertools.accumulate(sizes[:-1], initial=channel + address):
                self._transport.memory_write(image, np.zeros(HEADER_BYTES, np.uint8))
        self._ranges = [*self._ranges, entry]
        self._write(self._ranges[-_MOST:])
        self._ranges = self._ranges[-_MOST:]
