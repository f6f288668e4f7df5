"""The device as a model: same registers, rings, checks and bits as the hardware, only faster.

Everything the device does goes through its memory: experts are decoded from the images that were
uploaded, results are written where the command says. A doorbell executes what is in the ring before
it returns; a command that is interrupted is executed again, from its beginning, by the next
doorbell or wait.
"""

from __future__ import annotations

import logging
import mmap
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from moeaccel.config import BLOCK, MEMORY_LATENCY_CYCLES, TOP_K_MAX, AcceleratorConfig
from moeaccel.cycles import expert_cycles, linear_cycles
from moeaccel.formats import QuantisedMatrix, WeightFormat
from moeaccel.golden import DeviceResult, experts, gemm
from moeaccel.host.errors import DeviceClosed, InvalidOption, UploadError
from moeaccel.host.options import whole
from moeaccel.host.registers import mask
from moeaccel.host.transports.base import Bytes, DeviceSpec, Scheme, Transport
from moeaccel.image import Expert, ExpertShape, Section, unpack_section
from moeaccel.interface.commands import (
    COMPLETION,
    COUNT_MAX,
    ENTRY_BYTES,
    GRID_EXPONENTS,
    LAYER,
    RING_LOG2_MAX,
    SUBMISSION,
    Activation,
    LayerKind,
    Opcode,
    Status,
    decode,
    encode,
)
from moeaccel.interface.registers import COUNTERS, REGISTERS, Access

__all__ = ["SCHEME", "GoldenTransport"]

logger = logging.getLogger(__name__)

_PAGE_BITS = 12
_COUNTER_BITS = 48
_BY_ADDRESS = {register.address: register for register in REGISTERS.values()}
_COMPLETION_IRQ, _RESET_IRQ = 1, 2
_PHASE = -1  # kept among the registers, at no address, so that it changes with the ring's indices
# Python 3.11's mmap does not name this flag.
_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x40 if sys.platform == "darwin" else 0x4000)


class _Done(NamedTuple):
    """A command that has run and whose completion is not written yet."""

    head: int
    tail: int
    completion: dict[str, int]
    counters: dict[str, int]


class _Fault(Exception):
    """Ends a command with a status."""

    def __init__(self, status: Status, *, detail: int = 0, address: int = 0) -> None:
        super().__init__(status.name)
        self.status, self.detail, self.address = status, detail, address


@dataclass(frozen=True)
class _Layer:
    """A checked layer descriptor."""

    kind: LayerKind
    format: WeightFormat
    planes: int
    num_experts: int
    d_in: int
    d_expert: int
    d_out: int
    grid_exponent: int
    stride: int
    image_address: int
    sections: tuple[Section, ...]

    @property
    def payload_bytes(self) -> int:
        return sum(section.words * section.word_bytes for section in self.sections)


