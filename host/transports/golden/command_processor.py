"""The device's end of the two rings: submissions are fetched, checked, run and completed."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from moeaccel.config import AcceleratorConfig
from moeaccel.host.transports.golden.engine import Engine
from moeaccel.host.transports.golden.memory_port import Fault, MemoryPort
from moeaccel.host.transports.golden.register_file import RegisterFile
from moeaccel.host.transports.golden.route_unit import RouteUnit
from moeaccel.interface.commands import (
    COMPLETION,
    COUNT_MAX,
    ENTRY_BYTES,
    LAYER,
    RING_LOG2_MAX,
    ROUTER,
    SUBMISSION,
    ElementType,
    Field,
    Opcode,
    Status,
    bad_field,
    decode,
    encode,
    field_of,
)

logger = logging.getLogger(__name__)


class _Done(NamedTuple):
    """A command that has run and whose completion is not written yet."""

    head: int
    tail: int
    completion: dict[str, int]
    counters: dict[str, int]


@lru_cache(maxsize=256)
def _check_layer(raw: bytes, config: AcceleratorConfig) -> tuple[dict[str, int], Field | None]:
    """Return the fields of a layer descriptor, and the bad one."""
    values = decode(LAYER, raw)
    wrong = bad_field(LAYER, values, config)
    return values, wrong and wrong[0]


class CommandProcessor:
    """Runs submissions one at a time, in order, and completes each.

    Parameters
    ----------
    config : :class:`AcceleratorConfig`
    registers : :class:`RegisterFile`
    port : :class:`MemoryPort`
    engine : :class:`Engine`
    routes : :class:`RouteUnit`
    """

    def __init__(self, config: AcceleratorConfig, registers: RegisterFile, port: MemoryPort,
                 engine: Engine, routes: RouteUnit) -> None:
        self._config = config
        self._registers = registers
        self._port = port
        self._engine = engine
        self._routes = routes
        self._unwritten: _Done | None = None

    # -- rings -------------------------------------------------------------------------------------
    @property
    def _entries(self) -> int:
        return 1 << min(self._registers.get("RING_LOG2"), RING_LOG2_MAX)

    def check_rings(self) -> None:
        """Set the errors of registers that describe no rings, as long as they do."""
        registers = self._registers
        if not (registers.get("ENABLE") & 1 or self._unwritten):
            return
        if not 1 <= registers.get("RING_LOG2") <= RING_LOG2_MAX:
            registers.raise_bit("ERROR_STATUS", "ring_log2")
        for name in ("SQ_BASE", "CQ_BASE"):
            base = registers.get64(name)
            end = base + ENTRY_BYTES * self._entries
            if base % ENTRY_BYTES or end > 1 << self._config.address_bits:
                registers.raise_bit("ERROR_STATUS", name.lower())

    def reset(self) -> None:
        """Forget the command whose completion was not written."""
        self._unwritten = None

    def execute_ring(self) -> None:
        """Run submissions and write completions as long as there are some.

        An interruption at any point, by a signal's handler, leaves a device that goes on with it.
        """
        registers = self._registers
        last = self._entries - 1
        while not registers.get("ERROR_STATUS"):
            head, tail = registers.get("SQ_HEAD"), registers.get("CQ_TAIL")
            if self._unwritten is not None and self._unwritten.tail != tail:
                self._unwritten = None  # it was written, and then came an interruption
            counted = dict(registers.counters)
            try:
                if self._unwritten is None:
                    if (not registers.get("ENABLE") & 1 or head == registers.get("SQ_TAIL") & last
                            or (tail + 1) & last == registers.get("CQ_HEAD") & last):
                        break
                    completion = self._execute(registers.get64("SQ_BASE") + ENTRY_BYTES * head)
                    self._unwritten = _Done(head, tail, completion, dict(registers.counters))
                done = self._unwritten
                registers.set(SQ_HEAD=(done.head + 1) & last)
                where = registers.get64("CQ_BASE") + ENTRY_BYTES * tail
                if faults := self._port.first_faults([(where, ENTRY_BYTES)], write=True):
                    logger.debug("completion at %#x cannot be written", where)
                    registers.raise_bit(
                        "ERROR_STATUS", "completion_window" if faults[0].status == Status.WINDOW
                        else "completion_bus")
                    break
                entry = encode(COMPLETION, done.completion | {"phase": registers.phase})
                self._port.ram.write(where, np.frombuffer(entry, np.uint8))
                registers.count(commands=1, bytes_written=ENTRY_BYTES)
                registers.completed((tail + 1) & last)
            except BaseException:
                if registers.get("CQ_TAIL") == tail:
                    registers.counters = dict(
                        counted if self._unwritten is None else self._unwritten.counters)
                raise

    # -- commands ----------------------------------------------------------------------------------
    def _execute(self, address: int) -> dict[str, int]:
        """Execute the submission at an address and return its completion, but for the phase."""
        tag, cycles, status, detail, where, underflows = 0, 0, Status.OK, 0, 0, 0
        self._port.possible_faults = []
        try:
            submission = decode(SUBMISSION, self._port.load(address, ENTRY_BYTES).tobytes())
            tag = submission["tag"]
            match submission["opcode"]:
                case Opcode.NOP | Opcode.FENCE:
                    pass
                case Opcode.EXPERTS | Opcode.GEMM:
                    layer = self._check(submission)
                    result, cycles = self._engine.run(submission, layer)
                    status, detail, where = result.outcome
                    underflows = min(result.underflows, COUNT_MAX)
                case Opcode.ROUTE if self._config.router:
                    router = self._check_router(submission)
                    (status, detail, where), cycles = self._routes.run(submission, router)
                case opcode:
                    raise Fault(Status.BAD_OPCODE, detail=opcode)
        except Fault as fault:
            status, detail, where = fault.status, fault.detail, fault.address
        return {"tag": tag, "status": status, "detail": detail, "address": where, "cycles": cycles,
                "underflows": underflows}

    def _check_router(self, submission: Mapping[str, int]) -> dict[str, int]:
        """Return the router of a submission, both checked."""
        wrong = bad_field(SUBMISSION, submission, self._config)
        if wrong is not None:
            raise Fault(Status.BAD_FIELD, detail=wrong[0].word)
        router = decode(
            ROUTER, self._port.load(submission["layer_address"], ENTRY_BYTES).tobytes())
        wrong = bad_field(ROUTER, router, self._config)
        if wrong is not None:
            raise Fault(Status.BAD_ROUTER, detail=wrong[0].word)
        self._routes.check(submission, router)
        return router

    def _check(self, submission: Mapping[str, int]) -> dict[str, int]:
        """Return the layer of a submission, both checked: each by itself, then what they touch."""
        wrong = bad_field(SUBMISSION, submission, self._config)
        if wrong is not None:
            raise Fault(Status.BAD_FIELD, detail=wrong[0].word)
        raw = self._port.load(submission["layer_address"], ENTRY_BYTES).tobytes()
        layer, bad = _check_layer(raw, self._config)
        if bad is not None:
            raise Fault(Status.BAD_LAYER, detail=bad.word)
        top = 1 << self._config.address_bits
        tokens = submission["tokens"]
        pairs = 4 * tokens * submission["top_k"]
        x_bytes, y_bytes = (ElementType(submission[name]).bytes for name in ("x_type", "y_type"))
        sizes = {"x_address": x_bytes * tokens * layer["d_in"], "ids_address": pairs,
                 "weights_address": pairs, "y_address": y_bytes * tokens * layer["d_out"],
                 "workspace_address": 8 * tokens * layer["d_out"]}
        for name, size in sizes.items():
            if submission[name] + size > top:
                raise Fault(Status.BAD_FIELD, detail=field_of(SUBMISSION, name).word)
        if layer["table_address"] + ENTRY_BYTES * layer["num_experts"] > top:
            raise Fault(Status.BAD_LAYER, detail=field_of(LAYER, "table_address").word)
        return layer
