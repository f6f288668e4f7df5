"""What a call costs beside the device's work: verbs, bytes and microseconds by part.

A transport that answers at once stands for the device: every submission has completed when its
doorbell returns. What is left is the driver. Verbs and bytes are those that any device sees; their
time here is that of a copy in memory, and is not the driver's.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np

from moeaccel.config import AcceleratorConfig, preset
from moeaccel.errors import MoeAccelError
from moeaccel.formats import weight_format
from moeaccel.host.device import Device
from moeaccel.host.layers import Experts
from moeaccel.host.options import whole
from moeaccel.host.registers import mask
from moeaccel.host.transports.base import Bytes, Transport
from moeaccel.host.weights import WeightReport
from moeaccel.image import ExpertShape
from moeaccel.interface.commands import COMPLETION, ENTRY_BYTES, SUBMISSION, encode, field_of
from moeaccel.interface.registers import REGISTERS

__all__ = ["DTYPES", "PARTS", "CallBenchError", "CallCost", "InstantTransport", "bench_call"]

PARTS = ("stage", "memory_write", "doorbell", "submitted", "wait", "acknowledge", "memory_read",
         "result")
"""Of a call in order: until the write begins; the write; the register write behind it; until
``submit`` returns; from ``sync`` until the wait is over; clearing the interrupt and until the read
begins; the read; until y is there. With polling, ``wait`` are reads of a register."""

DTYPES = ("bfloat16", "float16", "float32", "numpy")
"""What x and y are: torch tensors of a type, or float32 of NumPy."""

_ADDRESS = {name: REGISTERS[name].address for name in (
    "SQ_TAIL", "CQ_TAIL", "CQ_HEAD", "IRQ_STATUS", "CONTROL", "RING_LOG2", "SQ_BASE_LO",
    "CQ_BASE_LO", "ERROR_STATUS")}
_TAG = field_of(SUBMISSION, "tag")
_PHASE = field_of(COMPLETION, "phase")


class CallBenchError(MoeAccelError, ValueError):
    """A measurement of calls that cannot be made as asked."""


class InstantTransport(Transport):
    """Registers and memory of a device that computes nothing and completes everything.

    Parameters
    ----------
    config : :class:`AcceleratorConfig`
    memory_bytes : :class:`int`

    Attributes
    ----------
    log : list
        Of whoever watches: verb, bytes, begin, end.
    """

    def __init__(self, config: AcceleratorConfig, memory_bytes: int) -> None:
        self._memory = np.zeros(memory_bytes, np.uint8)
        self._registers = {register.address: register.reset for register in REGISTERS.values()}
        self._registers[REGISTERS["CONFIG_HASH"].address] = config.digest
        self._head = self._tail = 0
        self._phase = 1
        self.log: list[tuple[str, int, float, float]] = []

    @property
    def memory_bytes(self) -> int:
        return len(self._memory)

    def register_read(self, address: int) -> int:
        return self._registers[address]

    def register_write(self, address: int, value: int) -> None:
        registers = self._registers
        if address == _ADDRESS["SQ_TAIL"]:
            self._complete(value)
        elif address == _ADDRESS["IRQ_STATUS"]:
            registers[address] &= ~value
        elif address == _ADDRESS["CONTROL"]:
            self._head = self._tail = registers[_ADDRESS["CQ_TAIL"]] = 0
            self._phase = 1
            registers[_ADDRESS["IRQ_STATUS"]] |= mask("IRQ_STATUS", "reset_done")
        elif address != _ADDRESS["ERROR_STATUS"]:
            registers[address] = value

    def memory_read(self, address: int, count: int) -> Bytes:
        return self._memory[address : address + count].copy()

    def memory_write(self, address: int, data: bytes | Bytes) -> None:
        raw = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else data
        self._memory[address : address + raw.size] = raw

    def wait_interrupt(self, timeout_s: float) -> bool:
        return bool(self._registers[_ADDRESS["IRQ_STATUS"]])

    def close(self) -> None:
        pass

    def _complete(self, behind: int) -> None:
        registers, memory = self._registers, self._memory
        entries = 1 << registers[_ADDRESS["RING_LOG2"]]
        while self._head != behind:
            at = registers[_ADDRESS["SQ_BASE_LO"]] + ENTRY_BYTES * self._head
            entry = int.from_bytes(memory[at : at + 8].tobytes(), "little")
            tag = entry >> _TAG.offset & ((1 << _TAG.bits) - 1)
            done = encode(COMPLETION, {"tag": tag, "phase": self._phase, "cycles": 1})
            at = registers[_ADDRESS["CQ_BASE_LO"]] + ENTRY_BYTES * self._tail
            memory[at : at + ENTRY_BYTES] = np.frombuffer(done, np.uint8)
            self._head = (self._head + 1) % entries
            self._tail = (self._tail + 1) % entries
            self._phase ^= self._tail == 0
        registers[_ADDRESS["SQ_TAIL"]] = behind
        registers[_ADDRESS["CQ_TAIL"]] = self._tail
        registers[_ADDRESS["IRQ_STATUS"]] |= mask("IRQ_STATUS", "completion")


class _Watched(InstantTransport):
    """One that notes when each verb began and ended, and how many bytes it moved."""

    def _noted(self, verb: str, moved: int, call: Callable[..., Any], *arguments: Any) -> Any:
        begin = time.perf_counter()
        result = call(*arguments)
        self.log.append((verb, moved, begin, time.perf_counter()))
        return result

    def register_read(self, address: int) -> int:
        return self._noted("register_read", 0, super().register_read, address)

    def register_write(self, address: int, value: int) -> None:
        self._noted("register_write", 0, super().register_write, address, value)

    def memory_read(self, address: int, count: int) -> Bytes:
        return self._noted("memory_read", count, super().memory_read, address, count)

    def memory_write(self, address: int, data: bytes | Bytes) -> None:
        self._noted("memory_write", len(data), super().memory_write, address, data)

    def wait_interrupt(self, timeout_s: float) -> bool:
        return self._noted("wait_interrupt", 0, super().wait_interrupt, timeout_s)


@dataclass(frozen=True, kw_only=True)
class CallCost:
    """One measurement.

    Parameters
    ----------
    tokens, top_k, d_model : :class:`int`
    dtype : :class:`str`
        One of :data:`DTYPES`.
    in_flight : :class:`int`
        Calls that are submitted before the oldest is awaited.
    polling : :class:`bool`
    verbs : dict
        How often each verb is used in a call, in the mean.
    bytes_written, bytes_read : :class:`float`
        Of device memory, in a call.
    microseconds : :class:`float`
        Of a call, in the median, without what the verbs took.
    fastest_microseconds : :class:`float`
        That of the fastest tenth: what the machine's other work does not disturb.
    verb_microseconds : :class:`float`
        What they took in that stand-in.
    parts : dict
        Of :data:`PARTS`, the median of each while it is watched, with one call in flight; else
        empty.
    """

    tokens: int
    top_k: int
    d_model: int
    dtype: str
    in_flight: int
    polling: bool
    verbs: dict[str, float]
    bytes_written: float
    bytes_read: float
    microseconds: float
    fastest_microseconds: float
    verb_microseconds: float
    parts: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return every figure for JSON."""
        return asdict(self)