class _Memory:
    """Bytes whose pages cost nothing until they are touched, and when they last changed."""

    def __init__(self, size: int) -> None:
        try:
            pages = mmap.mmap(-1, size,
                              flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
        except (OSError, OverflowError, ValueError) as error:
            raise InvalidOption(
                f"memory_bytes must be an amount that the system grants, not {size}: {error}"
            ) from error
        self._bytes = np.frombuffer(pages, np.uint8)
        self._changed = np.zeros(-(-size >> _PAGE_BITS), np.int64)
        self._version = 0

    def __len__(self) -> int:
        return len(self._bytes)

    def read(self, address: int, count: int) -> Bytes:
        return self._bytes[address : address + count].copy()

    def view(self, address: int, count: int) -> Bytes:
        return self._bytes[address : address + count]

    def write(self, address: int, data: Bytes) -> None:
        if data.size:
            self._version += 1
            last = address + data.size - 1
            self._changed[address >> _PAGE_BITS : (last >> _PAGE_BITS) + 1] = self._version
            self._bytes[address : last + 1] = data

    def version(self, address: int, count: int) -> int:
        """Return a number that grows when something in the range changes."""
        pages = self._changed[address >> _PAGE_BITS : ((address + count - 1) >> _PAGE_BITS) + 1]
        return int(pages.max())


class _Experts(Sequence[Expert]):
    """The experts of a layer, decoded from memory when they are used."""

    def __init__(self, count: int, load: Callable[[int], Expert]) -> None:
        self._count = count
        self._load = load

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Expert: ...
    @overload
    def __getitem__(self, index: slice) -> list[Expert]: ...
    def __getitem__(self, index: int | slice) -> Expert | list[Expert]:
        if isinstance(index, slice):
            return [self._load(i) for i in range(*index.indices(self._count))]
        return self._load(index)


class GoldenTransport(Transport):
    """The golden model behind registers, rings and memory.

    Parameters
    ----------
    config : :class:`AcceleratorConfig`
    memory_bytes : :class:`int`
        Of each channel: a multiple of 4096; only pages that are touched cost anything.
    cache_bytes : :class:`int`
        Decoded weights that are kept, in bytes.
    latency : :class:`int`
        Of the ideal memory for which completions state the cycle model's cycles.

    Raises
    ------
    InvalidOption
        If the system does not grant that much address space.
    """

    def __init__(self, config: AcceleratorConfig, *, memory_bytes: int,
                 cache_bytes: int = 1 << 30,
                 latency: int = MEMORY_LATENCY_CYCLES) -> None:
        whole("cache_bytes", cache_bytes, least=0)
        whole("latency", latency, least=0, unit=" cycles")
        self._config = config
        self._memories = tuple(_Memory(memory_bytes) for _ in range(config.channels))
        self._memory_bytes = memory_bytes
        self._latency = latency
        self._registers = {r.address: r.reset for r in REGISTERS.values()}
        self._registers[REGISTERS["CONFIG_HASH"].address] = config.digest
        self._registers[_PHASE] = 1
        self._counters = {name: 0 for name, _ in COUNTERS}
        self._unwritten: _Done | None = None
        self._faults: list[_Fault] = []
        self._cache: OrderedDict[tuple[int, tuple[Section, ...]],
                                 tuple[int, tuple[QuantisedMatrix, ...], int]] = OrderedDict()
        self._cache_bytes = cache_bytes

    # -- the five verbs ----------------------------------------------------------------------------
    @property
    def memory_bytes(self) -> int:
        return self._memory_bytes

    def register_read(self, address: int) -> int:
        register = _BY_ADDRESS.get(address)
        if register is None:
            raise InvalidOption(f"register address must be in the register map, not {address:#x}")
        name, _, half = register.name.rpartition("_")
        if name.lower() in self._counters:
            value = self._counters[name.lower()] & ((1 << _COUNTER_BITS) - 1)
            return value >> 32 if half == "HI" else value & 0xFFFF_FFFF
        return self._registers[address]

    def register_write(self, address: int, value: int) -> None:
        register = _BY_ADDRESS.get(address)
        if register is None or not 0 <= value < 1 << 32:
            raise InvalidOption("register write must be 32 bits to an address in the register "
                                f"map, not {value:#x} to {address:#x}")
        if register.fields:
            value &= sum(((1 << f.bits) - 1) << f.offset for f in register.fields)
        if register.access is Access.RW:
            self._registers[address] = value
        elif register.access is Access.W1C:
            self._registers[address] &= ~value
        elif register.name == "CONTROL" and value & 1:
            self._soft_reset()
        # An abort finds nothing to end: every doorbell has done its work before it returns.
        self._check_rings()
        if register.name in ("ENABLE", "SQ_TAIL", "CQ_HEAD", "ERROR_STATUS"):
            self._execute_ring()

    def memory_read(self, address: int, count: int) -> Bytes:
        memory, address = self._range(address, count)
        return memory.read(address, count)

    def memory_write(self, address: int, data: bytes | Bytes) -> None:
        raw = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else data.reshape(-1)
        memory, address = self._range(address, raw.size)
        memory.write(address, raw)

    def wait_interrupt(self, timeout_s: float) -> bool:
        del timeout_s  # whatever can happen has happened, or does when it was interrupted
        self._execute_ring()
        return any(self._get(f"{name}_STATUS") & self._get(f"{name}_ENABLE")
                   for name in ("IRQ", "ERROR"))

    @property
    def possible_faults(self) -> set[tuple[int, int]]:
        """Status and address of every fault that the last command may have reported.

        The model names the first of these; hardware the one that it came to first.
        """
        return {(fault.status, fault.address) for fault in self._faults}

    def close(self) -> None:
        self._memories = ()
        self._cache.clear()

    # -- registers and memory ----------------------------------------------------------------------
    def _get(self, name: str) -> int:
        return self._registers[REGISTERS[name].address]

    def _get64(self, name: str) -> int:
        return self._get(f"{name}_HI") << 32 | self._get(f"{name}_LO")

    def _set(self, name: str, value: int) -> None:
        self._registers[REGISTERS[name].address] = value

    @property
    def _channels(self) -> tuple[_Memory, ...]:
        if not self._memories:
            raise DeviceClosed("transport must not be used after it was closed; open a new device")
        return self._memories

    @property
    def _ram(self) -> _Memory:
        """Memory of channel 0, where all but weights is."""
        return self._channels[0]

    def _range(self, address: int, count: int) -> tuple[_Memory, int]:
        """Return the memory that a device address is in, and the address there."""
        channels = self._channels
        channel = address >> self._config.address_bits
        inside = address & ((1 << self._config.address_bits) - 1)
        size = self._memory_bytes
        if not 0 <= channel < len(channels) or count < 0 or inside + count > size:
            raise UploadError(f"memory access must be within {size:#x} bytes"
                              f"{'' if len(channels) == 1 else f' of {len(channels)} channels'}, "
                              f"not {count} bytes at {address:#x}")
        return channels[channel], inside

    def _first_faults(self, requests: Iterable[tuple[int, int]], *,
                      write: bool = False) -> list[_Fault]:
        """Return the faults of which one is the first of a stream of linear requests.

        Requests, (address, bytes), are cut into bursts at multiples of the longest one. Bursts
        outside the window are known when they would be issued, what memory refuses only later.
        """
        port = self._config.port_bytes
        block = port * self._config.max_burst_beats
        base, limit = self._get64("WINDOW_BASE"), self._get64("WINDOW_LIMIT")
        size = len(self._ram)
        refused: list[_Fault] = []
        for address, count in requests:
            end = address + -(-count // port) * port
            if base <= address and end <= min(limit, size):
                continue
            # The first burst that memory refuses, and the first one outside, if there is one.
            beyond, outside = (max(address, top // block * block) for top in (size, limit))
            if address < base:
                outside = address
            elif end <= limit:
                outside = end
            if end > size and beyond < outside and not refused:
                refused.append(_Fault(Status.BUS_ERROR, address=0 if write else beyond))
            if outside < end:
                return [*refused, _Fault(Status.WINDOW, address=outside)]
        return refused

    def _raise_first(self, *streams: list[_Fault]) -> None:
        """End the command if one of its streams has a fault."""
        self._faults = [fault for stream in streams for fault in stream]
        if self._faults:
            raise self._faults[0]

    def _load(self, address: int, count: int) -> Bytes:
        self._raise_first(self._first_faults([(address, count)]))
        self._count(bytes_read_other=-(-count // self._config.port_bytes) * self._config.port_bytes)
        return self._ram.read(address, count)

    def _count(self, **amounts: int) -> None:
        for name, amount in amounts.items():
            self._counters[name] += amount

    # -- rings -------------------------------------------------------------------------------------
    @property
    def _entries(self) -> int:
        return 1 << min(self._get("RING_LOG2"), RING_LOG2_MAX)

    def _set_error(self, field: str) -> None:
        self._set("ERROR_STATUS", self._get("ERROR_STATUS") | mask("ERROR_STATUS", field))

    def _check_rings(self) -> None:
        """Set the errors of registers that describe no rings, as long as they do."""
        if not (self._get("ENABLE") & 1 or self._unwritten):
            return
        if not 1 <= self._get("RING_LOG2") <= RING_LOG2_MAX:
            self._set_error("ring_log2")
        for name in ("SQ_BASE", "CQ_BASE"):
            base = self._get64(name)
            end = base + ENTRY_BYTES * self._entries
            if base % ENTRY_BYTES or end > 1 << self._config.address_bits:
                self._set_error(name.lower())

    def _soft_reset(self) -> None:
        self._unwritten = None
        for name in ("SQ_HEAD", "SQ_TAIL", "CQ_HEAD", "CQ_TAIL"):
            self._set(name, 0)
        self._registers[_PHASE] = 1
        self._counters = dict.fromkeys(self._counters, 0)
        self._set("IRQ_STATUS", self._get("IRQ_STATUS") | _RESET_IRQ)

    def _execute_ring(self) -> None:
        """Run submissions and write completions as long as there are some.

        An interruption at any point, by a signal's handler, leaves a device that goes on with it.
        """
        last = self._entries - 1
        while not self._get("ERROR_STATUS"):
            head, tail = self._get("SQ_HEAD"), self._get("CQ_TAIL")
            if self._unwritten is not None and self._unwritten.tail != tail:
                self._unwritten = None  # it was written, and then came an interruption
            counted = dict(self._counters)
            try:
                if self._unwritten is None:
                    if (not self._get("ENABLE") & 1 or head == self._get("SQ_TAIL") & last
                            or (tail + 1) & last == self._get("CQ_HEAD") & last):
                        break
                    completion = self._execute(self._get64("SQ_BASE") + ENTRY_BYTES * head)
                    self._unwritten = _Done(head, tail, completion, dict(self._counters))
                done = self._unwritten
                self._set("SQ_HEAD", (done.head + 1) & last)
                where = self._get64("CQ_BASE") + ENTRY_BYTES * tail
                if faults := self._first_faults([(where, ENTRY_BYTES)], write=True):
                    logger.debug("completion at %#x cannot be written", where)
                    self._set_error("completion_window" if faults[0].status == Status.WINDOW
                                    else "completion_bus")
                    break
                entry = encode(COMPLETION, done.completion | {"phase": self._registers[_PHASE]})
                self._ram.write(where, np.frombuffer(entry, np.uint8))
                self._count(commands=1, bytes_written=ENTRY_BYTES)
                behind = (tail + 1) & last
                self._registers |= {  # all at once
                    REGISTERS["CQ_TAIL"].address: behind,
                    REGISTERS["IRQ_STATUS"].address: self._get("IRQ_STATUS") | _COMPLETION_IRQ,
                    _PHASE: self._registers[_PHASE] ^ (behind == 0)}
            except BaseException:
                if self._get("CQ_TAIL") == tail:
                    self._counters = dict(
                        counted if self._unwritten is None else self._unwritten.counters)
                raise

    def _execute(self, address: int) -> dict[str, int]:
        """Execute the submission at an address and return its completion, but for the phase."""
        tag, cycles, status, detail, where, underflows = 0, 0, Status.OK, 0, 0, 0
        self._faults = []
        try:
            submission = decode(SUBMISSION, self._load(address, ENTRY_BYTES).tobytes())
            tag = submission["tag"]
            match submission["opcode"]:
                case Opcode.NOP | Opcode.FENCE:
                    pass
                case Opcode.EXPERTS | Opcode.GEMM:
                    result, cycles = self._compute(submission)
                    status, detail, where = result.outcome
                    underflows = min(result.underflows, COUNT_MAX)
                case opcode:
                    raise _Fault(Status.BAD_OPCODE, detail=opcode)
        except _Fault as fault:
            status, detail, where = fault.status, fault.detail, fault.address
        return {"tag": tag, "status": status, "detail": detail, "address": where, "cycles": cycles,
                "underflows": underflows}

    # -- commands ----------------------------------------------------------------------------------
    def _compute(self, submission: dict[str, int]) -> tuple[DeviceResult, int]:
        """Check, compute and write back an EXPERTS or GEMM command; return also its cycles."""
        linear = submission["opcode"] == Opcode.GEMM
        self._check_submission(submission, linear=linear)
        layer = self._check_layer(submission["layer_address"], linear=linear)
        self._check_ends(submission, layer)
        tokens, top_k = submission["tokens"], submission["top_k"]
        if linear:
            ids = np.zeros((tokens, 1), np.int64)
            weights = np.ones((tokens, 1), np.float32)
        else:
            count = 4 * tokens * top_k
            ids = self._load(submission["ids_address"], count).view("<i4").reshape(tokens, top_k)
            ids = ids.astype(np.int64)
            weights = self._floats(submission["weights_address"], (tokens, top_k))
        used = np.unique(ids[(ids >= 0) & (ids < layer.num_experts)])
        self._account(layer, ids, used, submission)

        result = DeviceResult(np.zeros((tokens, layer.d_out), np.float32), [], [], 0, 0)
        if used.size:
            x = self._floats(submission["x_address"], (tokens, layer.d_in))
            options: dict[str, Any] = {"planes": layer.planes, "grid_exponent": layer.grid_exponent}
            if linear:
                result = gemm(x, self._decoded(layer, 0)[0], **options)
            else:  # the golden model looks at expert 0 even if no token does
                decoded = _Experts(layer.num_experts, lambda e: Expert(
                    *self._decoded(layer, e if e in used else int(used[0]))))
                result = experts(x, ids, weights, decoded, **options)
        self._count(overflows=result.overflows, underflows=result.underflows)
        self._ram.write(submission["y_address"], np.ascontiguousarray(result.y).view(np.uint8)
                        .reshape(-1))
        return result, self._predict(layer, ids)

    def _floats(self, address: int, shape: tuple[int, int]) -> NDArray[np.float32]:
        """Return an array of memory; where there is none, which nobody asks for, zeros."""
        raw = self._ram.read(address, 4 * shape[0] * shape[1])
        return np.pad(raw, (0, 4 * shape[0] * shape[1] - raw.size)).view("<f4").reshape(shape)

    def _check_submission(self, submission: dict[str, int], *, linear: bool) -> None:
        config = self._config
        tokens, top_k = submission["tokens"], submission["top_k"]
        most = 1 if linear else TOP_K_MAX
        ok = {
            "tokens": 1 <= tokens <= config.max_tokens,
            "top_k": 1 <= top_k <= most and tokens * top_k <= config.max_assignments,
        }
        for name, value in submission.items():
            if name.endswith("_address"):
                ok[name] = value % ENTRY_BYTES == 0 and value < 1 << config.address_bits
        for field in SUBMISSION:
            if not ok.get(field.name, True):
                raise _Fault(Status.BAD_FIELD, detail=field.word)

    def _check_layer(self, address: int, *, linear: bool) -> _Layer:
        config = self._config
        values = decode(LAYER, self._load(address, ENTRY_BYTES).tobytes())

        def dim(name: str) -> bool:
            return 0 < values[name] <= config.max_dim and values[name] % BLOCK == 0

        formats = {f.code: f for f in config.weight_formats}
        kind = LayerKind.LINEAR if linear else LayerKind.EXPERTS
        ok = {
            "kind": values["kind"] == kind,
            "format": values["format"] in formats,
            "planes": values["planes"] in (1, 2),
            "activation": values["activation"] in list(Activation),
            "num_experts": 1 <= values["num_experts"] <= (1 if linear else config.max_experts),
            "d_in": dim("d_in"),
            "d_expert": dim("d_expert") and (not linear or values["d_expert"] == values["d_in"]),
            "d_out": dim("d_out"),
            "grid_exponent": values["grid_exponent"] in GRID_EXPONENTS,
            "stride": values["stride"] % 64 == 0,
            "image_address": values["image_address"] % 64 == 0
                             and values["image_address"] < 1 << config.address_bits,
        }
        for field in LAYER:
            if not ok[field.name]:
                raise _Fault(Status.BAD_LAYER, detail=field.word)
        fmt = formats[values["format"]]
        array = config.row_multipliers, config.channels
        down = Section(fmt, values["d_out"], values["d_expert"], *array)
        gate_up = Section(fmt, 2 * values["d_expert"], values["d_in"], *array)
        return _Layer(
            kind, fmt, values["planes"], values["num_experts"], values["d_in"], values["d_expert"],
            values["d_out"], values["grid_exponent"], values["stride"], values["image_address"],
            (down,) if linear else (gate_up, down))

    def _check_ends(self, submission: dict[str, int], layer: _Layer) -> None:
        """End the command unless everything it may touch ends within the address space."""
        top = 1 << self._config.address_bits
        tokens = submission["tokens"]
        pairs, y_bytes = 4 * tokens * submission["top_k"], 4 * tokens * layer.d_out
        sizes = {"x_address": 4 * tokens * layer.d_in, "ids_address": pairs,
                 "weights_address": pairs, "y_address": y_bytes, "workspace_address": 2 * y_bytes}
        for field in SUBMISSION:
            if field.name in sizes and submission[field.name] + sizes[field.name] > top:
                raise _Fault(Status.BAD_FIELD, detail=field.word)
        images = (layer.num_experts - 1) * layer.stride + layer.payload_bytes
        if layer.image_address + images > top:
            word = next(field.word for field in LAYER if field.name == "image_address")
            raise _Fault(Status.BAD_LAYER, detail=word)

    def _decoded(self, layer: _Layer, expert: int) -> tuple[QuantisedMatrix, ...]:
        """Return the matrices of an image as they are in memory now."""
        address = layer.image_address + expert * layer.stride
        version = sum(memory.version(address, layer.payload_bytes) for memory in self._channels)
        key = (address, layer.sections)
        found = self._cache.get(key)
        if found is not None and found[0] == version:
            self._cache.move_to_end(key)
            return found[1]
        matrices = []
        for section in layer.sections:
            size = section.words * section.word_bytes
            words = [memory.view(address, size) for memory in self._channels]
            matrices.append(unpack_section(
                words, section, paired=len(layer.sections) == 2 and not matrices))
            address += size
        size = sum(matrix.integers.nbytes for matrix in matrices)
        self._cache[key] = (version, tuple(matrices), size)
        self._cache.move_to_end(key)
        while len(self._cache) > 1 and self._cache_bytes < sum(
                kept[2] for kept in self._cache.values()):
            self._cache.popitem(last=False)
        return tuple(matrices)

    def _account(self, layer: _Layer, ids: NDArray[np.int64], used: NDArray[np.int64],
                 submission: dict[str, int]) -> None:
        """Check what the command touches, and count what it moves and computes.

        An expert takes its tokens in passes of as many as there are slots. Consecutive passes over
        the same tokens keep x and y on the chip; else partial sums travel through the workspace.
        """
        slots = self._config.max_slots // layer.planes
        passes = 0
        resident: list[tuple[int, ...]] = []  # tokens of each run of passes over the same tokens
        for expert in used:
            tokens = np.nonzero(ids == expert)[0].tolist()
            for begin in range(0, len(tokens), slots):
                passes += 1
                chosen = tuple(tokens[begin : begin + slots])
                if not resident or resident[-1] != chosen:
                    resident.append(chosen)
        left = np.bincount(np.array([t for run in resident for t in run], np.int64),
                           minlength=ids.shape[0])
        seen = np.zeros(ids.shape[0], bool)
        row = 8 * layer.d_out
        x, y, workspace = (submission[f"{name}_address"] for name in ("x", "y", "workspace"))
        zeros = [(y + row // 2 * int(token), row // 2) for token in np.nonzero(left == 0)[0]]
        reads: list[tuple[int, int]] = []
        writes: list[tuple[int, int]] = []
        for run in resident:
            for token in run:
                left[token] -= 1
                partial = workspace + row * token, row
                if seen[token]:
                    reads.append(partial)
                writes.append(partial if left[token] else (y + row // 2 * token, row // 2))
                seen[token] = True
        tokens = ids.shape[0]
        pairs = 0 if layer.kind is LayerKind.LINEAR else 4 * ids.size
        x_row = 4 * layer.d_in
        arrays = [(submission["weights_address"], pairs)] * (pairs > 0)
        images = [(layer.image_address + int(e) * layer.stride, layer.payload_bytes) for e in used]
        self._raise_first(
            self._first_faults(arrays),
            self._first_faults(images),
            self._first_faults((x + x_row * token, x_row) for run in resident for token in run),
            self._first_faults(zeros, write=True),
            self._first_faults(reads),
            self._first_faults(writes, write=True))
        read = x_row * sum(len(run) for run in resident) + row * len(reads)
        written = sum(size for _, size in (*zeros, *writes))
        port = self._config.port_bytes
        read += -(-pairs // port) * port
        self._count(
            bytes_read_weights=self._config.channels * passes
                               * (-(-layer.payload_bytes // port) * port),
            bytes_read_other=read, bytes_written=written, tokens=ids.shape[0],
            expert_passes=passes,
            assignments=int(((ids >= 0) & (ids < layer.num_experts)).sum()))

    def _predict(self, layer: _Layer, ids: NDArray[np.int64]) -> int:
        """Return the cycle model's figure for a command."""
        config, planes, latency = self._config, layer.planes, self._latency
        if layer.kind is LayerKind.LINEAR:
            return linear_cycles(
                config, layer.sections[0], len(ids), planes=planes, latency=latency)
        shape = ExpertShape(layer.format, layer.d_in, layer.d_expert, config.row_multipliers,
                            config.channels)
        return expert_cycles(
            config, shape, ids, layer.num_experts, planes=planes, latency=latency)


def _open(spec: DeviceSpec) -> tuple[Transport, AcceleratorConfig]:
    size = spec.memory_bytes or min(1 << 32, 1 << spec.config.address_bits)
    return GoldenTransport(spec.config, memory_bytes=size, **spec.options), spec.config


SCHEME = Scheme(
    help="the golden model behind registers, rings and memory", time="cycles from the cycle model",
    options=(GoldenTransport,), open=_open)
