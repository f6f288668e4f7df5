"""The accelerator's RTL as a co-simulation: configuration in, running model out."""

from __future__ import annotations

import functools
from typing import Any

from moeaccel.config import AcceleratorConfig, preset
from moeaccel.sim.cosim.memory import MemoryModel
from moeaccel.sim.cosim.simulation import CoSimulation
from moeaccel.sim.cosim.verilator import Model, build_model


@functools.cache
def accelerator_verilog(config: AcceleratorConfig, family: str = "generic") -> str:
    """Return the accelerator's Verilog with models of the family's multiplier blocks."""
    from moeaccel.hdl.top import generate_verilog
    from moeaccel.hdl.verilog.dsp_models import DSP_MODELS

    return generate_verilog(config, family=family, simulation=True) + DSP_MODELS[family]


def build_accelerator_model(config: str | AcceleratorConfig, *, family: str = "generic",
                            waves: bool = False, threads: int = 1) -> Model:
    """Build the Verilated accelerator of a configuration, or take it from the cache."""
    return build_model(accelerator_verilog(preset(config), family), waves=waves, threads=threads)


def build_accelerator(config: str | AcceleratorConfig, *, family: str = "generic",
                      memory: MemoryModel | None = None, waves: bool = False, threads: int = 1,
                      **options: Any) -> CoSimulation:
    """Return a running simulation of the accelerator.

    Parameters
    ----------
    config : str or AcceleratorConfig
    family : str
        FPGA family of the multipliers; ``"generic"`` simulates fastest.
    memory : MemoryModel, optional
        Size and timing of the memory; ideal when left out.
    waves : bool
        Build the variant that can write waves.
    threads : int
        Threads that evaluate the model.
    **options
        Passed to :class:`~moeaccel.sim.cosim.simulation.CoSimulation`.
    """
    model = build_accelerator_model(config, family=family, waves=waves, threads=threads)
    return CoSimulation(model, memory=memory, **options)
