"""Reading and writing the files of this package: safetensors, with what they are in the header."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from moeaccel.errors import OutputError
from moeaccel.files import whole_file
from moeaccel.host.traces.errors import ForeignTrace, TornTrace

__all__ = ["read_bytes", "read_tensors", "read_text", "take", "write_tensors"]


def write_tensors(path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray],
                  metadata: Mapping[str, str]) -> None:
    """Write a file as a whole or not at all.

    Raises
    ------
    TornTrace
        If it cannot be written.
    """
    from safetensors.numpy import save

    path = Path(path)
    try:
        with whole_file(path) as part:
            part.write_bytes(save({name: np.ascontiguousarray(tensor)
                                   for name, tensor in tensors.items()}, dict(metadata)))
    except OSError as error:
        why = str(error) if isinstance(error, OutputError) else error.strerror or str(error)
        raise TornTrace(f"{path} must be a place that can be written: {why}") from error


def read_tensors(path: str | os.PathLike[str], *, kind: str,
                 version: str) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """Read a file of one kind: its header's texts and its tensors. Nothing in it is executed.

    Raises
    ------
    TornTrace
        If the file cannot be read, or is no whole safetensors file.
    ForeignTrace
        If it is a safetensors file of another kind or version.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except OSError as error:
        raise TornTrace(f"{path} must be a file that can be read: {error}") from error
    except (SafetensorError, TypeError, ValueError) as error:
        raise TornTrace(f"{path} must be a whole safetensors file, but it is cut off, damaged or "
                        f"of another kind ({error})") from error
    found = metadata.get("format", "nothing")
    if found != kind:
        raise ForeignTrace(f"{path} must hold {kind!r} by its header's \"format\", not {found!r}")
    if metadata.get("version") != version:
        raise ForeignTrace(f"{path} must be of version {version}, not {metadata.get('version')}; "
                           "read it with the release that wrote it")
    return metadata, tensors


def take(path: str | os.PathLike[str], tensors: dict[str, np.ndarray], name: str, *,
         shape: tuple[int | None, ...], kinds: str) -> np.ndarray:
    """Return one tensor of a file.

    Parameters
    ----------
    path, tensors
        As :func:`read_tensors` got and gave them.
    name : :class:`str`
    shape : :class:`tuple` of :class:`int`, optional
        None where any size will do.
    kinds : :class:`str`
        Names of NumPy types, parted by spaces.

    Raises
    ------
    TornTrace
        If there is no such tensor.
    """
    sizes = ", ".join("*" if size is None else str(size) for size in shape)
    expected = f"{' or '.join(kinds.split())} ({sizes})"
    tensor = tensors.get(name)
    if tensor is None:
        raise TornTrace(f"{path} must hold tensor {name!r}, {expected}; "
                        f"it has {', '.join(sorted(tensors)) or 'none'}")
    if (tensor.dtype.name not in kinds.split() or tensor.ndim != len(shape)
            or any(size not in (None, found)
                   for size, found in zip(shape, tensor.shape, strict=True))):
        raise TornTrace(f"{path}: tensor {name!r} must be {expected}, "
                        f"not {tensor.dtype.name} {tensor.shape}")
    return tensor


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """Return the bytes of a file.

    Raises
    ------
    TornTrace
        If it cannot be read.
    """
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise TornTrace(f"{path} must be a file that can be read: {error}") from error


def read_text(path: str | os.PathLike[str]) -> str:
    """Return the text of a UTF-8 file.

    Raises
    ------
    TornTrace
        If it cannot be read, or is no UTF-8.
    """
    try:
        return read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise TornTrace(f"{path} must be UTF-8 text: {error}") from error
