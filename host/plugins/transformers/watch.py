"""Whether a tensor still is, and still holds, what it was and held.

PyTorch counts writes (``_version``), but not those through ``.data``, through NumPy, or in
inference mode. So content is compared, too: a tensor's bytes are cut into blocks, of 4 KiB in
tensors of 8 MiB or more, else of 64 bytes; and the n-th look at it compares every 256th block,
beginning with block n mod 256, and what is left behind the last whole 256. So it is seen

- at once: another tensor in its place, also at the same address; writes that PyTorch counts; a
  write of any kind to 1 MiB in a row, or to 16 KiB in smaller tensors: to a matrix, to all of it;
- within 256 looks: any change, also of a single bit;
- at once, whatever it is, when everything is compared.

What is compared are digests: a change is missed with a probability of about 2^-32.
"""

from __future__ import annotations

import ctypes
import weakref
import zlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

__all__ = ["PARTS", "Watch", "identity"]

PARTS = 256
"""Looks after which every byte has been compared."""

_LARGE = 8 << 20
_BLOCK_BYTES, _LARGE_BLOCK_BYTES = 64, 4096


def _span(tensor: torch.Tensor) -> int:
    """Return how many bytes there are from a tensor's first element to its last."""
    if not tensor.numel():
        return 0
    last = sum((size - 1) * stride
               for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _layout(count: int) -> tuple[int, int]:
    """Return how many blocks of each part there are in so many bytes, and bytes of a block."""
    block = _LARGE_BLOCK_BYTES if count >= _LARGE else _BLOCK_BYTES
    return count // (PARTS * block), block


def identity(tensor: torch.Tensor) -> tuple[object, ...]:
    """Return what another view of the same storage may differ in."""
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


class _HostBytes:
    """Digests of a tensor's bytes in this process' memory; they are not kept alive."""

    def __init__(self, tensor: torch.Tensor, count: int) -> None:
        data = np.frombuffer(
            memoryview((ctypes.c_uint8 * count).from_address(tensor.data_ptr())), np.uint8)
        rows, block = _layout(count)
        whole = rows * PARTS * block
        self._blocks = data[:whole].reshape(rows, PARTS, block)
        self._rest = data[whole:]

    def digest(self, storage: Any, part: int) -> int:
        """Return that of a part; the storage has to be there."""
        del storage
        return zlib.crc32(self._rest.data, zlib.crc32(self._blocks[:, part].tobytes()))


class _TorchBytes:
    """Digests of a tensor's bytes on whatever device it is; it is not kept alive."""

    def __init__(self, tensor: torch.Tensor, count: int) -> None:
        self._offset = int(tensor.storage_offset()) * tensor.element_size()
        self._count = count
        self._rows, self._block = _layout(count)
        rng = np.random.default_rng(count)
        self._row_factors, self._factors, self._rest_factors = (
            torch.from_numpy(rng.integers(-1 << 63, 1 << 63, size) | 1).to(tensor.device)
            for size in (self._rows, self._block, count - self._rows * PARTS * self._block))

    def digest(self, storage: Any, part: int) -> list[int]:
        """Return that of a part: sums of products with odd random numbers, modulo 2^64."""
        data = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(
            storage, self._offset, (self._count,), (1,))
        whole = self._rows * PARTS * self._block
        blocks = data[:whole].view(self._rows, PARTS, self._block)[:, part].long()
        sums = ((blocks * self._factors).sum(1) * self._row_factors).sum()
        rest = (data[whole:].long() * self._rest_factors).sum()
        return torch.stack([sums, rest]).tolist()


class Watch:
    """Remembers what a tensor is and holds, without keeping it alive.

    Parameters
    ----------
    tensor : :class:`torch.Tensor`
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        # A weak reference to the storage is never that of another one at the same address.
        self._storage = weakref.ref(tensor.untyped_storage())
        self._identity = identity(tensor)
        self._version = self._version_of(tensor)
        self._bytes: _HostBytes | _TorchBytes | None = None
        if count := _span(tensor):
            kind = _HostBytes if tensor.device.type == "cpu" else _TorchBytes
            self._bytes = kind(tensor, count)
        self._digests = [self._digest(part) for part in range(PARTS)]

    @staticmethod
    def _version_of(tensor: torch.Tensor) -> int:
        return 0 if tensor.is_inference() else tensor._version

    def _digest(self, part: int) -> object:
        storage = self._storage()
        return self._bytes and storage and self._bytes.digest(storage, part)

    def holds(self, tensor: torch.Tensor, parts: Iterable[int]) -> bool:
        """Return whether another tensor is alike, and holds in some parts what this one did.

        Parameters
        ----------
        tensor : :class:`torch.Tensor`
        parts : iterable of :class:`int`
        """
        if identity(tensor)[1:] != self._identity[1:]:
            return False
        count = _span(tensor)
        if not count:
            return True
        read = (_HostBytes if tensor.device.type == "cpu" else _TorchBytes)(tensor, count)
        storage = tensor.untyped_storage()
        return all(read.digest(storage, part) == self._digests[part] for part in parts)

    def same(self, tensor: torch.Tensor, parts: Iterable[int]) -> bool:
        """Return whether a tensor is the one that is watched, and holds in some parts what it did.

        Parameters
        ----------
        tensor : :class:`torch.Tensor`
        parts : iterable of :class:`int`
            Which of the :data:`PARTS` parts to compare.
        """
        return (self._storage() is tensor.untyped_storage()
                and self._identity == identity(tensor)
                and self._version == self._version_of(tensor)
                and all(self._digest(part) == self._digests[part] for part in parts))
