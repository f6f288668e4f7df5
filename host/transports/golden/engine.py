"""EXPERTS and GEMM: what they read, compute and write, and what is counted of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from moeaccel.arithmetic import to_bfloat16
from moeaccel.config import AcceleratorConfig
from moeaccel.golden import DeviceResult, combined
from moeaccel.host.transports.base import Bytes
from moeaccel.host.transports.golden.expert_buffer import ExpertBuffer
from moeaccel.host.transports.golden.expert_table import Entry, ExpertTable
from moeaccel.host.transports.golden.images import Images
from moeaccel.host.transports.golden.memory_port import Fault, MemoryPort
from moeaccel.host.transports.golden.register_file import RegisterFile
from moeaccel.host.transports.golden.timing import Timing
from moeaccel.interface.commands import ElementType, Opcode
from moeaccel.plan import Plan, plan

if TYPE_CHECKING:
    from moeaccel.cycles.prediction import Prediction


def _row_bytes(submission: Mapping[str, int], layer: Mapping[str, int]) -> tuple[int, int, int]:
    """Return the bytes of a row of x, of y, and of partial sums."""
    return (ElementType(submission["x_type"]).bytes * layer["d_in"],
            ElementType(submission["y_type"]).bytes * layer["d_out"], 8 * layer["d_out"])


class Engine:
    """Runs a checked command.

    Where an entry of the expert table is bad, passes of the experts before it run, sums of the last
    one leave as those of any pass, and what they moved and computed is counted.

    Parameters
    ----------
    config : :class:`AcceleratorConfig`
    registers : :class:`RegisterFile`
    port : :class:`MemoryPort`
    images : :class:`Images`
    buffer : :class:`ExpertBuffer`
    timing : :class:`Timing`, optional
        Says how long it takes.
    """

    def __init__(self, config: AcceleratorConfig, registers: RegisterFile, port: MemoryPort,
                 images: Images, buffer: ExpertBuffer, timing: Timing | None) -> None:
        self._config = config
        self._registers = registers
        self._port = port
        self._table = ExpertTable(config, registers, port)
        self._images = images
        self._buffer = buffer
        self._timing = timing

    def run(self, submission: Mapping[str, int], layer: Mapping[str, int], *, held: bool = False
            ) -> tuple[DeviceResult, Prediction | None]:
        """Run a command; return its result, and with a cycle model what that predicts.

        Parameters
        ----------
        held : :class:`bool`
            Ids and weights are those that a router has just made: nobody reads them.

        Raises
        ------
        Fault
            If it ends early. Of several faults the first in the order: ids; weights, table entries,
            images, x, rows of zeros, partial sums read, rows and partial sums written; a bad entry.
        """
        tokens, top_k = submission["tokens"], submission["top_k"]
        gemm = submission["opcode"] == Opcode.GEMM
        if submission["opcode"] == Opcode.PREFETCH:
            return self._prefetch(submission, layer)
        if gemm:
            ids = np.tile(np.arange(top_k), (tokens, 1))
            weights = np.ones((tokens, top_k), np.float32)
        else:
            ids = self._ids(submission, self._port.ram.read if held else self._port.load)
            weights = self._port.floats(submission["weights_address"], (tokens, top_k))
        num_experts = layer["num_experts"]
        slots = self._config.max_slots // layer["planes"]
        planned = plan(ids, num_experts, slots)
        entries, bad, unread = self._table.read(layer, planned)
        behind: list[Fault] = []
        if bad is not None:
            behind = self._table.faults_behind(layer, planned, bad.detail)
            planned = planned.before(bad.detail)
            ids = np.where(np.isin(ids, planned.experts), ids, -1)
        pairs = 0 if gemm or held else 4 * tokens * top_k
        self._check_streams(submission, layer, planned, entries, unread, pairs=pairs)
        buffered = self._count(submission, layer, planned, entries, pairs=pairs)
        result = self._compute(submission, layer, planned, entries, ids, weights)
        self._registers.count(overflows=result.overflows, underflows=result.underflows)
        if bad is not None:
            self._port.raise_first([bad], behind)
        narrow = submission["y_type"] == ElementType.BFLOAT16
        y = to_bfloat16(result.y) if narrow else np.ascontiguousarray(result.y)
        self._port.ram.write(submission["y_address"], y.view(np.uint8).reshape(-1))
        if self._timing is None:
            return result, None
        return result, self._timing.predict(
            submission, layer, entries, ids, held=held, buffered=buffered)

    @staticmethod
    def _ids(submission: Mapping[str, int], load: Callable[[int, int], Bytes]
             ) -> NDArray[np.int64]:
        """Return the ids of a command."""
        shape = submission["tokens"], submission["top_k"]
        raw = load(submission["ids_address"], 4 * shape[0] * shape[1])
        return raw.view("<i4").reshape(shape).astype(np.int64)

    def _prefetch(self, submission: Mapping[str, int], layer: Mapping[str, int]
                  ) -> tuple[DeviceResult, Prediction | None]:
        """Run PREFETCH: like EXPERTS, but that images go to the buffer and no further.

        Experts before a bad entry are brought.
        """
        ids = self._ids(submission, self._port.load)
        planned = plan(ids, layer["num_experts"], self._config.max_slots // layer["planes"])
        entries, bad, unread = self._table.read(layer, planned)
        behind: list[Fault] = []
        if bad is not None:
            behind = self._table.faults_behind(layer, planned, bad.detail)
        images = [(entry.image_address, entry.payload_bytes) for entry in entries.values()]
        buffered, loads = [], []
        for image in images:
            buffered.append(self._buffer.has(*image))
            loads.append(self._buffer.load(*image))
        self._port.raise_first(unread, self._port.first_faults(
            (address + held, moved) for (address, _), held, moved
            in zip(images, buffered, loads, strict=True) if moved))
        if bad is not None:
            self._port.raise_first([bad], behind)
        result = DeviceResult(np.zeros((0, layer["d_out"]), np.float32), [], [], 0, 0)
        if self._timing is None:
            return result, None
        return result, self._timing.predict(
            submission, layer, entries, ids, buffered=buffered, loads=loads)

    def _compute(self, submission: Mapping[str, int], layer: Mapping[str, int], planned: Plan,
                 entries: Mapping[int, Entry], ids: NDArray[np.int64],
                 weights: NDArray[np.float32]) -> DeviceResult:
        tokens, d_out = submission["tokens"], layer["d_out"]
        y_type = ElementType(submission["y_type"])
        if not planned.passes:
            return DeviceResult(np.zeros((tokens, d_out), np.float32), [], [], 0, 0)
        x = self._port.floats(submission["x_address"], (tokens, layer["d_in"]),
                              ElementType(submission["x_type"]))
        return combined(
            x, ids, weights, lambda expert: self._images.weights(entries[expert]),
            num_experts=layer["num_experts"], d_out=d_out, planes=layer["planes"],
            grid_exponent=layer["grid_exponent"], y_type=y_type)

    def _check_streams(self, submission: Mapping[str, int], layer: Mapping[str, int],
                       planned: Plan, entries: Mapping[int, Entry], unread: list[Fault], *,
                       pairs: int) -> None:
        """End the command if something that it touches is outside window or memory; ``pairs``:
        bytes of its weights."""
        x, y, workspace = (submission[f"{name}_address"] for name in ("x", "y", "workspace"))
        x_row, y_row, sums_row = _row_bytes(submission, layer)
        faults = self._port.first_faults
        self._port.raise_first(
            faults([(submission["weights_address"], pairs)] if pairs else []),
            unread,
            faults(self._unbuffered(entries[e]) for e in planned.experts),
            faults((x + x_row * token, x_row) for token in planned.loads),
            faults(((y + y_row * token, y_row) for token in planned.zeros), write=True),
            faults((workspace + sums_row * row.token, sums_row)
                   for row in planned.rows if not row.first),
            faults(((y + y_row * row.token, y_row) if row.last
                    else (workspace + sums_row * row.token, sums_row)
                    for row in planned.rows), write=True))

    def _unbuffered(self, entry: Entry) -> tuple[int, int]:
        """Return address and bytes of what memory brings of an image."""
        held = self._buffer.has(entry.image_address, entry.payload_bytes)
        return entry.image_address + held, entry.payload_bytes - held

    def _count(self, submission: Mapping[str, int], layer: Mapping[str, int], planned: Plan,
               entries: Mapping[int, Entry], *, pairs: int) -> list[int]:
        """Count what a command moves and computes, and return the bytes of each pass that the
        buffer has; ``pairs``: bytes of its weights."""
        rows = planned.rows
        x_row, y_row, sums_row = _row_bytes(submission, layer)
        beats = self._port.beats
        images = [entries[now.expert] for now in planned.passes]
        buffered = [self._buffer.use(one.image_address, one.payload_bytes) for one in images]
        self._registers.count(
            bytes_read_weights=self._config.channels * sum(
                beats(one.payload_bytes) - held
                for one, held in zip(images, buffered, strict=True)),
            bytes_read_other=beats(pairs) + x_row * len(planned.loads)
                             + sums_row * sum(not row.first for row in rows),
            bytes_written=y_row * len(planned.zeros)
                          + sum(y_row if row.last else sums_row for row in rows),
            expert_passes=len(planned.passes), assignments=planned.pairs)
        return buffered
