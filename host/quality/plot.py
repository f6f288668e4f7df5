"""Bytes or cycles against what they buy."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moeaccel.errors import OutputError, ToolMissingError
from moeaccel.host.errors import InvalidOption
from moeaccel.host.quality.study import QualityResult

__all__ = ["check_picture", "pareto", "plot"]

_COSTS = {"bytes": ("stored_bytes", 1e6, "megabytes of experts"),
          "cycles": ("decode_cycles", 1e3, "thousand cycles of experts a token")}


def _cost(row: QualityResult, axis: str) -> float | None:
    return getattr(row, _COSTS[axis][0])


def pareto(rows: Sequence[QualityResult], axis: str) -> list[str]:
    """Return the variants beside which no other has both less cost and less KL divergence.

    Parameters
    ----------
    rows : sequence of :class:`QualityResult`
        The reference, whose KL divergence is 0, is none of them.
    axis : :class:`str`
        ``bytes`` or ``cycles``.
    """
    points = sorted((cost, row.kl, row.variant) for row in rows
                    if row.variant != "float" and (cost := _cost(row, axis)) is not None)
    front: list[str] = []
    least = float("inf")
    for _, kl, variant in points:
        if kl < least:
            front.append(variant)
            least = kl
    return front


def _matplotlib() -> tuple[Any, Any]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ToolMissingError("plots need matplotlib; install moeaccel[plot]") from error
    return FigureCanvasAgg, Figure


def check_picture(path: str | os.PathLike[str]) -> None:
    """Raise what :func:`plot` would raise for a path, before minutes of work.

    Raises
    ------
    ToolMissingError
        Without matplotlib.
    InvalidOption
        If the suffix is none that matplotlib knows.
    """
    canvas, figure = _matplotlib()
    known = canvas(figure()).get_supported_filetypes()
    suffix = Path(path).suffix
    if suffix.removeprefix(".").lower() not in known:
        raise InvalidOption(f"plot must end in one of {', '.join(sorted(known))}, not {suffix!r}")


def plot(rows: Sequence[QualityResult], path: str | os.PathLike[str], *, axis: str = "bytes",
         title: str = "") -> None:
    """Draw KL divergence against bytes or cycles, and the Pareto front.

    Parameters
    ----------
    rows : sequence of :class:`QualityResult`
    path : path
        Its suffix says what kind of picture: ``.png``, ``.svg``, ``.pdf``.
    axis : :class:`str`
        ``bytes`` or ``cycles``.
    title : :class:`str`

    Raises
    ------
    ToolMissingError, InvalidOption
        See :func:`check_picture`.
    OutputError
        If the picture cannot be written.
    """
    check_picture(path)
    figure = _matplotlib()[1](figsize=(10, 7), layout="constrained")
    axes = figure.subplots()
    _, unit, label = _COSTS[axis]
    front = set(pareto(rows, axis))
    points: list[tuple[float, float]] = []
    for row in rows:
        cost = _cost(row, axis)
        if cost is None or row.kl <= 0:
            continue
        best = row.variant in front
        marker = "v" if row.criterion else "s" if row.weight_format.startswith("mixed") else "o"
        axes.errorbar(cost / unit, row.kl, yerr=row.kl_error, marker=marker, capsize=2,
                      color="tab:blue" if best else "tab:gray")
        axes.annotate(row.variant, (cost / unit, row.kl), fontsize=7, xytext=(4, 3),
                      textcoords="offset points")
        if best:
            points.append((cost / unit, row.kl))
    axes.plot(*zip(*sorted(points), strict=True) if points else ([], []), color="tab:blue",
              linewidth=0.8)
    axes.set(xlabel=label, ylabel="KL divergence to float, nats a token", yscale="log")
    figure.suptitle(title, fontsize=9)
    try:
        figure.savefig(path)
    except OSError as error:
        raise OutputError(f"output must go to a place that can be written, not {str(path)!r}: "
                          f"{error.strerror or error}") from error
