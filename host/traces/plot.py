"""A trace at a glance."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moeaccel.errors import ToolMissingError
from moeaccel.host.traces.errors import InvalidTrace, TornTrace
from moeaccel.host.traces.popularity import PopularityProfile
from moeaccel.host.traces.statistics.caches import layer_caches
from moeaccel.host.traces.statistics.sample import Sample
from moeaccel.host.traces.trace import RoutingTrace

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot"]

_LAGS, _STREAM, _LAYERS, _SIZES = 64, 2048, 6, 8


def plot(what: RoutingTrace | PopularityProfile, path: str | os.PathLike[str]) -> None:
    """Draw popularity by layer and, of a trace, one request, reuse over time and hit rates.

    Parameters
    ----------
    what : :class:`RoutingTrace` or :class:`PopularityProfile`
    path : path
        Its suffix says what kind of picture: ``.png``, ``.svg``, ``.pdf``.

    Raises
    ------
    ToolMissingError
        Without matplotlib.
    InvalidTrace
        If the suffix is none that matplotlib knows.
    TornTrace
        If the picture cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ToolMissingError("plots need matplotlib; install moeaccel[plot]") from error
    path = Path(path)
    # A figure of its own, not of pyplot: no window system, no state that is left behind.
    figure = Figure(figsize=(11, 8) if isinstance(what, RoutingTrace) else (7, 5),
                    layout="constrained")
    canvas = FigureCanvasAgg(figure)
    known = canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in known:
        raise InvalidTrace(f"plot must end in one of {', '.join(sorted(known))}, not "
                           f"{path.suffix!r}")
    if isinstance(what, PopularityProfile):
        _popularity(figure.subplots(), what)
    else:
        (a, b), (c, d) = figure.subplots(2, 2)
        _popularity(a, what.popularity())
        _request(b, what)
        sample = Sample(what)
        _reuse(c, sample)
        _caches(d, sample)
    figure.suptitle(f"{what.model}: {what.source}")
    try:
        figure.savefig(path)
    except OSError as error:
        raise TornTrace(f"{path} must be a place that can be written: {error}") from error


def _popularity(axes: Axes, profile: PopularityProfile) -> None:
    shares = np.sort(profile.shares(), axis=1)[:, ::-1] * profile.n_experts
    picture = axes.imshow(shares, aspect="auto", interpolation="nearest", cmap="viridis")
    axes.figure.colorbar(picture, ax=axes, label="load over the mean")
    axes.set(title="Popularity, each layer sorted", xlabel="rank of the expert", ylabel="layer")
    ticks = np.unique(np.linspace(0, len(profile.layers) - 1, 8).astype(int))
    axes.set_yticks(ticks, [str(profile.layers[i]) for i in ticks])


def _request(axes: Axes, trace: RoutingTrace) -> None:
    _, ids = max(trace.sequences(), key=lambda item: len(item[1]))
    middle = trace.n_layers // 2
    part = ids[:256, middle]
    time = np.repeat(np.arange(len(part)), part.shape[1])
    axes.plot(time[part.ravel() >= 0], part[part >= 0], ".", markersize=2)
    axes.set(title=f"Longest request, layer {trace.layers[middle]}", xlabel="token",
             ylabel="expert", ylim=(-1, trace.n_experts))


def _reuse(axes: Axes, sample: Sample) -> None:
    lags = range(1, min(_LAGS, max(len(mask) for mask in sample.masks) - 1) + 1)
    shares = [np.concatenate([(mask[lag:] & mask[:-lag]).sum(2).mean(1) for mask in sample.masks
                              if len(mask) > lag]).mean() / sample.top_k for lag in lags]
    axes.plot(lags, shares)
    axes.axhline(sample.top_k / sample.n_experts, color="grey", linestyle=":", label="chance")
    axes.set(title="Experts that an earlier token had", xlabel="tokens before", ylabel="share",
             xscale="log", ylim=(0, None))
    axes.legend()


def _caches(axes: Axes, sample: Sample) -> None:
    stream = sample.stream(_STREAM, layers=_LAYERS)
    sizes = np.unique(np.linspace(sample.top_k, sample.n_experts, _SIZES).astype(int))
    rates = layer_caches(stream, sizes.tolist())
    for name in rates[0]:
        axes.plot(sizes, [rate[name] for rate in rates], label=name)
    axes.set(title="Caches for each layer", xlabel="slots of a layer", ylabel="hit rate",
             ylim=(0, 1))
    axes.legend()
