"""The Verilated RTL in this process: exact cycles."""

from __future__ import annotations

import importlib
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from moeaccel.config import AcceleratorConfig
from moeaccel.errors import MoeAccelError
from moeaccel.host.errors import DeviceClosed, InvalidOption
from moeaccel.host.options import check_names, whole
from moeaccel.host.transports.base import Bytes, DeviceSpec, Scheme, Transport

if TYPE_CHECKING:
    from moeaccel.sim.cosim.memory import MemoryModel
    from moeaccel.sim.cosim.simulation import CoSimulation

__all__ = ["SCHEME", "RtlTransport"]

_FOREVER_CYCLES = 1 << 62


def _build(config: AcceleratorConfig, memory_bytes: int | None, memory: MemoryModel | None,
           options: dict[str, Any]) -> CoSimulation:
    sim = importlib.import_module("moeaccel.sim")
    check_names("rtl", options, RtlTransport, sim.build_accelerator, sim.CoSimulation)
    try:
        if memory is None:
            memory = sim.MemoryModel.ideal(size=memory_bytes or min(1 << 32,
                                                                    1 << config.address_bits))
        elif not hasattr(memory, "size"):
            raise InvalidOption(f"memory must be a MemoryModel, not {memory!r}")
        elif memory_bytes not in (None, memory.size):
            raise InvalidOption(f"memory_bytes must be that of memory, {memory.size}, or left "
                                f"out, not {memory_bytes}")
        return sim.build_accelerator(config, memory=memory, **options)
    except (TypeError, ValueError) as error:
        if isinstance(error, MoeAccelError):
            raise
        raise InvalidOption(f"options of rtl must be as build_accelerator takes them, but: {error}"
                            ) from error


class RtlTransport(Transport):
    """Registers over the simulated bus, memory by the back door, time only while someone waits.

    Parameters
    ----------
    config : :class:`AcceleratorConfig`
    memory_bytes : :class:`int`, optional
        Of each channel: a multiple of 4096; that of ``memory``, or 4 GiB, when left out.
    memory : :class:`moeaccel.sim.cosim.memory.MemoryModel`, optional
        Size and timing of the memory; ideal when left out.
    cycles_per_second : :class:`int`
        Clock cycles that count as one second of a timeout: simulated time, so that a slow machine
        gives the same result.
    simulation : :class:`moeaccel.sim.cosim.simulation.CoSimulation`, optional
        A simulation that exists already; it is closed with the transport. Else one is built.
    **options
        Passed to ``moeaccel.sim.build_accelerator``.
    """

    def __init__(self, config: AcceleratorConfig, *, memory_bytes: int | None = None,
                 memory: MemoryModel | None = None, cycles_per_second: int = 1_000_000,
                 simulation: CoSimulation | None = None, **options: Any) -> None:
        self._cycles_per_second = whole("cycles_per_second", cycles_per_second, least=1)
        if simulation is None:
            simulation = _build(config, memory_bytes, memory, options)
        self._simulation: CoSimulation | None = simulation
        self._memory_bytes = min(
            1 << config.address_bits, *(model.size for model in simulation.memory_models))
        self._address_bits = config.address_bits

    @property
    def simulation(self) -> CoSimulation:
        """The simulation, for statistics and waves."""
        if self._simulation is None:
            raise DeviceClosed("simulation must not be used after it was closed; open a new device")
        return self._simulation

    @property
    def memory_bytes(self) -> int:
        return self._memory_bytes

    def register_read(self, address: int) -> int:
        return self.simulation.reg_read(address)

    def register_write(self, address: int, value: int) -> None:
        self.simulation.reg_write(address, value)

    def memory_read(self, address: int, count: int) -> Bytes:
        channel, address = self._place(address)
        return np.asarray(self.simulation.mem_read(address, count, port=channel), np.uint8)

    def memory_write(self, address: int, data: bytes | Bytes) -> None:
        channel, address = self._place(address)
        self.simulation.mem_write(address, data, port=channel)

    def _place(self, address: int) -> tuple[int, int]:
        """Return the channel of a device address, and the address in its memory."""
        return address >> self._address_bits, address & ((1 << self._address_bits) - 1)

    def wait_interrupt(self, timeout_s: float) -> bool:
        simulation = self.simulation
        simulation.run(math.ceil(min(timeout_s * self._cycles_per_second, _FOREVER_CYCLES)))
        return simulation.irq

    def close(self) -> None:
        if self._simulation is not None:
            self._simulation.close()  # may be called twice
            self._simulation = None


def _open(spec: DeviceSpec) -> tuple[Transport, AcceleratorConfig]:
    transport = RtlTransport(spec.config, memory_bytes=spec.memory_bytes, **spec.options)
    return transport, spec.config


SCHEME = Scheme(
    help="the Verilated RTL in this process",
    time="exact cycles; timeouts count simulated cycles", open=_open)
