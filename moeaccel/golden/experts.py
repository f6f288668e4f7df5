"""The integer golden model: the device's exact bits for EXPERTS and GEMM, order-free."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from moeaccel.arithmetic import BlockFloat, InternalFloat
from moeaccel.formats import QuantisedMatrix
from moeaccel.golden.activation_unit import hidden
from moeaccel.golden.block_quantiser import quantise_hidden, quantise_x, rows_of
from moeaccel.golden.combiner import Combiner
from moeaccel.golden.dot_array import matvec
from moeaccel.image import Expert
from moeaccel.interface.commands import COUNT_MAX, ElementType, NonFinite, Overflow, Status

DEFAULT_GRID_EXPONENT = -28

Weights: TypeAlias = Expert | QuantisedMatrix
"""What an image holds: a gated expert, or one matrix, y = x W^T."""


@dataclass(frozen=True)
class DeviceResult:
    """What a command leaves behind.

    Parameters
    ----------
    y : float32 array, (T, d_out)
        Where the command has y in bfloat16, such numbers.
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
            return Status.OVERFLOW, min(self.overflows, COUNT_MAX), Overflow.OUTPUT
        return Status.OK, 0, 0


def expert(x: BlockFloat, weights: Weights) -> InternalFloat:
    """Return one expert's output, (n, d_out)."""
    if isinstance(weights, QuantisedMatrix):
        return matvec(x, weights)
    h = hidden(matvec(x, weights.gate_up), weights)
    return matvec(quantise_hidden(h, x.planes), weights.down)


def combined(
    x: NDArray[np.float32],
    ids: NDArray[np.integer],
    weights: NDArray[np.float32],
    weights_of: Callable[[int], Weights],
    *,
    num_experts: int,
    d_out: int,
    planes: int,
    grid_exponent: int,
    y_type: ElementType = ElementType.FLOAT32,
) -> DeviceResult:
    """Return what a command computes; :func:`experts`, for experts that are only there when they
    are used.

    Parameters
    ----------
    weights_of : callable
        Asked once for each expert with tokens, in ascending order.
    num_experts, d_out : :class:`int`
    y_type : :class:`ElementType`
        What y is rounded to.
    """
    quantised, nonfinite = quantise_x(x, planes)
    sums = Combiner(len(x), d_out, grid_exponent, y_type)
    used = np.zeros(len(x), bool)
    for e in np.unique(ids[(ids >= 0) & (ids < num_experts)]).tolist():
        tokens, slots = np.nonzero(ids == e)
        used[tokens] = True
        sums.add(tokens, weights[tokens, slots], expert(rows_of(quantised, tokens), weights_of(e)))
    return DeviceResult(sums.y, np.nonzero(nonfinite & used)[0].tolist(), sums.nonfinite_weights,
                        sums.overflows, sums.underflows)


def experts(
    x: NDArray[np.float32],
    ids: NDArray[np.integer],
    weights: NDArray[np.float32],
    layer: Sequence[Weights],
    *,
    planes: int = 2,
    grid_exponent: int = DEFAULT_GRID_EXPONENT,
    y_type: ElementType = ElementType.FLOAT32,
) -> DeviceResult:
    """Return what an EXPERTS command computes.

    Parameters
    ----------
    x : float32 array, (T, d_in)
    ids : integer array, (T, K)
        Negative or ``>= len(layer)``: skipped.
    weights : float32 array, (T, K)
    layer : sequence of :class:`Expert` or :class:`QuantisedMatrix`
        They may differ in all but d_in and d_out.
    planes : :class:`int`
        1 (``a8``) or 2 (``a16``).
    grid_exponent : :class:`int`
        LSB of the output grid.
    y_type : :class:`ElementType`
        What y is rounded to. (x in bfloat16 is the same numbers in float32.)
    """
    any_matrix = layer[0] if isinstance(layer[0], QuantisedMatrix) else layer[0].down
    return combined(
        x, ids, weights, layer.__getitem__, num_experts=len(layer),
        d_out=any_matrix.integers.shape[0], planes=planes, grid_exponent=grid_exponent,
        y_type=y_type)


def gemm(
    x: NDArray[np.float32],
    weights: QuantisedMatrix,
    *,
    planes: int = 2,
    grid_exponent: int = DEFAULT_GRID_EXPONENT,
    y_type: ElementType = ElementType.FLOAT32,
) -> DeviceResult:
    """Return what a GEMM command computes with one matrix: ``x W^T``, (T, rows)."""
    every = len(x), 1
    return experts(x, np.zeros(every, np.int64), np.ones(every, np.float32), [weights],
                   planes=planes, grid_exponent=grid_exponent, y_type=y_type)
