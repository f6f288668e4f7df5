"""Tensors in, tensors out: torch and NumPy alike, without importing torch for those who do not."""

from __future__ import annotations

import functools
import sys
import warnings
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import numpy as np
from numpy.typing import NDArray

from moeaccel.host.errors import InvalidTensor
from moeaccel.interface.commands import ElementType

if TYPE_CHECKING:
    import torch

__all__ = ["Like", "Target", "Tensor", "element_type", "elements", "float32", "indices",
           "io_type", "is_torch", "put_floats", "put_indices", "shape_of"]

_INTEGERS = ("int64", "int32", "int16", "int8", "uint8", "uint16", "uint32", "uint64")

if TYPE_CHECKING:
    Tensor = torch.Tensor | NDArray[Any]
else:
    Tensor = Any
"""A torch tensor or a NumPy array."""


_torch_types: set[type] = set()  # seen so far


def is_torch(value: object) -> TypeGuard[torch.Tensor]:
    """Return whether a value is a torch tensor, without importing torch."""
    if type(value) in _torch_types:
        return True
    torch = sys.modules.get("torch")
    found = torch is not None and isinstance(value, torch.Tensor)
    if found:
        _torch_types.add(type(value))
    return found


def shape_of(name: str, value: Tensor, *dims: str) -> tuple[int, ...]:
    """Return a tensor's shape.

    Raises
    ------
    InvalidTensor
        Unless it is a dense tensor with values and so many dimensions.
    """
    if not (isinstance(value, np.ndarray) or is_torch(value)):
        raise InvalidTensor(
            f"{name} must be a torch.Tensor or a numpy.ndarray, not {type(value).__name__}")
    _check_dense(name, value)
    shape = tuple(value.shape)
    if len(shape) != len(dims):
        raise InvalidTensor(f"{name} must have the shape ({', '.join(dims)}), not {shape}")
    return shape


def _check_dense(name: str, value: Tensor) -> None:
    """Check that a tensor has all its elements: it is not sparse, nor on the meta device."""
    if is_torch(value) and (value.is_meta or value.layout is not sys.modules["torch"].strided):
        what = "on the meta device" if value.is_meta else value.layout
        raise InvalidTensor(f"{name} must be dense, with values, not {what}; load or convert it")


def float32(name: str, value: Tensor) -> NDArray[np.float32]:
    """Return a floating-point tensor of any type and place as contiguous float32 in this process.

    Raises
    ------
    InvalidTensor
        If its elements are not floating-point numbers, or not there.
    """
    if is_torch(value):
        import torch

        _check_dense(name, value)
        if not value.dtype.is_floating_point:
            raise InvalidTensor(f"{name} must be floating point, not {value.dtype}; convert it")
        array = value.detach().to(device="cpu", dtype=torch.float32).numpy()
        return np.ascontiguousarray(array)
    given = np.asarray(value)
    if not np.issubdtype(given.dtype, np.floating):
        raise InvalidTensor(f"{name} must be floating point, not {given.dtype}; convert it")
    with np.errstate(over="ignore"):  # the device reports infinities, and where they are
        return np.ascontiguousarray(given, np.float32)


def io_type(value: Tensor) -> ElementType:
    """Return what a tensor's elements are on their way to the device: bfloat16 of torch stays what
    it is, all else is float32."""
    if is_torch(value) and value.dtype is sys.modules["torch"].bfloat16:
        return ElementType.BFLOAT16
    return ElementType.FLOAT32


def elements(name: str, value: Tensor) -> NDArray[np.float32] | NDArray[np.uint16]:
    """Return a floating-point tensor as the device takes x, contiguous and in this process.

    A torch tensor of bfloat16 stays what it is, as uint16; all others become float32.

    Raises
    ------
    InvalidTensor
        If its elements are not floating-point numbers.
    """
    if io_type(value) is ElementType.FLOAT32 or not is_torch(value):
        return float32(name, value)
    import torch

    stored = value.detach().to(device="cpu").contiguous()
    return stored.view(torch.int16).numpy().view(np.uint16)


def element_type(array: NDArray[Any]) -> ElementType:
    """Return what the elements of an array are, from :func:`elements`."""
    return ElementType.BFLOAT16 if array.itemsize == 2 else ElementType.FLOAT32


