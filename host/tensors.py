"""Tensors in, tensors out: torch and NumPy alike, without importing torch for those who do not."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from moeaccel.host.errors import InvalidTensor
from moeaccel.interface.commands import ElementType

if TYPE_CHECKING:
    import torch

__all__ = ["Like", "Tensor", "element_type", "elements", "float32", "indices", "is_torch",
           "shape_of"]

_INTEGERS = ("int64", "int32", "int16", "int8", "uint8", "uint16", "uint32", "uint64")

if TYPE_CHECKING:
    Tensor = torch.Tensor | NDArray[Any]
else:
    Tensor = Any
"""A torch tensor or a NumPy array."""


def is_torch(value: object) -> TypeGuard[torch.Tensor]:
    """Return whether a value is a torch tensor, without importing torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def shape_of(name: str, value: Tensor, *dims: str) -> tuple[int, ...]:
    """Return a tensor's shape.

    Raises
    ------
    InvalidTensor
        Unless it is a tensor with so many dimensions.
    """
    if not (is_torch(value) or isinstance(value, np.ndarray)):
        raise InvalidTensor(
            f"{name} must be a torch.Tensor or a numpy.ndarray, not {type(value).__name__}")
    if len(value.shape) != len(dims):
        raise InvalidTensor(
            f"{name} must have the shape ({', '.join(dims)}), not {tuple(value.shape)}")
    return tuple(value.shape)


def float32(name: str, value: Tensor) -> NDArray[np.float32]:
    """Return a floating-point tensor of any type and place as contiguous float32 in this process.

    Raises
    ------
    InvalidTensor
        If its elements are not floating-point numbers.
    """
    if is_torch(value):
        import torch

        if not value.dtype.is_floating_point:
            raise InvalidTensor(f"{name} must be floating point, not {value.dtype}; convert it")
        array = value.detach().to(device="cpu", dtype=torch.float32).numpy()
        return np.ascontiguousarray(array)
    given = np.asarray(value)
    if not np.issubdtype(given.dtype, np.floating):
        raise InvalidTensor(f"{name} must be floating point, not {given.dtype}; convert it")
    with np.errstate(over="ignore"):  # the device reports infinities, and where they are
        return np.ascontiguousarray(given, np.float32)


def elements(name: str, value: Tensor) -> NDArray[np.float32] | NDArray[np.uint16]:
    """Return a floating-point tensor as the device takes x, contiguous and in this process.

    A torch tensor of bfloat16 stays what it is, as uint16; all others become float32.

    Raises
    ------
    InvalidTensor
        If its elements are not floating-point numbers.
    """
    if is_torch(value):
        import torch

        if value.dtype == torch.bfloat16:
            stored = value.detach().to(device="cpu").contiguous()
            return stored.view(torch.int16).numpy().view(np.uint16)
    return float32(name, value)


def element_type(array: NDArray[Any]) -> ElementType:
    """Return what the elements of an array are, from :func:`elements`."""
    return ElementType.BFLOAT16 if array.dtype == np.uint16 else ElementType.FLOAT32


def indices(name: str, value: Tensor, limit: int) -> NDArray[np.int32]:
    """Return an integer tensor as contiguous int32 in this process, -1 outside [0, limit).

    Raises
    ------
    InvalidTensor
        If its elements are not integers.
    """
    if str(value.dtype).removeprefix("torch.") not in _INTEGERS:
        raise InvalidTensor(f"{name} must be integers (int64 or int32), not {value.dtype}")
    array: NDArray[Any] = value.detach().cpu().numpy() if is_torch(value) else np.asarray(value)
    return np.where((array >= 0) & (array < limit), array, -1).astype(np.int32)


@dataclass(frozen=True)
class Like:
    """Where a result goes: the kind, type and place of the tensor it answers."""

    torch_device: Any
    dtype: Any

    @classmethod
    def of(cls, value: Tensor) -> Like:
        """Return the kind, type and place of a tensor."""
        if is_torch(value):
            return cls(value.device, value.dtype)
        return cls(None, value.dtype)

    def __call__(self, result: NDArray[np.float32] | NDArray[np.uint16]) -> Any:
        """Convert a result: float32, or bfloat16 as :func:`elements` has it."""
        if self.torch_device is None:
            with np.errstate(over="ignore"):  # float16 has infinities
                return result.astype(self.dtype, copy=False)
        import torch

        if element_type(result) is ElementType.BFLOAT16:
            return torch.from_numpy(result.view(np.int16)).view(torch.bfloat16).to(
                device=self.torch_device)
        return torch.from_numpy(result).to(device=self.torch_device, dtype=self.dtype)
