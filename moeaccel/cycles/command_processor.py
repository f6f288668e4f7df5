"""A command before its job: submission and layer."""

from __future__ import annotations

from collections.abc import Callable

from moeaccel.config import AcceleratorConfig
from moeaccel.cycles.job import Job
from moeaccel.cycles.memory_port import READ_CYCLES, MemoryPort
from moeaccel.cycles.schedule import Process
from moeaccel.interface.commands import ENTRY_BYTES, MOE_BLOCK

NEXT_CYCLES = 2
"""From where a completion would begin to the next job of a MOE."""


def fetch(job: Job, port: MemoryPort, start: Callable[[int], None]) -> Process:
    """Fetch submission and layer, check them, see where arrays end, start the job.

    From the submission's last beat 5 cycles to the request of the layer; from the layer's 5, and
    the bits of the largest factor of a size, to the job.
    """
    beats = job.beats(ENTRY_BYTES, 1)
    read = port.read(0, beats)
    yield read
    yield read.last + 5
    read = port.read(read.last + 5, beats)
    yield read
    cycle = read.last + 5 + max(job.steps_in, job.steps_out, job.ids.shape[1]).bit_length()
    yield cycle
    start(cycle)


def before_job(config: AcceleratorConfig, largest: int, latency: int) -> int:
    """Return the cycle in which the job of :func:`fetch` starts.

    Parameters
    ----------
    largest : :class:`int`
        Factor of a size: blocks of a row, or experts of a token.
    """
    read = READ_CYCLES + latency + ENTRY_BYTES // config.port_bytes - 1
    return 2 * read + 10 + largest.bit_length()


def before_moe(config: AcceleratorConfig, largest: tuple[int, ...], latency: int) -> int:
    """Return the cycle in which the first job of a MOE starts: its three descriptors are read at
    once, checked one after the other, and turned to the first."""
    beats = ENTRY_BYTES // config.port_bytes
    read = 2 * (READ_CYCLES + latency - 1) + (1 + len(MOE_BLOCK)) * beats + 5
    return read + 3 + sum(5 + size.bit_length() for size in largest)
