"""The device as a model: same registers, rings, checks and bits as the hardware, only faster.

Everything the device does goes through its memory: experts are decoded from the images that were
uploaded, results are written where the command says. A doorbell executes what is in the ring before
it returns.
"""

from __future__ import annotations

import logging
import mmap
import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from moeaccel.commands import (
    COMPLETION,
    ENTRY_BYTES,
    LAYER,
    SUBMISSION,
    Activation,
    LayerKind,
    Opcode,
    Status,
    decode,
    encode,
)
from moeaccel.config import BLOCK, TOP_K_MAX, AcceleratorConfig
from moeaccel.cycles import expert_cycles, linear_cycles
from moeaccel.formats import QuantisedMatrix, WeightFormat
from moeaccel.golden import DeviceResult, experts, gemm
from moeaccel.host.errors import DeviceClosed, InvalidOption, UploadError
from moeaccel.host.transports.base import Bytes, Transport
from moeaccel.image import Expert, ExpertShape, Section, unpack_section
from moeaccel.registers import COUNTERS, REGISTERS, Access

__all__ = ["GoldenTransport"]

logger = logging.getLogger(__name__)

_PAGE_BITS = 12
_COUNTER_BITS = 48
_BY_ADDRESS = {register.address: register for register in REGISTERS.values()}
_COMPLETION_IRQ, _RESET_IRQ = 1, 2
# Python 3.11's mmap does not name this flag.
_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x40 if sys.platform == "darwin" else 0x4000)


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
                 cache_bytes: int = 1 << 30, latency: int = 40) -> None:
        self._config = config
        self._memories = tuple(_Memory(memory_bytes) for _ in range(config.channels))
        self._memory_bytes = memory_bytes
        self._latency = latency
        self._registers = {r.address: r.reset for r in REGISTERS.values()}
        self._registers[REGISTERS["CONFIG_HASH"].address] = config.digest
        self._counters = {name: 0 for name, _ in COUNTERS}
        self._phase = 1
        self._cache: OrderedDict[tuple[int, tuple[Section, ...]],
                                 tuple[int, tuple[QuantisedMatrix, ...], int]] = OrderedDict()
        self._cache_bytes, self._cached_bytes = cache_bytes, 0

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
        if register.name in ("ENABLE", "SQ_TAIL", "CQ_HEAD"):
            self._execute_ring()

    def memory_read(self, address: int, count: int) -> Bytes:
        memory, address = self._range(address, count)
        return memory.read(address, count)

    def memory_write(self, address: int, data: bytes | Bytes) -> None:
        raw = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else data.reshape(-1)
        memory, address = self._range(address, raw.size)
        memory.write(address, raw)

    def wait_interrupt(self, timeout_s: float) -> bool:
        del timeout_s  # whatever can happen has happened
        return bool(self._get("IRQ_STATUS") & self._get("IRQ_ENABLE"))

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

    def _check(self, address: int, count: int) -> None:
        """End the command unless every burst of the range is inside the window and the memory."""
        port = self._config.port_bytes
        block = port * self._config.max_burst_beats
        end = address + -(-count // port) * port
        base, limit = self._get64("WINDOW_BASE"), self._get64("WINDOW_LIMIT")
        if address < base:
            raise _Fault(Status.WINDOW, address=address)
        for status, top in ((Status.WINDOW, limit), (Status.BUS_ERROR, len(self._ram))):
            if end > top:
                raise _Fault(status, address=max(address, top // block * block))

    def _load(self, address: int, count: int) -> Bytes:
        self._check(address, count)
        self._count(bytes_read_other=-(-count // self._config.port_bytes) * self._config.port_bytes)
        return self._ram.read(address, count)

    def _count(self, **amounts: int) -> None:
        for name, amount in amounts.items():
            self._counters[name] += amount

    # -- rings -------------------------------------------------------------------------------------
    @property
    def _entries(self) -> int:
        return 1 << min(max(self._get("RING_LOG2"), 1), 8)

    def _soft_reset(self) -> None:
        for name in ("SQ_HEAD", "SQ_TAIL", "CQ_HEAD", "CQ_TAIL"):
            self._set(name, 0)
        self._phase = 1
        self._counters = dict.fromkeys(self._counters, 0)
        self._set("IRQ_STATUS", self._get("IRQ_STATUS") | _RESET_IRQ)

    def _execute_ring(self) -> None:
        mask = self._entries - 1
        while (self._get("ENABLE") & 1
               and self._get("SQ_HEAD") != self._get("SQ_TAIL") & mask
               and (self._get("CQ_TAIL") + 1) & mask != self._get("CQ_HEAD") & mask):
            head, tail = self._get("SQ_HEAD"), self._get("CQ_TAIL")
            completion = self._execute(self._get64("SQ_BASE") + ENTRY_BYTES * head)
            self._set("SQ_HEAD", (head + 1) & mask)
            where = self._get64("CQ_BASE") + ENTRY_BYTES * tail
            self._count(commands=1, bytes_written=ENTRY_BYTES)
            try:
                self._check(where, ENTRY_BYTES)
                entry = encode(COMPLETION, completion | {"phase": self._phase})
                self._ram.write(where, np.frombuffer(entry, np.uint8))
            except _Fault:
                logger.debug("completion ring at %#x is outside the window", where)
            self._set("CQ_TAIL", (tail + 1) & mask)
            self._phase ^= (tail + 1) & mask == 0
            self._set("IRQ_STATUS", self._get("IRQ_STATUS") | _COMPLETION_IRQ)

    def _execute(self, address: int) -> dict[str, int]:
        """Execute the submission at an address and return its completion, but for the phase."""
        tag, cycles, status, detail, where = 0, 0, Status.OK, 0, 0
        try:
            submission = decode(SUBMISSION, self._load(address, ENTRY_BYTES).tobytes())
            tag = submission["tag"]
            match submission["opcode"]:
                case Opcode.NOP | Opcode.FENCE:
                    pass
                case Opcode.EXPERTS | Opcode.GEMM:
                    result, cycles = self._compute(submission)
                    if result.nonfinite_tokens:
                        status, detail = Status.NONFINITE, result.nonfinite_tokens[0]
                    elif result.overflows:
                        status, detail = Status.OVERFLOW, result.overflows
                case opcode:
                    raise _Fault(Status.BAD_OPCODE, detail=opcode)
        except _Fault as fault:
            status, detail, where = fault.status, fault.detail, fault.address
        return {"tag": tag, "status": status, "detail": detail, "address": where, "cycles": cycles}

    # -- commands ----------------------------------------------------------------------------------
    def _compute(self, submission: dict[str, int]) -> tuple[DeviceResult, int]:
        """Check, compute and write back an EXPERTS or GEMM command; return also its cycles."""
        linear = submission["opcode"] == Opcode.GEMM
        self._check_submission(submission, linear=linear)
        layer = self._check_layer(submission["layer_address"], linear=linear)
        tokens, top_k = submission["tokens"], submission["top_k"]
        if linear:
            ids = np.zeros((tokens, 1), np.int64)
            weights = np.ones((tokens, 1), np.float32)
        else:
            count = 4 * tokens * top_k
            ids = self._load(submission["ids_address"], count).view("<i4").reshape(tokens, top_k)
            ids = ids.astype(np.int64)
            weights = self._load(submission["weights_address"], count).view("<f4")
            weights = weights.reshape(tokens, top_k)
        used = np.unique(ids[(ids >= 0) & (ids < layer.num_experts)])
        y_bytes = 4 * tokens * layer.d_out
        for expert in used:
            self._check(layer.image_address + int(expert) * layer.stride, layer.payload_bytes)
        if used.size:
            self._check(submission["x_address"], 4 * tokens * layer.d_in)
        self._check(submission["y_address"], y_bytes)
        self._account(layer, ids, used, submission)

        result = DeviceResult(np.zeros((tokens, layer.d_out), np.float32), [], 0)
        if used.size:
            x = self._ram.read(submission["x_address"], 4 * tokens * layer.d_in).view("<f4")
            x = x.reshape(tokens, layer.d_in)
            options: dict[str, Any] = {"planes": layer.planes, "grid_exponent": layer.grid_exponent}
            if linear:
                result = gemm(x, self._decoded(layer, 0)[0], **options)
            else:  # the golden model looks at expert 0 even if no token does
                decoded = _Experts(layer.num_experts, lambda e: Expert(
                    *self._decoded(layer, e if e in used else int(used[0]))))
                result = experts(x, ids, weights, decoded, **options)
        self._count(overflows=result.overflows)
        self._ram.write(submission["y_address"], np.ascontiguousarray(result.y).view(np.uint8)
                        .reshape(-1))
        return result, self._predict(layer, ids)

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
            "grid_exponent": -100 <= values["grid_exponent"] <= 60,
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
        if found is not None:
            self._cached_bytes -= self._cache.pop(key)[2]
        self._cache[key] = (version, tuple(matrices), size)
        self._cached_bytes += size
        while self._cached_bytes > self._cache_bytes and len(self._cache) > 1:
            self._cached_bytes -= self._cache.popitem(last=False)[1][2]
        return tuple(matrices)

    def _account(self, layer: _Layer, ids: NDArray[np.int64], used: NDArray[np.int64],
                 submission: dict[str, int]) -> None:
        """Check the workspace and count what the command moves and computes.

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
        idle_tokens = int((left == 0).sum())
        seen = np.zeros(ids.shape[0], bool)
        row = 8 * layer.d_out
        read, written = 0, 4 * layer.d_out * idle_tokens
        for run in resident:
            read += 4 * layer.d_in * len(run)
            for token in run:
                left[token] -= 1
                if seen[token] or left[token]:
                    self._check(submission["workspace_address"] + row * token, row)
                read += row if seen[token] else 0
                written += row if left[token] else row // 2
                seen[token] = True
        port = self._config.port_bytes
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
