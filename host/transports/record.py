"""Record what a driver asks of a device and what it gets; replay it where there is no device.

A recording is a text file of JSON lines. The first line says what it is: ``{"format":
"moeaccel recording", "version": 1, "config": ..., "digest": ..., "memory_bytes": ...}``. Each
further line is a call, ``{"call": verb, argument: value, ..., "result": value}``, or ``"error"``
and ``"message"`` in place of the result. Memory that was read is base64 of its zlib-compressed
bytes; of memory that was written the number of bytes and their BLAKE2b digest are kept, which
tells a difference, and a recording of weights stays small.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from moeaccel.config import AcceleratorConfig
from moeaccel.host import errors
from moeaccel.host.errors import (
    ConfigMismatch,
    DeviceClosed,
    HostError,
    RecordingError,
    ReplayMismatch,
)
from moeaccel.host.transports.base import Bytes, Transport

__all__ = ["RecordTransport", "ReplayTransport"]

_FORMAT = "moeaccel recording"
_VERSION = 1
_DIGEST_BYTES = 16

_Result = TypeVar("_Result")


def _written(data: bytes | Bytes) -> dict[str, Any]:
    """Return how the bytes of a write are kept."""
    raw = data if isinstance(data, bytes) else data.tobytes()
    return {"count": len(raw),
            "blake2b": hashlib.blake2b(raw, digest_size=_DIGEST_BYTES).hexdigest()}


class RecordTransport(Transport):
    """Pass everything on to a transport, and write it down.

    Every line is in the file when the call returns, so that a session that crashes is recorded as
    far as it came. What is no error of the driver (:class:`HostError`) is not recorded, so that a
    session in which a call was interrupted is replayed as far as there.

    Parameters
    ----------
    transport : :class:`Transport`
        Closed with this one.
    path : :class:`str` or path
        Overwritten.
    config : :class:`AcceleratorConfig`
        What the device was built from.

    Raises
    ------
    RecordingError
        If the file cannot be written.
    """

    def __init__(self, transport: Transport, path: str | Path, config: AcceleratorConfig) -> None:
        self._transport = transport
        self._path = path
        try:
            self._file = open(path, "w", encoding="utf-8", buffering=1)
        except OSError as error:
            raise RecordingError(
                f"record must name a file that can be written, not {str(path)!r}: {error}"
            ) from error
        self._put({"format": _FORMAT, "version": _VERSION, "config": config.name,
                   "digest": config.digest, "memory_bytes": transport.memory_bytes})

    def _put(self, line: dict[str, Any]) -> None:
        try:
            self._file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise RecordingError(f"recording {str(self._path)!r} must have room: {error}"
                                 ) from error

    def _call(self, line: dict[str, Any], function: Callable[[], _Result],
              keep: Callable[[_Result], Any] = lambda result: result) -> _Result:
        try:
            result = function()
        except HostError as error:
            self._put(line | {"error": type(error).__name__, "message": str(error)})
            raise
        self._put(line | {"result": keep(result)})
        return result

    @property
    def memory_bytes(self) -> int:
        return self._transport.memory_bytes

    def register_read(self, address: int) -> int:
        return self._call({"call": "register_read", "address": address},
                          lambda: self._transport.register_read(address))

    def register_write(self, address: int, value: int) -> None:
        self._call({"call": "register_write", "address": address, "value": value},
                   lambda: self._transport.register_write(address, value))

    def memory_read(self, address: int, count: int) -> Bytes:
        return self._call(
            {"call": "memory_read", "address": address, "count": count},
            lambda: self._transport.memory_read(address, count),
            lambda data: base64.b64encode(zlib.compress(data.tobytes())).decode())

    def memory_write(self, address: int, data: bytes | Bytes) -> None:
        self._call({"call": "memory_write", "address": address} | _written(data),
                   lambda: self._transport.memory_write(address, data))

    def wait_interrupt(self, timeout_s: float) -> bool:
        return self._call({"call": "wait_interrupt"},
                          lambda: self._transport.wait_interrupt(timeout_s))

    def reconnect(self) -> bool:
        return self._call({"call": "reconnect"}, self._transport.reconnect)

    def close(self) -> None:
        if not self._file.closed:
            with contextlib.closing(self._file):
                self._call({"call": "close"}, self._transport.close)


class ReplayTransport(Transport):
    """Answer as a recorded device did, as long as the driver asks the same.

    Timeouts are not compared: what was recorded comes at once. After the first difference every
    call names it; so does every call after one that was interrupted, unless it goes on as recorded.

    Parameters
    ----------
    path : :class:`str` or path
        Of a :class:`RecordTransport`.
    config : :class:`AcceleratorConfig`
        Must be the recorded one.

    Raises
    ------
    RecordingError
        If the file is missing, or is no recording of this version.
    ConfigMismatch
        If another configuration was recorded.
    """

    def __init__(self, path: str | Path, config: AcceleratorConfig) -> None:
        self._path = path
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise RecordingError(f"replay must name a recording, not {str(path)!r}: {error}"
                                 ) from error
        self._lines = lines
        self._at = 0
        self._difference: ReplayMismatch | None = None
        head = self._next("a head")
        if (head.get("format"), head.get("version")) != (_FORMAT, _VERSION):
            raise RecordingError(
                f"{str(path)!r} must begin as a recording of version {_VERSION}, not with "
                f"{lines[0][:60]!r}; record the session again with this version")
        if not all(isinstance(head.get(name), int) for name in ("digest", "memory_bytes")):
            raise RecordingError(f"head of {str(path)!r} must name digest and memory_bytes, not "
                                 f"{lines[0][:60]!r}; record the session again")
        if head["digest"] != config.digest:
            raise ConfigMismatch(
                f"recording must be of config {config.name!r}, not {head.get('config')!r}; open it "
                "with the config that it was recorded with")
        self._memory_bytes: int = head["memory_bytes"]

    def _next(self, asked: str) -> dict[str, Any]:
        if self._at == len(self._lines):
            self._difference = ReplayMismatch(
                f"recording {str(self._path)!r} ends after {self._at} lines, but the driver asked "
                f"for {asked}; record the session again")
            raise self._difference
        line = self._lines[self._at]
        self._at += 1
        try:
            found = json.loads(line)
        except json.JSONDecodeError:
            found = None
        if not isinstance(found, dict):
            raise RecordingError(f"line {self._at} of {str(self._path)!r} must be a JSON object, "
                                 f"not {line[:60]!r}")
        return found

    def _call(self, **asked: Any) -> Any:
        """Check that the next recorded call is the one that is asked for; return its result."""
        if self._at < 0:
            raise DeviceClosed("transport must not be used after it was closed; open a new device")
        if self._difference is not None:
            raise ReplayMismatch(str(self._difference))
        text = _text(asked)
        recorded = self._next(text)
        result = recorded.pop("result", None)
        error, message = recorded.pop("error", None), recorded.pop("message", "")
        if recorded != asked:
            self._difference = ReplayMismatch(
                f"driver must ask what was recorded in line {self._at} of {str(self._path)!r}, "
                f"{_text(recorded)}, not {text}; record the session again if the driver changed")
            raise self._difference
        if error is not None:
            kind = getattr(errors, error, HostError)
            raise kind(message)
        return result

    @property
    def memory_bytes(self) -> int:
        return self._memory_bytes

    def register_read(self, address: int) -> int:
        return self._call(call="register_read", address=address)

    def register_write(self, address: int, value: int) -> None:
        self._call(call="register_write", address=address, value=value)

    def memory_read(self, address: int, count: int) -> Bytes:
        text = self._call(call="memory_read", address=address, count=count)
        try:
            data = zlib.decompress(base64.b64decode(text))
        except (zlib.error, binascii.Error) as error:
            raise RecordingError(
                f"result in line {self._at} of {str(self._path)!r} must be compressed bytes: "
                f"{error}") from error
        return np.frombuffer(data, np.uint8).copy()

    def memory_write(self, address: int, data: bytes | Bytes) -> None:
        self._call(call="memory_write", address=address, **_written(data))

    def wait_interrupt(self, timeout_s: float) -> bool:
        del timeout_s
        return self._call(call="wait_interrupt")

    def reconnect(self) -> bool:
        return self._call(call="reconnect")

    def close(self) -> None:
        if self._at >= 0:
            self._at = -1


def _text(call: dict[str, Any]) -> str:
    """Return a call for messages: numbers in hexadecimal."""
    values = [f"{name} {value:#x}" if isinstance(value, int) else f"{name} {value}"
              for name, value in call.items() if name != "call"]
    return f"{call.get('call')}({', '.join(values)})"
