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
then for each range its address u64, the bytes from one image to the next u32, and the number of
images u32.
"""

from __future__ import annotations

import logging
import struct
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from moeaccel.host.memory import PAGE
from moeaccel.host.registers import RegisterAccess, mask
from moeaccel.host.transports.base import Transport
from moeaccel.image import HEADER_BYTES

__all__ = ["Residents"]

logger = logging.getLogger(__name__)

_MAGIC = 0x5352_4F4D  # "MORS" in memory order
_VERSION = 1
_LISTED = mask("MEMORY_STATE", "listed")
_HEAD = struct.Struct("<IHH")
_CRC = struct.Struct("<I")
_RANGE = struct.Struct("<QII")
_MOST = (PAGE - _HEAD.size - _CRC.size) // _RANGE.size


class _Range(NamedTuple):
    """Bytes that hold images, each ``stride`` bytes behind the one before."""

    address: int
    stride: int
    images: int

    def overlaps(self, address: int, size: int) -> bool:
        return address < self.address + self.stride * self.images and self.address < address + size


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
        page = self._transport.memory_read(0, PAGE).tobytes()
        magic, version, count = _HEAD.unpack_from(page)
        if (magic, version) != (_MAGIC, _VERSION) or count > _MOST:
            return []
        begin = _HEAD.size + _CRC.size
        body = page[begin : begin + count * _RANGE.size]
        if _CRC.unpack_from(page, _HEAD.size)[0] != zlib.crc32(body, zlib.crc32(page[:_HEAD.size])):
            return []
        return [_Range(*fields) for fields in _RANGE.iter_unpack(body)]

    def _write(self, ranges: Sequence[_Range]) -> None:
        head = _HEAD.pack(_MAGIC, _VERSION, len(ranges))
        body = b"".join(_RANGE.pack(*entry) for entry in ranges)
        self._transport.memory_write(0, head + _CRC.pack(zlib.crc32(body, zlib.crc32(head))) + body)
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

    def enter(self, address: int, stride: int, count: int) -> None:
        """Enter a range, before its images are uploaded; every header in it is true from then on.

        Parameters
        ----------
        address : :class:`int`
            Of the first image.
        stride : :class:`int`
            Bytes from one image to the next.
        count : :class:`int`
            Number of images.
        """
        entry = _Range(address, stride, count)
        if entry in self._ranges:
            return
        self.forget(address, stride * count)
        for channel in self._channels:
            for image in range(count):
                self._transport.memory_write(
                    channel + address + image * stride, np.zeros(HEADER_BYTES, np.uint8))
        self._ranges = [*self._ranges, entry]
        self._write(self._ranges[-_MOST:])
        self._ranges = self._ranges[-_MOST:]
