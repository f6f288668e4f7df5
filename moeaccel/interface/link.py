"""The serial link between a host and a device, described once: hardware and driver come from it.

**Frames.** A frame is its content and a CRC-32 of it (that of zlib, low byte first), with zeros
removed by COBS (Cheshire and Baker, "Consistent Overhead Byte Stuffing", 1999), and one zero byte
behind. So a zero ends a frame and is never inside one: after any garbage, or a frame cut in the
middle, the next zero resynchronises, with no timer; and no content, not even a recording of this
link, looks like a frame. COBS costs one byte in 254, whatever the content is (byte escapes, as in
HDLC, may double it). The CRC has 32 bits because damaged frames are expected in great numbers on a
bad line: one in 65,536 would be executed with 16.

**Requests** are numbered modulo 256. Content, little-endian::

    number u8 | opcode (4 bits), attempt (4 bits) | count u16 | address u32 | payload of a write

**Replies** come in the order of the requests::

    number, opcode, attempt as in the request | payload of a read | status, INTERRUPT | expected u8

``expected`` is the number of the request that the device executes next. Up to ``WINDOW`` requests
are sent before the first reply is there, since USB-serial chips answer only every few milliseconds.

**Numbers.** The device executes requests in the order of their numbers and nothing out of order:

========================== =========================================================================
number of a request         what the device does
========================== =========================================================================
``expected``                executes and answers it
one of ``WINDOW`` before    it was executed, but its reply got lost: a write is answered again with
                            the status that it had, not executed; a read is executed again
any other                   answers ``OUT_OF_ORDER`` and nothing else: one before it got lost
========================== =========================================================================

The host sends everything unanswered again, in order, with the next attempt, when a reply of the
present attempt tells it that something got lost (``OUT_OF_ORDER``, ``DAMAGED``, or a reply behind
the missing one), or when replies fail to come. So that reading again gives what the first reading
gave, it sends no write while a read is unanswered.

**Hello** is executed whatever its number is, and numbers go on from it. Its address is any number;
the reply returns it, so that no reply of an earlier session is taken for it, and says what the
device speaks (:class:`Hello`).

**Notices** come unasked, with the number and attempt of the request served last: a notice with
``OK`` when the interrupt has risen since a level was last reported; one with ``DAMAGED`` when a
frame was, and nothing else waits. Both may get lost.
"""

from __future__ import annotations

import enum
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

from moeaccel.errors import MoeAccelError

__all__ = [
    "ADDRESS_BITS", "ATTEMPTS", "CRC_BYTES", "HEADER_BYTES", "HELLO_BYTES", "INTERRUPT",
    "MAX_PAYLOAD", "NUMBERS", "TRAILER_BYTES", "VERSION", "WINDOW", "FrameReader", "Hello",
    "LinkError", "Opcode", "Reply", "Request", "Status", "frame",
]

VERSION = 1
"""Of this protocol; the first thing that both ends compare."""

WINDOW = 16
"""Requests that may be unanswered: with the largest payload 8 KiB, 27 ms at 3 Mbaud, more than the
16 ms that a USB-serial chip sits on bytes."""

MAX_PAYLOAD = 512
"""Bytes of a block: 97 % of the line are payload; what noise damages costs less than in longer
ones."""

NUMBERS = 256
ATTEMPTS = 16
ADDRESS_BITS = 32
HEADER_BYTES = 8
TRAILER_BYTES = 2
CRC_BYTES = 4
HELLO_BYTES = 8
REGISTER_BYTES = 4

INTERRUPT = 0x80
"""Bit of a reply's status byte: level of the interrupt."""

_DELIMITER = b"\0"
_HEADER = struct.Struct("<BBHI")
_CRC = struct.Struct("<I")
_HELLO = struct.Struct("<IBBBB")
_BLOCK = 254


class LinkError(MoeAccelError, ValueError):
    """Content that is not that of a frame of this protocol."""


class Opcode(enum.IntEnum):
    """What a request asks for; bit 0: it carries a payload of ``count`` bytes."""

    HELLO = 0
    """Start a session; ``count`` is HELLO_BYTES."""
    MEMORY_READ = 2
    """``count`` bytes from any address; 0 bytes ask only for the interrupt."""
    MEMORY_WRITE = 3
    REGISTER_READ = 4
    """The register at an address that is a multiple of 4; ``count`` is REGISTER_BYTES."""
    REGISTER_WRITE = 5
    NOTICE = 6
    """Only from the device, unasked."""

    @property
    def writes(self) -> bool:
        """Whether a request carries a payload."""
        return bool(self & 1)


class Status(enum.IntEnum):
    """How a request ended. After an error in a block, some of its bytes may have been written."""

    OK = 0
    BAD_REQUEST = 1
    """Opcode, count or address is not one of this protocol; nothing was done."""
    BUS_ERROR = 2
    """The bus answered SLVERR, as for an address without a register."""
    NO_MEMORY = 3
    """The bus answered DECERR, or the address is beyond 32 bits."""
    BUS_TIMEOUT = 4
    """The bus did not answer; what it was asked may still happen."""
    OUT_OF_ORDER = 5
    """A request before this one got lost; nothing was done."""
    DAMAGED = 6
    """A frame was damaged; nothing was done."""


def frame(content: bytes) -> bytes:
    """Return the frame of some content: CRC, no zeros, delimiter."""
    out = bytearray()
    for block in (content + _CRC.pack(zlib.crc32(content))).split(_DELIMITER):
        while len(block) >= _BLOCK:
            out.append(_BLOCK + 1)
            out += block[:_BLOCK]
            block = block[_BLOCK:]
        out.append(len(block) + 1)
        out += block
    return bytes(out + _DELIMITER)


