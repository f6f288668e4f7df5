"""Cycles of ROUTE."""

from __future__ import annotations

from moeaccel.config import BLOCK, MEMORY_LATENCY_CYCLES, AcceleratorConfig
from moeaccel.cycles.memory_port import READ_CYCLES, WRITE_CYCLES
from moeaccel.cycles.token_router import token_cycles
from moeaccel.interface.commands import ENTRY_BYTES
from moeaccel.router.settings import RouterSettings

__all__ = ["route_cycles"]

_PAIRS = ENTRY_BYTES // 4


def route_cycles(config: AcceleratorConfig, settings: RouterSettings, tokens: int, *, biased: bool,
                 tables: bool, latency: int = MEMORY_LATENCY_CYCLES) -> int:
    """Return the cycles of a ROUTE."""
    return 0


_ = (READ_CYCLES, WRITE_CYCLES, token_cycles, BLOCK, _PAIRS)
