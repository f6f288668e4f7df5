"""Experts cut along their hidden rows: each block is an expert of the device, and they add up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeaccel.host.tensors import Tensor, float32

__all__ = ["RowBlocks", "bias_block", "down_block", "gate_up_block"]

Floats = NDArray[np.float32]


class RowBlocks(Sequence[Tensor]):
    """The matrices of experts, each cut along its hidden rows into ``blocks``, one at a time."""

    def __init__(self, name: str, stack: Tensor | Sequence[Tensor], blocks: int,
                 parts: int) -> None:
        self._name, self._stack, self._blocks = name, stack, blocks
        self._parts = parts

    def __len__(self) -> int:
        return len(self._stack) * self._blocks

    def __getitem__(self, index: Any) -> Any:
        expert, block = divmod(index, self._blocks)
        matrix = float32(self._name, self._stack[expert])
        if self._name == "down":
            return down_block(matrix, block, self._blocks)
        return gate_up_block(matrix, block, self._blocks, self._parts)


def gate_up_block(rows: Floats, block: int, blocks: int, parts: int) -> Floats:
    """Return a block of the hidden rows of gate_up, (rows, H), or of their biases, (rows,)."""
    each = rows.reshape(parts, blocks, -1, *rows.shape[1:])[:, block]
    return np.ascontiguousarray(each.reshape(-1, *rows.shape[1:]))


def down_block(matrix: Floats, block: int, blocks: int) -> Floats:
    """Return what of down, (H, I), goes with a block of hidden rows."""
    return np.ascontiguousarray(np.split(matrix, blocks, axis=1)[block])


def bias_block(gate_up: Floats | None, down: Floats | None, block: int,
               blocks: int, parts: int) -> list[Floats | None]:
    """Return the biases of a block of an expert's hidden rows: its rows', and those of down in the
    first block, 0 in others, since outputs of blocks are added."""
    return [None if gate_up is None else gate_up_block(gate_up, block, blocks, parts),
            down if down is None or block == 0 else np.zeros_like(down)]
