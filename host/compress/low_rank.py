"""Experts as low-rank products, and how the device runs them: as three commands.

``gate_up ~ U V`` and ``down ~ P Q``, of one rank r, singular value decompositions whose values are
shared out to both factors by their roots; gate and up have one ``V``. No section of the device
feeds a section of another matrix, so that an expert becomes three layers of the device, each with
an entry for every expert, and a call three commands, whatever the number of tokens and experts:

1. ``t = V x`` for each pair of a token and an expert: matrices, (r, H);
2. ``z = Q act(U t)``: experts of width I whose x and y have r elements;
3. ``y = g P z``: matrices, (H, r), weighted by the router; a token's pairs are added on the host.

Between them t and z come back as float32: two round trips more than a whole expert takes. That is
``r (2 H + 3 I)`` weights instead of ``3 H I``, in memory and over its port. Ranks are multiples of
32, the device's blocks; experts of one rank are one such triple of layers, so that there are few
ranks. A rank whose factors are as large as the matrices is refused, by leaving the expert whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from moeaccel.closing import Closing
from moeaccel.config import AcceleratorConfig
from moeaccel.cycles import expert_cycles
from moeaccel.formats import BLOCK, QuantisedMatrix, quantise
from moeaccel.host.compress.layer import Factors, FloatExpert, MoELayer
from moeaccel.image import Expert, ExpertShape, LinearShape

if TYPE_CHECKING:
    from moeaccel.host.device import Device
    from moeaccel.host.layers import Experts, Linears

_Part = TypeVar("_Part", "Experts", "Linears")

__all__ = ["LowRankLayer", "Triple", "decode_cycles", "factored", "factors_of", "triples"]

Floats = NDArray[np.float32]


def _halves(weights: Floats, rank: int) -> tuple[Floats, Floats]:
    """Return (n, r) and (r, K) whose product is the nearest matrix of that rank."""
    u, s, v = np.linalg.svd(weights.astype(np.float64), full_matrices=False)
    root = np.sqrt(s[:rank])
    return (u[:, :rank] * root).astype(np.float32), (root[:, None] * v[:rank]).astype(np.float32)


def factored(expert: FloatExpert, rank: int) -> FloatExpert:
    """Return an expert as products of a rank, the nearest multiple of 32 and at least that; the
    expert itself where factors would have as many numbers as its matrices."""
    d_model, d_expert = expert.down.shape
    rank = max(1, round(rank / BLOCK)) * BLOCK
    rows = len(expert.gate_up)
    if rank * (2 * d_model + rows + d_expert) >= expert.size:
        return expert
    up, into = _halves(expert.gate_up, rank)
    out, inside = _halves(expert.down, rank)
    return replace(expert, gate_up=up @ into, down=out @ inside,
                   factors=Factors(into, up, inside, out))


@dataclass(frozen=True)
class Triple:
    """The experts of a layer that have one rank, as the device stores them.

    Parameters
    ----------
    experts : tuple of :class:`int`
        Numbers in the layer.
    into, out : tuple of :class:`QuantisedMatrix`
        V, (r, H), and P, (H, r), of each.
    inner : tuple of :class:`Expert`
        U and Q: experts between r elements and r.
    """

    experts: tuple[int, ...]
    into: tuple[QuantisedMatrix, ...]
    inner: tuple[Expert, ...]
    out: tuple[QuantisedMatrix, ...]

    def shapes(self, config: AcceleratorConfig
               ) -> tuple[list[LinearShape], list[ExpertShape], list[LinearShape]]:
        """Return the shapes of the three layers' entries."""
        array = config.row_multipliers, config.channels
        first, last = ([LinearShape(m.format, len(m.integers), m.integers.shape[1], *array)
                        for m in part] for part in (self.into, self.out))
        return first, [expert.shape(*array) for expert in self.inner], last

    def floats(self) -> list[FloatExpert]:
        """Return the experts that these factors are, multiplied out."""
        found = []
        for into, inner, out in zip(self.into, self.inner, self.out, strict=True):
            small = FloatExpert.of(inner)
            found.append(small.changed(
                (small.gate_up @ into.dequantise()).astype(np.float32),
                (out.dequantise() @ small.down).astype(np.float32)))
        return found


def factors_of(layer: MoELayer) -> list[int]:
    """Return which experts of a layer are products."""
    return [e for e, expert in enumerate(layer.experts) if expert.factors is not None]


