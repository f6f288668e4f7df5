"""Cycles of ROUTE."""

from __future__ import annotations

from moeaccel.config import BLOCK, MEMORY_LATENCY_CYCLES, AcceleratorConfig
from moeaccel.cycles.memory_port import READ_CYCLES, WRITE_CYCLES
from moeaccel.cycles.token_router import token_cycles
from moeaccel.interface.commands import ENTRY_BYTES
from moeaccel.router.settings import RouterSettings

__all__ = ["route_cycles"]

_UNIT = ENTRY_BYTES // 4
"""Words that are read, and pairs that are written, at once."""
_QUEUED = 16
"""Pairs that may wait when a token's weights are made."""

_FETCH, _START, _TABLE, _FIRST, _LOADED, _FREED, _WEIGHTS, _PAIR, _WRITE, _END = (
    11, 6, 2, 5, 4, 1, 15, 2, 9, 2)


def route_cycles(config: AcceleratorConfig, settings: RouterSettings, tokens: int, *, biased: bool,
                 tables: bool, latency: int = MEMORY_LATENCY_CYCLES) -> int:
    """Return the cycles of a ROUTE.

    Parameters
    ----------
    tokens : :class:`int`
    biased : :class:`bool`
        Keys are scores with a selection bias.
    tables : :class:`bool`
        There is a table.
    latency : :class:`int`
        Of the ideal memory, reads and writes.
    """
    beats = ENTRY_BYTES // config.port_bytes
    read = READ_CYCLES + latency
    experts, top_k = settings.experts, settings.top_k
    row = -(-experts // BLOCK) * BLOCK
    # Submission, router, checks; table; first logit.
    largest = max(row // BLOCK, top_k)
    now = _FETCH + 2 * (read + beats) + largest.bit_length()
    now += _START
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
        done = [done[1], end]
    if collected:
        free += _UNIT - collected + written
    return free + _END
