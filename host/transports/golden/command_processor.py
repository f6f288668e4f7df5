"""The device's end of the two rings: submissions are fetched, checked, run and completed."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from moeaccel.config import AcceleratorConfig
from moeaccel.golden import DeviceResult
from moeaccel.golden.router import RoutedTokens
from moeaccel.host.transports.golden.checks import check_descriptor, check_layer
from moeaccel.host.transports.golden.engine import Engine
from moeaccel.host.transports.golden.expert_buffer import ExpertBuffer
from moeaccel.host.transports.golden.memory_port import Fault, MemoryPort
from moeaccel.host.transports.golden.moe import Moe, MoeResult
from moeaccel.host.transports.golden.register_file import RegisterFile
from moeaccel.host.transports.golden.route_unit import RouteUnit
from moeaccel.host.transports.golden.timing import Timing
from moeaccel.interface.commands import (
    COMPLETION,
    COUNT_MAX,
    ENTRY_BYTES,
    MOE_OPCODES,
    OPCODES_ALONE,
    RING_LOG2_MAX,
    SUBMISSION,
    Opcode,
    Status,
    bad_field,
    decode,
    encode,
    opcodes,
)

if TYPE_CHECKING:
    from moeaccel.cycles.prediction import Prediction

logger = logging.getLogger(__name__)


class _Done(NamedTuple):
    """A command that has run and whose completion is not written yet."""

    head: int
    tail: int
    completion: dict[str, int]
    counters: dict[str, int]


class CommandProcessor:
    """Runs submissions one at a time, in order, and completes each.

    Parameters
    ----------
    config : :class:`AcceleratorConfig`
    registers : :class:`RegisterFile`
    port : :class:`MemoryPort`
    engine : :class:`Engine`
    routes : :class:`RouteUnit`
    buffer : :class:`ExpertBuffer`
    timing : :class:`Timing`, optional
        Says how long commands take.
    """

    def __init__(self, config: AcceleratorConfig, registers: RegisterFile, port: MemoryPort,
                 engine: Engine, routes: RouteUnit, buffer: ExpertBuffer,
                 timing: Timing | None) -> None:
        self._config = config
        self._registers = registers
        self._port = port
        self._engine = engine
        self._routes = routes
        self._buffer = buffer
        self._moe = Moe(config, port, engine, routes, timing)
        self._timing = timing
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
        """Forget the command whose completion was not written, and what the buffer holds."""
        self._unwritten = None
        self._buffer.reset()

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
            counted, held = dict(registers.counters), self._buffer.snapshot()
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
                    if self._unwritten is None:  # it runs again, from its beginning
                        self._buffer.restore(held)
                raise

    # -- commands ----------------------------------------------------------------------------------
    def _execute(self, address: int) -> dict[str, int]:
        """Execute the submission at an address and return its completion, but for the phase."""
        tag, tokens, cycles, status, detail, where, underflows = 0, 0, 0, Status.OK, 0, 0, 0
        opcode = int(Opcode.NOP)
        self._port.possible_faults = []
        before = dict(self._registers.counters)
        try:
            submission = decode(SUBMISSION, self._port.load(address, ENTRY_BYTES).tobytes())
            tag, tokens, opcode = (submission[name] for name in ("tag", "tokens", "opcode"))
            if opcode not in opcodes(self._config):
                raise Fault(Status.BAD_OPCODE, detail=opcode)
            if opcode == Opcode.FORGET:
                self._buffer.forget()
            if opcode not in OPCODES_ALONE:
                wrong = bad_field(SUBMISSION, submission, self._config)
                if wrong is not None:
                    raise Fault(Status.BAD_FIELD, detail=wrong[0].word)
                result, predicted = self._run(submission)
                status, detail, where = result.outcome
                if opcode != Opcode.PREFETCH:
                    self._registers.count(tokens=tokens)
                if not isinstance(result, RoutedTokens):
                    underflows = min(result.underflows, COUNT_MAX)
                if self._timing is not None and predicted is not None:
                    cycles = self._timing.count(predicted)
        except Fault as fault:
            status, detail, where = fault.status, fault.detail, fault.address
            if status is Status.BAD_EXPERT and opcode != Opcode.PREFETCH:  # it has run so far
                self._registers.count(tokens=tokens)
            if status in (Status.WINDOW, Status.BUS_ERROR):
                for name in ("overflows", "underflows"):  # numbers of its parts mean nothing
                    self._registers.counters[name] = before[name]
                self._buffer.forget()  # what it holds may be none of memory's
        return {"tag": tag, "status": status, "detail": detail, "address": where, "cycles": cycles,
                "underflows": underflows}

    def _run(self, submission: Mapping[str, int]
             ) -> tuple[DeviceResult | RoutedTokens | MoeResult, Prediction | None]:
        """Run a submission whose own fields are good."""
        if submission["opcode"] in MOE_OPCODES:
            return self._moe.run(submission, self._moe.check(submission))
        routes = submission["opcode"] == Opcode.ROUTE
        where = submission["layer_address"]
        raw = self._port.load(where, ENTRY_BYTES).tobytes()
        try:
            layer = check_descriptor(
                Status.BAD_ROUTER if routes else Status.BAD_LAYER, raw, self._config)
            if routes:
                self._routes.check(submission, layer)
            else:
                check_layer(submission, layer, self._config)
        except Fault as fault:
            if fault.status is not Status.BAD_FIELD:
                fault.address = where
            raise
        return (self._routes if routes else self._engine).run(submission, layer)
