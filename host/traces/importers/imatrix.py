"""Counts in importance matrices of llama.cpp."""

from __future__ import annotations

import os
import re
import struct

import numpy as np

from moeaccel.host.traces.errors import ForeignTrace, InvalidTrace, TornTrace
from moeaccel.host.traces.files import read_bytes
from moeaccel.host.traces.popularity import PopularityProfile

__all__ = ["import_imatrix"]

_COUNTS = re.compile(r"blk\.(\d+)\.ffn_(?:gate|up|gate_up|down)_exps\.weight\.counts")
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q",
            12: "d"}
_STRING, _ARRAY, _F32 = 8, 9, 0


def import_imatrix(path: str | os.PathLike[str], *, model: str = "unknown") -> PopularityProfile:
    """Read how often each expert was used, from the GGUF file of ``llama-imatrix``.

    It gives counts and nothing else: a profile, not a trace. For every matrix product over chosen
    experts the tool keeps ``blk.N.ffn_*_exps.weight.counts``, float32 (experts, 1), the tokens that
    each expert had (``tools/imatrix/imatrix.cpp`` of llama.cpp, from which this was written). The
    older ``.dat`` format has one number of calls a tensor, so that nothing can be read from it:
    write GGUF with ``--output-format gguf``.

    Raises
    ------
    TornTrace
        If the file is cut off or damaged.
    ForeignTrace
        If it is no GGUF, or has no counts of experts.
    """
    data = read_bytes(path)
    if data[:4] != b"GGUF":
        raise ForeignTrace(f"{path} must be GGUF, by its first four bytes, not {data[:4]!r}; "
                           "run llama-imatrix with --output-format gguf")
    try:
        tensors = _Reader(data).f32_tensors(_COUNTS)
    except (struct.error, ValueError, KeyError, IndexError, OverflowError, MemoryError) as error:
        raise TornTrace(f"{path} must be a whole GGUF file: {error!r}") from error
    layers: dict[int, np.ndarray] = {}
    for name, counts in tensors.items():
        found = _COUNTS.fullmatch(name)
        assert found is not None
        if counts.size > 1:
            layers.setdefault(int(found[1]), counts)
    if not layers:
        raise ForeignTrace(f"{path} must have tensors blk.N.ffn_*_exps.weight.counts with a count "
                           "an expert; it is no importance matrix of an MoE model")
    if len({counts.size for counts in layers.values()}) != 1:
        raise ForeignTrace(f"{path} must have as many experts in every layer, not "
                           f"{sorted({counts.size for counts in layers.values()})}")
    numbers = sorted(layers)
    counts = np.stack([layers[layer] for layer in numbers])
    if not np.isfinite(counts).all():
        raise TornTrace(f"{path}: counts must be finite")
    try:
        return PopularityProfile(counts=np.rint(counts), layers=tuple(numbers), model=model,
                                 source=f"llama.cpp imatrix, {os.fspath(path)}")
    except InvalidTrace as error:
        raise TornTrace(f"{path} must hold counts, but: {error}") from error


class _Reader:
    """Just enough of GGUF 2 and 3: skip the key-values, find tensors by name."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 4

    def f32_tensors(self, pattern: re.Pattern[str]) -> dict[str, np.ndarray]:
        version, n_tensors, n_values = self._unpack("IQQ")
        if version not in (2, 3):
            raise ValueError(f"version must be 2 or 3, not {version}")
        alignment = 32
        for _ in range(n_values):
            key, kind = self._string(), self._unpack("I")[0]
            value = self._value(kind)
            if key == "general.alignment":
                alignment = int(value or 0)
        wanted = []
        for _ in range(n_tensors):
            name, n_dims = self._string(), self._unpack("I")[0]
            dims = self._unpack("Q" * min(n_dims, 8))
            kind, offset = self._unpack("IQ")
            if pattern.fullmatch(name):
                if kind != _F32:
                    raise ValueError(f"{name} must be float32, not GGML type {kind}")
                wanted.append((name, int(np.prod(dims, dtype=object)), offset))
        start = -(-self._at // alignment) * alignment
        return {name: np.frombuffer(self._data, "<f4", size, start + offset)
                for name, size, offset in wanted}

    def _unpack(self, layout: str) -> tuple[int, ...]:
        values = struct.unpack_from("<" + layout, self._data, self._at)
        self._at += struct.calcsize("<" + layout)
        return values

    def _string(self) -> str:
        (length,) = self._unpack("Q")
        text = self._data[self._at : self._at + length]
        if len(text) != length:
            raise ValueError(f"a text of {length} bytes ends behind the file")
        self._at += length
        return text.decode("utf-8")

    def _value(self, kind: int) -> float | None:
        if kind == _STRING:
            self._string()
            return None
        if kind == _ARRAY:
            inner, count = self._unpack("IQ")
            if inner in _SCALARS:
                self._at += count * struct.calcsize("<" + _SCALARS[inner])
            else:
                for _ in range(count):
                    self._value(inner)
            return None
        return self._unpack(_SCALARS[kind])[0]
