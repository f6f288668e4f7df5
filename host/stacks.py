"""Matrices of experts as callers have them, one tensor or a sequence, taken one by one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moeaccel.host.errors import InvalidTensor
from moeaccel.host.tensors import Tensor, float32, shape_of

__all__ = ["Biases", "Stack", "stack_shape"]

Stack = Tensor | Sequence[Tensor]
"""One matrix for each expert."""


def stack_shape(name: str, stack: Stack, *dims: str) -> tuple[int, ...]:
    """Return (E, rows, K) of a tensor, or of a sequence of matrices by its first."""
    if isinstance(stack, Sequence):
        return len(stack), *(shape_of(f"{name}[0]", stack[0], *dims) if len(stack) else (0, 0))
    return shape_of(name, stack, "E", *dims)


class Biases:
    """The biases of one matrix of all experts, (E, rows) or a sequence of (rows,); or none."""

    def __init__(self, name: str, stack: Stack | None, experts: int, rows: int) -> None:
        self._name, self._stack, self._rows = name, stack, rows
        if stack is None:
            return
        found = (len(stack), rows) if isinstance(stack, Sequence) else shape_of(
            name, stack, "E", "rows")
        if found != (experts, rows):
            raise InvalidTensor(
                f"{name} must have the shape {(experts, rows)}, one number for each row of each "
                f"expert, not {found}")

    def of(self, expert: int) -> NDArray[np.float32] | None:
        """Return those of an expert, (rows,)."""
        if self._stack is None:
            return None
        values = float32(self._name, self._stack[expert])
        if values.shape != (self._rows,):
            raise InvalidTensor(f"{self._name}[{expert}] must have the shape {(self._rows,)}, not "
                                f"{values.shape}")
        return values
