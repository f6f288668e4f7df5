"""How the simulated memory behaves, and what it counted."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from moeaccel.config import MEMORY_LATENCY_CYCLES

MEMORY_ALIGNMENT_BYTES = 4096
CHANNELS = ("ar", "r", "aw", "w", "b")


def _check_integer(name: str, value: object, *, least: int, most: int = (1 << 32) - 1) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f"{name} must be an integer in [{least}, {most}], not {value!r}")


@dataclass(frozen=True, kw_only=True)
class StallModel:
    """Random pauses of the five channels of a bus, each with a probability in every cycle.

    Parameters
    ----------
    ar, r, aw, w, b : float
        Chance in [0, 1) that a pause begins.
    length : int
        A pause lasts 1 to `length` cycles.
    """

    ar: float = 0.0
    r: float = 0.0
    aw: float = 0.0
    w: float = 0.0
    b: float = 0.0
    length: int = 1

    def __post_init__(self) -> None:
        for name in CHANNELS:
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 <= value < 1:
                raise ValueError(f"Stall probability {name} must be in [0, 1), not {value!r}")
        _check_integer("Stall length", self.length, least=1)

    @classmethod
    def uniform(cls, probability: float, *, length: int = 1) -> StallModel:
        """Return the same probability for every channel."""
        return cls(ar=probability, r=probability, aw=probability, w=probability, b=probability,
                   length=length)


@dataclass(frozen=True, kw_only=True)
class MemoryModel:
    """Size and timing of the memory behind one AXI4 master.

    A burst's data streams one beat a cycle as far as bandwidth, refresh and pauses allow. Reads
    take their data when a beat is first offered; writes take effect when their response is first
    offered. Bursts are answered in order unless `reorder` is set.

    Parameters
    ----------
    size : int
        Bytes; a multiple of 4096. Only pages that are touched cost anything. Addresses outside are
        answered with SLVERR.
    read_latency : int
        Cycles from an accepted read address to its first beat of data, at least 1.
    write_latency : int
        Cycles from a write's last accepted beat to its response, at least 1.
    read_latency_most, write_latency_most : int
        Where larger, each burst has a latency of its own up to here, with every power of two as
        likely as every other.
    last_beat_delay : int
        Cycles that a read burst's last beat comes later.
    bytes_per_cycle : fractions.Fraction or int, optional
        Bandwidth; one beat of the bus a cycle when left out.
    shared : bool
        Reads and writes share the bandwidth; else each has it.
    never_refuse : bool
        Addresses and write data are accepted in every cycle. With shared bandwidth a write then
        takes the next cycle from the reads.
    max_reads, max_writes : int
        Bursts that may be accepted and unfinished.
    refresh_interval, refresh_cycles : int
        Every so many cycles, no data and no response for so many cycles.
    turnaround_cycles : int
        Lost when shared bandwidth changes its direction. Writes are posted and drained in batches.
    row_bytes, banks, row_miss_cycles : int
        Row buffers: reading another row of a bank costs time, which bursts that wait hide when they
        are for different banks. 0 row bytes: no rows.
    stalls : StallModel
        Random pauses.
    reorder : bool
        Bursts of different ids overtake each other at random.
    interleave : bool
        And so do their beats.
    response_timeout : int
        Cycles that a response may wait for its ready signal, or accepted write addresses for their
        data, before that is a violation; 0 for ever.
    check_races : bool
        An access that overlaps an unacknowledged write, or a write that overlaps an outstanding
        read, is a violation.
    check_unwritten : bool
        A read by the device of 64 bytes that nobody wrote, or a write of a part of 64, is a
        violation: memory with error correction faults on the one and is slow at the other.
    seed : int
        Of everything random.
    """

    size: int = 1 << 32
    read_latency: int = MEMORY_LATENCY_CYCLES
    write_latency: int = MEMORY_LATENCY_CYCLES
    read_latency_most: int = 0
    write_latency_most: int = 0
    last_beat_delay: int = 0
    bytes_per_cycle: Fraction | int | None = None
    shared: bool = False
    never_refuse: bool = False
    max_reads: int = 64
    max_writes: int = 64
    refresh_interval: int = 0
    refresh_cycles: int = 0
    turnaround_cycles: int = 0
    row_bytes: int = 0
    banks: int = 16
    row_miss_cycles: int = 0
    stalls: StallModel = StallModel()
    reorder: bool = False
    interleave: bool = False
    response_timeout: int = 100_000
    check_races: bool = True
    check_unwritten: bool = False
    seed: int = 1

    def __post_init__(self) -> None:
        _check_integer("Memory size", self.size, least=MEMORY_ALIGNMENT_BYTES, most=1 << 47)
        if self.size % MEMORY_ALIGNMENT_BYTES:
            raise ValueError(
                f"Memory size must be a multiple of {MEMORY_ALIGNMENT_BYTES}, not {self.size!r}")
        _check_integer("Read latency", self.read_latency, least=1)
        _check_integer("Write latency", self.write_latency, least=1)
        _check_integer("Most read latency", self.read_latency_most, least=0, most=(1 << 31) - 1)
        _check_integer("Most write latency", self.write_latency_most, least=0, most=(1 << 31) - 1)
        _check_integer("Delay of last beats", self.last_beat_delay, least=0)
        _check_integer("Outstanding reads", self.max_reads, least=1)
        _check_integer("Outstanding writes", self.max_writes, least=1)
        if self.bytes_per_cycle is not None:
            rate = self.bytes_per_cycle
            if not isinstance(rate, Fraction | int) or rate <= 0:
                raise ValueError(f"Bytes per cycle must be a positive fraction, not {rate!r}")
            if rate.numerator >= 1 << 32 or rate.denominator >= 1 << 32:
                raise ValueError(f"Bytes per cycle must have terms below 2^32, not {rate!r}")
        _check_integer("Refresh interval", self.refresh_interval, least=0)
        _check_integer("Refresh length", self.refresh_cycles, least=0,
                       most=max(0, self.refresh_interval - 1))
        _check_integer("Turnaround", self.turnaround_cycles, least=0)
        _check_integer("Row size", self.row_bytes, least=0)
        _check_integer("Bank count", self.banks, least=1)
        _check_integer("Row miss", self.row_miss_cycles, least=0)
        _check_integer("Response timeout", self.response_timeout, least=0)
        _check_integer("Seed", self.seed, least=0, most=(1 << 64) - 1)
        if self.row_bytes and (self.read_latency_most or self.last_beat_delay):
            raise ValueError("A memory with rows must have one read latency and no late beats")
        paused = any(getattr(self.stalls, name) for name in ("ar", "aw", "w"))
        if self.never_refuse and (paused or self.refresh_interval):
            raise ValueError("A memory that never refuses must have no refresh and no pauses of "
                             "AR, AW and W")

    @classmethod
    def ideal(cls, latency: int = MEMORY_LATENCY_CYCLES, *, size: int = 1 << 32) -> MemoryModel:
        """Return one port shared by reads and writes, never refusing, with a fixed latency."""
        return cls(size=size, read_latency=latency, write_latency=latency, shared=True,
                   never_refuse=True)

    @classmethod
    def random(cls, seed: int, *, size: int = 1 << 32) -> MemoryModel:
        """Return a memory that finds mistakes; every seed is another one.

        Latency, pauses, refresh and the number of outstanding bursts are drawn from the seed;
        bursts of different ids overtake each other, and their beats are mixed with some seeds.
        """
        draw = random.Random(seed)
        stalls = {name: draw.choice((0.0, 0.05, 0.2, 0.5)) for name in CHANNELS}
        refresh = draw.choice((0, 0, 200, 1000))
        return cls(
            size=size, seed=seed,
            read_latency=draw.choice((1, 2, 7, 40, 200)),
            write_latency=draw.choice((1, 3, 20, 200)),
            max_reads=draw.choice((1, 2, 5, 16, 64)), max_writes=draw.choice((1, 2, 5, 16)),
            refresh_interval=refresh, refresh_cycles=refresh // 5,
            stalls=StallModel(**stalls, length=draw.choice((1, 4, 30))),
            reorder=True, interleave=draw.random() < 0.5)

    @classmethod
    def adversarial(cls, seed: int, *, size: int = 1 << 32) -> MemoryModel:
        """Return a memory that may be slow to the extreme, on one channel or on several.

        Half of the seeds have one thing that is slow and a memory that else answers at once, which
        :meth:`random` never has; the others two or three. Latencies are up to 20,000 cycles,
        log-uniform, the same for all bursts or each its own; pauses have a probability of up to
        0.99 in each cycle and last up to 100.
        """
        draw = random.Random(seed)

        def cycles(most: int) -> int:
            return round(math.exp(draw.uniform(0, math.log(most))))

        def latency(name: str) -> dict[str, Any]:
            most = cycles(20_000)
            each_its_own = draw.random() < 0.3
            return {name: 1 if each_its_own else most,
                    f"{name}_most": most if each_its_own else 0}

        slow: dict[str, Callable[[], dict[str, Any]]] = {
            "read": lambda: latency("read_latency"),
            "write": lambda: latency("write_latency"),
            "last beat": lambda: {"last_beat_delay": cycles(2000)},
            "one read": lambda: {"max_reads": 1, "read_latency": cycles(300)},
            "one write": lambda: {"max_writes": 1, "write_latency": cycles(300)},
            "order": lambda: {"reorder": True, "interleave": draw.random() < 0.5,
                              "read_latency": 1, "read_latency_most": cycles(2000)},
        } | dict.fromkeys(CHANNELS, dict)
        chosen = draw.sample(list(slow), draw.choice((1, 1, 1, 2, 2, 3)))
        fields: dict[str, Any] = {"read_latency": 1, "write_latency": 1}
        for name in chosen:
            fields |= slow[name]()
        pauses = {name: draw.choice((0.3, 0.9, 0.97, 0.99)) for name in CHANNELS if name in chosen}
        return cls(size=size, seed=seed, **fields,
                   stalls=StallModel(**pauses, length=draw.choice((1, 3, 10, 100))))

    @classmethod
    def dram(cls, *, bytes_per_cycle: Fraction | int | None = None, clock_mhz: int = 200,
             size: int = 1 << 32, latency: int = MEMORY_LATENCY_CYCLES) -> MemoryModel:
        """Return something like a DDR4 channel behind its controller.

        Refresh for 350 ns every 7.8 us, rows of 8 KiB in 16 banks with 28 ns to open another one,
        10 ns to turn the bus round, 32 reads and 32 writes outstanding.

        Parameters
        ----------
        bytes_per_cycle : fractions.Fraction or int, optional
            Peak bandwidth, shared by reads and writes; one beat a cycle when left out.
        clock_mhz : int
            Clock of the design.
        size : int
            Bytes.
        latency : int
            Cycles of an unloaded read whose row is open, and of a write.
        """
        _check_integer("Clock", clock_mhz, least=1)

        def cycles(nanoseconds: int) -> int:
            return max(1, round(nanoseconds * clock_mhz / 1000))

        return cls(
            size=size, read_latency=latency, write_latency=latency,
            bytes_per_cycle=bytes_per_cycle, shared=True, max_reads=32, max_writes=32,
            refresh_interval=cycles(7800), refresh_cycles=cycles(350),
            turnaround_cycles=cycles(10), row_bytes=8192, banks=16, row_miss_cycles=cycles(28))


@dataclass(frozen=True, kw_only=True)
class MemoryStats:
    """What one memory port counted.

    Parameters
    ----------
    bytes_read, bytes_written : int
        Whole beats read; strobed bytes that reached the memory.
    read_bursts, write_bursts : int
        Accepted addresses.
    read_beats, write_beats : int
        Cycles in which data moved.
    read_wait_cycles, write_wait_cycles : int
        Cycles in which a valid beat was not taken.
    read_busy_cycles : int
        Cycles with at least one read outstanding.
    first_read_cycle, last_read_cycle, first_write_cycle, last_write_cycle : int or None
        Of data; None while there was none.
    most_reads, most_writes : int
        Bursts outstanding at the same time, at most.
    """

    bytes_read: int
    bytes_written: int
    read_bursts: int
    write_bursts: int
    read_beats: int
    write_beats: int
    read_wait_cycles: int
    write_wait_cycles: int
    read_busy_cycles: int
    first_read_cycle: int | None
    last_read_cycle: int | None
    first_write_cycle: int | None
    last_write_cycle: int | None
    most_reads: int
    most_writes: int
