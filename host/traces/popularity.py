"""How often each expert was used, without when."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass

import numpy as np

from moeaccel.host.traces.errors import InvalidTrace, TornTrace
from moeaccel.host.traces.files import read_tensors, take, write_tensors

__all__ = ["PopularityProfile"]

_KIND, _VERSION = "moeaccel.popularity_profile", "1"


@dataclass(frozen=True, kw_only=True, eq=False)
class PopularityProfile:
    """Counts of each expert of each layer: all that some tools keep of the routes.

    Enough for a static placement and for balance over devices. It is no trace: nothing can be said
    from it about reuse from token to token, about caches or about prefetch, and no request can be
    replayed. :meth:`RoutingTrace.popularity` makes one of a trace.

    Parameters
    ----------
    counts : integer, (layers, experts)
        Tokens that each expert had.
    layers : :class:`tuple` of :class:`int`
        Number of each layer in the model, ascending.
    model, source : :class:`str`
        Which model; where the counts come from.

    Raises
    ------
    InvalidTrace
        If the counts are negative or all 0, or shapes do not go together.
    """

    counts: np.ndarray
    layers: tuple[int, ...]
    model: str = "unknown"
    source: str = "unknown"

    def __post_init__(self) -> None:
        counts = np.array(self.counts, np.int64)
        if counts.ndim != 2 or not counts.size:
            raise InvalidTrace(f"counts must be (layers, experts), not {counts.shape}")
        if counts.min() < 0 or not counts.any():
            raise InvalidTrace("counts must be at least 0 and not all 0; the smallest is "
                               f"{counts.min()}")
        layers = tuple(int(layer) for layer in self.layers)
        if len(layers) != len(counts) or list(layers) != sorted(set(layers)):
            raise InvalidTrace(f"layers must be {len(counts)} ascending numbers, not {layers}")
        counts.flags.writeable = False
        object.__setattr__(self, "counts", counts)
        object.__setattr__(self, "layers", layers)

    @property
    def n_experts(self) -> int:
        """Experts of a layer."""
        return self.counts.shape[1]

    def shares(self) -> np.ndarray:
        """Return float64 (layers, experts) whose rows sum to 1, or to 0 without counts."""
        return self.counts / np.maximum(self.counts.sum(1, keepdims=True), 1)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file: ``counts``, and ``model``, ``layers``, ``source`` as texts.

        Raises
        ------
        TornTrace
            If the file cannot be written.
        """
        write_tensors(path, {"counts": self.counts}, {
            "format": _KIND, "version": _VERSION, "model": self.model,
            "layers": json.dumps(self.layers), "source": self.source})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PopularityProfile:
        """Read what :meth:`save` wrote.

        Raises
        ------
        TornTrace, ForeignTrace
            If the file is damaged, or something else.
        """
        metadata, tensors = read_tensors(path, kind=_KIND, version=_VERSION)
        counts = take(path, tensors, "counts", shape=(None, None), kinds="int64")
        try:
            return cls(counts=counts, layers=json.loads(metadata["layers"]),
                       model=metadata["model"], source=metadata["source"])
        except (InvalidTrace, KeyError, TypeError, ValueError) as error:
            raise TornTrace(f"{path} must hold a profile, but: {error}") from error
