"""Simulation: Verilator build, C++ co-simulation, DRAM model and bus models."""

from moeaccel.sim.cosim.accelerator import build_accelerator, build_accelerator_model
from moeaccel.sim.cosim.memory import MemoryModel, StallModel
from moeaccel.sim.cosim.simulation import CoSimulation

__all__ = [
    "CoSimulation", "MemoryModel", "StallModel", "build_accelerator", "build_accelerator_model",
]