@functools.lru_cache(maxsize=64)
def _is_integer(dtype: Any) -> bool:
    return str(dtype).removeprefix("torch.") in _INTEGERS


def _integers(name: str, value: Tensor) -> NDArray[Any]:
    if not _is_integer(value.dtype):
        raise InvalidTensor(f"{name} must be integers (int64 or int32), not {value.dtype}")
    if isinstance(value, np.ndarray):
        return value
    return value.numpy() if value.is_cpu else value.cpu().numpy()


def indices(name: str, value: Tensor, limit: int) -> NDArray[np.int32]:
    """Return an integer tensor as contiguous int32 in this process, -1 outside [0, limit).

    Raises
    ------
    InvalidTensor
        If its elements are not integers.
    """
    array = _integers(name, value)
    return np.where((array >= 0) & (array < limit), array, -1).astype(np.int32)


class Target:
    """An array of this process into which tensors are converted.

    Parameters
    ----------
    array : array
        bfloat16 as uint16.
    """

    __slots__ = ("_torch", "array")

    def __init__(self, array: NDArray[Any]) -> None:
        self.array = array
        self._torch: torch.Tensor | None = None

    @property
    def torch(self) -> torch.Tensor:
        """The same memory for torch."""
        if self._torch is None:
            import torch

            if element_type(self.array) is ElementType.BFLOAT16:
                self._torch = torch.from_numpy(self.array.view(np.int16)).view(torch.bfloat16)
            else:
                self._torch = torch.from_numpy(self.array)
        return self._torch


def put_floats(name: str, value: Tensor, target: Target) -> None:
    """Convert a floating-point tensor of the target's shape into it.

    Raises
    ------
    InvalidTensor
        If its elements are not floating-point numbers.
    """
    if isinstance(value, np.ndarray):
        if value.dtype.kind != "f":
            float32(name, value)  # refuses it
        if value.dtype.itemsize > 4:
            with np.errstate(over="ignore"):  # the device reports infinities, and where they are
                np.copyto(target.array, value, casting="same_kind")
        else:
            np.copyto(target.array, value)
        return
    if not value.dtype.is_floating_point:
        float32(name, value)
    target.torch.copy_(value.detach() if value.requires_grad else value)


def put_indices(name: str, value: Tensor, limit: int, target: Target) -> None:
    """Convert an integer tensor of the target's shape into it; what is outside [0, limit) is so
    in the target, too.

    Raises
    ------
    InvalidTensor
        If its elements are not integers.
    """
    array = _integers(name, value)
    np.copyto(target.array, array, casting="unsafe")
    wraps = array.itemsize > 4 or (array.itemsize == 4 and array.dtype.kind == "u")
    if wraps and np.count_nonzero(target.array != array):
        np.copyto(target.array, np.where((array >= 0) & (array < limit), array, -1),
                  casting="unsafe")


@functools.lru_cache(maxsize=64)
def _largest(dtype: Any) -> float | None:
    """Return the largest value of a floating-point type; None of those with float32's range."""
    info = np.finfo(dtype) if isinstance(dtype, np.dtype) else sys.modules["torch"].finfo(dtype)
    return most if (most := float(info.max)) < 1e38 else None


class Like(NamedTuple):
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
        """Convert a result: float32, or bfloat16 as :func:`elements` has it.

        Warns
        -----
        RuntimeWarning
            If values lie beyond the largest of a narrower type, such as float16's 65,504.
        """
        if result.itemsize == 4 and (most := _largest(self.dtype)) is not None:
            lost = np.count_nonzero(np.abs(result) > most)
            if lost:
                warnings.warn(f"{lost} of {result.size} results lie beyond {most:,.0f}, the "
                              f"largest {self.dtype}, which the type of x cannot hold; give x as "
                              "float32 or bfloat16", RuntimeWarning, stacklevel=3)
        if self.torch_device is None:
            with np.errstate(over="ignore"):  # float16 has infinities
                return result.astype(self.dtype, copy=False)
        import torch

        if result.itemsize == 2:  # is bfloat16
            stored = torch.from_numpy(result.view(np.int16)).view(torch.bfloat16)
            device = self.torch_device
            return stored if device.type == "cpu" else stored.to(device=device)
        return torch.from_numpy(result).to(device=self.torch_device, dtype=self.dtype)
