"""A tensor in a file: where it lies, and its bytes when they are asked for."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from moeaccel.arithmetic import from_bfloat16
from moeaccel.host.importers.errors import (
    ClosedCheckpoint,
    DamagedCheckpoint,
    ForeignCheckpoint,
)

__all__ = ["FLOATS", "StoredTensor", "open_file", "read_at"]

FLOATS = ("F64", "F32", "F16", "BF16")
"""Types that :meth:`StoredTensor.float32` reads."""

_NUMPY = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4",
    "I16": "<i2", "I8": "i1", "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?",
    "F8_E4M3": "u1", "F8_E5M2": "u1", "F8_E8M0": "u1"}


def open_file(path: Path) -> tuple[BinaryIO, int]:
    """Open a file and return it with its size.

    Raises
    ------
    DamagedCheckpoint
        If that fails.
    """
    try:
        file = path.open("rb", buffering=0)
        return file, os.fstat(file.fileno()).st_size
    except OSError as error:
        raise DamagedCheckpoint(f"{path} must be a file that can be read: {error.strerror}"
                                ) from error


def read_at(file: BinaryIO, offset: int, size: int, what: str) -> NDArray[np.uint8]:
    """Read so many bytes; memory for them is taken only if the file has as many.

    Raises
    ------
    DamagedCheckpoint
        If it has not.
    ClosedCheckpoint
        If it was closed.
    """
    _check_open(file)
    try:
        end = os.fstat(file.fileno()).st_size
        if offset + size <= end:
            data = np.empty(size, np.uint8)
            view, done = data.data, 0
            while done < size and (got := os.preadv(file.fileno(), [view[done:]], offset + done)):
                done += got
            if done == size:
                return data
    except OSError as error:
        raise DamagedCheckpoint(f"{what} at byte {offset} of {file.name} cannot be read: "
                                f"{error.strerror}") from error
    raise DamagedCheckpoint(f"{what} must be {size} bytes at byte {offset} of {file.name}, which "
                            f"ends at {end}; it is truncated")


def _check_open(file: BinaryIO) -> None:
    if file.closed:
        raise ClosedCheckpoint(f"{file.name} must be open to be read, but was closed; open it "
                               "again, and read what is wanted before it is closed")


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor in a file.

    Parameters
    ----------
    name : :class:`str`
    dtype : :class:`str`
        As the file names it: ``"BF16"``, ``"F8_E4M3"``, ``"Q4_0"``.
    shape : tuple of :class:`int`
        Slowest dimension first; elements, also where several share a byte.
    file : binary file
    offset, nbytes : :class:`int`
        Where its bytes are.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: BinaryIO
    offset: int
    nbytes: int

    def __str__(self) -> str:
        return (f"tensor {self.name!r} ({self.dtype} {list(self.shape)} at byte {self.offset} of "
                f"{self.file.name})")

    @property
    def path(self) -> Path:
        """Of its file."""
        return Path(self.file.name)

    def bytes(self, index: int | None = None) -> NDArray[np.uint8]:
        """Read all of it, or one entry of its first dimension.

        Raises
        ------
        DamagedCheckpoint
            If the file is no longer what it was.
        ClosedCheckpoint
            If it was closed.
        """
        if index is None:
            return read_at(self.file, self.offset, self.nbytes, f"tensor {self.name!r}")
        size = self.nbytes // self.shape[0]
        return read_at(self.file, self.offset + index * size, size, f"tensor {self.name!r}")

    def array(self, index: int | None = None) -> NDArray[Any]:
        """Read it as NumPy has it; 16 and 8 bits of float that it has not are unsigned integers.

        Raises
        ------
        ForeignCheckpoint
            If its type is none of whole bytes.
        """
        if self.dtype not in _NUMPY:
            raise ForeignCheckpoint(f"{self} must be of one of the types {', '.join(_NUMPY)}")
        shape = self.shape if index is None else self.shape[1:]
        return self.bytes(index).view(_NUMPY[self.dtype]).reshape(shape)

    def mapped(self) -> NDArray[Any]:
        """Return it as memory that the file is mapped into, read where it is looked at.

        Raises
        ------
        DamagedCheckpoint
            If the file is shorter than it was.
        ClosedCheckpoint
            If it was closed.
        """
        _check_open(self.file)
        if os.fstat(self.file.fileno()).st_size < self.offset + self.nbytes:
            self.bytes()  # says so
        return np.asarray(np.memmap(self.file, _NUMPY[self.dtype], "r", self.offset, self.shape))

    def float32(self, index: int | None = None) -> NDArray[np.float32]:
        """Read floats as float32.

        Raises
        ------
        ForeignCheckpoint
            If they are none of :data:`FLOATS`.
        """
        if self.dtype not in FLOATS:
            raise ForeignCheckpoint(f"{self} must be of one of the types {', '.join(FLOATS)}")
        values = self.array(index)
        if self.dtype == "BF16":
            return from_bfloat16(values)
        with np.errstate(over="ignore"):  # float64 beyond float32: infinite, and refused as such
            return values.astype(np.float32, copy=False)
