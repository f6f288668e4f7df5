"""GGUF files, versions 2 and 3: counts, metadata, tensors' descriptions, tensors.

Read here rather than by the package ``gguf``, which is asked for the types' sizes alone: errors say
which tensor, and where, and arrays of the metadata (vocabularies) are passed over.
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path
from typing import Any, BinaryIO

from moeaccel.host.importers.errors import DamagedCheckpoint, ForeignCheckpoint
from moeaccel.host.importers.files.stored import StoredTensor, open_file

__all__ = ["read_gguf"]

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q",
            11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_MOST_DIMS = 4
_MOST_NESTING = 4
_DEFAULT_ALIGNMENT = 32


class _Cursor:
    """Reads a header's fields one after another."""

    def __init__(self, data: mmap.mmap, name: str) -> None:
        self._data = data
        self._name = name
        self.offset = 0

    def skip(self, size: int, what: str) -> int:
        """Go on by so many bytes; return where they begin."""
        begin = self.offset
        if size > len(self._data) - begin:
            raise DamagedCheckpoint(
                f"{what} must be {size} bytes at byte {begin} of {self._name}, which ends at "
                f"{len(self._data)}; the file is truncated or damaged")
        self.offset += size
        return begin

    def scalar(self, kind: str, what: str) -> Any:
        return struct.unpack_from(kind, self._data, self.skip(struct.calcsize(kind), what))[0]

    def text(self, what: str) -> str:
        size = self.scalar("<Q", f"length of {what}")
        begin = self.skip(size, what)
        try:
            return self._data[begin : self.offset].decode()
        except UnicodeDecodeError as error:
            raise DamagedCheckpoint(f"{what} at byte {begin} of {self._name} must be UTF-8, but: "
                                    f"{error}") from error

    def value(self, kind: int, what: str, depth: int = 0) -> Any:
        """Return a value of the metadata, None for an array."""
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind], what)
        if kind == _STRING:
            return self.text(what)
        if kind != _ARRAY or depth == _MOST_NESTING:
            raise DamagedCheckpoint(
                f"{what} before byte {self.offset} of {self._name} must be of a type from 0 to 12, "
                f"arrays at most {_MOST_NESTING} deep, not {kind}")
        inner, count = self.scalar("<I", f"type of {what}"), self.scalar("<Q", f"size of {what}")
        if inner in _SCALARS:
            self.skip(count * struct.calcsize(_SCALARS[inner]), what)
        elif inner == _STRING:
            for _ in range(count):
                self.skip(self.scalar("<Q", f"length of a part of {what}"), f"a part of {what}")
        else:
            for _ in range(count):
                self.value(inner, what, depth + 1)
        return None


def read_gguf(path: Path) -> tuple[BinaryIO, dict[str, StoredTensor], dict[str, Any]]:
    """Read a file's header.

    Returns
    -------
    file : binary file
        Open; the caller closes it.
    tensors : dict of :class:`str` to :class:`StoredTensor`
        Dimensions in the order of other files: slowest first.
    metadata : :class:`dict`
        Arrays are None.

    Raises
    ------
    DamagedCheckpoint
        Naming the file, the tensor and the offset.
    ForeignCheckpoint
        If it is no GGUF file, or of another version.
    """
    file, end = open_file(path)
    try:
        if end < 4 or file.read(4) != b"GGUF":
            raise ForeignCheckpoint(f"{path} must start with 'GGUF'; this is no GGUF file")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return (file, *_header(_Cursor(data, str(path)), file, end))
    except BaseException:
        file.close()
        raise


def _header(cursor: _Cursor, file: BinaryIO, end: int
            ) -> tuple[dict[str, StoredTensor], dict[str, Any]]:
    cursor.skip(4, "magic")
    version = cursor.scalar("<I", "version")
    if version not in (2, 3):
        raise ForeignCheckpoint(f"{file.name} must be of GGUF version 2 or 3, little-endian, not "
                                f"{version}; convert it again")
    tensors, pairs = cursor.scalar("<Q", "number of tensors"), cursor.scalar("<Q", "metadata count")
    metadata: dict[str, Any] = {}
    for _ in range(pairs):
        key = cursor.text("a key of the metadata")
        metadata[key] = cursor.value(cursor.scalar("<I", f"type of {key!r}"), f"value of {key!r}")
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise DamagedCheckpoint(f"general.alignment of {file.name} must be a power of two, not "
                                f"{alignment!r}")
    found: list[tuple[str, tuple[int, ...], int, int, int]] = []
    for _ in range(tensors):
        where = cursor.offset
        name = cursor.text("name of a tensor")
        dims = cursor.scalar("<I", f"dimensions of tensor {name!r}")
        if not 1 <= dims <= _MOST_DIMS:
            raise DamagedCheckpoint(
                f"tensor {name!r}, described at byte {where} of {file.name}, must have 1 to "
                f"{_MOST_DIMS} dimensions, not {dims}")
        shape = [cursor.scalar("<Q", f"shape of tensor {name!r}") for _ in range(dims)]
        found.append((name, tuple(reversed(shape)), cursor.scalar("<I", f"type of tensor {name!r}"),
                      cursor.scalar("<Q", f"offset of tensor {name!r}"), where))
    start = -(-cursor.offset // alignment) * alignment
    stored: dict[str, StoredTensor] = {}
    for name, shape, code, offset, where in found:
        dtype, size = _size_of(shape, code, f"tensor {name!r}, described at byte {where} of "
                                            f"{file.name},")
        if name in stored:
            raise DamagedCheckpoint(f"tensor {name!r}, described at byte {where} of {file.name}, "
                                    "must not be there twice")
        if start + offset + size > end:
            raise DamagedCheckpoint(
                f"tensor {name!r} must be {size} bytes at byte {start + offset} of {file.name}, "
                f"which ends at {end}; the file is truncated or damaged")
        stored[name] = StoredTensor(name, dtype, shape, file, start + offset, size)
    return stored, metadata


def _size_of(shape: tuple[int, ...], code: int, what: str) -> tuple[str, int]:
    """Return the name of a tensor's type and its size in bytes."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        kind = GGMLQuantizationType(code)
        block, size = GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError):
        raise DamagedCheckpoint(f"{what} must be of a type that the package gguf knows, not "
                                f"{code}; update it, or the file is damaged") from None
    if shape[-1] % block:
        raise DamagedCheckpoint(f"{what} must have rows of whole blocks of {block} for "
                                f"{kind.name}, not of {shape[-1]}")
    return kind.name, math.prod(shape) // block * size
