"""A comparison at a glance."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from moeaccel.errors import OutputError, ToolMissingError
from moeaccel.host.errors import InvalidOption
from moeaccel.host.policies.compare import Comparison

__all__ = ["plot"]


def plot(rows: Sequence[Comparison], path: str | os.PathLike[str], *, title: str = "") -> None:
    """Draw time a token, bytes over the link and hit rate of each system.

    Parameters
    ----------
    rows : sequence of :class:`Comparison`
    path : path
        Its suffix says what kind of picture: ``.png``, ``.svg``, ``.pdf``.
    title : :class:`str`

    Raises
    ------
    ToolMissingError
        Without matplotlib.
    InvalidOption
        If the suffix is none that matplotlib knows.
    OutputError
        If the picture cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ToolMissingError("plots need matplotlib; install moeaccel[plot]") from error
    path = Path(path)
    figure = Figure(figsize=(12, 1.5 + 0.28 * len(rows)), layout="constrained")
    known = FigureCanvasAgg(figure).get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in known:
        raise InvalidOption(f"plot must end in one of {', '.join(sorted(known))}, not "
                            f"{path.suffix!r}")
    time, bytes_, hits = figure.subplots(1, 3, sharey=True)
    found = [row.outcome for row in rows]
    names = [f"{o.system.title}{'' if o.system.lossless else ' (lossy)'}" for o in found]
    places = list(range(len(rows)))
    colours = ["tab:blue" if o.system.lossless else "tab:orange" for o in found]
    time.barh(places, [o.seconds_per_token * 1e3 for o in found], color=colours)
    time.set(xlabel="milliseconds a token, predicted", xscale="log")
    time.set_yticks(places, names)
    time.invert_yaxis()
    bytes_.barh(places, [o.link_bytes_per_token / 1e6 for o in found], color=colours)
    bytes_.set(xlabel="megabytes a token over the link", xscale="symlog")
    hits.barh(places, [o.hit_rate for o in found], color=colours)
    hits.set(xlabel="hit rate", xlim=(0, 1))
    figure.suptitle(title)
    try:
        figure.savefig(path)
    except OSError as error:
        raise OutputError(f"{path} must be a place that can be written: {error}") from error
