"""Registers by name, over any transport."""

from __future__ import annotations

from moeaccel.host.transports.base import Transport
from moeaccel.interface.registers import COUNTERS, REGISTERS

__all__ = ["RegisterAccess", "fields_of", "mask"]


def mask(register: str, field: str | None = None) -> int:
    """Return the mask of a field of a register, or of all of them."""
    return sum(((1 << f.bits) - 1) << f.offset for f in REGISTERS[register].fields
               if field in (f.name, None))


def fields_of(register: str, value: int) -> tuple[str, ...]:
    """Return the names of the fields of a register that are not 0 in a value."""
    return tuple(f.name for f in REGISTERS[register].fields if value & mask(register, f.name))


class RegisterAccess:
    """Read and write registers by the names of :data:`moeaccel.interface.registers.REGISTERS`.

    Parameters
    ----------
    transport : :class:`Transport`
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def read(self, name: str) -> int:
        """Return a 32-bit register."""
        return self._transport.register_read(REGISTERS[name].address)

    def write(self, name: str, value: int) -> None:
        """Write a 32-bit register."""
        self._transport.register_write(REGISTERS[name].address, value)

    def write64(self, name: str, value: int) -> None:
        """Write a pair of registers, ``name_LO`` and ``name_HI``."""
        self.write(f"{name}_LO", value & 0xFFFF_FFFF)
        self.write(f"{name}_HI", value >> 32)

    def counter(self, name: str) -> int:
        """Return a counter that may be running: high, low, high until both highs agree."""
        high = self.read(f"{name.upper()}_HI")
        while True:
            low = self.read(f"{name.upper()}_LO")
            before, high = high, self.read(f"{name.upper()}_HI")
            if before == high:
                return high << 32 | low

    def counters(self) -> dict[str, int]:
        """Return every counter by name."""
        return {name: self.counter(name) for name, _ in COUNTERS}
