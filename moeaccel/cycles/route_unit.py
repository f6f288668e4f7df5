"""Cycles of ROUTE."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from moeaccel.config import BLOCK, MEMORY_LATENCY_CYCLES, AcceleratorConfig
from moeaccel.cycles.command_processor import before_job
from moeaccel.cycles.memory_port import READ_CYCLES, WRITE_CYCLES
from moeaccel.cycles.prediction import Prediction
from moeaccel.cycles.token_router import drop_cycles, token_cycles
from moeaccel.formats import whole_blocks
from moeaccel.interface.commands import ENTRY_BYTES
from moeaccel.router.choices import CapacityOrder
from moeaccel.router.settings import RouterSettings

__all__ = ["RouteTimes", "predict_route", "route_cycles", "route_times"]

_UNIT = ENTRY_BYTES // 4
"""Words that are read, and pairs that are written, at once."""
_QUEUED = 16
"""Pairs that may wait when a token's weights are made."""

_START, _TABLE, _FIRST, _LOADED, _FREED, _WEIGHTS, _PAIR, _WRITE, _BEHIND, _END = (
    9, 3, 7, 5, 1, 17, 2, 9, 1, 2)
_SENT = 4
"""With a latency, from the last pair on its way to where a completion would begin."""
_PLACE, _WALK, _AGAIN = 3, 7, 7
"""Of a capacity: to put a token into its order, to count a pair, and to begin again."""


@dataclass(frozen=True)
class RouteTimes:
    """Cycles of a ROUTE's job.

    Parameters
    ----------
    ready : int
        From its start to where logits are asked for, or awaited.
    read : int
        From there to the first logit from memory.
    sent, done : int
        From the first logit to the last pair on its way to memory, and to where a completion
        would begin.
    """

    ready: int
    read: int
    sent: int
    done: int


def route_cycles(config: AcceleratorConfig, settings: RouterSettings, tokens: int, *, biased: bool,
                 tables: bool, residents: bool = False, shared: int = 0,
                 latency: int = MEMORY_LATENCY_CYCLES) -> int:
    """Return the cycles of a ROUTE; parameters are those of :func:`route_times`."""
    times = route_times(config, settings, tokens, biased=biased, tables=tables,
                        residents=residents, shared=shared, latency=latency)
    largest = max(-(-settings.outputs // BLOCK), settings.top_k + settings.shared + shared)
    return before_job(config, largest, latency) + times.ready + times.read + times.done


def route_times(config: AcceleratorConfig, settings: RouterSettings, tokens: int, *, biased: bool,
                tables: bool, residents: bool = False, shared: int = 0,
                latency: int = MEMORY_LATENCY_CYCLES) -> RouteTimes:
    """Return the times of a ROUTE's job.

    Parameters
    ----------
    tokens : :class:`int`
    biased : :class:`bool`
        Keys are scores with a selection bias.
    tables : :class:`bool`
        There is a table.
    residents : :class:`bool`
        There are residents, in it or alone.
    shared : :class:`int`
        Experts behind those chosen, beside those that have gates.
    latency : :class:`int`
        Of the ideal memory, reads and writes.
    """
    beats = ENTRY_BYTES // config.port_bytes
    read = READ_CYCLES + latency
    experts, top_k = settings.experts, settings.top_k + settings.shared
    row = -(-settings.outputs // BLOCK) * BLOCK
    # Table; first logit.
    ready = _START
    early = -(-2 * experts // _UNIT) if tables else 0
    early += -(-experts // (8 * ENTRY_BYTES)) if residents else 0
    if early:
        ready += _TABLE + read + early * _UNIT
    else:  # how many units the logits are
        ready += (row // BLOCK).bit_length() - 1
    first = 0
    one = token_cycles(config, settings, biased=biased)
    written = 2 * (beats + _BEHIND) + latency + WRITE_CYCLES + _WRITE
    pairs = tokens * top_k
    if settings.capacity is not None:
        placing = settings.capacity_order_kind is CapacityOrder.PRIORITY
        free = _sweep(settings, tokens, first, one, lambda pair: (
            # Half of those before it are behind it, of tokens in no order: two cycles for each.
            _PLACE + pair // top_k if placing and not (pair + 1) % top_k else 0))
        first = free + _WALK * pairs + _AGAIN + read
        one += drop_cycles(settings, capped=True) - drop_cycles(settings)
    slots = top_k + shared

    def write(pair: int) -> int:
        """Behind a token's own pairs come those of shared experts; 16 are written at once."""
        begin = pair // top_k * slots + pair % top_k
        end = begin + (1 if (pair + 1) % top_k else 1 + shared)
        return end - begin - 1 + (end // _UNIT - begin // _UNIT) * written

    free = _sweep(settings, tokens, first, one, write)
    if tokens * slots % _UNIT:
        free += _UNIT - tokens * slots % _UNIT + written
    done = free + _END
    return RouteTimes(ready=ready, read=_FIRST + read, sent=done - latency - _SENT, done=done)


def _sweep(settings: RouterSettings, tokens: int, first: int, one: int,
           busy: Callable[[int], int]) -> int:
    """Return when all pairs have been taken by who takes them.

    Parameters
    ----------
    first : :class:`int`
        When the first logit is there.
    one : :class:`int`
        Cycles of a token.
    busy : callable
        Cycles that a pair takes who takes it, beyond one.
    """
    top_k = settings.top_k + settings.shared
    row = -(-settings.outputs // BLOCK) * BLOCK
    load = first
    done = [0, 0]
    taken: list[int] = []  # cycle in which each pair is taken
    free = 0  # when who takes them is there again
    for token in range(tokens):
        # Two tokens' logits have room.
        load = max(load, done[0] + _FREED if token > 1 else 0)
        loaded = load + settings.outputs + _LOADED
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
            free += busy(token * top_k + pair)
        done = [done[1], end]
    return free


def predict_route(config: AcceleratorConfig, settings: RouterSettings, tokens: int, *,
                  biased: bool, tables: bool, residents: bool = False, shared: int = 0,
                  latency: int = MEMORY_LATENCY_CYCLES) -> Prediction:
    """Predict ROUTE; parameters are those of :func:`route_cycles`."""
    cycles = route_cycles(config, settings, tokens, biased=biased, tables=tables,
                          residents=residents, shared=shared, latency=latency)

    def whole(count: int) -> int:
        return -(-count // ENTRY_BYTES) * ENTRY_BYTES

    read = 4 * tokens * whole_blocks(settings.outputs) * (1 + (settings.capacity is not None))
    if tables:
        read += whole(8 * settings.experts)
    if residents:
        read += whole(-(-settings.experts // 8))
    slots = settings.top_k + settings.shared + shared
    return Prediction(
        cycles=cycles, idle=cycles, bytes_read_other=2 * ENTRY_BYTES + read,
        bytes_written=2 * whole(4 * tokens * slots) + ENTRY_BYTES)
