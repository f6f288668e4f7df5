"""Weights as they are in memory now, decoded once."""

from __future__ import annotations

from collections import OrderedDict

from moeaccel.formats import QuantisedMatrix
from moeaccel.golden.experts import Weights
from moeaccel.host.transports.golden.expert_table import Entry
from moeaccel.host.transports.golden.memory_port import MemoryPort
from moeaccel.image import Expert, Section, unpack_section

_Matrices = tuple[QuantisedMatrix, ...]


class Images:
    """Decodes images, and keeps what it has decoded as long as memory does not change.

    Parameters
    ----------
    port : :class:`MemoryPort`
    cache_bytes : :class:`int`
        Of decoded weights that are kept.
    """

    def __init__(self, port: MemoryPort, cache_bytes: int) -> None:
        self._port = port
        self._most = cache_bytes
        self._cache: OrderedDict[tuple[int, tuple[Section, ...], int],
                                 tuple[int, _Matrices, int]] = OrderedDict()

    def clear(self) -> None:
        """Forget all."""
        self._cache.clear()

    def weights(self, entry: Entry) -> Weights:
        """Return what an entry's image holds."""
        matrices = self._matrices(entry)
        if len(matrices) == 1:
            return matrices[0]
        gate_up, down = matrices
        return Expert(gate_up, down, entry.activation, entry.limit, entry.gate_limit)

    def _matrices(self, entry: Entry) -> _Matrices:
        channels = self._port.channels
        address, sections = entry.image_address, entry.sections
        version = sum(memory.version(address, entry.payload_bytes) for memory in channels)
        key = address, sections, entry.rows_of_h
        found = self._cache.get(key)
        if found is not None and found[0] == version:
            self._cache.move_to_end(key)
            return found[1]
        matrices = []
        for i, section in enumerate(sections):
            size = section.words * section.word_bytes
            words = [memory.view(address, size) for memory in channels]
            together = entry.rows_of_h if i + 1 < len(sections) else 1
            matrices.append(unpack_section(words, section, together=together))
            address += size
        size = sum(matrix.integers.nbytes for matrix in matrices)
        self._cache[key] = version, tuple(matrices), size
        self._cache.move_to_end(key)
        while len(self._cache) > 1 and self._most < sum(kept[2] for kept in self._cache.values()):
            self._cache.popitem(last=False)
        return tuple(matrices)