def _layer(device: Device, d_model: int, d_expert: int, experts: int) -> Experts:
    """Return experts whose weights nobody reads."""
    config = device.config
    shape = ExpertShape(weight_format("int4_g32"), d_model, d_expert, config.row_multipliers,
                        config.channels)
    report = WeightReport("int4_g32", None, None, None, 0, 0)
    memory = device.memory
    loaded = Experts(device, [shape] * experts, memory.allocate(64), memory.allocate(64), 2, 0,
                     report)
    loaded._looks = False  # at x, which says something of x and not of the call
    return loaded


def _tensors(dtype: str, tokens: int, d_model: int, top_k: int, experts: int) -> tuple[Any, ...]:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((tokens, d_model), np.float32)
    ids = rng.integers(0, experts, (tokens, top_k))
    weights = rng.random((tokens, top_k), np.float32)
    if dtype == "numpy":
        return x, ids, weights
    import torch

    kind = getattr(torch, dtype)
    return (torch.from_numpy(x).to(kind), torch.from_numpy(ids),
            torch.from_numpy(weights).to(kind))


def bench_call(*, tokens: int, d_model: int = 2048, top_k: int = 8, d_expert: int = 1024,
               experts: int = 64, dtype: str = "bfloat16", config: str = "hbm32",
               in_flight: int = 1, polling: bool = False, calls: int = 400) -> CallCost:
    """Measure calls of one shape.

    Parameters
    ----------
    tokens, d_model, top_k, d_expert, experts : :class:`int`
    dtype : :class:`str`
        One of :data:`DTYPES`.
    config : :class:`str`
        Preset, whose limits cut calls into commands.
    in_flight : :class:`int`
        1 to 8.
    polling : :class:`bool`
        See :class:`Device`.
    calls : :class:`int`
        How many are measured, after a tenth more that are not.

    Raises
    ------
    CallBenchError
        For a type that is none of these.
    InvalidOption
        For a number out of range.
    """
    for name, value, most in (("tokens", tokens, 1 << 16), ("d_model", d_model, 1 << 16),
                              ("top_k", top_k, 16), ("calls", calls, 1 << 20),
                              ("in_flight", in_flight, 8)):
        whole(name, value, least=1, most=most)
    if dtype not in DTYPES:
        raise CallBenchError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    built = preset(config)
    size = min(1 << 32, 1 << built.address_bits)
    watched, plain = _Watched(built, size), InstantTransport(built, size)
    shape = (d_model, d_expert, experts)
    call = _tensors(dtype, tokens, d_model, top_k, experts)
    samples = _measure(watched, built, shape, call, in_flight=in_flight, polling=polling,
                       calls=calls)
    # Watching takes time, too: whole calls are timed without.
    unwatched = _measure(plain, built, shape, call, in_flight=in_flight, polling=polling,
                         calls=calls)
    verbs: dict[str, float] = {}
    moved = {"memory_write": 0.0, "memory_read": 0.0}
    for sample in samples:
        for verb, size, _, _ in sample.log:
            verbs[verb] = verbs.get(verb, 0) + 1 / calls
            if verb in moved:
                moved[verb] += size / calls
    others = statistics.median(
        1e6 * sum(last - first for _, _, first, last in sample.log) for sample in samples)
    whole_calls = [1e6 * (sample.end - sample.begin) for sample in unwatched]
    return CallCost(
        tokens=tokens, top_k=top_k, d_model=d_model, dtype=dtype, in_flight=in_flight,
        polling=polling, verbs={verb: round(count, 3) for verb, count in sorted(verbs.items())},
        bytes_written=round(moved["memory_write"], 1), bytes_read=round(moved["memory_read"], 1),
        microseconds=round(statistics.median(whole_calls) - others, 2),
        fastest_microseconds=round(statistics.quantiles(whole_calls, n=10)[0] - others, 2),
        verb_microseconds=round(others, 2), parts=_parts(samples) if in_flight == 1 else {})


