"""x and h on their way to the array: block floats."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moeaccel.arithmetic import BlockFloat, Ints, quantise_elements, quantise_float32


def quantise_x(x: NDArray[np.float32], planes: int) -> tuple[BlockFloat, NDArray[np.bool_]]:
    """Return x quantised, (T, K), and which tokens have NaN or infinity (it counts as zero)."""
    return quantise_float32(x, planes)


def quantise_hidden(hidden: tuple[Ints, Ints], planes: int) -> BlockFloat:
    """Return h, (significand, exponent), quantised."""
    return quantise_elements(*hidden, planes)


def rows_of(x: BlockFloat, tokens: NDArray[np.integer]) -> BlockFloat:
    """Return the rows of some tokens."""
    return BlockFloat(x.mantissa[tokens], x.shift[tokens], x.base[tokens], x.planes)
