"""Record what a driver asks of a device and what it gets; ``replay.py`` answers from it.

A recording is a text file of JSON lines. The first line says what it is: ``{"format":
"moeaccel recording", "version": 2, "config": ..., "digest": ..., "memory_bytes": ..., "verb_bytes":
...}``. Each further line is a call, ``{"call": verb, argument: value, ..., "result": value}``, or
``"error"`` and ``"message"`` in place of the result. Memory that was read is base64 of its
zlib-compressed bytes; of memory that was written the number of bytes and their BLAKE2b digest are
kept, which tells a difference, and a recording of weights stays small.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from moeaccel.config import AcceleratorConfig
from moeaccel.host.errors import (
    HostError,
    RecordingError,
)
from moeaccel.host.transports.base import Bytes, Transport

__all__ = ["FORMAT", "VERSION", "RecordTransport", "written"]

FORMAT = "moeaccel recording"
VERSION = 2
_DIGEST_BYTES = 16

_Result = TypeVar("_Result")


def written(data: bytes | Bytes) -> dict[str, Any]:
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
        self._put({"format": FORMAT, "version": VERSION, "config": config.name,
                   "digest": config.digest, "memory_bytes": transport.memory_bytes,
                   "verb_bytes": transport.verb_bytes})

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

    @property
    def verb_bytes(self) -> int:
        return self._transport.verb_bytes

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
        self._call({"call": "memory_write", "address": address} | written(data),
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
