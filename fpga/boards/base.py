"""What a board is: a device, what is built for it, how, and what drives it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from moeaccel.config import AcceleratorConfig

__all__ = ["BitstreamBoard", "Board", "Design", "ProjectBoard"]


class Board(ABC):
    """A board.

    Attributes
    ----------
    name : str
        That of its file.
    title : str
        For people.
    part : str
        The FPGA.
    family : str
        Its multipliers: one of :data:`moeaccel.hdl.array.multiplier.FAMILIES`.
    memory : str
        What the accelerator's weights lie in.
    resources : mapping of str to int
        What the FPGA has, by the names that reports use.
    config : str
        Preset that is built when nothing else is asked for.
    clock_hz : int
        And its clock.
    transport : str
        What drives it: the ``spec`` of :func:`moeaccel.host.open_device`.
    command : str
        Command line that builds for boards of its kind; its option ``--board`` names one.
    """

    name: str
    title: str
    part: str
    family: str
    memory: str
    resources: Mapping[str, int]
    config: str
    clock_hz: int
    transport: str
    command: ClassVar[str]


@dataclass(frozen=True, kw_only=True)
class Design:
    """What the open tools need of a board's design.

    Parameters
    ----------
    verilog : str
        Text with the module ``top``.
    constraints : str
        Text of an LPF file: pins, their electrical standards, the oscillator.
    """

    verilog: str
    constraints: str


class BitstreamBoard(Board):
    """A board with an ECP5: Yosys, nextpnr and ecppack make its bitstream.

    Attributes
    ----------
    route, pack : tuple of str
        Flags of nextpnr that name the device, and flags of ecppack.
    baud : int
        Rate of its serial line when nothing else is asked for.
    """

    command = "moeaccel bitstream"
    route: tuple[str, ...]
    pack: tuple[str, ...]
    baud: int

    @abstractmethod
    def design(self, config: AcceleratorConfig, *, clock_hz: int, baud: int) -> Design:
        """Return the design for a configuration, a clock and a rate of the serial line.

        Raises
        ------
        ClockRateError
            If the board cannot make that clock, or that rate from it.
        """

    def sites(self, config: AcceleratorConfig) -> Mapping[str, str]:
        """Return the sites of cells that must not lie elsewhere, by ends of their names.

        See :func:`moeaccel.fpga.netlist.place`.
        """
        del config
        return {}

    @abstractmethod
    def program(self, bitstream: Path) -> tuple[str, ...]:
        """Return the commands that load a bitstream, any of which does."""


class ProjectBoard(Board):
    """A board with a device that only its vendor's tools know: they get a project."""

    command = "moeaccel verilog"

    @abstractmethod
    def project(self, config: AcceleratorConfig, *, name: str, core_mhz: float) -> dict[str, str]:
        """Return the project's files by name.

        Parameters
        ----------
        config : AcceleratorConfig
        name : str
            Of the accelerator's Verilog beside them, ``<name>.v``, with multipliers for `family`.
        core_mhz : float
            Clock of the accelerator.

        Raises
        ------
        ConfigurationError
            If the board has not the memory channels that the configuration asks for, or not the
            clock.
        """
