"""The accelerator's RTL as a co-simulation: configuration in, running model out."""

from __future__ import annotations

import functools
from typing import Any

from moeaccel.config import AcceleratorConfig, preset
from moeaccel.sim.cosim import CoSimulation
from moeaccel.sim.memory import MemoryModel
from moeaccel.sim.verilator import Model, build_model


@functools.cache
def _verilog(config: AcceleratorConfig) -> str:
    from moeaccel.hdl.top import generate_verilog

    return generate_verilog(config)


def build_accelerator_model(config: str | AcceleratorConfig, *, waves: bool = False,
                            threads: int = 1) -> Model:
    """Build the Verilated accelerator of a configuration, or take it from the cache."""
    return build_model(_verilog(preset(config)), waves=waves, threads=threads)


def build_accelerator(config: str | AcceleratorConfig, *, memory: MemoryModel | None = None,
                      waves: bool = False, threads: int = 1, **options: Any) -> CoSimulation:
    """Return a running simulation of the accelerator.

    Parameters
    ----------
    config : str or AcceleratorConfig
    memory : MemoryModel, optional
        Size and timing of the memory; ideal when left out.
    waves : bool
        Build the variant that can write waves.
    threads : int
        Threads that evaluate the model.
    **options
        Passed to :class:`~moeaccel.sim.cosim.CoSimulation`.
    """
    model = build_accelerator_model(config, waves=waves, threads=threads)
    return CoSimulation(model, memory=memory, **options)
