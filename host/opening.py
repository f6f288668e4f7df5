"""Open a device: by what it is called, with the transport that this names."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from moeaccel.config import AcceleratorConfig, preset
from moeaccel.host import transports
from moeaccel.host.device import Device
from moeaccel.host.errors import InvalidOption
from moeaccel.host.options import check_names, whole
from moeaccel.host.transports.base import DeviceSpec, Transport
from moeaccel.host.transports.record import RecordTransport

__all__ = ["open_device"]


def open_device(spec: str | Transport, config: str | AcceleratorConfig | None = None, *,
                memory_bytes: int | None = None, timeout_s: float = 30.0, ring_log2: int = 4,
                watchdog_cycles: int = 1 << 24, polling: bool = False,
                record: str | Path | None = None, **options: Any) -> Device:
    """Open a device.

    Parameters
    ----------
    spec : :class:`str` or :class:`Transport`
        ``"golden"``: the bit-exact model; with ``timing=True`` it also states cycles.
        ``"rtl"``: the Verilated hardware in this process.
        ``"serial:PORT"``: a board at a serial port; option ``baud``. ``"xdma:N"``: a PCIe card.
        ``"replay:FILE"``: a recorded session. A transport is used as it is.
    config : :class:`str` or :class:`AcceleratorConfig`, optional
        What the device was built from: a preset's name, or a configuration; when left out,
        ``"ulx3s"`` at a serial port, the preset that a PCIe card names, else ``"small"``.
    memory_bytes : :class:`int`, optional
        Size of the memory on each channel. A model's costs only what is used; 4 GiB when left out.
        A PCIe card's is that of an Alveo U55C when left out. A board at a serial port or a
        recording says itself how much it has.
    timeout_s, ring_log2, watchdog_cycles, polling
        See :class:`Device`.
    record : path, optional
        File to which the session is recorded, for ``"replay:FILE"``.
    **options
        Passed to the transport.

    Raises
    ------
    UnsupportedTransport
        For a specification that this version does not know.
    InvalidOption
        For options that the transport does not have, or values of the wrong type or range.
    DeviceNotFound, ConfigMismatch
        If something else answers, or nothing.
    PortUnavailable
        If there is no such port, or it may not be opened.
    """
    if memory_bytes is not None:
        memory_bytes = whole("memory_bytes", memory_bytes, least=1)
    if record is not None and not isinstance(record, str | os.PathLike):
        raise InvalidOption(f"record must be the name of a file, not {record!r}")
    transport, chosen = _open(spec, config, memory_bytes, timeout_s, options)
    try:
        if record is not None:
            transport = RecordTransport(transport, record, chosen)
        return Device(transport, chosen, timeout_s=timeout_s, ring_log2=ring_log2,
                      watchdog_cycles=watchdog_cycles, polling=polling)
    except BaseException:
        transport.close()
        raise


def _open(spec: str | Transport, config: str | AcceleratorConfig | None, memory_bytes: int | None,
          timeout_s: float, options: dict[str, Any]) -> tuple[Transport, AcceleratorConfig]:
    """Return an open transport, and what the device was built from."""
    if isinstance(spec, Transport):
        _check_unsized("an open transport", memory_bytes)
        check_names("an open transport", options)
        return spec, preset("small" if config is None else config)
    name, scheme, argument = transports.scheme(spec)
    if scheme.sized:
        _check_unsized(f"{name}:...", memory_bytes)
    if scheme.options is not None:
        check_names(f"{name}:{scheme.argument}".rstrip(":"), options, *scheme.options)
    config = scheme.config if config is None else config
    return scheme.open(DeviceSpec(
        argument=argument, config=None if config is None else preset(config),
        memory_bytes=memory_bytes, timeout_s=timeout_s, options=options))


def _check_unsized(what: str, memory_bytes: int | None) -> None:
    if memory_bytes is not None:
        raise InvalidOption(f"memory_bytes must be left out for {what}, which says itself how much "
                            f"there is, not {memory_bytes}")
