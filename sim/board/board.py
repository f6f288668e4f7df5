"""A whole board in simulation: serial line, accelerator, SDRAM, behind a pseudo-terminal.

>>> with Board("ulx3s") as board:                         # doctest: +SKIP
...     device = open_device(f"serial:{board.port}", config="ulx3s")

:class:`BoardProcess` runs one as a process of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import functools
import json
import os
import pty
import select
import subprocess
import sys
import threading
import tty
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from moeaccel.closing import Closing
from moeaccel.config import AcceleratorConfig, preset
from moeaccel.sim.cosim.accelerator import busy, parameters
from moeaccel.sim.cosim.sources import Design, design_from
from moeaccel.sim.cosim.verilator import Library, build_library
from moeaccel.sim.errors import ModelStopped, SimulationError

__all__ = ["CLOCK_HZ", "CYCLES_PER_BIT", "Board", "BoardProcess", "BoardState", "LineNoise",
           "build_board"]

CLOCK_HZ = 100_000_000
"""Of the board; only the SDRAM's limits, which are times, depend on it."""

CYCLES_PER_BIT = 4
"""Of the serial line: the least, because every byte costs ten times as many simulated cycles."""

_FOLDER = Path(__file__).resolve().parent
_SLICE_MS = 100  # Python looks for Ctrl-C only between calls
_MESSAGE_BYTES = 4096


class _Reason(enum.IntEnum):
    """Why the library's serve came back, see board.h."""

    TIME = 0
    STOPPED = 1
    VIOLATION = 2
    FAILED = 3
    LINE = 4


class _Noise(ctypes.Structure):
    _fields_ = [("seed", ctypes.c_uint64), ("flip", ctypes.c_uint32), ("lose", ctypes.c_uint32),
                ("repeat", ctypes.c_uint32)]


class _State(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_uint64) for name in (
        "cycles", "bytes_received", "bytes_sent", "flipped", "lost", "repeated")),
        ("violation", ctypes.c_uint32)]


@dataclass(frozen=True, kw_only=True)
class LineNoise:
    """What happens to bytes on the line, in both directions, each with a chance for every byte.

    Parameters
    ----------
    flip, lose, repeat : float
        Chances in [0, 1) that one bit is flipped, that the byte is lost, that it comes twice.
    seed : int
    """

    flip: float = 0.0
    lose: float = 0.0
    repeat: float = 0.0
    seed: int = 1

    def __post_init__(self) -> None:
        for name in ("flip", "lose", "repeat"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), not {getattr(self, name)!r}")


@dataclass(frozen=True, kw_only=True)
class BoardState:
    """What a board has counted.

    Parameters
    ----------
    cycles : int
        Of its clock; it stands still while the board has nothing to do.
    bytes_received, bytes_sent : int
        On the serial line, by the board.
    flipped, lost, repeated : int
        Bytes that noise hit.
    violation : str
        First rule of the SDRAM that was broken; ``NONE`` if none was.
    """

    cycles: int
    bytes_received: int
    bytes_sent: int
    flipped: int
    lost: int
    repeated: int
    violation: str


def _verilog(config: AcceleratorConfig, cycles_per_bit: int) -> str:
    from moeaccel.sim.board.model import board_verilog

    return board_verilog(config, clock_hz=CLOCK_HZ, cycles_per_bit=cycles_per_bit)


def board_design(config: AcceleratorConfig, cycles_per_bit: int = CYCLES_PER_BIT) -> Design:
    """Return a board's Verilog, to be made when a model of it has to be built."""
    return design_from(
        _FOLDER / "model.py", _FOLDER / "sdram_chip.py",
        parameters=f"{parameters(config)} {CLOCK_HZ} {cycles_per_bit}",
        verilog=functools.partial(_verilog, config, cycles_per_bit), busy=busy)


def build_board(config: str | AcceleratorConfig = "ulx3s", *,
                cycles_per_bit: int = CYCLES_PER_BIT, speedup: bool | None = None) -> Library:
    """Build the Verilated board, or take it from the cache."""
    return build_library(board_design(preset(config), cycles_per_bit),
                         harness=_FOLDER / "board.cpp", speedup=speedup)


