"""Drive a Verilated accelerator from Python: registers, memory, clock, statistics.

>>> model = build_model(verilog)                                     # doctest: +SKIP
>>> with CoSimulation(model, memory=MemoryModel.ideal(40)) as cosim:  # doctest: +SKIP
...     cosim.mem_write(0x1000, weights)
...     cosim.reg_write(0x10, 1)
...     cosim.wait_irq(max_cycles=1_000_000)

The clock moves only inside :meth:`CoSimulation.run`, :meth:`CoSimulation.wait_irq`, register
accesses and resets; memory accesses take no time. The hot loop is C++ (``harness.cpp``).
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import functools
import mmap
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moeaccel.closing import Closing
from moeaccel.sim.cosim.memory import CHANNELS, MemoryModel, MemoryStats, StallModel
from moeaccel.sim.cosim.verilator import Model
from moeaccel.sim.errors import (
    ModelStopped,
    ProtocolError,
    RegisterResponseError,
    SimulationError,
    SimulationTimeout,
    Violation,
)

_API_VERSION = 2
_WRITTEN_BYTES = 64  # MOEACCEL_WRITTEN_BYTES of harness.h
_NEVER = (1 << 64) - 1
_MESSAGE_BYTES = 4096
# Python looks for signals (Ctrl-C) only between calls: one takes about this long, in seconds, and
# at least so many cycles, which cost no more than the call itself.
_SLICE_S = 0.1
_FIRST_CYCLES, _LEAST_CYCLES = 1 << 14, 1 << 8
_RESPONSES = {2: "SLVERR", 3: "DECERR"}
# Python 3.11's mmap does not name this flag.
_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x40 if sys.platform == "darwin" else 0x4000)


class StopReason(enum.Enum):
    """Why :meth:`CoSimulation.run` came back."""

    CYCLES = 0
    IRQ = 1


# Other values of the harness's reasons, which become exceptions.
_VIOLATION, _STOP, _FINISH, _TIMEOUT, _DONE = range(2, 7)


class _MemoryConfig(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p), ("written", ctypes.c_void_p),
        *((name, ctypes.c_uint64) for name in
          ("size", "seed", "bandwidth_numerator", "bandwidth_denominator")),
        *((name, ctypes.c_uint32) for name in
          ("shared_bandwidth", "never_refuse", "read_latency", "write_latency",
           "read_latency_most", "write_latency_most", "last_beat_delay", "max_reads",
           "max_writes", "refresh_interval", "refresh_cycles", "turnaround_cycles", "row_bytes",
           "banks", "row_miss_cycles")),
        ("stall", ctypes.c_uint32 * len(CHANNELS)),
        *((name, ctypes.c_uint32) for name in
          ("stall_length", "reorder", "interleave", "response_timeout", "check_races")),
    ]


class _RegisterConfig(ctypes.Structure):
    _fields_ = [
        ("seed", ctypes.c_uint64),
        ("stall", ctypes.c_uint32 * len(CHANNELS)),
        ("stall_length", ctypes.c_uint32),
    ]


class _Stats(ctypes.Structure):
    _fields_ = [(field.name, ctypes.c_uint64) for field in fields(MemoryStats)]


@functools.cache
def _open_library(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path), mode=ctypes.RTLD_LOCAL)
    handle, u32, u64, text = ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint64, ctypes.c_char_p
    u32_out, u64_out = ctypes.POINTER(u32), ctypes.POINTER(u64)
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "api_version": (u32, []),
        "port_count": (u32, []),
        "data_bytes": (u32, []),
        "open": (handle, [ctypes.POINTER(_MemoryConfig), ctypes.POINTER(_RegisterConfig), u32,
                          text, u64]),
        "close": (None, [handle]),
        "reset": (ctypes.c_int32, [handle, u64, u32]),
        "run": (ctypes.c_int32, [handle, u64, u32]),
        "cycle": (u64, [handle]),
        "irq": (u32, [handle]),
        "register_read": (ctypes.c_int32, [handle, u32, u64, u32_out, u32_out]),
        "register_write": (ctypes.c_int32, [handle, u32, u32, u32, u64, u32_out]),
        "inject_error": (None, [handle, u32, u64, u64, u32, u32, u32]),
        "clear_errors": (None, [handle, u32]),
        "read_stats": (None, [handle, u32, ctypes.POINTER(_Stats)]),
        "clear_stats": (None, [handle, u32]),
        "violation_count": (u64, [handle]),
        "violation": (text, [handle, u64, u64_out, ctypes.POINTER(text)]),
        "clear_violations": (None, [handle]),
        "log": (text, [handle]),
        "waves_start": (ctypes.c_int32, [handle, text]),
        "waves_stop": (None, [handle]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, f"moeaccel_{name}")
        function.restype = result
        function.argtypes = arguments
    version = library.moeaccel_api_version()
    if version != _API_VERSION:
        raise SimulationError(
            f"Model {path} must have interface version {_API_VERSION}, not {version}: build again")
    return library


def _new_memory(size: int) -> npt.NDArray[np.uint8]:
    """Return zeroed bytes whose pages cost nothing until they are touched."""
    try:
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
    except (OSError, OverflowError) as error:
        raise SimulationError(
            f"The system refuses {size} bytes of address space for a memory: {error}") from error
    return np.frombuffer(pages, dtype=np.uint8)


def _thresholds(stalls: StallModel) -> Any:
    values = (round(getattr(stalls, name) * 65536) for name in CHANNELS)
    return (ctypes.c_uint32 * len(CHANNELS))(*values)


def _memory_config(model: MemoryModel, data: npt.NDArray[np.uint8],
                   written: npt.NDArray[np.uint8] | None, *, port: int) -> _MemoryConfig:
    rate = model.bytes_per_cycle or 0
    return _MemoryConfig(
        data=data.ctypes.data, written=None if written is None else written.ctypes.data,
        size=model.size,
        seed=(model.seed + port * 0x9E3779B97F4A7C15) & _NEVER,
        bandwidth_numerator=rate.numerator, bandwidth_denominator=rate.denominator,
        shared_bandwidth=model.shared, never_refuse=model.never_refuse,
        read_latency=model.read_latency, write_latency=model.write_latency,
        read_latency_most=model.read_latency_most, write_latency_most=model.write_latency_most,
        last_beat_delay=model.last_beat_delay,
        max_reads=model.max_reads, max_writes=model.max_writes,
        refresh_interval=model.refresh_interval, refresh_cycles=model.refresh_cycles,
        turnaround_cycles=model.turnaround_cycles, row_bytes=model.row_bytes, banks=model.banks,
        row_miss_cycles=model.row_miss_cycles, stall=_thresholds(model.stalls),
        stall_length=model.stalls.length, reorder=model.reorder, interleave=model.interleave,
        response_timeout=model.response_timeout, check_races=model.check_races)


class CoSimulation(Closing):
    """A Verilated accelerator with its memories; power-on reset is done when it is made.

    Parameters
    ----------
    model : Model
        From :func:`moeaccel.sim.cosim.verilator.build_model`.
    memory : MemoryModel or sequence of MemoryModel, optional
        For every memory port the same, or one for each; ideal when left out. Each port has a memory
        of its own.
    register_stalls : StallModel, optional
        Pauses of the register master's side of its channels.
    register_timeout : int
        Cycles that a register access may take.
    strict : bool
        Raise :class:`ProtocolError` as soon as the model breaks a bus rule. Else violations wait
        in :meth:`violations`.
    seed : int
        Of the register master's pauses.
    """

    def __init__(self, model: Model, *, memory: MemoryModel | Sequence[MemoryModel] | None = None,
                 register_stalls: StallModel | None = None, register_timeout: int = 10_000,
                 strict: bool = True, seed: int = 1) -> None:
        if not isinstance(register_timeout, int) or register_timeout < 1:
            raise ValueError(
                f"Register timeout must be a positive number of cycles, not {register_timeout!r}")
        self._handle: int | None = None
        self._process = os.getpid()
        self._slice_cycles = _FIRST_CYCLES
        self._library = _open_library(model.library)
        self._model = model
        self._register_timeout = register_timeout
        ports = self._library.moeaccel_port_count()
        memory = memory or MemoryModel.ideal()
        models = (memory,) * ports if isinstance(memory, MemoryModel) else tuple(memory)
        if len(models) != ports:
            raise ValueError(f"Memory models must be one or {ports}, not {len(models)}")
        self._memory_models = models
        self._memories = tuple(_new_memory(one.size) for one in models)
        self._written = tuple(
            _new_memory(one.size // _WRITTEN_BYTES) if one.check_unwritten else None
            for one in models)
        configs = (_MemoryConfig * ports)(*(
            _memory_config(one, data, written, port=port) for port, (one, data, written)
            in enumerate(zip(models, self._memories, self._written, strict=True))))
        stalls = register_stalls or StallModel()
        registers = _RegisterConfig(seed=seed, stall=_thresholds(stalls),
                                    stall_length=stalls.length)
        message = ctypes.create_string_buffer(_MESSAGE_BYTES)
        self._handle = self._library.moeaccel_open(configs, ctypes.byref(registers), strict,
                                                   message, _MESSAGE_BYTES)
        if self._handle is None:
            raise SimulationError(f"The model does not start: {message.value.decode()}")
        try:
            self.reset()
        except SimulationError:
            self.close()
            raise

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # the constructor may have failed early
            self.close()

    def close(self) -> None:
        """Let the model go; a second call does nothing. Views of its memory stay valid."""
        handle, self._handle = self._handle, None  # first: it must never be closed twice
        if handle is not None and self._process == os.getpid():  # a fork has not its threads
            self._library.moeaccel_close(handle)

    # -- properties ------------------------------------------------------------------------------

    @property
    def model(self) -> Model:
        """The model."""
        return self._model

    @property
    def port_count(self) -> int:
        """Number of memory ports."""
        return len(self._memories)

    @property
    def data_bytes(self) -> int:
        """Width of a memory port in bytes."""
        return self._library.moeaccel_data_bytes()

    @property
    def memory_models(self) -> tuple[MemoryModel, ...]:
        """The memory model of each port."""
        return self._memory_models

    @property
    def cycle(self) -> int:
        """Clock cycles since power-on, resets included."""
        return self._library.moeaccel_cycle(self._open)

    @property
    def irq(self) -> bool:
        """Level of the interrupt."""
        return bool(self._library.moeaccel_irq(self._open))

    @property
    def log(self) -> str:
        """What the model printed: the newest 64 KiB or more of it."""
        return self._library.moeaccel_log(self._open).decode(errors="replace")

    @property
    def _open(self) -> int:
        if self._handle is None:
            raise SimulationError("The simulation is closed")
        return self._handle

    # -- time ------------------------------------------------------------------------------------

    def reset(self, *, cycles: int = 4, memory: bool = True) -> None:
        """Hold reset for `cycles`; what memory holds stays.

        Parameters
        ----------
        cycles : int
            At least 2.
        memory : bool
            Reset the memory ports, too: they forget what is in flight, and the model is told
            (``mem_rst``). Else they know nothing of it, and answer what is in flight, late.
        """
        _check_count("Reset cycles", cycles, least=2)  # kResetCycles of harness.cpp
        self._finish(self._library.moeaccel_reset(self._open, cycles, memory))

    def run(self, max_cycles: int, *, until_irq: bool = True) -> StopReason:
        """Let the clock run, until the interrupt is high or for `max_cycles`.

        Returns at once when the interrupt is high already.

        Raises
        ------
        ProtocolError
            If the model broke a bus rule and the simulation is strict.
        ModelStopped
            If an assertion failed.
        """
        _check_count("Cycles", max_cycles, least=0)
        left = max_cycles
        while True:
            cycles = min(left, self._slice_cycles)
            begin = time.monotonic()
            reason = self._finish(self._library.moeaccel_run(self._open, cycles, until_irq))
            left -= cycles
            if reason == StopReason.IRQ.value or left == 0:
                return StopReason(reason)
            took = time.monotonic() - begin
            if took > 2 * _SLICE_S:
                self._slice_cycles = max(cycles // 2, _LEAST_CYCLES)
            elif took < _SLICE_S / 2:
                self._slice_cycles = cycles * 2

    def wait_irq(self, *, max_cycles: int) -> int:
        """Run until the interrupt is high and return how many cycles that took.

        Raises
        ------
        SimulationTimeout
            If it stays low for `max_cycles`.
        """
        begin = self.cycle
        if self.run(max_cycles) is not StopReason.IRQ:
            raise SimulationTimeout(
                f"No interrupt within {max_cycles} cycles, at cycle {self.cycle}")
        return self.cycle - begin

    # -- registers -------------------------------------------------------------------------------

    def reg_read(self, address: int) -> int:
        """Read a 32-bit register over AXI4-Lite.

        Raises
        ------
        RegisterResponseError
            If the answer is an error.
        SimulationTimeout
            If there is none.
        """
        _check_register(address)
        value, response = ctypes.c_uint32(), ctypes.c_uint32()
        reason = self._library.moeaccel_register_read(
            self._open, address, self._register_timeout, ctypes.byref(value),
            ctypes.byref(response))
        self._finish_access("read", address, reason, response.value)
        return value.value

    def reg_write(self, address: int, value: int, *, strobe: int = 0xF) -> None:
        """Write a 32-bit register over AXI4-Lite; see :meth:`reg_read`."""
        _check_register(address)
        if not 0 <= value < 1 << 32:
            raise ValueError(f"Register value must be in [0, 2^32), not {value!r}")
        if not 0 <= strobe < 16:
            raise ValueError(f"Strobe must be in [0, 15], not {strobe!r}")
        response = ctypes.c_uint32()
        reason = self._library.moeaccel_register_write(
            self._open, address, value, strobe, self._register_timeout, ctypes.byref(response))
        self._finish_access("write", address, reason, response.value)

    # -- memory, by the back door ----------------------------------------------------------------

    def mem_view(self, address: int, count: int, *, port: int = 0) -> npt.NDArray[np.uint8]:
        """Return the memory's own bytes, which the model reads and writes as well."""
        memory = self._memories[self._port(port)]
        if address < 0 or count < 0 or address + count > memory.size:
            raise ValueError(
                f"Memory range must be within {memory.size:#x} bytes, not {count} at {address:#x}")
        return memory[address:address + count]

    def mem_read(self, address: int, count: int, *, port: int = 0) -> npt.NDArray[np.uint8]:
        """Return a copy of `count` bytes."""
        return self.mem_view(address, count, port=port).copy()

    def mem_write(self, address: int, data: npt.ArrayLike | bytes, *, port: int = 0) -> None:
        """Copy bytes, or an array's bytes in C order, into the memory."""
        if isinstance(data, bytes | bytearray | memoryview):
            source = np.frombuffer(data, dtype=np.uint8)
        else:
            source = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        self.mem_view(address, source.size, port=port)[:] = source
        written = self._written[port]
        if written is not None and source.size:
            written[address // _WRITTEN_BYTES:
                    (address + source.size - 1) // _WRITTEN_BYTES + 1] = 1

    def inject_error(self, address: int, count: int, *, response: str = "SLVERR",
                     reads: bool = True, writes: bool = True, port: int = 0) -> None:
        """Answer an error to every beat that touches a range; such writes have no effect.

        Parameters
        ----------
        address, count : int
            The range in bytes; it may lie outside the memory.
        response : {"SLVERR", "DECERR"}
        reads, writes : bool
            What it applies to.
        port : int
            Memory port.
        """
        codes = {name: code for code, name in _RESPONSES.items()}
        if response not in codes:
            raise ValueError(f"Response must be one of {sorted(codes)}, not {response!r}")
        if address < 0 or count < 1 or address + count > 1 << 64:
            raise ValueError(f"Error range must not be empty, not {count} at {address:#x}")
        self._library.moeaccel_inject_error(self._open, self._port(port), address,
                                            address + count - 1, codes[response], reads, writes)

    def clear_errors(self, *, port: int = 0) -> None:
        """Take back what :meth:`inject_error` did."""
        self._library.moeaccel_clear_errors(self._open, self._port(port))

    # -- what was seen ---------------------------------------------------------------------------

    def stats(self, *, port: int = 0) -> MemoryStats:
        """Return a memory port's counts since it was made or :meth:`clear_stats`."""
        raw = _Stats()
        self._library.moeaccel_read_stats(self._open, self._port(port), ctypes.byref(raw))
        values = {field.name: getattr(raw, field.name) for field in fields(MemoryStats)}
        for name, value in values.items():
            if name.endswith("_cycle") and value == _NEVER:
                values[name] = None
        return MemoryStats(**values)

    def clear_stats(self) -> None:
        """Count from zero again, on every port."""
        for port in range(self.port_count):
            self._library.moeaccel_clear_stats(self._open, port)

    @property
    def violation_count(self) -> int:
        """Number of broken bus rules."""
        return self._library.moeaccel_violation_count(self._open)

    def violations(self) -> tuple[Violation, ...]:
        """Return the first 256 broken bus rules."""
        found = []
        cycle, channel = ctypes.c_uint64(), ctypes.c_char_p()
        while True:
            text = self._library.moeaccel_violation(self._open, len(found), ctypes.byref(cycle),
                                                    ctypes.byref(channel))
            if text is None:
                return tuple(found)
            found.append(Violation(cycle=cycle.value, channel=(channel.value or b"").decode(),
                                   text=text.decode()))

    def check(self) -> None:
        """Raise :class:`ProtocolError` if any bus rule was broken."""
        if self.violation_count:
            raise ProtocolError(self.violations(), count=self.violation_count)

    def clear_violations(self) -> None:
        """Forget the violations; a strict simulation can go on then."""
        self._library.moeaccel_clear_violations(self._open)

    # -- waves -----------------------------------------------------------------------------------

    def start_waves(self, path: str | Path) -> None:
        """Write every signal from now on into an FST file; needs a model built with `waves`."""
        result = self._library.moeaccel_waves_start(self._open, str(path).encode())
        if result == 1:
            raise SimulationError("The model must be built with build_model(..., waves=True)")
        if result != 0:
            raise SimulationError(f"The waves file {path} cannot be written")

    def stop_waves(self) -> None:
        """Finish the waves file."""
        self._library.moeaccel_waves_stop(self._open)

    # -- inside ----------------------------------------------------------------------------------

    def _port(self, port: int) -> int:
        if not 0 <= port < len(self._memories):
            raise ValueError(f"Memory port must be in [0, {len(self._memories) - 1}], not {port!r}")
        return port

    def _finish(self, reason: int) -> int:
        """Turn the harness's bad news into exceptions."""
        if reason == _VIOLATION:
            self.check()
        if reason in (_STOP, _FINISH):
            what = "stopped" if reason == _STOP else "called $finish"
            last = "\n".join(self.log.splitlines()[-10:])
            raise ModelStopped(f"The model {what} at cycle {self.cycle}:\n{last}")
        return reason

    def _finish_access(self, what: str, address: int, reason: int, response: int) -> None:
        self._finish(reason)
        if reason == _TIMEOUT:
            raise SimulationTimeout(
                f"Register {what} at {address:#05x} got no answer within {self._register_timeout} "
                f"cycles, at cycle {self.cycle}; registers answer again after reset()")
        if response != 0:
            raise RegisterResponseError(
                f"Register {what} at {address:#05x} was answered with "
                f"{_RESPONSES.get(response, response)}", address=address, response=response)


def _check_register(address: int) -> None:
    if not 0 <= address < 1 << 12 or address % 4:
        raise ValueError(f"Register address must be a multiple of 4 below 4096, not {address!r}")


def _check_count(name: str, value: int, *, least: int) -> None:
    if not isinstance(value, int) or not least <= value < 1 << 63:
        raise ValueError(f"{name} must be an integer of at least {least}, not {value!r}")
