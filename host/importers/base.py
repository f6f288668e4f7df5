"""What a family of weights is, and what it is given to read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeaccel.host.importers.coded import Matrix
from moeaccel.host.importers.errors import ForeignCheckpoint
from moeaccel.host.importers.files import StoredTensor

__all__ = ["Contents", "Family", "check_shape", "grouped_columns", "nibbles"]


@dataclass(frozen=True)
class Contents:
    """What a checkpoint holds.

    Parameters
    ----------
    tensors : mapping of :class:`str` to :class:`StoredTensor`
    config : mapping
        ``config.json``, or a GGUF file's metadata; empty where there is none.
    """

    tensors: Mapping[str, StoredTensor]
    config: Mapping[str, Any]

    @property
    def quantisation(self) -> Mapping[str, Any]:
        """What the configuration says of how weights are stored."""
        found = self.config.get("quantization_config")
        return found if isinstance(found, dict) else {}

    def need(self, name: str) -> StoredTensor:
        """Return a tensor.

        Raises
        ------
        ForeignCheckpoint
            If it is not there.
        """
        try:
            return self.tensors[name]
        except KeyError:
            files = sorted({tensor.file.name for tensor in self.tensors.values()})
            raise ForeignCheckpoint(
                f"tensor {name!r} must be in the checkpoint, but is not in {', '.join(files)}"
            ) from None

    def dtype(self, name: str) -> str:
        """Return a tensor's type, nothing where there is no such tensor."""
        found = self.tensors.get(name)
        return "" if found is None else found.dtype


class Family(ABC):
    """A way of storing weights, in a file of its own.

    The tensors of one matrix begin with one *stem*: its name without what says which part of it a
    tensor holds. Experts are a matrix each, or stacked along the first dimension of one.
    """

    name: str
    """For users."""
    mark: str
    """What the name of one tensor of each matrix ends with, behind the stem."""
    rank = 0
    """Of families that claim a stem, the one of the highest rank reads it."""

    @abstractmethod
    def claims(self, contents: Contents, stem: str) -> bool:
        """Return whether the tensors of a stem, of which one is there, are of this family."""

    @abstractmethod
    def shape(self, contents: Contents, stem: str) -> tuple[int, ...]:
        """Return the shape of the matrix, (n, K), or (E, n, K) of stacked ones."""

    @abstractmethod
    def read(self, contents: Contents, stem: str, expert: int | None) -> Matrix:
        """Read a matrix, or one of those that are stacked.

        Raises
        ------
        CheckpointError
            Naming the tensor.
        """


def check_shape(tensor: StoredTensor, expected: tuple[int, ...], why: str) -> None:
    """Raise :class:`ForeignCheckpoint` unless a tensor has a shape."""
    if tensor.shape != expected:
        raise ForeignCheckpoint(f"{tensor} must have the shape {list(expected)} {why}")


def nibbles(words: NDArray[np.integer]) -> NDArray[np.int8]:
    """Return the eight 4-bit numbers of each 32-bit word, low ones first, as a last dimension."""
    low_first = np.ascontiguousarray(words).view(np.uint8).reshape(*words.shape, 4)
    pairs = np.stack([low_first & 15, low_first >> 4], axis=-1)
    return pairs.reshape(*words.shape, 8).view(np.int8)


def grouped_columns(g_idx: NDArray[np.integer], group: int, groups: int
                    ) -> NDArray[np.integer] | None:
    """Return the order that sorts columns into their groups, None if they lie so.

    Raises
    ------
    ForeignCheckpoint
        If groups have not as many columns as they should.
    """
    k = len(g_idx)
    if np.array_equal(g_idx, np.arange(k) // group):
        return None
    order = np.argsort(g_idx, kind="stable")
    if not np.array_equal(g_idx[order], np.arange(k) // group):
        raise ForeignCheckpoint(
            f"g_idx must name each of {groups} groups for {group} columns; this one does not")
    return order
