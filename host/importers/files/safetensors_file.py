"""Safetensors files: eight bytes of length, a JSON header, tensors.

Read here rather than by the package of that name so that errors say which tensor, and where.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, BinaryIO

from moeaccel.host.importers.errors import DamagedCheckpoint
from moeaccel.host.importers.files.stored import StoredTensor, open_file, read_at

__all__ = ["read_safetensors"]

_MOST_HEADER_BYTES = 100_000_000  # as the reference implementation has it
_BITS = {
    "F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16,
    "BF16": 16, "I16": 16, "U16": 16, "I8": 8, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8,
    "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4}


def read_safetensors(path: Path) -> tuple[BinaryIO, dict[str, StoredTensor], dict[str, Any]]:
    """Read a file's header.

    Returns
    -------
    file : binary file
        Open; the caller closes it.
    tensors : dict of :class:`str` to :class:`StoredTensor`
    metadata : :class:`dict`

    Raises
    ------
    DamagedCheckpoint
        Naming the file, the tensor and the offset.
    """
    file, end = open_file(path)
    try:
        size = int.from_bytes(read_at(file, 0, 8, "length of the header").tobytes(), "little")
        if size > min(_MOST_HEADER_BYTES, end - 8):
            raise DamagedCheckpoint(
                f"header at byte 8 of {path} must be at most {min(_MOST_HEADER_BYTES, end - 8)} "
                f"bytes, not {size}; this is no safetensors file, or it is truncated")
        try:
            header = json.loads(read_at(file, 8, size, "header").tobytes())
        except (ValueError, RecursionError) as error:
            raise DamagedCheckpoint(f"header at byte 8 of {path} must be JSON, but: {error}"
                                    ) from error
        if not isinstance(header, dict):
            raise DamagedCheckpoint(f"header at byte 8 of {path} must be a JSON object, not a "
                                    f"{type(header).__name__}")
        metadata = header.pop("__metadata__", {})
        tensors = {name: _tensor(file, name, entry, 8 + size, end)
                   for name, entry in header.items()}
        return file, tensors, metadata if isinstance(metadata, dict) else {}
    except BaseException:
        file.close()
        raise


def _whole(values: Any) -> list[int] | None:
    """Return a list of whole numbers, None if it is none."""
    good = isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)
    return values if good else None


def _tensor(file: BinaryIO, name: str, entry: Any, start: int, end: int) -> StoredTensor:
    """Return a tensor of the header."""
    fields = entry if isinstance(entry, dict) else {}
    dtype = fields.get("dtype")
    shape, offsets = _whole(fields.get("shape")), _whole(fields.get("data_offsets"))
    if not isinstance(dtype, str) or shape is None or offsets is None or len(offsets) != 2:
        raise DamagedCheckpoint(
            f"tensor {name!r} in the header of {file.name} must have a dtype, a shape and two "
            f"data_offsets, not {str(entry)[:200]}")
    first, last = (start + offset for offset in offsets)
    if not first <= last <= end:
        raise DamagedCheckpoint(
            f"tensor {name!r} must lie between byte {start} and the end of {file.name}, {end}, not "
            f"from {first} to {last}; the file is truncated or damaged")
    if dtype in _BITS and (last - first) * 8 != math.prod(shape) * _BITS[dtype]:
        raise DamagedCheckpoint(
            f"tensor {name!r} at byte {first} of {file.name} must have "
            f"{math.prod(shape) * _BITS[dtype] / 8:.0f} bytes for {dtype} {shape}, not "
            f"{last - first}")
    return StoredTensor(name, dtype, tuple(shape), file, first, last - first)