class Board:
    """A simulated board, driven by a thread of this process or by :meth:`serve`.

    Parameters
    ----------
    config : str or AcceleratorConfig
    cycles_per_bit : int
        Clock cycles of a bit on the serial line, 4 or more.
    noise : LineNoise, optional

    Raises
    ------
    SimulationError
        If the model does not start.
    """

    def __init__(self, config: str | AcceleratorConfig = "ulx3s", *,
                 cycles_per_bit: int = CYCLES_PER_BIT, noise: LineNoise | None = None) -> None:
        self._handle: int | None = None
        noise = noise or LineNoise()
        library = ctypes.CDLL(str(build_board(config, cycles_per_bit=cycles_per_bit).path))
        self._library = _declare(library)
        message = ctypes.create_string_buffer(_MESSAGE_BYTES)
        rates = _Noise(noise.seed, *(round(rate * 2**32) for rate in (
            noise.flip, noise.lose, noise.repeat)))
        handle = self._library.moeaccel_board_open(
            cycles_per_bit, ctypes.byref(rates), message, _MESSAGE_BYTES)
        if handle is None:
            raise SimulationError(f"The board does not start: {message.value.decode()}")
        self._handle = handle
        self._line, self._slave = pty.openpty()  # our own end: hosts may come and go
        tty.setraw(self._slave)
        os.set_blocking(self._line, False)
        self._stop_reader, self._stop_writer = os.pipe()
        self._thread: threading.Thread | None = None
        self._error: SimulationError | None = None

    @property
    def port(self) -> str:
        """Name of the pseudo-terminal."""
        return os.ttyname(self._slave)

    @property
    def memory(self) -> npt.NDArray[np.uint8]:
        """The SDRAM's own bytes, uint8 (32 Mi,); they must not be used after :meth:`close`."""
        from moeaccel.hdl.memory.sdram import CHIP_BYTES

        address = self._library.moeaccel_board_memory(self._open)
        if not address:
            raise SimulationError("The model must have an array top.chip.memory.mem")
        return np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(ctypes.c_uint8)),
                                     (CHIP_BYTES,))

    @property
    def state(self) -> BoardState:
        """What it has counted so far."""
        from moeaccel.sim.board.sdram_chip import Violation

        raw = _State()
        self._library.moeaccel_board_read_state(self._open, ctypes.byref(raw))
        values: dict[str, Any] = {
            field.name: getattr(raw, field.name) for field in fields(BoardState)}
        values["violation"] = Violation(raw.violation).name
        return BoardState(**values)

    @property
    def _open(self) -> int:
        if self._handle is None:
            raise SimulationError("The board is closed")
        return self._handle

    def serve(self, *, stop: int | None = None) -> None:
        """Run the board until `stop`, a file descriptor, is readable or its other end closed.

        Raises
        ------
        ModelStopped
            If an assertion failed or a rule of the SDRAM was broken.
        """
        stop = self._stop_reader if stop is None else stop
        reason = _Reason.TIME
        while reason is _Reason.TIME:
            reason = _Reason(self._library.moeaccel_board_serve(
                self._open, self._line, stop, _SLICE_MS))
        state = self.state
        if reason is _Reason.VIOLATION:
            raise ModelStopped(f"The SDRAM's rule {state.violation} must be kept, but was broken "
                               f"before cycle {state.cycles}")
        if reason is not _Reason.STOPPED:
            log = self._library.moeaccel_board_log(self._open).decode(errors="replace")
            raise ModelStopped(f"The board stopped ({reason.name}) at cycle {state.cycles}:\n"
                               f"{log[-_MESSAGE_BYTES:]}")

    def start(self) -> Self:
        """Let a thread serve the board until :meth:`close`, which raises what it raised."""
        self._thread = threading.Thread(target=self._run, name="board", daemon=True)
        self._thread.start()
        return self

    def _run(self) -> None:
        try:
            self.serve()
        except SimulationError as error:
            self._error = error

    def close(self) -> None:
        """Let the board go; a second call does nothing.

        Raises
        ------
        ModelStopped
            If the thread ended with it.
        """
        if self._handle is None:
            return
        os.close(self._stop_writer)
        if self._thread is not None:
            self._thread.join()
        self._library.moeaccel_board_close(self._handle)
        self._handle = None
        for descriptor in (self._line, self._slave, self._stop_reader):
            os.close(descriptor)
        if self._error is not None:
            raise self._error

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self.close()


def _declare(library: ctypes.CDLL) -> Any:
    handle = ctypes.c_void_p
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "open": (handle, [ctypes.c_uint32, ctypes.POINTER(_Noise), ctypes.c_char_p,
                          ctypes.c_uint64]),
        "close": (None, [handle]),
        "memory": (ctypes.c_void_p, [handle]),
        "serve": (ctypes.c_int32, [handle, ctypes.c_int32, ctypes.c_int32, ctypes.c_uint32]),
        "read_state": (None, [handle, ctypes.POINTER(_State)]),
        "log": (ctypes.c_char_p, [handle]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, f"moeaccel_board_{name}")
        function.restype, function.argtypes = result, arguments
    return library


class BoardProcess(Closing):
    """A simulated board as a process of its own, which ends with this one.

    Parameters
    ----------
    config : str or AcceleratorConfig
    cycles_per_bit : int
    noise : LineNoise, optional
    start_s : float
        How long it may take until it is there; a first build takes minutes.

    Raises
    ------
    SimulationError
        If it does not start.
    """

    def __init__(self, config: str | AcceleratorConfig = "ulx3s", *,
                 cycles_per_bit: int = CYCLES_PER_BIT, noise: LineNoise | None = None,
                 start_s: float = 900.0) -> None:
        options = {"config": asdict(preset(config)), "cycles_per_bit": cycles_per_bit,
                   "noise": asdict(noise or LineNoise())}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "moeaccel.sim.board.board", json.dumps(options)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], start_s)
        self.port = self._process.stdout.readline().decode().strip() if ready else ""
        if not self.port:
            self._process.kill()
            self._process.wait()
            raise SimulationError(
                f"The board's process must name its port within {start_s:g} s; it did not, with "
                f"exit status {self._process.returncode}")

    @property
    def pid(self) -> int:
        """Number of the process."""
        return self._process.pid

    def close(self, *, timeout_s: float = 10.0) -> int:
        """End the process and return its exit status: 0 if nothing went wrong in it."""
        with contextlib.suppress(BrokenPipeError):
            if self._process.stdin is not None:
                self._process.stdin.close()  # what it waits for
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()
        finally:
            if self._process.stdout is not None:
                self._process.stdout.close()


def _main(options: dict[str, Any]) -> None:
    board = Board(AcceleratorConfig(**options["config"]), cycles_per_bit=options["cycles_per_bit"],
                  noise=LineNoise(**options["noise"]))
    sys.stdout.write(f"{board.port}\n")
    sys.stdout.flush()
    try:
        board.serve(stop=sys.stdin.fileno())
    finally:
        board.close()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        _main(json.loads(sys.argv[1]))
