"""What the simulated board reaches: weights a cycle and use of its array, by tokens an expert."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from moeaccel.config import AcceleratorConfig, preset
from moeaccel.formats import weight_format, whole_blocks
from moeaccel.host.device import Device
from moeaccel.host.errors import InvalidOption, LimitExceeded
from moeaccel.host.transports.base import Bytes
from moeaccel.host.transports.serial import SerialTransport
from moeaccel.image import Expert
from moeaccel.sim.board.board import Board

__all__ = ["BUS_BYTES", "Point", "Ridge", "measure_board"]

BUS_BYTES = 2
"""Peak of the SDRAM's 16-bit bus, bytes a cycle."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One command.

    Parameters
    ----------
    tokens : int
        All routed to the same expert.
    cycles : int
        From fetching the command to its completion.
    passes : int
        Times that the expert's weights were read.
    bus_share : float
        Bytes read and written / (bytes of the bus's peak x cycles).
    weights_per_cycle : float
        Weights that arrived from memory in a cycle.
    array_share : float
        Useful multiplications / those that the array can do.
    equal : bool
        Every bit of y is the golden model's.
    """

    tokens: int
    cycles: int
    passes: int
    bus_share: float
    weights_per_cycle: float
    array_share: float
    equal: bool


@dataclass(frozen=True, kw_only=True)
class Ridge:
    """The board's two limits.

    Parameters
    ----------
    config, weight_format : str
    activation_bits, d_model, d_expert : int
    tokens : float
        Tokens an expert at which array and memory take equally long: weights that the array takes
        in a cycle for one token, over those that memory gave in the command with one token.
    resident_tokens : int
        Most tokens of one pass; more read the weights again.
    points : list of Point
    """

    config: str
    weight_format: str
    activation_bits: int
    d_model: int
    d_expert: int
    tokens: float
    resident_tokens: int
    points: list[Point]

    def as_dict(self) -> dict[str, Any]:
        """Return every field for JSON."""
        return asdict(self)


class _BackDoor(SerialTransport):
    """Registers and interrupts over the line, memory directly: its bytes take no time."""

    def __init__(self, board: Board) -> None:
        super().__init__(board.port)
        self._memory = board.memory

    def memory_read(self, address: int, count: int) -> Bytes:
        self._flush()
        return self._memory[address:address + count].copy()

    def memory_write(self, address: int, data: bytes | Bytes) -> None:
        self._flush()
        self._memory[address:address + len(data)] = np.frombuffer(data, np.uint8)


def measure_board(config: str | AcceleratorConfig = "ulx3s", *,
                  tokens: Sequence[int] = (4, 16, 64, 128), d_model: int = 1024,
                  d_expert: int = 512, weight_format_name: str = "int4_g32",
                  activation_bits: int = 8, seed: int = 0,
                  progress: Callable[[str], None] = lambda _: None) -> Ridge:
    """Run one expert for different numbers of tokens on the simulated board, and compare bits.

    Parameters
    ----------
    config : str or AcceleratorConfig
    tokens : sequence of int
        Of each command; one with a single token always comes first, for the ridge.
    d_model, d_expert : int
    weight_format_name : str
    activation_bits : int
    seed : int
        Of weights and x.
    progress : callable
        Told what is being done.

    Raises
    ------
    InvalidOption
        If a number is not positive.
    LimitExceeded
        If the expert is larger than the configuration allows.
    """
    from moeaccel import golden

    config = preset(config)
    if any(number < 1 for number in tokens):
        raise InvalidOption(f"tokens must be positive numbers, not {tokens!r}")
    if d_model < 1 or d_expert < 1:
        raise InvalidOption(f"d_model and d_expert must be at least 1, not {d_model}, {d_expert}")
    if (most := max(d_model, d_expert)) > config.max_dim:
        raise LimitExceeded(f"d_model and d_expert must be at most max_dim = {config.max_dim} of "
                            f"config {config.name!r}, not {most}")
    tokens = (1, *(number for number in tokens if number != 1))
    rng = np.random.default_rng(seed)
    fmt, planes = weight_format(weight_format_name), activation_bits // 8

    # Two experts are the least that a layer may have; only the first is used.
    expert = Expert.quantise(
        rng.standard_normal((2 * d_expert, d_model), np.float32) / np.sqrt(np.float32(d_model)),
        rng.standard_normal((d_model, d_expert), np.float32) / np.sqrt(np.float32(d_expert)), fmt)
    count = 3 * d_model * d_expert
    per_cycle = config.multipliers * (2 if fmt.packed else 1)
    points = []
    progress("building the board; the first time takes some minutes")
    with Board(config) as board, Device(_BackDoor(board), config, timeout_s=3600.0) as device:
        loaded = device.load_quantised([expert, expert], activation_bits=activation_bits)
        for number in tokens:
            progress(f"{number} tokens")
            x = rng.standard_normal((number, d_model), np.float32)
            ids, weights = np.zeros((number, 1), np.int64), np.ones((number, 1), np.float32)
            before = device.counters()
            handle = loaded.submit(x, ids, weights)
            y = loaded.sync(handle)
            after = device.counters()
            taken = {name: after[name] - before[name] for name in after}
            moved = sum(taken[name] for name in (
                "bytes_read_weights", "bytes_read_other", "bytes_written"))
            filled = np.pad(x, ((0, 0), (0, whole_blocks(d_model) - d_model)))
            expected = golden.experts(filled, ids, weights, [expert.filled()], planes=planes,
                                      grid_exponent=loaded.grid_exponent).y[:, :d_model]
            points.append(Point(
                tokens=number, cycles=handle.cycles, passes=taken["expert_passes"],
                bus_share=moved / (BUS_BYTES * handle.cycles),
                weights_per_cycle=taken["expert_passes"] * count / handle.cycles,
                array_share=number * planes * count / (per_cycle * handle.cycles),
                equal=bool((y == expected).all())))
    return Ridge(
        config=config.name, weight_format=fmt.name, activation_bits=activation_bits,
        d_model=d_model, d_expert=d_expert,
        tokens=per_cycle / planes / points[0].weights_per_cycle,
        resident_tokens=config.max_slots // planes, points=points)
