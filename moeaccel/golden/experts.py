"""The integer golden model: the device's exact bits for EXPERTS and GEMM, order-free.

A dot product is a float64 matrix product of integers that never round (docs/arithmetic.md): the
block sums of 32, weighted by the activation's and the weight's scales, stay below 2**53.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from moeaccel.arithmetic import (
    BlockFloat,
    InternalFloat,
    float32_to_internal,
    grid_to_float32,
    normalise,
    quantise_elements,
    quantise_float32,
    weighted_output,
)
from moeaccel.config import BLOCK
from moeaccel.formats import QuantisedMatrix
from moeaccel.image import Expert
from moeaccel.interface.commands import COUNT_MAX, NonFinite, Status
from moeaccel.tables import swiglu

DEFAULT_GRID_EXPONENT = -28


@dataclass(frozen=True)
class DeviceResult:
    """What a command leaves behind.

    Parameters
    ----------
    y : float32 array, (T, d_out)
    nonfinite_tokens, nonfinite_weights : :class:`list` of :class:`int`
        Tokens with NaN or infinity in x, and in the weight of one of their pairs (those count as
        zero).
    overflows : :class:`int`
        Weighted outputs beyond the grid (they count as zero).
    underflows : :class:`int`
        Weighted outputs that were not zero and are zero on the grid.
    """

    y: NDArray[np.float32]
    nonfinite_tokens: list[int]
    nonfinite_weights: list[int]
    overflows: int
    underflows: int

    @property
    def outcome(self) -> tuple[Status, int, int]:
        """Status, detail and address of the completion."""
        if self.nonfinite_tokens:
            return Status.NONFINITE, self.nonfinite_tokens[0], NonFinite.X
        if self.nonfinite_weights:
            return Status.NONFINITE, self.nonfinite_weights[0], NonFinite.ROUTING_WEIGHT
        if self.overflows:
            return Status.OVERFLOW, min(self.overflows, COUNT_MAX), 0
        return Status.OK, 0, 0


def matvec(x: BlockFloat, weights: QuantisedMatrix) -> InternalFloat:
    """Return ``x W^T`` as internal floats, (n, rows): exact until its one rounding."""
    fmt = weights.format
    scale = np.repeat(
        weights.significand.astype(np.float64) * 2.0**weights.shift, fmt.steps_per_group, axis=1
    )
    scale = scale[:, : x.shift.shape[1]]
    w = torch.from_numpy(
        (weights.integers.reshape((*scale.shape, BLOCK)) * scale[:, :, None]).reshape(
            weights.integers.shape
        )
    )
    shift = np.repeat(2.0**x.shift, BLOCK, axis=1)
    total = np.zeros((x.mantissa.shape[0], w.shape[0]), np.int64)
    for plane in x.plane_mantissas():
        product = (torch.from_numpy(plane * shift) @ w.T).numpy()
        total = (total << 8) + product.astype(np.int64)
    return normalise(total, x.base[:, None] + weights.row_exponent[None, :].astype(np.int64))


def expert(x: BlockFloat, weights: Expert) -> InternalFloat:
    """Return one gated expert's output, (n, d_model)."""
    gate_up = matvec(x, weights.gate_up)
    hidden = swiglu(gate_up[:, 0::2], gate_up[:, 1::2])
    return matvec(quantise_elements(*hidden, x.planes), weights.down)


def _take(x: BlockFloat, tokens: NDArray[np.integer]) -> BlockFloat:
    return BlockFloat(x.mantissa[tokens], x.shift[tokens], x.base[tokens], x.planes)


def _combine(
    x: NDArray[np.float32],
    ids: NDArray[np.integer],
    weights: NDArray[np.float32],
    num_experts: int,
    d_out: int,
    output: Callable[[int, BlockFloat], InternalFloat],
    planes: int,
    grid_exponent: int,
) -> DeviceResult:
    quantised, nonfinite = quantise_float32(x, planes)
    total = np.zeros((x.shape[0], d_out), np.int64)
    overflows = underflows = 0
    used, unweighted = np.zeros(x.shape[0], bool), np.zeros(x.shape[0], bool)
    for e in np.unique(ids[(ids >= 0) & (ids < num_experts)]):
        tokens, slots = np.nonzero(ids == e)
        used[tokens] = True
        chosen = weights[tokens, slots]
        unweighted[tokens[~np.isfinite(chosen)]] = True
        weight = float32_to_internal(chosen)
        term, overflow, underflow = weighted_output(
            output(int(e), _take(quantised, tokens)),
            InternalFloat(weight.mantissa[:, None], weight.exponent[:, None]),
            grid_exponent,
        )
        np.add.at(total, tokens, term)
        overflows += int(overflow.sum())
        underflows += int(underflow.sum())
    return DeviceResult(
        grid_to_float32(total, grid_exponent), np.nonzero(nonfinite & used)[0].tolist(),
        np.nonzero(unweighted)[0].tolist(), overflows, underflows)


def experts(
    x: NDArray[np.float32],
    ids: NDArray[np.integer],
    weights: NDArray[np.float32],
    layer: Sequence[Expert],
    *,
    planes: int = 2,
    grid_exponent: int = DEFAULT_GRID_EXPONENT,
) -> DeviceResult:
    """Return what an EXPERTS command computes.

    Parameters
    ----------
    x : float32 array, (T, d_model)
    ids : integer array, (T, K)
        Negative or ``>= len(layer)``: skipped.
    weights : float32 array, (T, K)
    layer : sequence of :class:`Expert`
    planes : :class:`int`
        1 (``a8``) or 2 (``a16``).
    grid_exponent : :class:`int`
        LSB of the output grid.
    """
    return _combine(
        x,
        ids,
        weights,
        len(layer),
        layer[0].down.integers.shape[0],
        lambda e, rows: expert(rows, layer[e]),
        planes,
        grid_exponent,
    )


def gemm(
    x: NDArray[np.float32],
    weights: QuantisedMatrix,
    *,
    planes: int = 2,
    grid_exponent: int = DEFAULT_GRID_EXPONENT,
) -> DeviceResult:
    """Return what a GEMM command computes: ``x W^T``, (T, rows)."""
    tokens = x.shape[0]
    return _combine(
        x,
        np.zeros((tokens, 1), np.int64),
        np.ones((tokens, 1), np.float32),
        1,
        weights.integers.shape[0],
        lambda _, rows: matvec(rows, weights),
        planes,
        grid_exponent,
    )
