"""FP8 weights with a scale for each block, as DeepSeek-V3 and others publish them."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence

import torch

from moeaccel.host.errors import UnsupportedExperts

__all__ = ["dequantise"]

logger = logging.getLogger(__name__)


def dequantise(weight: torch.Tensor, scale: torch.Tensor, block: Sequence[int] | None = None, *,
               parts: int = 1) -> torch.Tensor:
    """Multiply one expert's FP8 weights by their scales.

    What a scale covers follows from the shape of their grid, since dimensions need not be
    multiples of a block. Along rows it is the first of these that gives the grid's number of rows:

    1. Each of the ``parts`` matrices has a grid of its own, whose last block may be short. Gate and
       up are published as two matrices, and their grids lie behind one another as their rows do.
    2. One grid over all rows, whose last block may be short.
    3. Blocks of equal size, whatever ``block`` says: also one scale for all, or one for each row.

    Where the first two fit and differ, as for two matrices of 224 rows in blocks of 128, a warning
    says once that the first was taken.

    Columns likewise, with one part.

    Parameters
    ----------
    weight : FP8 tensor, (N, K)
    scale : tensor, (rows, columns)
        Of any float type; uint8 is E8M0, ``2**(byte - 127)``.
    block : pair of int, optional
        Rows and columns of a block.
    parts : :class:`int`
        Matrices of equal size that N is made of.

    Returns
    -------
    tensor, (N, K) float32

    Raises
    ------
    UnsupportedExperts
        If no grid fits.
    """
    scales = (scale.float() - 127).exp2() if scale.dtype == torch.uint8 else scale.float()
    height, width = block or (None, None)
    rows = _covered(weight.shape[0], scales.shape[0], height, parts)
    columns = _covered(weight.shape[1], scales.shape[1], width, 1)
    if rows is None or columns is None:
        raise UnsupportedExperts(
            f"FP8 weights of {tuple(weight.shape)} must have a scale for each block of {block}, "
            f"not a grid of {tuple(scale.shape)} scales; dequantise the checkpoint to bfloat16")
    return weight.float() * scales[rows][:, columns]


def _covered(size: int, scales: int, block: int | None, parts: int) -> torch.Tensor | None:
    """Return the index of each element's scale along one dimension; None if no grid fits."""
    if block is not None and size % parts == 0:
        part = size // parts
        blocks = -(-part // block)
        if parts * blocks == scales:
            if parts > 1 and part % block and -(-size // block) == scales:
                _warn_of_two_readings(size, block, parts)
            return (torch.arange(size) // part) * blocks + torch.arange(size) % part // block
    if block is not None and -(-size // block) == scales:
        return torch.arange(size) // block
    if scales and size % scales == 0:
        return torch.arange(size) // (size // scales)
    return None


@functools.cache  # once, and not for every expert
def _warn_of_two_readings(size: int, block: int, parts: int) -> None:
    logger.warning(
        "scales of %d rows in blocks of %d may be %d grids, one for each matrix, or one grid over "
        "all rows: they are taken as %d; if the layer's outputs are off, dequantise the checkpoint "
        "to bfloat16", size, block, parts, parts)
