"""Dot products: exact, and rounded once; once more where a bias is added.

A dot product is a float64 matrix product of integers that never round (docs/arithmetic.md): the
block sums of 32, weighted by the activation's and the weight's scales, stay below 2**53.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from moeaccel.arithmetic import (
    BlockFloat,
    InternalFloat,
    add,
    bfloat16_to_internal,
    normalise,
)
from moeaccel.config import BLOCK
from moeaccel.formats import QuantisedMatrix


def matvec(x: BlockFloat, weights: QuantisedMatrix) -> InternalFloat:
    """Return ``x W^T``, plus the biases where there are some, as internal floats, (n, rows)."""
    fmt = weights.format
    unit = min(fmt.group, BLOCK)  # of K: one scale, and one of them for several units

    def units(values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return what groups have for each unit, (rows, units, 1)."""
        each = np.repeat(values, fmt.group // unit, axis=1)
        return each[:, : weights.integers.shape[1] // unit, None]

    scale, minimum = weights.group_terms()
    integers = weights.integers.reshape(len(scale), -1, unit) * units(scale)
    if minimum is not None:
        integers += units(minimum)
    w = torch.from_numpy(integers.reshape(weights.integers.shape))
    shift = np.repeat(2.0**x.shift, BLOCK, axis=1)
    total = np.zeros((x.mantissa.shape[0], w.shape[0]), np.int64)
    for plane in x.plane_mantissas():
        product = (torch.from_numpy(plane * shift) @ w.T).numpy()
        total = (total << 8) + product.astype(np.int64)
    sums = normalise(total, x.base[:, None] + weights.row_exponent[None, :].astype(np.int64))
    if weights.bias is None:
        return sums
    bias = bfloat16_to_internal(weights.bias)
    return add(sums, InternalFloat(*(np.broadcast_to(part, total.shape)
                                     for part in (bias.mantissa, bias.exponent))))
