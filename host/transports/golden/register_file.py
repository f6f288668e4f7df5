"""Registers and counters."""

from __future__ import annotations

from moeaccel.config import AcceleratorConfig
from moeaccel.host.errors import InvalidOption
from moeaccel.host.registers import mask
from moeaccel.interface.registers import COUNTERS, REGISTERS, Access, Register, built_values

_COUNTER_BITS = 48
_BY_ADDRESS = {register.address: register for register in REGISTERS.values()}
_PHASE = -1  # kept among the registers, at no address, so that it changes with the ring's indices


class RegisterFile:
    """What the registers hold.

    Parameters
    ----------
    config : :class:`AcceleratorConfig`

    Attributes
    ----------
    counters : dict of str and int
        By name; more bits than the registers show.
    """

    def __init__(self, config: AcceleratorConfig) -> None:
        self._values = {r.address: r.reset for r in REGISTERS.values()}
        self.set(**built_values(config))
        self._values[_PHASE] = 1
        self.counters = {name: 0 for name, _ in COUNTERS}

    def read(self, address: int) -> int:
        """Return what the host reads.

        Raises
        ------
        InvalidOption
            If there is no register.
        """
        register = _BY_ADDRESS.get(address)
        if register is None:
            raise InvalidOption(f"register address must be in the register map, not {address:#x}")
        name, _, half = register.name.rpartition("_")
        if name.lower() in self.counters:
            value = self.counters[name.lower()] & ((1 << _COUNTER_BITS) - 1)
            return value >> 32 if half == "HI" else value & 0xFFFF_FFFF
        return self._values[address]

    def write(self, address: int, value: int) -> tuple[Register, int]:
        """Store what the host writes; return the register, and the value with the bits it has.

        Raises
        ------
        InvalidOption
            If there is no register, or the value is not one of 32 bits.
        """
        register = _BY_ADDRESS.get(address)
        if register is None or not 0 <= value < 1 << 32:
            raise InvalidOption("register write must be 32 bits to an address in the register "
                                f"map, not {value:#x} to {address:#x}")
        if register.fields:
            value &= sum(((1 << f.bits) - 1) << f.offset for f in register.fields)
        if register.access is Access.RW:
            self._values[address] = value
        elif register.access is Access.W1C:
            self._values[address] &= ~value
        return register, value

    def get(self, name: str) -> int:
        """Return a register."""
        return self._values[REGISTERS[name].address]

    def get64(self, name: str) -> int:
        """Return the two halves of a register."""
        return self.get(f"{name}_HI") << 32 | self.get(f"{name}_LO")

    def set(self, **values: int) -> None:
        """Set registers, all at once."""
        self._values |= {REGISTERS[name].address: value for name, value in values.items()}

    def raise_bit(self, register: str, field: str) -> None:
        """Set a bit."""
        self.set(**{register: self.get(register) | mask(register, field)})

    @property
    def phase(self) -> int:
        """Phase bit of the next completion."""
        return self._values[_PHASE]

    def completed(self, tail: int) -> None:
        """Move on behind a completion: ``tail``, interrupt and phase, all at once."""
        self._values |= {
            REGISTERS["CQ_TAIL"].address: tail,
            REGISTERS["IRQ_STATUS"].address:
                self.get("IRQ_STATUS") | mask("IRQ_STATUS", "completion"),
            _PHASE: self.phase ^ (tail == 0)}

    def count(self, **amounts: int) -> None:
        """Add to counters."""
        for name, amount in amounts.items():
            self.counters[name] += amount

    def reset(self) -> None:
        """Do what a soft reset does to registers and counters."""
        self.set(SQ_HEAD=0, SQ_TAIL=0, CQ_HEAD=0, CQ_TAIL=0)
        self._values[_PHASE] = 1
        self.counters = dict.fromkeys(self.counters, 0)
        self.raise_bit("IRQ_STATUS", "reset_done")
