"""Weighted outputs, summed as integers on the layer's grid: in any order the same bits."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moeaccel.arithmetic import (
    BFLOAT16_BITS,
    ELEMENT_BITS,
    InternalFloat,
    float32_to_internal,
    grid_to_float32,
    weighted_output,
)
from moeaccel.interface.commands import ElementType


class Combiner:
    """The sums of a command.

    Parameters
    ----------
    tokens, d_out : :class:`int`
    grid_exponent : :class:`int`
        LSB of the output grid.
    y_type : :class:`ElementType`
        What sums are rounded to.

    Attributes
    ----------
    overflows, underflows : :class:`int`
        Weighted outputs beyond the grid, and those that were not zero and are zero on it.
    """

    def __init__(self, tokens: int, d_out: int, grid_exponent: int,
                 y_type: ElementType = ElementType.FLOAT32) -> None:
        self._bits = BFLOAT16_BITS if y_type == ElementType.BFLOAT16 else ELEMENT_BITS
        self._grid_exponent = grid_exponent
        self._sums = np.zeros((tokens, d_out), np.int64)
        self._nonfinite = np.zeros(tokens, bool)
        self.overflows = self.underflows = 0

    def add(self, tokens: NDArray[np.integer], weights: NDArray[np.float32],
            output: InternalFloat) -> None:
        """Add an expert's output, (n, d_out), for n tokens, each times its weight.

        A token may be there more than once.
        """
        self._nonfinite[tokens[~np.isfinite(weights)]] = True
        weight = float32_to_internal(weights)
        term, overflow, underflow = weighted_output(
            output, InternalFloat(weight.mantissa[:, None], weight.exponent[:, None]),
            self._grid_exponent)
        np.add.at(self._sums, tokens, term)
        self.overflows += int(overflow.sum())
        self.underflows += int(underflow.sum())

    @property
    def nonfinite_weights(self) -> list[int]:
        """Tokens with a weight that is NaN or infinite (it counts as zero)."""
        return np.nonzero(self._nonfinite)[0].tolist()

    @property
    def sums(self) -> NDArray[np.int64]:
        """The sums, (tokens, d_out), in units of the grid."""
        return self._sums

    @property
    def y(self) -> NDArray[np.float32]:
        """The sums, (tokens, d_out), of ``y_type``."""
        return grid_to_float32(self._sums, self._grid_exponent, self._bits)
