"""Entries of expert tables: read for the experts that have tokens, and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from moeaccel.activations import ACTIVATIONS
from moeaccel.config import AcceleratorConfig
from moeaccel.formats import ALL_FORMATS
from moeaccel.host.transports.golden.memory_port import Fault, MemoryPort
from moeaccel.host.transports.golden.register_file import RegisterFile
from moeaccel.image import Section
from moeaccel.interface.commands import (
    ENTRY_BYTES,
    EXPERT,
    Sink,
    Status,
    bad_field,
    decode,
    field_of,
)
from moeaccel.plan import Plan

AHEAD = 17
"""Entries that hardware may have asked for behind the one that it hands out: 16, and one that is
checked."""


_ROWS_OF_H: dict[int, int] = {
    Sink.ACTIVATION: 2, Sink.ACTIVATION_ROWS: 1, Sink.ACTIVATION_PRODUCT: 4}
"""Rows of an element of h."""


@dataclass(frozen=True)
class Entry:
    """A checked entry.

    Parameters
    ----------
    image_address : :class:`int`
    sections : tuple of :class:`Section`
        Two of an expert; one of a matrix.
    activation, rows_of_h, limit, gate_limit
        Of an expert, as in :class:`moeaccel.image.ExpertShape`.
    """

    image_address: int
    sections: tuple[Section, ...]
    activation: str
    rows_of_h: int
    limit: float | None
    gate_limit: float | None

    @property
    def payload_bytes(self) -> int:
        """Bytes of the image, without its header, on each channel."""
        return sum(section.words * section.word_bytes for section in self.sections)


@lru_cache(maxsize=1 << 12)
def check_entry(raw: bytes, d_in: int, d_out: int, config: AcceleratorConfig) -> Entry | int:
    """Return an entry, or the 32-bit word of what is wrong with it.

    First of all the fields, each by itself, in the order of their words; then the image, which must
    end within the address space; then the words of each section, which must be those of
    :class:`Section`.
    """
    values = decode(EXPERT, raw)
    wrong = bad_field(EXPERT, values, config)
    if wrong is not None:
        return wrong[0].word
    sections = sections_of(values, d_in, d_out, config)
    activation = next((a.name for a in ACTIVATIONS.values() if a.code == values["activation"]), "")
    limits = (_number(values["limit"] << 16), _number(values["gate_limit"]))
    entry = Entry(
        values["image_address"], sections, activation, _ROWS_OF_H.get(values["sink0"], 1), *limits)
    if entry.image_address + entry.payload_bytes > 1 << config.address_bits:
        return field_of(EXPERT, "image_address").word
    for i, section in enumerate(sections):
        if values[f"words{i}"] != section.words:
            return field_of(EXPERT, f"words{i}").word
    return entry


def sections_of(values: Mapping[str, int], d_in: int, d_out: int, config: AcceleratorConfig
                ) -> tuple[Section, ...]:
    """Return the sections of an entry whose fields are good."""
    formats = {f.code: f for f in ALL_FORMATS.values()}
    d_expert = values["d_expert"]
    shapes = [(d_out, d_in)]
    if values["sections"] > 1:
        shapes = [(_ROWS_OF_H[values["sink0"]] * d_expert, d_in), (d_out, d_expert)]
    return tuple(
        Section(formats[values[f"format{i}"]], rows, k, config.row_multipliers, config.channels,
                bool(values[f"bias{i}"]))
        for i, (rows, k) in enumerate(shapes))


def _number(bits: int) -> float | None:
    """Return a limit; None where it is 0 or subnormal."""
    return float(np.uint32(bits).view(np.float32)) if bits >> 23 else None


class ExpertTable:
    """Reads entries.

    Hardware reads entries ahead of the passes, up to AHEAD, so that how many it has read behind a
    bad one depends on time. Here those up to the bad one are counted; :meth:`faults_behind` says
    what hardware may have met behind it.

    Parameters
    ----------
    config : :class:`AcceleratorConfig`
    registers : :class:`RegisterFile`
    port : :class:`MemoryPort`
    """

    def __init__(self, config: AcceleratorConfig, registers: RegisterFile, port: MemoryPort
                 ) -> None:
        self._config = config
        self._registers = registers
        self._port = port

    def read(self, layer: Mapping[str, int], plan: Plan
             ) -> tuple[dict[int, Entry], Fault | None, list[Fault]]:
        """Return the entries of a command's experts, the bad one that ends it, and the faults of
        reading them.

        An entry that cannot be read is bad: reads outside the window give zeros.
        """
        entries: dict[int, Entry] = {}
        for expert in plan.experts:
            address = layer["table_address"] + ENTRY_BYTES * expert
            faults = self._port.first_faults([(address, ENTRY_BYTES)])
            raw = bytes(ENTRY_BYTES)
            if not faults:
                raw = self._port.ram.read(address, ENTRY_BYTES).tobytes()
                self._registers.count(bytes_read_other=ENTRY_BYTES)
            found = check_entry(raw, layer["d_in"], layer["d_out"], self._config)
            if isinstance(found, int):
                return entries, Fault(Status.BAD_EXPERT, detail=expert, address=found), faults
            entries[expert] = found
        return entries, None, []

    def faults_behind(self, layer: Mapping[str, int], plan: Plan, bad: int) -> list[Fault]:
        """Return the faults of entries that may have been read ahead when that of ``bad`` came."""
        behind = plan.experts[plan.experts.index(bad) + 1:][:AHEAD]
        return self._port.first_faults(
            (layer["table_address"] + ENTRY_BYTES * expert, ENTRY_BYTES) for expert in behind)
