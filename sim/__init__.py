"""Simulation: Verilator build, C++ co-simulation, DRAM model and bus models."""

from moeaccel.sim.accelerator import build_accelerator, build_accelerator_model
from moeaccel.sim.cosim import CoSimulation
from moeaccel.sim.memory import MemoryModel, StallModel

__all__ = [
    "CoSimulation", "MemoryModel", "StallModel", "build_accelerator", "build_accelerator_model",
]
