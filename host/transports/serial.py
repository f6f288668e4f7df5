"""A device at the other end of a serial line, such as a board's USB port.

The protocol is that of :mod:`moeaccel.interface.link`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import importlib
import logging
import secrets
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeaccel.config import AcceleratorConfig
from moeaccel.errors import ToolMissingError
from moeaccel.host.errors import (
    AccessFailed,
    DeviceClosed,
    DeviceNotFound,
    InvalidOption,
    LinkLost,
    PortUnavailable,
    UploadError,
)
from moeaccel.host.transports.base import Bytes, DeviceSpec, Scheme, Transport
from moeaccel.interface.link import (
    ATTEMPTS,
    HELLO_BYTES,
    MAX_PAYLOAD,
    NUMBERS,
    REGISTER_BYTES,
    VERSION,
    WINDOW,
    FrameReader,
    Hello,
    LinkError,
    Opcode,
    Reply,
    Request,
    Status,
    frame,
)

__all__ = ["BAUD", "SCHEME", "SerialTransport"]

logger = logging.getLogger(__name__)

BAUD = 3_000_000
"""Bits a second: the most that an FT231X does."""

_HELLO_ATTEMPTS = 5
_SILENT_ROUNDS = 5  # times that a silent line is tried again
_ROUNDS = 64  # rounds without an answer, on a line that is not silent
_REPLY_S = 0.25  # shortest time after which a silent line is tried again
_POLL_S = 0.02  # of the port, between looks at the clock
_NOTICE_S = 0.5  # an interrupt whose notice got lost is seen that much later
_WRITE_S = 10.0  # for the port to take one frame

_NEXT_STEP = "call device.reset(), which connects again (weights in its memory stay)"


@dataclass
class _Exchange:
    """A request and what came back."""

    request: Request
    reply: Reply | None = None


def _access_error(failed: tuple[Request, Status]) -> AccessFailed:
    """Return the error for a request and the status that it ended with."""
    request, status = failed
    what = (f"{Opcode(request.opcode).name.lower().replace('_', ' ')} of {request.count} bytes at "
            f"{request.address:#x}")
    match status:
        case Status.BUS_TIMEOUT:
            text = "the bus did not answer; call device.reset(), or load the bitstream again"
        case Status.BUS_ERROR:
            text = "the bus answered with an error; is there such a register?"
        case Status.NO_MEMORY:
            text = "there is no memory; check the device's memory size"
        case _:
            text = f"the device answered {status.name}; is it of another version?"
    return AccessFailed(f"{what} must succeed, but {text}")


def _open_port(name: str, baud: int) -> Any:
    """Open a port, for this process alone."""
    try:
        serial = importlib.import_module("serial")
    except ModuleNotFoundError as error:
        raise ToolMissingError(
            "a serial device needs pyserial, which is not installed: pip install pyserial"
        ) from error
    try:
        port = serial.Serial(name, baud, timeout=_POLL_S, write_timeout=_WRITE_S, exclusive=True)
    except (serial.SerialException, OSError) as error:
        if error.errno in (errno.EACCES, errno.EPERM):
            step = ("this user may not open it; join its group (on most Linux systems: "
                    "sudo usermod -aG dialout $USER, then log in again)")
        elif error.errno in (errno.EAGAIN, errno.EWOULDBLOCK, errno.EBUSY):
            step = "another program uses it; close that program"
        elif error.errno in (errno.ENOENT, errno.ENXIO, errno.ENODEV):
            step = ("there is no such port; plug the board in, and list the ports with "
                    "'python -m serial.tools.list_ports'")
        else:
            step = f"it gave {error}; list the ports with 'python -m serial.tools.list_ports'"
        raise PortUnavailable(f"serial port must be one that can be opened, not {name!r}: {step}"
                              ) from error
    except ValueError as error:
        raise InvalidOption(f"baud must be a rate that {name} has, not {baud}: {error}") from error
    # A USB-serial chip otherwise keeps short answers for 16 ms. Not every port has the setting.
    with contextlib.suppress(AttributeError, NotImplementedError, ValueError, OSError):
        port.set_low_latency_mode(True)
    return port


_VERB_BYTES = 128
"""What a line of a megabaud moves in the millisecond after which an adapter answers."""


class SerialTransport(Transport):
    """The five verbs over a serial line.

    Writes return before the device has done them: up to WINDOW requests are on their way. What
    reads, and waiting for the interrupt, first waits for them; an error of one is raised there.

    After :class:`LinkLost` every call raises it again, since nobody knows which writes were done,
    until :meth:`reconnect`, which :meth:`Device.reset` calls.

    A request is on its way from the statement on that enters it into the window: when a call is
    interrupted behind it, the request, be it half sent, is sent again like any that noise hit.

    Parameters
    ----------
    port : :class:`str`
        Name of the port, such as ``/dev/ttyUSB0`` or ``COM3``.
    baud : :class:`int`
        Bits a second.

    Raises
    ------
    PortUnavailable
        If the port does not exist, is in use or may not be opened.
    DeviceNotFound
        If nothing answers, or something that speaks another version of the protocol.
    ToolMissingError
        If pyserial is not installed.
    """

    def __init__(self, port: str, *, baud: int = BAUD) -> None:
        if not isinstance(baud, int) or baud < 1:
            raise InvalidOption(f"baud must be a positive number of bits a second, not {baud!r}")
        self._name, self._baud = port, baud
        self._port: Any = None
        self._closed = False
        self._connect()

    # -- the five verbs ----------------------------------------------------------------------------
    @property
    def verb_bytes(self) -> int:
        return _VERB_BYTES

    @property
    def memory_bytes(self) -> int:
        return self._memory_bytes

    def register_read(self, address: int) -> int:
        exchange = self._submit(Opcode.REGISTER_READ, address, REGISTER_BYTES)
        return int.from_bytes(self._collect([exchange]), "little")

    def register_write(self, address: int, value: int) -> None:
        if not 0 <= value < 1 << 32:
            raise InvalidOption(f"register value must fit 32 bits, not {value:#x}")
        self._submit(Opcode.REGISTER_WRITE, address, payload=value.to_bytes(4, "little"))

    def memory_read(self, address: int, count: int) -> Bytes:
        self._check_range(address, count)
        exchanges = [self._submit(Opcode.MEMORY_READ, at, min(MAX_PAYLOAD, address + count - at))
                     for at in range(address, address + count, MAX_PAYLOAD)]
        return np.frombuffer(self._collect(exchanges), np.uint8).copy()

    def memory_write(self, address: int, data: bytes | Bytes) -> None:
        raw = data if isinstance(data, bytes) else data.tobytes()
        self._check_range(address, len(raw))
        for at in range(0, len(raw), MAX_PAYLOAD):
            self._submit(Opcode.MEMORY_WRITE, address + at, payload=raw[at : at + MAX_PAYLOAD])

    def wait_interrupt(self, timeout_s: float) -> bool:
        self._flush()
        end = time.monotonic() + timeout_s
        # A level that a reply told holds: a host's write lowers it, a notice tells that it rose.
        while not self._interrupt:
            left = end - time.monotonic()
            until = time.monotonic() + min(left, _NOTICE_S)
            while not self._interrupt and time.monotonic() < until:
                self._receive()
            if not self._interrupt:
                self._collect([self._submit(Opcode.MEMORY_READ, 0, 0)])
            if left <= _NOTICE_S:
                break
        return self._interrupt

    def reconnect(self) -> bool:
        if (lost := self._lost) is None:
            return False
        try:
            self._connect()
        except BaseException:
            self._lost = lost
            raise
        return True

    def close(self) -> None:
        if self._closed:
            return
        try:
            with contextlib.suppress(LinkLost):
                self._flush()
        finally:
            self._closed = True
            self._port.close()

    def _check_range(self, address: int, count: int) -> None:
        if address < 0 or count < 0 or address + count > self._memory_bytes:
            raise UploadError(f"memory access must be within {self._memory_bytes:#x} bytes, not "
                              f"{count} bytes at {address:#x}")

    # -- session -----------------------------------------------------------------------------------
    def _connect(self) -> None:
        """Open the port and agree on numbers with the device."""
        if self._port is not None:
            self._port.close()
        self._lost: LinkLost | None = None
        self._window: deque[_Exchange] = deque()
        self._last_number = secrets.randbelow(NUMBERS)  # of the request before the window
        self._attempt = 0
        self._rounds = self._silent_rounds = 0
        self._timer = _REPLY_S
        self._deadline = 0.0
        self._heard = False  # something since the timer was started
        self._damaged = 0  # frames since requests were sent for the first time, or again
        self._interrupt = False
        self._failed: tuple[Request, Status] | None = None
        self._reader = FrameReader()
        self._port = _open_port(self._name, self._baud)
        try:
            # How long does an answer take here? A simulated board is slower than its line.
            begin = time.monotonic()
            self._memory_bytes = self._hello().memory_bytes
            self._timer = max(_REPLY_S, 4 * (time.monotonic() - begin))
            begin = time.monotonic()
            self._collect([self._submit(Opcode.MEMORY_READ, 0, MAX_PAYLOAD)])
            self._timer = max(_REPLY_S, 4 * (time.monotonic() - begin))
        except BaseException:
            self._port.close()
            raise

    def _hello(self) -> Hello:
        """Start a session and return what the device says about itself."""
        self._last_number = self._next_number()
        request = Request(number=self._last_number, opcode=Opcode.HELLO, count=HELLO_BYTES,
                          address=secrets.randbits(32))
        heard = 0
        for k in range(_HELLO_ATTEMPTS):
            # The first zero ends whatever was on the line.
            self._write(b"\0" + frame(request.content()))
            end = time.monotonic() + _REPLY_S * 2**k
            while time.monotonic() < end:
                data = self._read()
                heard += len(data)
                for reply in self._replies(data):
                    if (reply.opcode, reply.number) != (Opcode.HELLO, request.number):
                        continue
                    with contextlib.suppress(LinkError):
                        hello = Hello.parse(reply.payload)
                        if hello.nonce == request.address:
                            return self._checked(hello)
        what = "nothing answered" if not heard else f"{heard} bytes came, none of them an answer"
        raise DeviceNotFound(
            f"a moeaccel device must answer at {self._name} with {self._baud:,} baud, but {what}; "
            "load the bitstream, and check that it was built for this baud rate")

    def _checked(self, hello: Hello) -> Hello:
        if (hello.version, hello.window, hello.max_payload) != (VERSION, WINDOW, MAX_PAYLOAD):
            raise DeviceNotFound(
                f"device at {self._name} must speak version {VERSION} of the link (window "
                f"{WINDOW}, blocks of {MAX_PAYLOAD}), not version {hello.version} (window "
                f"{hello.window}, blocks of {hello.max_payload}); load the bitstream of this "
                "driver's version")
        return hello

    def _next_number(self) -> int:
        last = self._window[-1].request.number if self._window else self._last_number
        return (last + 1) % NUMBERS

    # -- requests and replies ----------------------------------------------------------------------
    def _submit(self, opcode: Opcode, address: int, count: int = 0, *,
                payload: bytes = b"") -> _Exchange:
        """Send a request when the window has room; its reply comes later."""
        self._check_usable()
        if self._failed is not None:
            self._flush()
        while len(self._window) >= WINDOW:
            self._receive()
        exchange = _Exchange(Request(
            number=self._next_number(), opcode=opcode, attempt=self._attempt,
            count=len(payload) or count, address=address, payload=payload))
        if not self._window:
            self._damaged = 0
            self._restart_timer()
        self._window.append(exchange)
        self._write(frame(exchange.request.content()))
        return exchange

    def _flush(self) -> None:
        """Wait until everything is answered, and raise the first error among the answers."""
        self._check_usable()
        while self._window:
            self._receive()
        if self._failed is not None:
            try:
                raise _access_error(self._failed)
            finally:  # not before it is raised: an interrupt must not lose it
                self._failed = None

    def _collect(self, exchanges: list[_Exchange]) -> bytes:
        """Wait for reads and return what they read."""
        self._flush()
        parts = []
        for exchange in exchanges:
            assert exchange.reply is not None
            parts.append(exchange.reply.payload)
        return b"".join(parts)

    def _check_usable(self) -> None:
        if self._closed:
            raise DeviceClosed("transport must not be used after it was closed; open a new device")
        if self._lost is not None:
            raise LinkLost(str(self._lost)) from self._lost

    def _receive(self) -> None:
        """Take what came, for a moment if nothing did; send again what got lost."""
        data = self._read()
        self._heard |= bool(data)
        damaged = self._reader.damaged
        for reply in self._replies(data):
            self._take(reply)
        self._damaged += self._reader.damaged - damaged
        while self._window and (reply := self._window[0].reply) is not None:
            request = self._window[0].request
            if reply.status is not Status.OK and self._failed is None:
                self._failed = request, reply.status
            self._last_number = request.number
            self._window.popleft()
        if not self._window:
            return
        if self._damaged >= sum(exchange.reply is None for exchange in self._window):
            self._send_again("replies were damaged")  # nothing else is on its way
        elif time.monotonic() > self._deadline and self._heard:
            # Something is coming, be it slowly; what is lost then shows when the line is silent.
            self._count_round("no answer came whole")
            self._restart_timer()
        elif time.monotonic() > self._deadline:
            self._silent_rounds += 1
            self._send_again("the device did not answer")

    def _take(self, reply: Reply) -> None:
        """Match a reply with its request."""
        self._interrupt = reply.interrupt
        if reply.opcode == Opcode.NOTICE and reply.status is Status.DAMAGED:
            if self._window and reply.attempt == self._attempt:
                self._send_again("a request was damaged")
            return
        behind = False
        for exchange in self._window:
            request = exchange.request
            if (request.number, request.opcode) != (reply.number, reply.opcode):
                behind |= exchange.reply is None
                continue
            if exchange.reply is not None:
                return
            if reply.status is Status.OUT_OF_ORDER:
                if reply.attempt == self._attempt:
                    self._send_again("a request got lost")
                return
            wanted = 0 if Opcode(request.opcode).writes or reply.status is Status.BAD_REQUEST \
                else request.count
            if len(reply.payload) != wanted:
                return
            exchange.reply = reply
            current = reply.attempt == self._attempt
            if self._silent_rounds and not current:
                # The line was not silent, only slow: the timer is too short for this device.
                self._timer *= 2
            self._rounds = self._silent_rounds = 0
            self._restart_timer()
            if current and behind:
                self._send_again("a reply got lost")
            return

    def _send_again(self, why: str) -> None:
        """Send everything unanswered again, in order, as another attempt."""
        self._count_round(why)
        self._attempt = (self._attempt + 1) % ATTEMPTS
        logger.debug("%s: sending again, attempt %d", why, self._attempt)
        data = bytearray(b"\0")
        for exchange in self._window:
            if exchange.reply is None:
                exchange.request = dataclasses.replace(exchange.request, attempt=self._attempt)
                data += frame(exchange.request.content())
        self._damaged = 0
        self._restart_timer()
        self._write(bytes(data))

    def _count_round(self, why: str) -> None:
        """Give up after too many rounds without an answer."""
        self._rounds += 1
        if self._rounds > _ROUNDS or self._silent_rounds > _SILENT_ROUNDS:
            raise self._lose(f"{why}, for the {self._rounds}th time in a row")

    def _restart_timer(self) -> None:
        self._deadline = time.monotonic() + self._timer * 2**self._silent_rounds
        self._heard = False

    # -- bytes -------------------------------------------------------------------------------------
    def _replies(self, data: bytes) -> list[Reply]:
        replies = []
        for content in self._reader.feed(data):
            if content is not None:
                with contextlib.suppress(LinkError):
                    replies.append(Reply.parse(content))
        return replies

    def _read(self) -> bytes:
        """Return what is there, or comes within a moment."""
        try:
            return self._port.read(max(1, self._port.in_waiting))
        except OSError as error:  # SerialException is one
            raise self._lose(f"the port gave {error}") from error

    def _write(self, data: bytes) -> None:
        try:
            self._port.write(data)
        except OSError as error:
            raise self._lose(f"the port gave {error}") from error

    def _lose(self, why: str) -> LinkLost:
        self._lost = LinkLost(
            f"the line to {self._name} must stay connected, but {why}; check cable and power, "
            f"then {_NEXT_STEP}")
        return self._lost


def _open(spec: DeviceSpec) -> tuple[Transport, AcceleratorConfig]:
    return SerialTransport(spec.argument, **spec.options), spec.config


SCHEME = Scheme(
    argument="PORT", help=f"a board at a serial port, `baud={BAUD:_}`, config `ulx3s`",
    time="the board's", config="ulx3s", sized=True, options=(SerialTransport,), open=_open)
