"""Fetch, check, run and complete commands: the device's end of the two rings."""

import functools
import operator

from amaranth import *
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from moeaccel.config import BLOCK, AcceleratorConfig
from moeaccel.hdl import layouts
from moeaccel.hdl.control.command_wires import (
    ALIGNMENT_BITS,
    DRAIN_CYCLES,
    FETCHING,
    RESTING,
    State,
    Wires,
)
from moeaccel.hdl.control.field_checks import FieldChecks
from moeaccel.hdl.control.job_sizes import JobSizes
from moeaccel.hdl.control.rings import Rings
from moeaccel.hdl.layouts import ReadClientSignature, WriteClientSignature, entry_fields, job
from moeaccel.hdl.router.router_checks import RouterChecks, router_fields, table_units
from moeaccel.interface.commands import (
    COMPLETION,
    ENTRY_BYTES,
    LAYER,
    MOE_BLOCK,
    MOE_OPCODES,
    MOE_PLANES,
    ROUTER,
    SUBMISSION,
    ElementType,
    Opcode,
    Status,
    field_of,
    opcodes,
)

__all__ = ["CommandProcessor"]

_PRODUCT, _ROUTE, _EXPERTS = range(len(MOE_BLOCK))
"""Parts of a MOE."""


class CommandProcessor(wiring.Component):
    """Run submissions one at a time, in order, and complete each.

    ::

        registers --> Rings --> reader --> [64-byte entry] --> FieldChecks --> JobSizes --> o_job
        o_irq <-- writer done <-- writer <-- [completion] <--- status <--- faults, i_done

    A submission is fetched while ``enable`` is 1, ``error`` is 0, the registers of the rings are
    good, the submission ring is not empty and the completion ring has room. Opcode and fields are
    checked against the texts of ``moeaccel.interface.commands`` and the limits of ``config``; for
    EXPERTS and GEMM the layer descriptor, for ROUTE that of a router, is fetched and checked too,
    then that everything ends within the address space, and the job is offered on ``o_job``. After
    the engine's ``i_done``, which comes when its last write is acknowledged, the completion is
    written; when that is acknowledged, ``cq_tail`` advances and ``o_irq`` pulses. The submission's
    fields come before the layer's, and those before what only both together say; of each the lowest
    bad word is reported. Addresses are checked in every command that has a job, whether they are
    used or not. Fields of NOP and FENCE other than the opcode are ignored.

    MOE: the three descriptors are read at once and checked one after the other, each with the sizes
    of its own job; then their jobs run, of which the second and the third ``continues`` what the
    first one has counted. The second is handed over while the first one runs, and ``i_done`` is
    that of both; the third when they are done. Logits are where the partial sums of their
    product are: when a row of these is written, that of the token at half its index has been read.

    Statuses, the first that holds: ABORTED or WATCHDOG; WINDOW, BUS_ERROR (``fault_*``, cleared
    when a command starts); BAD_OPCODE, BAD_FIELD, BAD_LAYER, BAD_ROUTER; BAD_EXPERT; NONFINITE;
    OVERFLOW; OK.

    Where the completion itself was outside the window, or memory refused it, nothing says that the
    command has completed: ``o_error`` pulses, and when ``error`` is 0 again (the host has mended
    what was wrong) it is written once more.

    ``i_abort``, or WATCHDOG cycles without ``progress``, ends the running command:
    ``o_engine_reset`` and ``flush`` are held for DRAIN_CYCLES and until the port is ``idle``, then
    the completion is written. It is ignored between commands and once the completion is being
    written; if it comes while the submission itself is fetched, that is waited for, as its tag is
    needed; a check under way is finished. ``i_soft_reset`` does the same at any time, without a
    completion; then the ring indices are 0 and ``o_reset_done`` pulses. While memory does not
    answer, ``draining`` is 1.

    Latency, without waiting for memory or engine: a submission is requested 2 cycles after its
    doorbell shows. From the last beat of a submission it is 5 cycles to the request of the layer;
    from the last beat of the layer 5 cycles, plus the bits of the largest of steps_in, steps_out
    and top_k, to ``o_job``; from ``i_done`` 2 cycles to
    the request of the completion's write; from its ``done`` 1 cycle to ``o_irq``. Reset: idle,
    indices 0, phase 1.

    Parameters
    ----------
    config : :class:`AcceleratorConfig`
        Limits, widths, format constants.

    Members
    -------
    reader : :py:`Out(ReadClientSignature(config))`
    writer : :py:`Out(WriteClientSignature(config))`
    o_job : :py:`Out(stream.Signature(job(config)))`
    i_done, i_result : :py:`In(1)`, :py:`In(layouts.job_result(config))`
        ``i_done`` pulses at the end of a job; the result is valid with it. Only counts without
        ``o_engine_reset``.
    o_engine_reset : :py:`Out(1)`
        Resets everything behind ``o_job``, streams to the port included. A register, 1 after reset.
    progress : :py:`In(1)`
        Something moved: a beat of the port, a step of the array or of the router.
    flush, clear_faults : :py:`Out(1)`
    idle, fault_window, fault_bus, fault_address : :py:`In`
        Of MemoryPort, under its names.
    enable, sq_base, cq_base, ring_log2, sq_tail, cq_head, watchdog : :py:`In`
        Of the registers with these names.
    error : :py:`In(1)`
        A bit of ERROR_STATUS is 1. Follows ``o_error`` within DRAIN_CYCLES.
    i_abort, i_soft_reset : :py:`In(1)`
        Pulses of CONTROL.
    sq_head, cq_tail : :py:`Out(32)`
        Registers. Indices are taken modulo the ring's entries.
    busy, draining : :py:`Out(1)`
        Fields of STATUS.
    o_error : :py:`Out(5)`
        Set the bits of ERROR_STATUS, in their order.
    o_irq, o_reset_done : :py:`Out(1)`
        Set IRQ_STATUS completion and reset_done; the latter also clears counters and doorbells.
    o_forget : :py:`Out(1)`
        With an expert buffer, a pulse: what it holds may not be what memory has, or is not wanted.
    count_commands, count_tokens, count_overflows, count_underflows : :py:`Out`
        For Counters, one cycle each: a completion has been written; tokens, overflows and
        underflows of a command that was not ended, by an abort, say, and met no fault of memory.
    """

    def __init__(self, config):
        if not isinstance(config, AcceleratorConfig):
            raise TypeError(f"config must be an AcceleratorConfig, not {config!r}")
        self._config = config
        super().__init__({
            "reader": Out(ReadClientSignature(config)),
            "writer": Out(WriteClientSignature(config)),
            "o_job": Out(stream.Signature(job(config))),
            "i_done": In(1),
            "i_result": In(layouts.job_result(config)),
            "o_engine_reset": Out(1, init=1),
            "progress": In(1),
            "flush": Out(1),
            "clear_faults": Out(1),
            "idle": In(1),
            "fault_window": In(1),
            "fault_bus": In(1),
            "fault_address": In(config.device_address_bits),
            "enable": In(1),
            "sq_base": In(64),
            "cq_base": In(64),
            "ring_log2": In(32),
            "sq_tail": In(32),
            "cq_head": In(32),
            "watchdog": In(32),
            "error": In(1),
            "i_abort": In(1),
            "i_soft_reset": In(1),
            "sq_head": Out(32),
            "cq_tail": Out(32),
            "busy": Out(1),
            "draining": Out(1),
            "o_error": Out(5),
            "o_irq": Out(1),
            "o_reset_done": Out(1),
            **({"o_forget": Out(1)} if config.buffer_slots else {}),
            "count_commands": Out(1),
            "count_tokens": Out(config.max_tokens.bit_length()),
            "count_overflows": Out(layouts.output_count_bits(config)),
            "count_underflows": Out(layouts.output_count_bits(config)),
        })

    def elaborate(self, platform):
        m = Module()
        wires = Wires(self._config)
        m.submodules.rings = rings = Rings(self._config)
        self._begin(m, wires, rings)
        self._fetch(m, wires, rings)
        self._check(m, wires)
        self._run(m, wires)
        self._report(m, wires, rings)
        self._complete(m, wires, rings)
        m.d.sync += wires.state.eq(functools.reduce(operator.or_, wires.following.values()))
        self._interrupt(m, wires, rings)
        return m

    def _begin(self, m, w, rings):
        """Wait until the rings have a submission and room for its completion."""
        ready = Signal()
        m.d.comb += [
            getattr(rings, name).eq(getattr(self, name)) for name in (
                "enable", "sq_base", "cq_base", "ring_log2", "sq_tail", "cq_head")]
        m.d.comb += [self.sq_head.eq(rings.sq_head), self.cq_tail.eq(rings.cq_tail)]
        m.d.sync += [
            # Before IDLE the indices may be those of the last command; in the cycle of o_reset_done
            # the doorbells still hold what they held.
            ready.eq(w.at(State.IDLE) & rings.o_waiting & ~self.error & ~self.o_reset_done),
            w.bad_rings.eq(rings.o_bad.any()),
            w.cycles.eq(w.cycles + 1),
            self.o_error.eq(Mux(self.enable | self.busy, rings.o_bad, 0)),
            self.clear_faults.eq(0),
        ]
        with w.only(m, State.IDLE) as go:
            m.d.sync += [
                w.is_layer.eq(0),
                w.ran.eq(0),
                w.measured.eq(0),
                w.again.eq(0),
                w.stopping.eq(0),
                w.checked.eq(0),
                w.of_logits.eq(0),
                w.cycles.eq(0),
                w.fetch_address.eq(rings.o_submission),
            ]
            with m.If(ready):
                m.d.comb += go(State.REQUEST)
                m.d.sync += self.clear_faults.eq(1)

    def _fetch(self, m, w, rings):
        """Read the submission, or the layer, and keep what of it the job needs."""
        beat_bits = 8 * self._config.port_bytes
        beats = 8 * ENTRY_BYTES // beat_bits
        submission, layer = entry_fields(SUBMISSION, w.front), entry_fields(LAYER, w.front)
        block = w.moe & w.is_layer
        m.d.comb += [
            self.reader.request.payload.address.eq(w.fetch_address << ALIGNMENT_BITS),
            self.reader.request.payload.beats.eq(Mux(block, len(MOE_BLOCK) * beats, beats)),
        ]
        with w.only(m, State.REQUEST) as go:
            m.d.comb += self.reader.request.valid.eq(~w.holding)
            with m.If(self.reader.request.ready & ~w.holding):
                m.d.comb += go(State.COLLECT)

        with w.only(m, State.COLLECT) as go:
            with m.If(self.reader.valid & self.reader.last):
                m.d.comb += go(State.LIMIT)
                with m.If(block):
                    m.d.comb += go(State.TURN)

        if self._config.router:
            part = Signal.like(w.part, name="next_part")
            m.d.comb += [
                part.eq(Mux(w.part == _EXPERTS, _PRODUCT, w.part + 1)),
                w.product.eq(w.moe & (w.part == _PRODUCT)),
            ]
            with w.only(m, State.TURN) as go:
                m.d.comb += go(State.LIMIT)
                m.d.sync += [
                    w.part.eq(part), w.measured.eq(0), w.routes.eq(part == _ROUTE),
                    w.job.route.eq(part == _ROUTE), w.job.routed.eq(part == _EXPERTS),
                    w.job.continues.eq(part != _PRODUCT),
                ]

        with w.only(m, State.LIMIT) as go:
            m.d.comb += go(State.CHECK)
            with m.If(w.checked):
                m.d.comb += go(State.START)
            with m.If(~w.is_layer):
                m.d.comb += rings.i_fetched.eq(1)
                m.d.sync += [
                    w.opcode.eq(submission["opcode"]),
                    w.tag.eq(submission["tag"]),
                    w.known.eq(Cat(
                        submission["opcode"] == code for code in opcodes(self._config)).any()),
                    w.work.eq((submission["opcode"] == Opcode.EXPERTS)
                              | (submission["opcode"] == Opcode.GEMM)),
                    w.fetch_address.eq(submission["layer_address"] >> ALIGNMENT_BITS),
                    w.job.routed.eq(submission["opcode"] == Opcode.EXPERTS),
                    w.job.x_narrow.eq(submission["x_type"] == ElementType.BFLOAT16),
                    w.job.y_narrow.eq(submission["y_type"] == ElementType.BFLOAT16),
                ]
                if self._config.router:
                    routes = submission["opcode"] == Opcode.ROUTE
                    moe = Cat(submission["opcode"] == code for code in MOE_OPCODES).any()
                    m.d.sync += [w.routes.eq(routes), w.job.route.eq(routes), w.moe.eq(moe),
                                 w.job.continues.eq(0), w.part.eq(Mux(moe, -1, 0))]
                    with m.If(routes | moe):
                        m.d.sync += w.work.eq(1)
                if self._config.buffer_slots:
                    prefetch = submission["opcode"] == Opcode.PREFETCH
                    m.d.sync += w.job.prefetch.eq(prefetch)
                    with m.If(prefetch):
                        m.d.sync += [w.work.eq(1), w.job.routed.eq(1)]
                m.d.sync += [
                    w.job[name].eq(submission[name])
                    for name in ("tokens", "top_k", "x_address", "ids_address",
                                 "weights_address", "y_address", "workspace_address")
                ]
            with m.Else():
                m.d.sync += [
                    w.job[name].eq(layer[name])
                    for name in ("num_experts", "grid_exponent", "table_address")
                ]
                m.d.sync += [
                    w.job.two_planes.eq(layer["planes"] == 2),
                    w.job.steps_in.eq(layer["d_in"] // BLOCK),
                    w.job.steps_out.eq(layer["d_out"] // BLOCK),
                ]
                if self._config.router:
                    with m.If(w.product):
                        m.d.sync += [
                            w.steps_in.eq(layer["d_in"] // BLOCK),
                            w.steps_out.eq(layer["d_out"] // BLOCK),
                        ]
                    with m.If(w.routes):
                        m.d.sync += router_fields(self._config, w.front, w.job, w.groups)

        with m.If(w.state[State.LOAD] | Mux(
                w.state[State.COLLECT], self.reader.valid,
                w.state[State.SEND] & self.writer.data.ready)):
            # Sent as it is received: by a shift.
            m.d.sync += w.entry.eq(Mux(
                w.state[State.LOAD], Cat(w.entry[:-len(w.front)], w.completion),
                Cat(w.entry, self.reader.data)[beat_bits:]))
        if self._config.router:
            with m.If(w.state[State.TURN]):
                m.d.sync += w.entry.eq(w.entry.rotate_right(len(w.front)))

    def _check(self, m, w):
        """Look at every field; with the layer, at where everything in memory ends."""
        m.submodules.checks = checks = FieldChecks(self._config)
        m.submodules.sizes = sizes = JobSizes(self._config)
        m.d.comb += [
            checks.i_entry.eq(w.front),
            checks.i_is_layer.eq(w.is_layer),
            checks.i_is_router.eq(w.routes),
            sizes.i_start.eq(w.state[State.CHECK] & w.is_layer),
            sizes.i_job.eq(w.job),
            w.bad_word.eq(Mux(w.measured, sizes.o_word, checks.o_word)),
        ]
        bad_layer = Mux(w.routes, Status.BAD_ROUTER, Status.BAD_LAYER)
        if self._config.router:
            m.submodules.router_checks = router = RouterChecks(self._config)
            m.d.comb += [
                router.i_form.eq(w.job.form), router.i_groups.eq(w.groups),
                w.bad_top_k.eq(w.routes & router.o_bad_top_k),
                w.bad_router.eq(w.routes & router.o_bad),
            ]
            m.d.sync += w.mismatch.eq(w.moe & ~w.product & (
                w.job.steps_in != Mux(w.routes, w.steps_out, w.steps_in)))
            with m.If(w.routes):  # its table has 8 bytes an expert
                m.d.comb += sizes.i_job.num_experts.eq(sum(table_units(self._config, w.job)))
                with m.If(w.moe):  # logits are within the workspace
                    m.d.comb += sizes.i_job.x_address.eq(0)
            with m.If(w.product):
                m.d.comb += sizes.i_job.y_address.eq(0)
            with m.If(w.measured & w.bad_top_k):
                m.d.comb += w.bad_word.eq(field_of(SUBMISSION, "top_k").word)
            with m.Elif(w.measured & w.mismatch & ~sizes.o_bad_field):
                m.d.comb += w.bad_word.eq(Mux(
                    w.routes, field_of(ROUTER, "num_experts").word, field_of(LAYER, "d_in").word))
            with m.Elif(w.measured & w.bad_router & ~sizes.o_bad_field):
                m.d.comb += w.bad_word.eq(router.o_word)
        with w.only(m, State.CHECK) as go:
            m.d.comb += go(State.JOIN)

        with w.only(m, State.JOIN) as go:
            m.d.comb += go(State.DECIDE)

        with w.only(m, State.DECIDE) as go:
            m.d.comb += go(State.WRITE)
            with m.If(self.fault_window):
                m.d.sync += w.status.eq(Status.WINDOW)
            with m.Elif(self.fault_bus):
                m.d.sync += w.status.eq(Status.BUS_ERROR)
            with m.Elif(~w.known):
                m.d.sync += w.status.eq(Status.BAD_OPCODE)
            with m.Elif(~w.work):
                m.d.sync += w.status.eq(Status.OK)
            with m.Elif(checks.o_bad):
                m.d.sync += w.status.eq(Mux(w.is_layer, bad_layer, Status.BAD_FIELD))
            with m.Elif(~w.is_layer):
                m.d.comb += go(State.REQUEST)
                m.d.sync += w.is_layer.eq(1)
            with m.Else():
                m.d.comb += go(State.MEASURE)

        with w.only(m, State.MEASURE) as go:
            m.d.sync += [
                w.measured.eq(1),
                w.status.eq(
                    Mux(sizes.o_bad_field | w.bad_top_k, Status.BAD_FIELD, bad_layer)),
            ]
            with m.If(sizes.o_done):
                m.d.comb += go(State.START)
                with m.If(w.moe):
                    m.d.comb += go(State.TURN)
                    m.d.sync += w.checked.eq(w.part == _EXPERTS)
                with m.If(sizes.o_bad_field | sizes.o_bad_layer | w.bad_top_k | w.bad_router
                          | w.mismatch):
                    m.d.comb += go(State.WRITE)

    def _run(self, m, w):
        """Hand the job over, and judge what comes back."""
        m.d.comb += self.o_job.payload.eq(w.job)
        job = self.o_job.p
        with m.If(w.product):
            m.d.comb += [job.top_k.eq(MOE_PLANES), job.y_narrow.eq(0),
                         job.y_address.eq(w.job.workspace_address)]
        with m.If(w.moe & w.routes):
            m.d.comb += job.x_address.eq(w.job.workspace_address)
        if self._config.router:
            m.d.comb += [
                w.precedes.eq(w.product | (w.moe & w.routes & (w.opcode == Opcode.MOE))),
                job.precedes.eq(w.precedes),
            ]
        with w.only(m, State.START) as go:
            m.d.comb += self.o_job.valid.eq(1)
            with m.If(self.o_job.ready):
                m.d.comb += go(State.RUN)
                with m.If(w.product):  # the router makes ready beside it
                    m.d.comb += go(State.TURN)

        with w.only(m, State.RUN) as go:
            m.d.sync += w.result.eq(self.i_result)
            with m.If(self.i_done):
                m.d.comb += go(State.FINISH)
                m.d.sync += w.ran.eq(1)

        with w.only(m, State.FINISH) as go:
            m.d.comb += go(State.WRITE)
            with m.If(w.routes):
                m.d.sync += w.of_logits.eq(w.result.overflows != 0)
            with m.If(self.fault_window | self.fault_bus):
                # It has gone on without what it did not get: its numbers mean nothing.
                m.d.sync += [w.status.eq(Mux(self.fault_window, Status.WINDOW, Status.BUS_ERROR)),
                             w.ran.eq(0)]
            with m.Elif(w.result.bad_expert):
                m.d.sync += w.status.eq(Status.BAD_EXPERT)
            with m.Elif(w.precedes):
                m.d.comb += go(State.TURN)
            with m.Elif(w.result.nonfinite):
                m.d.sync += w.status.eq(Status.NONFINITE)
            with m.Elif(w.result.overflows != 0):
                m.d.sync += w.status.eq(Status.OVERFLOW)
            with m.Else():
                m.d.sync += w.status.eq(Status.OK)

    def _report(self, m, w, rings):
        """Choose what the completion says.

        What it comes from holds while the completion waits to be written; chosen here, that state's
        decision is a short one.
        """
        result = w.result
        detail = Signal(32)
        about = Signal(self._config.device_address_bits)
        underflows = Signal(32)
        values = {"tag": w.tag, "status": w.status, "phase": rings.o_phase, "detail": detail,
                  "address": about, "cycles": w.cycles, "underflows": underflows}
        m.d.comb += [
            w.completion[f.offset:f.offset + f.bits].eq(values[f.name]) for f in COMPLETION]
        with m.If(w.state[State.WRITE] & ~w.again):
            m.d.sync += [
                detail.eq(0), about.eq(0),
                underflows.eq(Mux(w.ran & ~self.fault_window & ~self.fault_bus & ~result.bad_expert,
                                  layouts.limited_count(result.underflows), 0)),
            ]
            with m.Switch(w.status):
                with m.Case(Status.WINDOW, Status.BUS_ERROR):
                    m.d.sync += about.eq(self.fault_address)
                with m.Case(Status.BAD_OPCODE):
                    m.d.sync += detail.eq(w.opcode)
                with m.Case(Status.BAD_FIELD):
                    m.d.sync += detail.eq(w.bad_word)
                with m.Case(Status.BAD_LAYER, Status.BAD_ROUTER):
                    where = Mux(w.moe, w.part, 0) | w.fetch_address  # a MOE's is a multiple of 4
                    m.d.sync += [detail.eq(w.bad_word), about.eq(where << ALIGNMENT_BITS)]
                with m.Case(Status.BAD_EXPERT):
                    m.d.sync += [
                        detail.eq(result.expert),
                        about.eq(Cat(result.word, w.moe & w.routes))]
                with m.Case(Status.NONFINITE):
                    m.d.sync += [detail.eq(result.token), about.eq(result.what)]
                with m.Case(Status.OVERFLOW):
                    m.d.sync += [detail.eq(layouts.limited_count(result.overflows)),
                                 about.eq(w.of_logits)]

    def _complete(self, m, w, rings):
        """Write the completion, and announce it when memory has it."""
        config = self._config
        beats = ENTRY_BYTES // config.port_bytes
        completion_address = Signal.like(w.fetch_address)
        sent = Signal(range(max(beats, 2)))
        m.d.comb += [
            self.writer.request.payload.address.eq(completion_address << ALIGNMENT_BITS),
            self.writer.request.payload.beats.eq(beats),
            self.writer.data.payload.eq(w.front[:8 * config.port_bytes]),
        ]
        if config.buffer_slots:
            m.d.sync += self.o_forget.eq(0)
        m.d.sync += [
            completion_address.eq(rings.o_completion),
            self.o_irq.eq(0),
            self.count_commands.eq(0),
            self.count_tokens.eq(0),
            self.count_overflows.eq(0),
            self.count_underflows.eq(0),
        ]
        with w.only(m, State.WRITE) as go:
            m.d.comb += self.writer.request.valid.eq(~w.holding & ~w.bad_rings)
            m.d.sync += [w.cycles.eq(w.cycles), sent.eq(0)]
            with m.If(w.bad_rings):  # changed while the command ran
                m.d.comb += go(State.STOPPED)
            with m.Elif(self.writer.request.ready & ~w.holding):
                m.d.comb += go(State.LOAD)
                # From here on a fault is the completion's.
                m.d.sync += self.clear_faults.eq(1)
                if config.buffer_slots:  # at a fault it may hold what memory has not
                    m.d.sync += self.o_forget.eq(
                        (w.opcode == Opcode.FORGET) | (w.status == Status.WINDOW)
                        | (w.status == Status.BUS_ERROR))

        with w.only(m, State.LOAD) as go:
            m.d.comb += go(State.SEND)
            m.d.sync += w.cycles.eq(w.cycles)

        with w.only(m, State.SEND) as go:
            m.d.comb += self.writer.data.valid.eq(1)
            m.d.sync += w.cycles.eq(w.cycles)
            with m.If(self.writer.data.ready):
                m.d.sync += sent.eq(sent + 1)
                with m.If(sent == beats - 1):
                    m.d.comb += go(State.ACKNOWLEDGE)

        with w.only(m, State.ACKNOWLEDGE) as go:
            m.d.sync += w.cycles.eq(w.cycles)
            with m.If(self.writer.done & (self.fault_window | self.fault_bus)):
                m.d.comb += go(State.STOPPED)
                m.d.sync += self.o_error[3:].eq(Cat(self.fault_window, ~self.fault_window))
            with m.Elif(self.writer.done):
                m.d.comb += [go(State.IDLE), rings.i_completed.eq(1)]
                m.d.sync += [
                    self.o_irq.eq(1),
                    self.count_commands.eq(1),
                ]
                with m.If(w.ran & ~w.job.prefetch if config.buffer_slots else w.ran):
                    m.d.sync += [
                        self.count_tokens.eq(w.job.tokens),
                        self.count_overflows.eq(w.result.overflows),
                        self.count_underflows.eq(w.result.underflows),
                    ]

        with w.only(m, State.STOPPED) as go:
            m.d.sync += [w.cycles.eq(w.cycles), w.again.eq(1)]
            with m.If(w.waited & ~self.error):
                m.d.comb += go(State.WRITE)

    def _interrupt(self, m, w, rings):
        """End a command at an abort or the watchdog, forget it at a soft reset.

        The last of the parts: the soft reset wins over whatever the state does.
        """
        draining = w.at(State.DRAIN, State.RESET)
        running = Signal()
        stop_status = Signal(8)
        timer = Signal(32)
        expired = Signal()
        aborted = Signal()
        restart = Signal()
        m.d.comb += [
            self.busy.eq(~w.at(State.IDLE, State.RESET)),
            self.draining.eq(
                draining | (w.stopping & ~w.is_layer & w.at(*FETCHING, State.LIMIT))),
            self.flush.eq(w.holding),
            w.waited.eq(w.drained == DRAIN_CYCLES - 1),
        ]
        m.d.sync += [
            w.holding.eq(draining),
            self.o_engine_reset.eq(draining),
            self.o_reset_done.eq(0),
            w.drained.eq(Mux(w.at(State.DRAIN, State.RESET, State.STOPPED),
                             w.drained + (w.drained != ~0), 0)),
            running.eq(~w.at(*RESTING)),
            aborted.eq(self.i_abort),
            restart.eq(self.progress | ~running),
            timer.eq(Mux(restart, self.watchdog, timer - 1)),
            expired.eq(~restart & (timer == 0) & (self.watchdog != 0)),
        ]
        with w.only(m, State.DRAIN) as go:
            with m.If(w.waited & self.idle):
                m.d.comb += go(State.WRITE)
                m.d.sync += [w.status.eq(stop_status), w.ran.eq(0)]

        with w.only(m, State.RESET) as go:
            m.d.sync += w.stopping.eq(0)
            with m.If(w.waited & self.idle):
                m.d.comb += [go(State.IDLE), rings.i_reset.eq(1)]
                m.d.sync += self.o_reset_done.eq(1)

        with m.If(running & ~w.stopping & (aborted | expired)):
            m.d.sync += [
                w.stopping.eq(1),
                stop_status.eq(Mux(aborted, Status.ABORTED, Status.WATCHDOG)),
            ]
        with m.If(self.i_soft_reset):
            m.d.sync += [w.state.eq(1 << State.RESET), w.drained.eq(0)]
