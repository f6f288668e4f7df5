"""Verilator's C++, rewritten so that it runs faster."""