def triples(layer: MoELayer) -> list[Triple]:
    """Return the experts of a layer that are products, as the device stores them, by their
    ranks."""
    by_rank: dict[int, list[int]] = {}
    for e in factors_of(layer):
        factors = layer.experts[e].factors
        assert factors is not None
        by_rank.setdefault(len(factors.into), []).append(e)
    found = []
    for _, chosen in sorted(by_rank.items()):
        into, inner, out = [], [], []
        for e in chosen:
            expert, name = layer.experts[e], layer.weight_formats[e]
            assert expert.factors is not None
            into.append(quantise(expert.factors.into, name))
            out.append(quantise(expert.factors.out, name))
            inner.append(Expert.quantise(
                expert.factors.gate_up, expert.factors.inside, name,
                activation=expert.activation, limit=expert.limit))
        found.append(Triple(tuple(chosen), tuple(into), tuple(inner), tuple(out)))
    return found


def decode_cycles(triple: Triple, ids: NDArray[np.integer], config: AcceleratorConfig) -> int:
    """Return the cycles of a token's three commands, for ids, (K,), of the layer; 0 where none of
    them is of this rank."""
    local = {e: i for i, e in enumerate(triple.experts)}
    pairs = np.array([[local[e]] for e in ids.tolist() if e in local])
    if not len(pairs):
        return 0
    return sum(expert_cycles(config, shapes, pairs, len(shapes), planes=2)
               for shapes in triple.shapes(config))


class LowRankLayer(Closing):
    """A layer some of whose experts are products, in a device's memory, until it is closed; the
    host routes.

    Parameters
    ----------
    device : :class:`Device`
    layer : :class:`MoELayer`
    activation_bits : :class:`int`
    """

    def __init__(self, device: Device, layer: MoELayer, activation_bits: int = 16) -> None:
        from moeaccel.host.weights import load_linears

        self._layer = layer
        self._triples: list[tuple[Triple, tuple[Linears, Experts, Linears]]] = []
        self._experts: Experts | None = None
        self._parts: list[Experts | Linears] = []
        products = set(factors_of(layer))
        self._whole = [e for e in range(len(layer.experts)) if e not in products]
        stored = layer.quantised(self._whole)
        bits: Any = {"activation_bits": activation_bits}

        def kept(part: _Part) -> _Part:
            self._parts.append(part)
            return part

        try:
            if stored:
                self._experts = kept(device.load_quantised(stored, **bits))
            for triple in triples(layer):
                # With x of RMS 1, what t and z have: grids are chosen for that.
                floats = [layer.experts[e].factors for e in triple.experts]
                t_rms = _typical([f.into for f in floats if f is not None])
                self._triples.append((triple, (
                    kept(load_linears(device, triple.into, **bits)),
                    kept(device.load_quantised(triple.inner, x_rms=t_rms, **bits)),
                    kept(load_linears(device, triple.out, x_rms=t_rms, **bits)))))
        except BaseException:
            self.close()
            raise

    def __call__(self, x: Floats) -> Floats:
        """Return y, (T, H), of x, (T, H)."""
        routing = self._layer.route(x)
        y = np.zeros(x.shape, np.float32)
        if self._experts is not None:
            place = np.full(len(self._layer.experts) + 1, -1)
            place[self._whole] = np.arange(len(self._whole))
            y += self._experts(x, place[routing.ids], routing.weights.astype(np.float32))
        for triple, (into, inner, out) in self._triples:
            place = np.full(len(self._layer.experts) + 1, -1)
            place[list(triple.experts)] = np.arange(len(triple.experts))
            local = place[routing.ids]
            tokens, slots = np.nonzero(local >= 0)
            ids = local[tokens, slots]
            ones = np.ones(len(ids), np.float32)
            t = into(np.ascontiguousarray(x[tokens]), ids, ones)
            z = inner(t, ids[:, None], ones[:, None])
            weights = routing.weights[tokens, slots].astype(np.float32)
            np.add.at(y, tokens, out(z, ids, weights))
        return y

    def close(self) -> None:
        """Free the device memory; a second call does nothing."""
        for part in self._parts:
            part.close()


def _typical(matrices: Sequence[Floats]) -> float:
    """Return the root mean square of what matrices make of x of RMS 1, at least a tiny one."""
    squares = [float(np.square(matrix, dtype=np.float64).sum(axis=1).mean()) for matrix in matrices]
    return max(float(np.sqrt(np.mean(squares))), 1e-6)