class _Sample(NamedTuple):
    """When a call began, when ``submit`` returned, when y was there; and its verbs."""

    begin: float
    between: float
    end: float
    log: list[tuple[str, int, float, float]]


def _measure(transport: InstantTransport, config: AcceleratorConfig, shape: tuple[int, int, int],
             call: tuple[Any, ...], *, in_flight: int, polling: bool, calls: int) -> list[_Sample]:
    """Return samples of calls, after some that do not count."""
    samples = []
    with Device(transport, config, polling=polling) as device:
        loaded = _layer(device, *shape)
        waiting = [loaded.submit(*call) for _ in range(in_flight - 1)]
        for _ in range(calls // 10 + 20):
            waiting.append(loaded.submit(*call))
            loaded.sync(waiting.pop(0))
        for _ in range(calls):
            log = transport.log = []
            begin = time.perf_counter()
            waiting.append(loaded.submit(*call))
            between = time.perf_counter()
            loaded.sync(waiting.pop(0))
            samples.append(_Sample(begin, between, time.perf_counter(), log))
        for handle in waiting:
            loaded.sync(handle)
    return samples


def _parts(samples: list[_Sample]) -> dict[str, float]:
    """Return the median of each part, where a call is one write and one read."""
    found: dict[str, list[float]] = {part: [] for part in PARTS}
    for begin, between, end, log in samples:
        writes = [entry for entry in log if entry[0] == "memory_write"]
        reads = [entry for entry in log if entry[0] == "memory_read"]
        waits = [entry for entry in log if entry[2] > between
                 and entry[0] in ("wait_interrupt", "register_read")]
        if len(writes) != 1 or len(reads) != 1 or not waits:
            continue
        write, read = writes[0], reads[0]
        bell = next(entry for entry in log if entry[0] == "register_write"
                    and entry[2] >= write[3])
        times = (begin, write[2], write[3], bell[3], between, waits[0][3], read[2], read[3], end)
        for part, first, last in zip(PARTS, times, times[1:], strict=False):
            found[part].append(1e6 * (last - first))
    return {part: round(statistics.median(values), 2) for part, values in found.items() if values}
