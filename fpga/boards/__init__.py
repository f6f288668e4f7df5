"""Boards that bitstreams can be built for, one module each."""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

from moeaccel.config import AcceleratorConfig
from moeaccel.errors import UnknownBoardError

__all__ = ["BOARDS", "Board", "Design", "board"]


@dataclass(frozen=True, kw_only=True)
class Design:
    """What the tools need to build a bitstream.

    Parameters
    ----------
    verilog : str
        Text with the module ``top``.
    constraints : str
        Text of an LPF file: pins, their electrical standards, the oscillator.
    route : tuple of str
        Flags of nextpnr that name the device.
    pack : tuple of str
        Flags of ecppack.
    """

    verilog: str
    constraints: str
    route: tuple[str, ...]
    pack: tuple[str, ...]


class Board(ABC):
    """A board: how its design is made, and how a bitstream gets onto it.

    Attributes
    ----------
    name : str
    part : str
        The FPGA, for tables.
    config : str
        Preset that fits it.
    clock_hz, baud : int
        What is built when nothing else is asked for.
    """

    name: str
    part: str
    config: str
    clock_hz: int
    baud: int

    @abstractmethod
    def design(self, config: AcceleratorConfig, *, clock_hz: int, baud: int) -> Design:
        """Return the design for a configuration, a clock and a rate of the serial line.

        Raises
        ------
        ClockRateError
            If the board cannot make that clock, or that rate from it.
        """

    @abstractmethod
    def program(self, bitstream: Path) -> tuple[str, ...]:
        """Return the commands that load a bitstream, any of which does."""


BOARDS = tuple(module.name for module in pkgutil.iter_modules(__path__))
"""Names of all boards: of the modules here, each of which has a ``BOARD``."""


def board(name: str) -> Board:
    """Return the board of that name.

    Raises
    ------
    UnknownBoardError
        If there is none.
    """
    if name not in BOARDS:
        raise UnknownBoardError(f"board must be one of {', '.join(BOARDS)}, not {name!r}")
    return importlib.import_module(f"{__name__}.{name}").BOARD