def _content(stuffed: bytes) -> bytes | None:
    """Return the content of a frame without its delimiter, None if it is damaged."""
    out = bytearray()
    at = 0
    while at < len(stuffed):
        code = stuffed[at]
        block = stuffed[at + 1 : at + code]
        if len(block) != code - 1:
            return None
        out += block
        at += code
        if code != _BLOCK + 1 and at < len(stuffed):
            out.append(0)
    content, crc = bytes(out[:-CRC_BYTES]), bytes(out[-CRC_BYTES:])
    return content if crc == _CRC.pack(zlib.crc32(content)) else None


class FrameReader:
    """Turns received bytes into the contents of frames.

    Attributes
    ----------
    damaged : :class:`int`
        Frames that were dropped so far.
    """

    def __init__(self) -> None:
        self.damaged = 0
        self._partial = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes | None]:
        """Yield for each frame that ends in ``data`` its content, or None if it is damaged."""
        *ends, rest = data.split(_DELIMITER)
        for end in ends:
            stuffed = bytes(self._partial + end)
            self._partial.clear()
            if stuffed:
                content = _content(stuffed)
                self.damaged += content is None
                yield content
        # No frame is longer: what is, is noise, and needs no keeping.
        self._partial += rest[: max(0, 4 * MAX_PAYLOAD - len(self._partial))]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the host sends.

    Parameters
    ----------
    number : :class:`int`
        Modulo NUMBERS.
    opcode : :class:`int`
        An :class:`Opcode`, or one that this version does not know.
    attempt : :class:`int`
        Modulo ATTEMPTS; the reply returns it.
    count : :class:`int`
        Bytes to read or write.
    address : :class:`int`
        32 bits.
    payload : :class:`bytes`
        ``count`` bytes if the opcode writes, else none.
    """

    number: int
    opcode: int
    attempt: int = 0
    count: int = 0
    address: int = 0
    payload: bytes = b""

    def content(self) -> bytes:
        """Return the content of its frame."""
        return _HEADER.pack(self.number, self.opcode | self.attempt << 4, self.count,
                            self.address) + self.payload

    @classmethod
    def parse(cls, content: bytes) -> Self:
        """Return the request of a frame's content.

        Raises
        ------
        LinkError
            If the length is not the one that the header asks for.
        """
        if len(content) < HEADER_BYTES:
            raise LinkError(
                f"request must have at least {HEADER_BYTES} bytes, not {len(content)}")
        number, kind, count, address = _HEADER.unpack_from(content)
        payload = content[HEADER_BYTES:]
        if len(payload) != (count if kind & 1 else 0):
            raise LinkError(f"payload must have {count if kind & 1 else 0} bytes for this header, "
                            f"not {len(payload)}")
        return cls(number=number, opcode=kind & 15, attempt=kind >> 4, count=count,
                   address=address, payload=payload)


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What the device sends.

    Parameters
    ----------
    number, opcode, attempt : :class:`int`
        Of the request that it answers.
    status : :class:`Status`
    interrupt : :class:`bool`
        Level of the interrupt.
    expected : :class:`int`
        Number of the request that is executed next.
    payload : :class:`bytes`
        Of a read.
    """

    number: int
    opcode: int
    attempt: int
    status: Status
    interrupt: bool
    expected: int
    payload: bytes = b""

    def content(self) -> bytes:
        """Return the content of its frame."""
        return bytes([self.number, self.opcode | self.attempt << 4]) + self.payload + bytes(
            [self.status | self.interrupt * INTERRUPT, self.expected])

    @classmethod
    def parse(cls, content: bytes) -> Self:
        """Return the reply of a frame's content.

        Raises
        ------
        LinkError
            If it is too short, or its status is unknown.
        """
        if len(content) < 2 + TRAILER_BYTES:
            raise LinkError(
                f"reply must have at least {2 + TRAILER_BYTES} bytes, not {len(content)}")
        number, kind, *_, status, expected = content
        known = [int(s) for s in Status]
        if status & ~INTERRUPT not in known:
            raise LinkError(f"status must be one of {known}, not {status & ~INTERRUPT}")
        return cls(number=number, opcode=kind & 15, attempt=kind >> 4,
                   status=Status(status & ~INTERRUPT), interrupt=bool(status & INTERRUPT),
                   expected=expected, payload=content[2:-TRAILER_BYTES])


@dataclass(frozen=True, kw_only=True)
class Hello:
    """What a device says about itself: the payload of the reply to HELLO.

    Parameters
    ----------
    nonce : :class:`int`
        Address of the request, 32 bits.
    memory_bytes : :class:`int`
        A power of two.
    version, window, max_payload : :class:`int`
        VERSION, WINDOW and MAX_PAYLOAD of the device.
    """

    nonce: int
    memory_bytes: int
    version: int = VERSION
    window: int = WINDOW
    max_payload: int = MAX_PAYLOAD

    def payload(self) -> bytes:
        """Return its HELLO_BYTES bytes."""
        return _HELLO.pack(self.nonce, self.version, self.window,
                           self.max_payload.bit_length() - 1, self.memory_bytes.bit_length() - 1)

    @classmethod
    def parse(cls, payload: bytes) -> Self:
        """Return what HELLO_BYTES bytes say."""
        if len(payload) != HELLO_BYTES:
            raise LinkError(f"hello must have {HELLO_BYTES} bytes, not {len(payload)}")
        nonce, version, window, payload_log2, memory_log2 = _HELLO.unpack(payload)
        return cls(nonce=nonce, version=version, window=window, max_payload=1 << payload_log2,
                   memory_bytes=1 << memory_log2)
