"""Errors of the simulation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moeaccel.errors import MoeAccelError


class SimulationError(MoeAccelError):
    """Base of the simulation's errors."""


class BuildError(SimulationError):
    """Verilator or the C++ compiler refused the model.

    Attributes
    ----------
    log : pathlib.Path
        Everything the tools said.
    """

    def __init__(self, message: str, *, log: Path) -> None:
        super().__init__(message)
        self.log = log


class SimulationTimeout(SimulationError, TimeoutError):
    """The model did not do in time what was waited for."""


class RegisterResponseError(SimulationError):
    """A register access was answered with an error.

    Attributes
    ----------
    address : int
    response : int
        The bus's response: 2 for SLVERR, 3 for DECERR.
    """

    def __init__(self, message: str, *, address: int, response: int) -> None:
        super().__init__(message)
        self.address = address
        self.response = response


class ModelStopped(SimulationError):
    """An assertion of the RTL failed, or the model called ``$stop``, ``$fatal`` or ``$finish``."""


@dataclass(frozen=True, kw_only=True)
class Violation:
    """A broken bus rule.

    Parameters
    ----------
    cycle : int
        Clock cycle.
    channel : str
        Port and channel, such as ``axi_mem.AR``.
    text : str
        What was broken.
    """

    cycle: int
    channel: str
    text: str

    def __str__(self) -> str:
        return f"cycle {self.cycle}: {self.channel}: {self.text}"


class ProtocolError(SimulationError):
    """The model broke a rule of AXI.

    Attributes
    ----------
    violations : tuple of Violation
        The first ones.
    count : int
        All of them.
    """

    SHOWN = 8

    def __init__(self, violations: tuple[Violation, ...], *, count: int) -> None:
        shown = [f"  {violation}" for violation in violations[:self.SHOWN]]
        if count > len(shown):
            shown.append(f"  and {count - len(shown)} more")
        super().__init__("\n".join([f"{count} violations of the AXI protocol", *shown]))
        self.violations = violations
        self.count = count
