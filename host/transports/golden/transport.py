"""The five verbs of the golden device.

Everything the device does goes through its memory: experts are decoded from the images that were
uploaded, results are written where the command says. A doorbell executes what is in the ring before
it returns; a command that is interrupted is executed again, from its beginning, by the next
doorbell or wait.
"""

from __future__ import annotations

import numpy as np

from moeaccel.config import MEMORY_LATENCY_CYCLES, AcceleratorConfig
from moeaccel.host.errors import InvalidOption
from moeaccel.host.options import whole
from moeaccel.host.transports.base import Bytes, Transport
from moeaccel.host.transports.golden.command_processor import CommandProcessor
from moeaccel.host.transports.golden.engine import Engine
from moeaccel.host.transports.golden.expert_buffer import ExpertBuffer
from moeaccel.host.transports.golden.images import Images
from moeaccel.host.transports.golden.memory_port import MemoryPort
from moeaccel.host.transports.golden.register_file import RegisterFile
from moeaccel.host.transports.golden.route_unit import RouteUnit
from moeaccel.host.transports.golden.timing import Timing

__all__ = ["GoldenTransport"]


class GoldenTransport(Transport):
    """The golden model behind registers, rings and memory.

    Parameters
    ----------
    config : :class:`AcceleratorConfig`
    memory_bytes : :class:`int`
        Of each channel: a multiple of 4096; only pages that are touched cost anything.
    cache_bytes : :class:`int`
        Decoded weights that are kept, in bytes.
    timing : :class:`bool`
        Completions state the cycle model's cycles, and counters of time count them; else they are
        0. It may take as long as the rest.
    latency : :class:`int`
        Of the ideal memory that the cycle model has, in cycles.

    Raises
    ------
    InvalidOption
        If an option is none, or the system does not grant that much address space.
    """

    def __init__(self, config: AcceleratorConfig, *, memory_bytes: int,
                 cache_bytes: int = 1 << 30, timing: bool = False,
                 latency: int = MEMORY_LATENCY_CYCLES) -> None:
        whole("cache_bytes", cache_bytes, least=0)
        whole("latency", latency, least=0, unit=" cycles")
        if not isinstance(timing, bool):
            raise InvalidOption(f"timing must be True or False, not {timing!r}")
        self._memory_bytes = memory_bytes
        self._registers = RegisterFile(config)
        self._port = MemoryPort(config, self._registers, memory_bytes)
        self._images = Images(self._port, cache_bytes)
        times = Timing(config, self._registers, latency) if timing else None
        buffer = ExpertBuffer(config, self._registers)
        engine = Engine(config, self._registers, self._port, self._images, buffer, times)
        routes = RouteUnit(config, self._registers, self._port, times)
        self._commands = CommandProcessor(
            config, self._registers, self._port, engine, routes, buffer, times)

    @property
    def memory_bytes(self) -> int:
        return self._memory_bytes

    def register_read(self, address: int) -> int:
        return self._registers.read(address)

    def register_write(self, address: int, value: int) -> None:
        register, value = self._registers.write(address, value)
        if register.name == "CONTROL" and value & 1:
            self._soft_reset()
        # An abort finds nothing to end: every doorbell has done its work before it returns.
        self._commands.check_rings()
        if register.name in ("ENABLE", "SQ_TAIL", "CQ_HEAD", "ERROR_STATUS"):
            self._execute_ring()

    def memory_read(self, address: int, count: int) -> Bytes:
        memory, address = self._port.locate(address, count)
        return memory.read(address, count)

    def memory_write(self, address: int, data: bytes | Bytes) -> None:
        raw = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else data.reshape(-1)
        memory, address = self._port.locate(address, raw.size)
        memory.write(address, raw)

    def wait_interrupt(self, timeout_s: float) -> bool:
        del timeout_s  # whatever can happen has happened, or does when it was interrupted
        self._execute_ring()
        return any(self._registers.get(f"{name}_STATUS") & self._registers.get(f"{name}_ENABLE")
                   for name in ("IRQ", "ERROR"))

    @property
    def possible_faults(self) -> set[tuple[int, int]]:
        """Status and address of every fault that the last command may have reported.

        The model names the first of these; hardware the one that it came to first.
        """
        return {(fault.status, fault.address) for fault in self._port.possible_faults}

    def close(self) -> None:
        self._port.close()
        self._images.clear()

    def _soft_reset(self) -> None:
        self._commands.reset()
        self._registers.reset()

    def _execute_ring(self) -> None:
        self._commands.execute_ring()
