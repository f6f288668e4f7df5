"""A routing trace on a device that has an expert buffer: its own counters beside the model's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from moeaccel.config import AcceleratorConfig
from moeaccel.formats import weight_format
from moeaccel.host.buffering.buffer import Counts
from moeaccel.host.buffering.predictions import Prediction
from moeaccel.host.buffering.prefetcher import Prefetcher
from moeaccel.host.buffering.replay import Call
from moeaccel.host.device import Device
from moeaccel.host.errors import InvalidOption
from moeaccel.host.traces import RoutingTrace
from moeaccel.image import Expert, ExpertShape

__all__ = ["BENCH_DIMS", "counts_of", "replay_on", "with_buffer"]

BENCH_DIMS = 64, 32
"""d_model and d_expert of the layers that a trace runs through: what is counted does not depend on
them."""


def with_buffer(config: AcceleratorConfig, slots: int) -> tuple[AcceleratorConfig, Call]:
    """Return a configuration whose slots take an expert of the layers of :func:`replay_on`, and
    what such experts cost."""
    d_model, d_expert = BENCH_DIMS
    shape = ExpertShape(weight_format("int4_g32"), d_model, d_expert, config.row_multipliers,
                        channels=config.channels)
    call = Call(config, shape, planes=2)
    beats = 1 << (call.words * config.beats_per_word - 1).bit_length()
    made = config.replace(name=f"{config.name}, {slots} buffer slots", buffer_slots=slots,
                          buffer_beats=max(2, beats))
    return made, replace(call, config=made)


def counts_of(device: Device) -> Counts:
    """Return the device's counters as those of the model: a hit may be partial there."""
    found = device.counters()
    return Counts(hits=found["buffer_hits"], misses=found["buffer_misses"],
                  hit_bytes=found["bytes_buffered"], fetched_bytes=found["bytes_prefetched"],
                  wasted_bytes=found["bytes_wasted"])


def replay_on(device: Device, trace: RoutingTrace, prediction: type[Prediction], *,
              progress: Callable[[str], None] = lambda text: None) -> Counts:
    """Send the decode tokens of a trace through layers of small experts, all of them alike, and
    what is predicted to the buffer, between any two calls.

    Returns
    -------
    :class:`Counts`
        What the device has counted meanwhile, from its reset on.

    Raises
    ------
    InvalidOption
        If the device has not room for so many tokens or experts.
    """
    d_model, d_expert = BENCH_DIMS
    config = device.config
    if trace.n_experts > config.max_experts:
        raise InvalidOption(f"a trace must have at most {config.max_experts} experts for config "
                            f"{config.name!r}, not {trace.n_experts}")
    expert = Expert.quantise(np.full((2 * d_expert, d_model), 2.0**-6, np.float32),
                             np.full((d_model, d_expert), 2.0**-6, np.float32), "int4_g32")
    layers = []
    for layer in range(trace.n_layers):
        progress(f"loading layer {layer + 1} of {trace.n_layers}")
        layers.append(device.load_quantised([expert] * trace.n_experts, grid_exponent=-28))
    device.reset()
    prefetcher = Prefetcher(layers, prediction, top_k=trace.top_k)
    requests: set[int] = set()
    for index, step in enumerate(trace.steps("decode")):
        now = set(step.request.tolist())
        prefetcher.begin_pass(new_request=now != requests)
        requests = now
        x = np.ones((len(step.ids), d_model), np.float32)
        weights = np.ones(step.ids[:, 0].shape, np.float32)
        progress(f"pass {index + 1}")
        for layer, experts in enumerate(layers):
            ids = step.ids[:, layer]
            if (ids >= 0).any():
                experts(x, ids, weights)
                prefetcher.observe(layer, ids)
    device.fence()
    prefetcher.check()
    return counts_of(device)
