"""A recorded session answers in place of its device; ``record.py`` has the file's format."""

from __future__ import annotations

import base64
import binascii
import json
import zlib
from pathlib import Path
from typing import Any

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
from moeaccel.host.transports.base import Bytes, DeviceSpec, Scheme, Transport
from moeaccel.host.transports.record import FORMAT, VERSION, written

__all__ = ["SCHEME", "ReplayTransport"]


_HEAD = ("digest", "memory_bytes", "verb_bytes")


class ReplayTransport(Transport):
    """Answer as a recorded device did, as long as the driver asks the same.

    Timeouts are not compared: what was recorded comes at once. After the first difference every
    call names it; so does every call after one that was interrupted, unless it goes on as recorded.

    Parameters
    ----------
    path : :class:`str` or path
        Of a :class:`~moeaccel.host.transports.record.RecordTransport`.
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
        if (head.get("format"), head.get("version")) != (FORMAT, VERSION):
            raise RecordingError(
                f"{str(path)!r} must begin as a recording of version {VERSION}, not with "
                f"{lines[0][:60]!r}; record the session again with this version")
        if not all(isinstance(head.get(name), int) for name in _HEAD):
            raise RecordingError(f"head of {str(path)!r} must name {', '.join(_HEAD)}, not "
                                 f"{lines[0][:60]!r}; record the session again")
        if head["digest"] != config.digest:
            raise ConfigMismatch(
                f"recording must be of config {config.name!r}, not {head.get('config')!r}; open it "
                "with the config that it was recorded with")
        self._memory_bytes: int = head["memory_bytes"]
        self._verb_bytes: int = head["verb_bytes"]

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

    @property
    def verb_bytes(self) -> int:
        return self._verb_bytes

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
        self._call(call="memory_write", address=address, **written(data))

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


def _open(spec: DeviceSpec) -> tuple[Transport, AcceleratorConfig]:
    config = spec.config
    return ReplayTransport(spec.argument, config, **spec.options), config


SCHEME = Scheme(
    argument="FILE", help="a recorded session", time="the recorded one's", sized=True,
    options=(ReplayTransport,), open=_open)
