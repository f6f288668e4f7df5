"""The output grid of a layer, chosen from its weights.

Weighted outputs are summed as integers in units of ``2**g``. Where ``T`` is the layer's typical
output, two things are asked of g:

* an output of ``2**-16 T`` keeps a relative error of ``2**-10``: the one rounding errs by at most
  half a unit, so ``g - 1 <= log2(T) - 16 - 10``, that is ``g <= log2(T) - 25``;
* an output of ``2**16 T`` fits: what is below ``2**(g + 43)`` does, so ``g >= log2(T) - 27``.

That is an interval of exactly 2, ends included, so every T has a multiple of 2 in it (one of 4 only
every other T has), and multiples of 2 are what is chosen: weights that differ a little, as those of
two checkpoints of one model do, mostly get the same grid, and with it the same rounding.

T is the root mean square of the outputs of one expert, estimated from norms for Gaussian x of
independent elements, where a bias counts as one more such element, and of all experts their median:
neither experts of zeros, which do not count, nor a few huge ones move it far. Routing weights count
as 1.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from moeaccel.activations import Activation, Factor, activation as find_activation
from moeaccel.arithmetic import TERM_BITS, from_bfloat16, to_bfloat16
from moeaccel.formats import QuantisedMatrix
from moeaccel.interface.commands import GRID_EXPONENTS

Floats = NDArray[np.float64]

LARGEST_BITS = 16
"""Outputs up to ``2**16`` times the typical one fit."""

GRID_STEP = 2
_CHUNK_ELEMENTS = 1 << 17


@dataclass(frozen=True)
class Squares:
    """Sums of squares of a matrix.

    Parameters
    ----------
    rows : float64 array, (n,)
    columns : float64 array, (K,)
    error : :class:`float`, optional
        Of the differences between quantised and float weights, where both are there.
    bias : float64 array, (n,), optional
        Squares of the rows' biases, where there are some.
    """

    rows: Floats
    columns: Floats
    error: float | None
    bias: Floats | None = None

    @property
    def total(self) -> float:
        """Of the whole matrix."""
        return float(self.rows.sum())


def squares(matrix: QuantisedMatrix, weights: NDArray[np.floating] | None = None) -> Squares:
    """Return the sums of squares of float weights, or of the quantised ones where they are all
    there is, in one pass.

    Parameters
    ----------
    matrix : :class:`QuantisedMatrix`
        (n, K)
    weights : float array, (n, K), optional
        What it was quantised from.
    """
    n, k = matrix.integers.shape
    rows, columns, error = np.empty(n), np.zeros(k), 0.0
    step = max(1, _CHUNK_ELEMENTS // k)
    for first in range(0, n, step):
        part = slice(first, first + step)
        values = matrix[part].dequantise()
        if weights is not None:
            exact = weights[part].astype(np.float64)
            values -= exact
            error += float(np.vdot(values, values))
            values = exact
        values *= values
        rows[part] = values.sum(axis=1)
        columns += values.sum(axis=0)
    return Squares(rows, columns, None if weights is None else error,
                   None if matrix.bias is None else matrix.bias_values.astype(np.float64) ** 2)


def squares_of(weights: NDArray[np.floating], bias: NDArray[np.floating] | None = None
               ) -> Squares:
    """Return the sums of squares of a float matrix, (n, K), and its biases: to the bit those that
    :func:`squares` finds beside whatever it is quantised to, so that who has no device chooses the
    same grid."""
    n, k = weights.shape
    rows, columns = np.empty(n), np.zeros(k)
    step = max(1, _CHUNK_ELEMENTS // k)
    for first in range(0, n, step):
        values = weights[first : first + step].astype(np.float64)
        values *= values
        rows[first : first + step] = values.sum(axis=1)
        columns += values.sum(axis=0)
    if bias is not None:
        bias = from_bfloat16(to_bfloat16(np.asarray(bias, np.float32))).astype(np.float64) ** 2
    return Squares(rows, columns, None, bias)


_DEVIATIONS_LOG2 = np.arange(-10.0, 10.25, 0.25)


@cache
def _gate_table(activation: Activation) -> Floats:
    """Return E[(z f(s z))**2] of a standard Gaussian z for each deviation s: of SiLU 1/4 where it
    is a line through the origin, 1/2 where it is a ramp, as ReLU is everywhere."""
    z = np.linspace(-8, 8, 4001)
    density = np.exp(-z * z / 2)
    gated = [z * activation.f(z * deviation) for deviation in np.exp2(_DEVIATIONS_LOG2)]
    return np.array([(g * g * density).sum() for g in gated]) / density.sum()


def gated_output(gate_up: Squares, down: Squares, *, x_rms: float = 1.0,
                 activation: str = "silu", limit: float | None = None,
                 gate_limit: float | None = None) -> float:
    """Return the typical output of one expert, 0 for one that only gives zeros.

    Parameters
    ----------
    gate_up : :class:`Squares`
        Rows in the order of images (:func:`moeaccel.image.interleave_gate_up`).
    down : :class:`Squares`
    x_rms : :class:`float`
        Root mean square of the elements of x.
    activation, limit, gate_limit
        As in :class:`moeaccel.image.ExpertShape`; a limit bounds rows as it bounds their squares.
    """
    act = find_activation(activation)
    # What is beyond float64 is infinite, and gets the coarsest grid.
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        rows = _with_bias(gate_up.rows * x_rms**2, gate_up)
        every = len(rows) // len(down.columns)
        most = np.inf if limit is None else limit**2
        gate = np.minimum(rows[0::every], most if gate_limit is None else gate_limit**2)
        rows = np.minimum(rows, most)
        up = rows[1::every] + act.up_offset if every == 2 else np.ones_like(gate)
        if every == 4:
            up = rows[1::4] * rows[3::4]
        if act.factor is Factor.RAMP:
            share = 1.5 * gate  # E[z**4] / 2 of a Gaussian, and no table goes far enough
        else:
            share = np.interp(np.log2(gate) / 2, _DEVIATIONS_LOG2, _gate_table(act))
        hidden = share * gate * up  # mean squares of h; its elements are independent of zero mean
        total = (down.columns * hidden).sum()
        return float(np.sqrt((total + _with_bias(0, down).sum()) / len(down.rows)))


def _with_bias(mean_squares: Floats | float, matrix: Squares) -> Floats:
    """Return the mean squares of rows with their biases."""
    return np.asarray(mean_squares if matrix.bias is None else mean_squares + matrix.bias)


def linear_output(weight: Squares, *, x_rms: float = 1.0) -> float:
    """Return the typical output of a linear layer."""
    return float(np.sqrt(_with_bias(weight.rows * x_rms**2, weight).mean()))


def grid_exponent(outputs: Iterable[float]) -> int:
    """Return the grid of a layer from the typical outputs of its experts.

    Parameters
    ----------
    outputs : iterable of :class:`float`
        Those that are 0 do not count; where none does, the grid is that of 1.

    Returns
    -------
    int
        A multiple of 2 from -100 to 60; beyond those the bounds hold no longer.
    """
    sizes = [float(np.log2(output)) for output in outputs if output > 0] or [0.0]
    typical = float(np.median(np.clip(sizes, -1000, 1000)))
    # The upper end of the interval, log2(T) + 16 - 43 + 2, rounded down.
    most = typical + LARGEST_BITS - TERM_BITS + GRID_STEP
    exponent = int(np.floor(most / GRID_STEP)) * GRID_STEP
    return min(max(exponent, GRID_EXPONENTS[0]), GRID_EXPONENTS[-1])
