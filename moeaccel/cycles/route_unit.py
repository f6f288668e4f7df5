"""Cycles of ROUTE."""

from __future__ import annotations

from moeaccel.config import BLOCK, MEMORY_LATENCY_CYCLES, AcceleratorConfig
from moeaccel.cycles.command_processor import before_job
from moeaccel.cycles.memory_port import READ_CYCLES, WRITE_CYCLES
from moeaccel.cycles.prediction import Prediction
from moeaccel.cycles.token_router import token_cycles
from moeaccel.formats import whole_blocks
from moeaccel.interface.commands import ENTRY_BYTES
from moeaccel.router.settings import RouterSettings

__all__ = ["predict_route", "route_cycles"]

_UNIT = ENTRY_BYTES // 4
"""Words that are read, and pairs that are written, at once."""
_QUEUED = 16
"""Pairs that may wait when a token's weights are made."""

_START, _TABLE, _FIRST, _LOADED, _FREED, _WEIGHTS, _PAIR, _WRITE, _END = (
    9, 2, 5, 4, 1, 15, 2, 9, 2)


def route_cycles(config: AcceleratorConfig, settings: RouterSettings, tokens: int, *, biased: bool,
                 tables: bool, shared: int = 0, latency: int = MEMORY_LATENCY_CYCLES) -> int:
    """Return the cycles of a ROUTE.

    Parameters
    ----------
    tokens : :class:`int`
    biased : :class:`bool`
        Keys are scores with a selection bias.
    tables : :class:`bool`
        There is a table.
    shared : :class:`int`
        Experts behind those chosen.
    latency : :class:`int`
        Of the ideal memory, reads and writes.
    """
    beats = ENTRY_BYTES // config.port_bytes
    read = READ_CYCLES + latency
    experts, top_k = settings.experts, settings.top_k
    row = -(-experts // BLOCK) * BLOCK
    # Submission, router, checks; table; first logit.
    largest = max(row // BLOCK, top_k + shared)
    now = before_job(config, largest, latency) + _START
    if tables:
        now += _TABLE + read + -(-2 * experts // _UNIT) * _UNIT
    else:  # how many units the logits are
        now += (row // BLOCK).bit_length() - 1
    first = now + _FIRST + read
    one = token_cycles(config, settings, biased=biased)
    written = 2 * (beats + latency + WRITE_CYCLES + _WRITE)

    load = first
    done = [0, 0]
    taken: list[int] = []  # cycle in which the writer takes each pair
    free, collected = 0, 0  # when the writer is there again; what it has
    for token in range(tokens):
        # Two tokens' logits have room.
        load = max(load, done[0] + _FREED if token > 1 else 0)
        loaded = load + experts + _LOADED
        load += row
        begin = max(loaded, done[1])
        weights = begin + one - top_k
        waiting = token * top_k - _QUEUED
        if waiting > 0:
            weights = max(weights, taken[waiting - 1] + _WEIGHTS)
        end = weights + top_k
        for pair in range(top_k):
            free = max(free, weights + pair + _PAIR) + 1
            taken.append(free)
            collected += 1
            if collected == _UNIT:
                free, collected = free + written, 0
        for _ in range(shared):
            free += 1
            collected += 1
            if collected == _UNIT:
                free, collected = free + written, 0
        done = [done[1], end]
    if collected:
        free += _UNIT - collected + written
    return free + _END


def predict_route(config: AcceleratorConfig, settings: RouterSettings, tokens: int, *,
                  biased: bool, tables: bool, shared: int = 0,
                  latency: int = MEMORY_LATENCY_CYCLES) -> Prediction:
    """Predict ROUTE; parameters are those of :func:`route_cycles`."""
    cycles = route_cycles(config, settings, tokens, biased=biased, tables=tables, shared=shared,
                          latency=latency)

    def whole(count: int) -> int:
        return -(-count // ENTRY_BYTES) * ENTRY_BYTES

    read = 4 * tokens * whole_blocks(settings.experts)
    if tables:
        read += whole(8 * settings.experts)
    return Prediction(
        cycles=cycles, idle=cycles, bytes_read_other=2 * ENTRY_BYTES + read,
        bytes_written=2 * whole(4 * tokens * (settings.top_k + shared)) + ENTRY_BYTES)
