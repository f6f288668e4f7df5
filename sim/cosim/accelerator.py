"""The accelerator's RTL as a co-simulation: configuration in, running model out."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

from moeaccel.config import AcceleratorConfig, preset
from moeaccel.sim.cosim.memory import MemoryModel
from moeaccel.sim.cosim.simulation import CoSimulation
from moeaccel.sim.cosim.sources import Design, design_from
from moeaccel.sim.cosim.verilator import Model, build_model
from moeaccel.sim.speedup.gating import below


@functools.cache
def accelerator_verilog(config: AcceleratorConfig, family: str = "generic") -> str:
    """Return the accelerator's Verilog with models of the family's multiplier blocks."""
    from moeaccel.hdl.top import generate_verilog
    from moeaccel.hdl.verilog.dsp_models import DSP_MODELS

    return generate_verilog(config, family=family, simulation=True) + DSP_MODELS[family]


def accelerator_design(config: AcceleratorConfig, family: str = "generic") -> Design:
    """Return the same Verilog, to be made when a model of it has to be built."""
    return design_from(Path(__file__), parameters=f"{parameters(config)} {family}",
                       verilog=functools.partial(accelerator_verilog, config, family), busy=busy)


def shipped_design(config: AcceleratorConfig, family: str = "generic") -> Design:
    """Return the Verilog that goes to other tools, without models of multiplier blocks."""
    def verilog() -> str:
        from moeaccel.hdl.top import generate_verilog

        return generate_verilog(config, family=family)

    return design_from(Path(__file__), parameters=f"shipped {parameters(config)} {family}",
                       verilog=verilog)


def parameters(config: AcceleratorConfig) -> str:
    """Return what a configuration's hardware depends on."""
    return f"{dataclasses.replace(config, name='any')} {config.digest:#010x}"


def busy() -> str:
    """Return which variables of a model change in nearly every cycle."""
    from moeaccel.hdl.core import BUSY
    from moeaccel.hdl.engine import CORE

    return below(CORE, BUSY)


def build_accelerator_model(config: str | AcceleratorConfig, *, family: str = "generic",
                            waves: bool = False, threads: int = 1,
                            speedup: bool | None = None) -> Model:
    """Build the Verilated accelerator of a configuration, or take it from the cache.

    See :func:`build_accelerator`.
    """
    return build_model(accelerator_design(preset(config), family), waves=waves, threads=threads,
                       speedup=speedup)


def build_accelerator(config: str | AcceleratorConfig, *, family: str = "generic",
                      memory: MemoryModel | None = None, waves: bool = False, threads: int = 1,
                      speedup: bool | None = None, **options: Any) -> CoSimulation:
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
    speedup : bool, optional
        False for a model of Verilator's C++ as it is, 1.4 to 1.6 times slower and the same in
        every cycle. When left out, the environment variable ``MOEACCEL_SPEEDUP`` decides (0 or 1),
        and else it is True.
    **options
        Passed to :class:`~moeaccel.sim.cosim.simulation.CoSimulation`.
    """
    model = build_accelerator_model(config, family=family, waves=waves, threads=threads,
                                    speedup=speedup)
    return CoSimulation(model, memory=memory, **options)
