"""The RTL and the golden model side by side: one script, the same bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from moeaccel.config import AcceleratorConfig
from moeaccel.host import open_device
from moeaccel.host.device import Command, Device
from moeaccel.host.errors import CommandFailed
from moeaccel.host.layers import Experts, Linear
from moeaccel.host.memory import Allocation
from moeaccel.host.rings import Completion
from moeaccel.host.transports.golden import GoldenTransport
from moeaccel.host.transports.rtl import RtlTransport
from moeaccel.interface.commands import ENTRY_BYTES, EXPERT, LAYER, Opcode, decode, encode
from moeaccel.interface.registers import REGISTERS
from moeaccel.sim import CoSimulation, MemoryModel, StallModel
from moeaccel.sim.cosim.verilator import Model

MEMORY_BYTES = 1 << 27  # 128 experts, each as large as a drawn case reads them

TIME = ("busy", "starved_weights", "starved_activations", "stalled_output", "idle")
"""Counters of cycles; the golden model keeps none of them."""

WORK = ("bytes_read_weights", "bytes_read_other", "bytes_written", "tokens", "expert_passes",
        "assignments", "overflows", "commands", "underflows")
"""Counters of work, equal on both."""


class Pair:
    """The same device twice: the RTL in a co-simulation, and the golden model.

    Parameters
    ----------
    model : Model
        Of ``config``.
    config : AcceleratorConfig
    memory : MemoryModel or sequence of MemoryModel
        Timing of the RTL's memory, of each channel or of all; its size is that of both.
    register_stalls : StallModel, optional
        Pauses of the RTL's register master.
    **options
        Of both devices.
    """

    def __init__(self, model: Model, config: AcceleratorConfig, *,
                 memory: MemoryModel | Sequence[MemoryModel] | None = None,
                 register_stalls: StallModel | None = None, seed: int = 1,
                 **options: Any) -> None:
        memory = memory or MemoryModel.ideal(size=MEMORY_BYTES)
        self.config = config
        self.simulation = CoSimulation(model, memory=memory, register_stalls=register_stalls,
                                       seed=seed)
        options = {"timeout_s": 20.0} | options
        self.rtl = open_device(RtlTransport(config, simulation=self.simulation), config=config,
                               **options)
        size = (memory if isinstance(memory, MemoryModel) else memory[0]).size
        self.golden = open_device("golden", config=config, memory_bytes=size, **options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self.close()

    @property
    def devices(self) -> tuple[Device, Device]:
        """The RTL, and the golden model."""
        return self.rtl, self.golden

    def close(self) -> None:
        """Close both."""
        for device in self.devices:
            device.close()

    def reset(self) -> None:
        """Bring both back to their first state: no command, counters 0, statistics 0."""
        for device in self.devices:
            device.reset()
        self.simulation.clear_stats()

    def same(self, script: Callable[[Device], Any]) -> Any:
        """Run a script on both and return its result, an array, which must be the same bits.

        A torch tensor, of bfloat16, counts as the array of its bits.

        An error that a device reports counts as a result: kind, status, detail and address.
        """
        rtl, golden = (_outcome(script, device) for device in self.devices)
        if isinstance(golden, np.ndarray) and isinstance(rtl, np.ndarray):
            assert_same_bits(rtl, golden)
        else:
            assert type(rtl) is type(golden) and rtl == golden
        return rtl

    def same_completion(self, script: Callable[[Device], Command]) -> Completion:
        """Run a script on both and return the completion of its command, which must be the same.

        Where several streams of the command are at fault, the RTL names the first fault of any of
        them (moeaccel.interface.commands.Status.WINDOW).
        """
        rtl, golden = (script(device).completion for device in self.devices)
        assert rtl is not None
        assert golden is not None
        assert isinstance(self.golden.transport, GoldenTransport)
        possible = self.golden.transport.possible_faults
        if possible:
            assert (golden.status, golden.address) in possible
            assert (rtl.status, rtl.address) in possible, f"{rtl} {golden} {possible}"
        else:
            assert (rtl.status, rtl.address) == (golden.status, golden.address)
        assert rtl.detail == golden.detail
        return rtl

    def check(self) -> dict[str, int]:
        """Hold counters and bus to what both devices did since the last reset; return counters.

        Not for commands that end early: those move less than the golden model says.
        """
        self.simulation.check()
        counters, expected = (device.counters() for device in self.devices)
        assert {name: counters[name] for name in WORK} == {name: expected[name] for name in WORK}
        stats, *others = (
            self.simulation.stats(port=port) for port in range(self.simulation.port_count))
        read = counters["bytes_read_weights"] + counters["bytes_read_other"]
        assert read == stats.bytes_read + sum(other.bytes_read for other in others)
        assert not any(other.bytes_written for other in others)
        assert counters["bytes_written"] == stats.bytes_written
        return counters


def _outcome(script: Callable[[Device], Any], device: Device) -> Any:
    try:
        y = script(device)
        return y.view(torch.int16).numpy() if isinstance(y, torch.Tensor) else y
    except CommandFailed as error:
        return type(error).__name__, int(error.status), error.detail, error.address


def assert_same_bits(found: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
    """Assert that arrays are equal bit by bit, and say where they are not."""
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    bits = np.dtype(f"u{found.itemsize}")
    differ = found.view(bits) != expected.view(bits)
    if differ.any():
        where = np.argwhere(differ)
        first = tuple(where[0])
        raise AssertionError(
            f"{len(where)} of {differ.size} elements differ, in rows {np.unique(where[:, 0])[:9]} "
            f"and columns {np.unique(where[:, 1])[:9]}; first {first}: {found[first]!r} instead of "
            f"{expected[first]!r}")


class Buffers:
    """Memory of one raw command, laid out by hand: the same addresses on every device.

    Parameters
    ----------
    device : Device
    x : float32 array, (T, d_in)
    ids, weights : arrays, (T, K)
    d_out : int
    room : int
        Bytes between one buffer and the next: nobody's.
    """

    def __init__(self, device: Device, x: NDArray[np.float32], ids: NDArray[np.integer],
                 weights: NDArray[np.float32], *, d_out: int, room: int = 256) -> None:
        self.device = device
        self.shape = len(x), d_out
        sizes = {"x": x.nbytes, "ids": 4 * ids.size, "weights": 4 * ids.size,
                 "y": 4 * len(x) * d_out, "workspace": 8 * len(x) * d_out}
        self.sizes = {name: -(-size // 64) * 64 for name, size in sizes.items()}
        self.memory: Allocation = device.memory.allocate(
            sum(self.sizes.values()) + room * (len(sizes) + 1))
        self.addresses: dict[str, int] = {}
        where = self.memory.address + room
        for name, size in self.sizes.items():
            self.addresses[name] = where
            where += size + room
        self.data = {"x": x.astype("<f4"), "ids": ids.astype("<i4"),
                     "weights": weights.astype("<f4")}
        for name in self.data:
            self.write(name, self.addresses[name])

    def write(self, name: str, address: int) -> None:
        """Write what a buffer holds to an address."""
        raw = np.ascontiguousarray(self.data[name]).view(np.uint8).reshape(-1)
        self.device.transport.memory_write(address, raw)

    def fields(self, layer: int, **changes: int) -> dict[str, int]:
        """Return the submission; ``changes`` replace fields."""
        tokens, top_k = self.data["ids"].shape
        return {"opcode": int(Opcode.EXPERTS), "tokens": tokens, "top_k": top_k,
                "layer_address": layer,
                **{f"{name}_address": value for name, value in self.addresses.items()}, **changes}

    def y(self) -> NDArray[np.float32]:
        """Return what y holds."""
        tokens, d_out = self.shape
        raw = self.device.transport.memory_read(self.addresses["y"], 4 * tokens * d_out)
        return raw.view("<f4").reshape(self.shape)


def execute(device: Device, fields: Mapping[str, int]) -> Command:
    """Submit a raw command and wait for its completion, whatever its status."""
    command = device.submit(fields, Command("raw"))
    device.wait(command)
    return command


def read_layer(device: Device, layer: Experts | Linear) -> tuple[dict[str, int],
                                                                 list[dict[str, int]]]:
    """Return the descriptor of a layer and the entries of its table, as they are in memory."""
    raw = device.transport.memory_read(layer._descriptor.address, ENTRY_BYTES).tobytes()
    descriptor = decode(LAYER, raw)
    table = device.transport.memory_read(
        descriptor["table_address"], ENTRY_BYTES * descriptor["num_experts"]).tobytes()
    return descriptor, [decode(EXPERT, table[at : at + ENTRY_BYTES])
                        for at in range(0, len(table), ENTRY_BYTES)]


def place_layer(device: Device, descriptor: Mapping[str, int],
                table: Sequence[Mapping[str, int]], **changes: int) -> Allocation:
    """Write a layer descriptor of one's own and its table; ``changes`` replace its fields."""
    memory = device.memory.allocate(ENTRY_BYTES * (1 + len(table)))
    own = {**descriptor, "table_address": memory.address + ENTRY_BYTES, **changes}
    raw = encode(LAYER, own) + b"".join(encode(EXPERT, entry) for entry in table)
    device.transport.memory_write(memory.address, np.frombuffer(raw, np.uint8))
    return memory


