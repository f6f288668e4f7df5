"""Simulation: Verilator build, C++ co-simulation, DRAM model and bus models."""
