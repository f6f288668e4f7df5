"""Is it a device of ours, of this driver's version, and built from which configuration?"""

from __future__ import annotations

from moeaccel.config import PRESETS, AcceleratorConfig
from moeaccel.host.errors import ConfigMismatch, DeviceNotFound
from moeaccel.host.registers import RegisterAccess
from moeaccel.interface.registers import ID_VALUE, VERSION_VALUE

__all__ = ["check_config", "check_version", "detect_config"]


def check_version(registers: RegisterAccess) -> None:
    """Check ID and VERSION.

    Raises
    ------
    DeviceNotFound
        If they are not those of a device that this driver knows.
    """
    found = registers.read("ID")
    if found != ID_VALUE:
        raise DeviceNotFound(f"register ID must read {ID_VALUE:#010x}, not {found:#010x}; "
                             "this is no moeaccel device, or its clock does not run")
    found = registers.read("VERSION")
    major, minor = VERSION_VALUE >> 16, VERSION_VALUE & 0xFFFF
    if found >> 16 != major or found & 0xFFFF < minor:
        raise DeviceNotFound(
            f"register VERSION must be {major}.{minor}, or a later {major}.x, not "
            f"{found >> 16}.{found & 0xFFFF}; use the driver of the device's version, or load "
            "the bitstream of this driver's")


def _preset_of(digest: int) -> AcceleratorConfig | None:
    return next((config for config in PRESETS.values() if config.digest == digest), None)


def check_config(registers: RegisterAccess, config: AcceleratorConfig) -> None:
    """Check CONFIG_HASH.

    Raises
    ------
    ConfigMismatch
        If it is not that of ``config``.
    """
    found = registers.read("CONFIG_HASH")
    if found != config.digest:
        other = _preset_of(found)
        raise ConfigMismatch(
            f"register CONFIG_HASH must be {config.digest:#010x} (config {config.name!r}), not "
            f"{found:#010x} ({f'config {other.name!r}' if other else 'no preset'}); open the "
            "device with the config that it was built from")


def detect_config(registers: RegisterAccess) -> AcceleratorConfig:
    """Return the preset that a device was built from.

    Raises
    ------
    DeviceNotFound
        See :func:`check_version`.
    ConfigMismatch
        If it is none of the presets.
    """
    check_version(registers)
    found = registers.read("CONFIG_HASH")
    config = _preset_of(found)
    if config is None:
        raise ConfigMismatch(
            f"register CONFIG_HASH must be that of a preset ({', '.join(PRESETS)}), not "
            f"{found:#010x}; open the device with the config that it was built from")
    return config
