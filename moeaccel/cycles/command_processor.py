"""A command before its job: submission and layer."""

from __future__ import annotations

from collections.abc import Callable

from moeaccel.cycles.job import Job
from moeaccel.cycles.memory_port import MemoryPort
from moeaccel.cycles.schedule import Process
from moeaccel.interface.commands import ENTRY_BYTES


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
