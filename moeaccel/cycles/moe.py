"""Cycles of MOE: those of its jobs; the router makes ready while its logits are being made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from moeaccel.config import BLOCK, MEMORY_LATENCY_CYCLES, AcceleratorConfig
from moeaccel.cycles.command_processor import NEXT_CYCLES, before_job, before_moe
from moeaccel.cycles.commands import predict_command
from moeaccel.cycles.job import Pairs
from moeaccel.cycles.prediction import Prediction
from moeaccel.cycles.route_unit import RouteTimes, predict_route, route_times
from moeaccel.image import Section
from moeaccel.interface.commands import ENTRY_BYTES, MOE_BLOCK, MOE_PLANES, ElementType
from moeaccel.router.settings import RouterSettings

__all__ = ["join", "predict_moe"]


_TURN, _THERE, _TAKEN, _WRITTEN, _PAIRS = 3, 9, 20, 8, 12
"""From the product's start to the route's; from where the product's completion would begin to where
logits are read; from a beat on its way to memory to its first logit; behind a row's last beat, with
a latency, to where the product's completion would begin; and from there, with the beats of ids and
weights, to the last of them, if they wait for the product's acknowledgement."""


def join(config: AcceleratorConfig, parts: Sequence[Prediction], route: RouteTimes, *, tokens: int,
         d_in: int, logits: int, d_out: int, top_k: int, latency: int) -> Prediction:
    """Return what a MOE takes, of what its parts would take as commands of their own.

    The router reads its table while the product runs. Of a single token it takes the logits as
    they go to memory, else it reads them when they are there; experts follow when their pairs are
    on their way to memory.

    Parameters
    ----------
    parts : sequence of :class:`Prediction`
        Product, ROUTE and, unless it is a MOE_ROUTE, EXPERTS.
    route : :class:`RouteTimes`
    tokens : :class:`int`
    d_in, logits, d_out : :class:`int`
        Elements of a row of x, of logits and of y.
    top_k : :class:`int`
        Of the submission, with shared experts.
    latency : :class:`int`
        Of the ideal memory.
    """
    alone = [max(d_in // BLOCK, logits // BLOCK, MOE_PLANES),
             max(logits // BLOCK, top_k),
             max(d_in // BLOCK, d_out // BLOCK, top_k)]
    checked = (max(alone[0], top_k), *alone[1:])
    own = [part.cycles - before_job(config, largest, latency)
           for part, largest in zip(parts, alone, strict=False)]
    product, ready = own[0], _TURN + route.ready
    row = max(4 * logits // config.port_bytes, logits // config.quantiser_lanes)
    beat = product - latency - _WRITTEN - row
    if tokens == 1:
        late = max(0, ready - beat)  # the row waits for the table
        pairs = 2 * (ENTRY_BYTES // config.port_bytes + 1)
        end = late + max(beat + _TAKEN + route.sent, product + _PAIRS + pairs)
    else:
        end = max(ready, product + _THERE) + route.read + route.sent
    if len(parts) == 2:
        end += route.done - route.sent
    cycles = before_moe(config, checked, latency) + end
    if len(parts) > 2:
        cycles += NEXT_CYCLES + own[2]
    whole = sum(parts, Prediction())
    again = len(parts) - 1
    taken = 4 * logits if tokens == 1 else 0
    return replace(
        whole, cycles=cycles, idle=cycles - (whole.cycles - whole.idle),
        bytes_read_other=(whole.bytes_read_other - taken
                          - ENTRY_BYTES * (2 * len(parts) - 1 - len(MOE_BLOCK))),
        bytes_written=whole.bytes_written - ENTRY_BYTES * again)


def predict_moe(
    config: AcceleratorConfig,
    settings: RouterSettings,
    plane: Section,
    experts: Mapping[int, tuple[Section, ...]],
    ids: Pairs,
    num_experts: int,
    *,
    d_model: int,
    planes: int,
    biased: bool = False,
    tables: bool = False,
    latency: int = MEMORY_LATENCY_CYCLES,
    io: ElementType = ElementType.FLOAT32,
) -> Prediction:
    """Predict one MOE, within the limits of the configuration.

    Parameters
    ----------
    settings : :class:`RouterSettings`
    plane : :class:`Section`
        Of each plane of the router's matrix, whose product is in ``a16``.
    experts : mapping of int to tuple of :class:`Section`
        What the images hold of the experts with tokens, shared ones included.
    ids : integer array, (T, K)
        That the router chooses, and behind them the shared experts.
    num_experts, d_model, planes : :class:`int`
        Of the experts.
    biased, tables : :class:`bool`
        As in :func:`moeaccel.cycles.route_unit.route_cycles`.
    latency, io
        As in :func:`moeaccel.cycles.predict_experts`.
    """
    tokens, top_k = ids.shape
    product = predict_command(
        config, dict.fromkeys(range(MOE_PLANES), (plane,)),
        np.tile(np.arange(MOE_PLANES), (tokens, 1)), MOE_PLANES, d_in=d_model, d_out=plane.rows,
        planes=2, latency=latency, gemm=True, x_type=io)
    options = {"biased": biased, "tables": tables, "latency": latency,
               "shared": top_k - settings.top_k - settings.shared}
    routed = predict_route(config, settings, tokens, **options)
    times = route_times(config, settings, tokens, **options)
    result = predict_command(config, experts, ids, num_experts, d_in=d_model, d_out=d_model,
                             planes=planes, latency=latency, x_type=io, y_type=io, held=True)
    return join(config, [product, routed, result], times, tokens=tokens, d_in=d_model,
                logits=plane.rows, d_out=d_model, top_k=top_k, latency=latency)