def write_register(device: Device, name: str, value: int) -> None:
    """Write a register, both halves of one that has two."""
    if name in REGISTERS:
        device.transport.register_write(REGISTERS[name].address, value)
        return
    for half, part in (("LO", value & 0xFFFF_FFFF), ("HI", value >> 32)):
        device.transport.register_write(REGISTERS[f"{name}_{half}"].address, part)


def read_register(device: Device, name: str) -> int:
    """Read a register."""
    return device.transport.register_read(REGISTERS[name].address)


def draw_experts(rng: np.random.Generator, experts: int, d_model: int, d_expert: int, *,
                 spread: int = 0) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return (gate_up, down) of a layer whose outputs are about as large as its inputs.

    With a spread, blocks of 32 weights are smaller by powers of two down to ``2**-spread``, and one
    in twenty is zero, so that scales use their whole range.
    """
    def matrices(rows: int, columns: int) -> NDArray[np.float32]:
        values = rng.standard_normal((experts, rows, columns)) * (1.5 / np.sqrt(columns))
        if spread:
            scale = np.exp2(-rng.integers(0, spread + 1, (experts, rows, columns // 32)))
            scale *= rng.random(scale.shape) < 0.95
            values *= np.repeat(scale, 32, axis=-1)
        return values.astype(np.float32)

    return matrices(2 * d_expert, d_model), matrices(d_model, d_expert)


def batches(total: int, most: int) -> Iterator[slice]:
    """Yield consecutive slices of at most so many."""
    for first in range(0, total, most):
        yield slice(first, min(total, first + most))
