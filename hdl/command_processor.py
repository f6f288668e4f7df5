"""Fetch, check, run and complete commands: the device's end of the two rings."""

import enum
import functools
import operator
from contextlib import contextmanager

from amaranth import *
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import exact_log2

from moeaccel.commands import (
    COMPLETION,
    ENTRY_BYTES,
    LAYER,
    SUBMISSION,
    Activation,
    LayerKind,
    Opcode,
    Status,
)
from moeaccel.config import BLOCK, TOP_K_MAX, AcceleratorConfig
from moeaccel.hdl import layouts
from moeaccel.hdl.layouts import ReadClientSignature, WriteClientSignature, job, token_bits
from moeaccel.image import Section

RING_LOG2_MAX = 8

GRID_EXPONENT_RANGE = (-100, 60)

DRAIN_CYCLES = 16
"""Cycles for which the engine's reset and the port's flush are held at least."""

_ALIGNMENT_BITS = exact_log2(ENTRY_BYTES)
_CYCLES_BITS = 48


class _State(enum.IntEnum):
    """States, each a bit of its own: most of what a state does is one gate behind it."""

    IDLE = 0
    REQUEST = 1  # ask for the submission or the layer
    COLLECT = 2  # its beats
    LIMIT = 3  # what depends on another field
    CHECK = 4  # every field, into one bit each
    JOIN = 5  # the bits
    DECIDE = 6
    MULTIPLY = 7  # words of the image's sections
    ROUND = 8
    ADD = 9
    START = 10  # hand over the job
    RUN = 11
    FINISH = 12
    WRITE = 13  # announce the completion
    LOAD = 14  # put it together
    SEND = 15  # its beats
    ACKNOWLEDGE = 16
    DRAIN = 17  # abort, watchdog: then complete
    RESET = 18  # soft reset: then forget


_RESTING = (_State.IDLE, _State.WRITE, _State.LOAD, _State.SEND, _State.ACKNOWLEDGE, _State.DRAIN,
            _State.RESET)
"""Where abort and watchdog end nothing."""

_FETCHING = (_State.REQUEST, _State.COLLECT)

_STOPPED = (*_FETCHING, _State.DECIDE, _State.START, _State.RUN, _State.FINISH)
"""Where they do; the others take a few cycles at most."""


def _outside(value, low, high):
    return [value < low, value > high]


class CommandProcessor(wiring.Component):
    """Run submissions one at a time, in order, and complete each.

    ::

        registers --> [rings] --> reader --> [64-byte entry] --> [checks] --> [words] --> o_job
        o_irq <-- writer done <-- writer <-- [completion] <--- status <--- faults, i_done

    A submission is fetched while ``enable`` is 1, the submission ring is not empty and the
    completion ring has room. Opcode and fields are checked against the texts of
    ``moeaccel.commands`` and the limits of ``config``; for EXPERTS and GEMM the layer descriptor is
    fetched and checked too, the words of the image's sections are derived as
    ``moeaccel.image.Section.words`` has them, and the job is offered on ``o_job``. After the
    engine's ``i_done``, which comes when its last write is acknowledged, the completion is written;
    when that is acknowledged, ``cq_tail`` advances and ``o_irq`` pulses. Within a structure the
    lowest bad word is reported; addresses are checked in every EXPERTS and GEMM, whether they are
    used or not. Fields of NOP and FENCE other than the opcode are ignored.

    Statuses, the first that holds: ABORTED or WATCHDOG; WINDOW, BUS_ERROR (``fault_*``, cleared
    when a command starts); BAD_OPCODE, BAD_FIELD, BAD_LAYER; NONFINITE; OVERFLOW; OK. A fault of
    the completion's own write cannot be reported.

    ``i_abort``, or WATCHDOG cycles without ``progress``, ends the running command:
    ``o_engine_reset`` and ``flush`` are held for DRAIN_CYCLES and until the port is ``idle``, then
    the completion is written. It is ignored between commands and once the completion is being
    written; if it comes while the submission itself is fetched, that is waited for, as its tag is
    needed; a check under way is finished. ``i_soft_reset`` does the same at any time, without a
    completion; then the ring indices are 0 and ``o_reset_done`` pulses. While memory does not
    answer, ``draining`` is 1.

    Latency, without waiting for memory or engine: a submission is requested 2 cycles after its
    doorbell shows. From the last beat of a submission it is 5 cycles to the request of the layer;
    from the last beat of the layer 7 cycles, plus the bits of the larger of steps_in and
    steps_hidden, to ``o_job``; from ``i_done`` 2 cycles to the request of the completion's write;
    from its ``done`` 1 cycle to ``o_irq``. Reset: idle, indices 0, phase 1.

    Parameters
    ----------
    config : :class:`AcceleratorConfig`
        Limits, widths, format constants.

    Members
    -------
    reader : :py:`Out(ReadClientSignature(config))`
    writer : :py:`Out(WriteClientSignature(config))`
    o_job : :py:`Out(stream.Signature(job(config)))`
    i_done, i_nonfinite, i_nonfinite_token, i_overflows : :py:`In`
        ``i_done`` pulses at the end of a job; the others are valid with it. Only counts without
        ``o_engine_reset``.
    o_engine_reset : :py:`Out(1)`
        Resets everything behind ``o_job``, streams to the port included. A register, 1 after reset.
    progress : :py:`In(1)`
        Something moved: a beat of the port, a step of the array.
    flush, clear_faults : :py:`Out(1)`
    idle, fault_window, fault_bus, fault_address : :py:`In`
        Of MemoryPort, under its names.
    enable, sq_base, cq_base, ring_log2, sq_tail, cq_head, watchdog : :py:`In`
        Of the registers with these names.
    i_abort, i_soft_reset : :py:`In(1)`
        Pulses of CONTROL.
    sq_head, cq_tail : :py:`Out(32)`
        Registers. Indices are taken modulo the ring's entries.
    busy, draining : :py:`Out(1)`
        Fields of STATUS.
    o_irq, o_reset_done : :py:`Out(1)`
        Set IRQ_STATUS completion and reset_done; the latter also clears counters and doorbells.
    count_commands, count_tokens, count_overflows : :py:`Out`
        For Counters, one cycle each: a completion has been written; tokens and overflows of a job
        that has run to its end.
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
            "i_nonfinite": In(1),
            "i_nonfinite_token": In(token_bits(config)),
            "i_overflows": In(32),
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
            "i_abort": In(1),
            "i_soft_reset": In(1),
            "sq_head": Out(32),
            "cq_tail": Out(32),
            "busy": Out(1),
            "draining": Out(1),
            "o_irq": Out(1),
            "o_reset_done": Out(1),
            "count_commands": Out(1),
            "count_tokens": Out(config.max_tokens.bit_length()),
            "count_overflows": Out(32),
        })

    # -- checks ------------------------------------------------------------------------------------
    def _bad_address(self, value):
        return [value[:_ALIGNMENT_BITS] != 0, value[self._config.address_bits:] != 0]

    def _bad_submission(self, m, entry):
        """Return what makes fields of a GEMM or EXPERTS submission bad, by field.

        A limit is one cycle behind the entry.
        """
        config = self._config
        top_k = entry["top_k"]
        # tokens * top_k <= max_assignments, without the product.
        limit = Signal(range(config.max_tokens + 1))
        with m.Switch(top_k[:TOP_K_MAX.bit_length()]):
            for k in range(1, TOP_K_MAX + 1):
                with m.Case(k):
                    m.d.sync += limit.eq(min(config.max_tokens, config.max_assignments // k))
        too_many = entry["tokens"][:len(limit)] > limit
        gemm = entry["opcode"] == Opcode.GEMM
        bad = {
            "tokens": _outside(entry["tokens"], 1, config.max_tokens),
            "top_k": [*_outside(top_k, 1, TOP_K_MAX), gemm & (top_k != 1), too_many],
        }
        return bad | {
            field.name: self._bad_address(entry[field.name])
            for field in SUBMISSION if field.name.endswith("_address")
        }

    def _bad_layer(self, entry, gemm):
        """Return what makes fields of a layer descriptor bad, by field."""
        config = self._config

        def unknown(name, values):
            return ~Cat(entry[name] == value for value in values).any()

        def dimension(name):
            return [entry[name][:exact_log2(BLOCK)] != 0, *_outside(entry[name], 1, config.max_dim)]

        return {
            "kind": [entry["kind"] != Mux(gemm, LayerKind.LINEAR, LayerKind.EXPERTS)],
            "format": [unknown("format", [f.code for f in config.weight_formats])],
            "planes": [unknown("planes", (1, 2))],
            "activation": [unknown("activation", Activation)],
            "num_experts": [*_outside(entry["num_experts"], 1, config.max_experts),
                            gemm & (entry["num_experts"] != 1)],
            "d_in": dimension("d_in"),
            "d_expert": [*dimension("d_expert"), gemm & (entry["d_expert"] != entry["d_in"])],
            "d_out": dimension("d_out"),
            "grid_exponent": _outside(entry["grid_exponent"], *GRID_EXPONENT_RANGE),
            "stride": [entry["stride"][:_ALIGNMENT_BITS] != 0],
            "image_address": self._bad_address(entry["image_address"]),
        }

    # -- words of a section ------------------------------------------------------------------------
    def _words(self, m, *, load, step, format_code, sections):
        """Derive Section.words of each of ``sections``, pairs (rows, steps).

        In the cycle after ``load`` the shift-and-add multipliers are loaded; they take one bit of
        the multiplier in each cycle of ``step``. Returns a signal that is 1 when nothing is left to
        add, and for each section (product, row words, scale entries' product) and the scale words.
        """
        config = self._config
        constants = {
            f.code: Section(f, 2 * BLOCK, BLOCK, config.row_multipliers, config.channels)
            for f in config.weight_formats}
        busy = []
        results = []
        for i, (rows, steps) in enumerate(sections):
            tiles = Signal(len(rows), name=f"tiles{i}")
            groups = Signal(len(steps), name=f"groups{i}")
            row_words = Signal(len(rows), name=f"row_words{i}")
            left_steps = Signal(len(steps), name=f"left_steps{i}")
            left_groups = Signal(len(steps), name=f"left_groups{i}")
            multiplicand = Signal(len(rows) + len(steps), name=f"multiplicand{i}")
            weights = Signal(32, name=f"weights{i}")
            entries = Signal(32, name=f"entries{i}")
            scale_words = Signal(32, name=f"scale_words{i}")
            tiles_before = Signal(len(rows), name=f"tiles_before{i}")
            m.d.sync += tiles_before.eq(tiles)

            def up(value, divisor):
                return (value + (divisor - 1)) >> exact_log2(divisor)

            with m.Switch(format_code):
                for code, section in constants.items():
                    with m.Case(code):
                        m.d.comb += [
                            tiles.eq(layouts.tiles(rows, section.tile_rows * section.channels)),
                            groups.eq(up(steps, section.format.steps_per_group)),
                        ]
                        m.d.sync += [
                            row_words.eq(up(tiles_before, section.tiles_per_row_word)),
                            scale_words.eq(up(entries, section.entries_per_scale_word)),
                        ]
            with m.If(load):
                m.d.sync += [
                    multiplicand.eq(tiles),
                    left_steps.eq(steps),
                    left_groups.eq(groups),
                    weights.eq(0),
                    entries.eq(0),
                ]
            with m.If(step):
                m.d.sync += [
                    multiplicand.eq(multiplicand << 1),
                    left_steps.eq(left_steps >> 1),
                    left_groups.eq(left_groups >> 1),
                ]
                with m.If(left_steps[0]):
                    m.d.sync += weights.eq(weights + multiplicand)
                with m.If(left_groups[0]):
                    m.d.sync += entries.eq(entries + multiplicand)
            # Groups never have more bits than steps.
            busy.append(left_steps[1:].any())
            results.append((weights, row_words, scale_words))
        return ~Cat(*busy).any(), results

    def elaborate(self, platform):
        m = Module()
        config = self._config
        address_bits = config.address_bits
        state = Signal(len(_State), init=1 << _State.IDLE)
        is_layer = Signal()
        stopping = Signal()
        following = {s: Signal(len(_State), name=f"after_{s.name.lower()}") for s in _State}

        def in_state(*states):
            return Cat(state[s] for s in states).any()

        @contextmanager
        def in_only(s):
            with m.If(state[s]):
                m.d.comb += following[s].eq(1 << s)
                yield lambda to: following[s].eq(1 << to)
                if s in _STOPPED:  # once the submission's tag is known
                    with m.If(stopping & (is_layer if s in _FETCHING else 1)):
                        m.d.comb += following[s].eq(1 << _State.DRAIN)

        # -- rings ---------------------------------------------------------------------------------
        mask = Signal(RING_LOG2_MAX)
        sq_head = Signal(RING_LOG2_MAX)
        cq_tail = Signal(RING_LOG2_MAX)
        cq_next = Signal(RING_LOG2_MAX)
        cq_wraps = Signal()
        phase = Signal(init=1)
        ready = Signal()
        m.d.sync += [
            cq_wraps.eq(cq_next == 0),
            mask.eq(Cat(self.ring_log2 > i for i in range(RING_LOG2_MAX))),
            # Before IDLE the indices may be those of the last command; in the cycle of o_reset_done
            # the doorbells still hold what they held.
            ready.eq(in_state(_State.IDLE) & self.enable & ~self.o_reset_done
                     & (sq_head != (self.sq_tail & mask)) & (cq_next != (self.cq_head & mask))),
        ]
        m.d.comb += [
            cq_next.eq((cq_tail + 1) & mask),
            self.sq_head.eq(sq_head),
            self.cq_tail.eq(cq_tail),
        ]

        # -- the structure being read --------------------------------------------------------------
        entry = Signal(8 * ENTRY_BYTES)
        fetch_address = Signal(address_bits - _ALIGNMENT_BITS)
        beats = ENTRY_BYTES // config.port_bytes
        m.d.comb += [
            self.reader.request.payload.address.eq(fetch_address << _ALIGNMENT_BITS),
            self.reader.request.payload.beats.eq(beats),
        ]

        def fields(structure):
            return {
                f.name: entry[f.offset:f.offset + f.bits].as_signed() if f.signed
                else entry[f.offset:f.offset + f.bits]
                for f in structure
            }

        submission, layer = fields(SUBMISSION), fields(LAYER)

        opcode = Signal(8)
        tag = Signal(16)
        work = Signal()
        known = Signal()

        def bad_words(structure, checks):
            """Return a bit for each word with a bad field, one cycle behind the checks."""
            words = [[] for _ in range(ENTRY_BYTES // 4)]
            for field in structure:
                for i, check in enumerate(checks.get(field.name, [])):
                    bit = Signal(name=f"bad_{field.name}{i}")
                    m.d.sync += bit.eq(check)
                    words[field.word].append(bit)
            return Cat(Cat(*word).any() if word else C(0, 1) for word in words)

        o_job = self.o_job.payload
        bad = Signal(ENTRY_BYTES // 4)
        bad_word = Signal(range(ENTRY_BYTES // 4))
        bad_any = Signal()
        of_layer = bad_words(LAYER, self._bad_layer(layer, o_job.linear))
        of_submission = bad_words(SUBMISSION, self._bad_submission(m, submission))
        m.d.sync += [
            bad.eq(Mux(is_layer, of_layer, of_submission)),
            bad_any.eq(Mux(is_layer, of_layer.any(), of_submission.any())),
        ]
        for i in reversed(range(len(bad))):
            with m.If(bad[i]):
                m.d.sync += bad_word.eq(i)

        # -- the job -------------------------------------------------------------------------------
        d_expert = Signal(range(config.max_dim + 1))
        d_out = Signal(range(config.max_dim + 1))
        multiplied, ((gate_up, gate_up_rows, gate_up_scales), (down, down_rows, down_scales)) = \
            self._words(
                m, load=in_state(_State.DECIDE), step=in_state(_State.MULTIPLY),
                format_code=o_job.format,
                sections=((d_expert << 1, o_job.steps_in), (d_out, o_job.steps_hidden)))

        # -- the completion ------------------------------------------------------------------------
        status = Signal(8)
        detail = Signal(32)
        fault_or_zero = Signal(config.device_address_bits)
        cycles = Signal(_CYCLES_BITS)
        ran = Signal()
        nonfinite = Signal()
        nonfinite_token = Signal.like(self.i_nonfinite_token)
        overflows = Signal(32)
        completion_address = Signal(address_bits - _ALIGNMENT_BITS)
        completion = Signal(8 * ENTRY_BYTES)
        sent = Signal(range(max(beats, 2)))
        values = {"tag": tag, "status": status, "phase": phase, "detail": detail,
                  "address": fault_or_zero, "cycles": cycles}
        m.d.comb += [
            *(completion[f.offset:f.offset + f.bits].eq(values[f.name]) for f in COMPLETION),
            self.writer.request.payload.address.eq(completion_address << _ALIGNMENT_BITS),
            self.writer.request.payload.beats.eq(beats),
            self.writer.data.payload.eq(entry[:8 * config.port_bytes]),
        ]
        m.d.sync += [
            completion_address.eq(self.cq_base[_ALIGNMENT_BITS:address_bits] + cq_tail),
            cycles.eq(cycles + 1),
            self.clear_faults.eq(0),
            self.o_irq.eq(0),
            self.o_reset_done.eq(0),
            self.count_commands.eq(0),
            self.count_tokens.eq(0),
            self.count_overflows.eq(0),
        ]

        # -- abort and watchdog --------------------------------------------------------------------
        running = Signal()
        stop_status = Signal(8)
        drained = Signal(range(DRAIN_CYCLES))
        timer = Signal(32)
        expired = Signal()
        aborted = Signal()
        restart = Signal()
        holding = Signal()
        m.d.comb += [
            self.busy.eq(~in_state(_State.IDLE, _State.RESET)),
            self.draining.eq(
                in_state(_State.DRAIN, _State.RESET)
                | (stopping & ~is_layer & in_state(*_FETCHING, _State.LIMIT))),
            self.flush.eq(holding),
        ]
        m.d.sync += [
            holding.eq(in_state(_State.DRAIN, _State.RESET)),
            self.o_engine_reset.eq(in_state(_State.DRAIN, _State.RESET)),
            drained.eq(Mux(in_state(_State.DRAIN, _State.RESET), drained + (drained != ~0), 0)),
            running.eq(~in_state(*_RESTING)),
            aborted.eq(self.i_abort),
            restart.eq(self.progress | ~running),
            timer.eq(Mux(restart, self.watchdog, timer - 1)),
            expired.eq(~restart & (timer == 0) & (self.watchdog != 0)),
        ]
        held = (drained == DRAIN_CYCLES - 1) & self.idle

        with in_only(_State.IDLE) as go:
            m.d.sync += [
                is_layer.eq(0),
                ran.eq(0),
                stopping.eq(0),
                cycles.eq(0),
                fetch_address.eq(self.sq_base[_ALIGNMENT_BITS:address_bits] + sq_head),
            ]
            with m.If(ready):
                m.d.comb += go(_State.REQUEST)
                m.d.sync += self.clear_faults.eq(1)

        with in_only(_State.REQUEST) as go:
            m.d.comb += self.reader.request.valid.eq(~holding)
            with m.If(self.reader.request.ready & ~holding):
                m.d.comb += go(_State.COLLECT)

        with in_only(_State.COLLECT) as go:
            with m.If(self.reader.valid & self.reader.last):
                m.d.comb += go(_State.LIMIT)

        with in_only(_State.LIMIT) as go:
            m.d.comb += go(_State.CHECK)
            with m.If(~is_layer):
                m.d.sync += [
                    sq_head.eq((sq_head + 1) & mask),
                    opcode.eq(submission["opcode"]),
                    tag.eq(submission["tag"]),
                    known.eq(Cat(submission["opcode"] == code for code in Opcode).any()),
                    work.eq((submission["opcode"] == Opcode.EXPERTS)
                            | (submission["opcode"] == Opcode.GEMM)),
                    fetch_address.eq(submission["layer_address"] >> _ALIGNMENT_BITS),
                    o_job.linear.eq(submission["opcode"] == Opcode.GEMM),
                ]
                m.d.sync += [
                    o_job[name].eq(submission[name])
                    for name in ("tokens", "top_k", "x_address", "ids_address",
                                 "weights_address", "y_address", "workspace_address")
                ]
            with m.Else():
                m.d.sync += [
                    o_job[name].eq(layer[name])
                    for name in ("format", "num_experts", "grid_exponent", "stride",
                                 "image_address")
                ]
                m.d.sync += [
                    o_job.two_planes.eq(layer["planes"] == 2),
                    o_job.steps_in.eq(layer["d_in"] // BLOCK),
                    o_job.steps_hidden.eq(layer["d_expert"] // BLOCK),
                    o_job.steps_out.eq(layer["d_out"] // BLOCK),
                    d_expert.eq(layer["d_expert"]),
                    d_out.eq(layer["d_out"]),
                ]

        with in_only(_State.CHECK) as go:
            m.d.comb += go(_State.JOIN)

        with in_only(_State.JOIN) as go:
            m.d.comb += go(_State.DECIDE)

        with in_only(_State.DECIDE) as go:
            m.d.comb += go(_State.WRITE)
            with m.If(self.fault_window):
                m.d.sync += status.eq(Status.WINDOW)
            with m.Elif(self.fault_bus):
                m.d.sync += status.eq(Status.BUS_ERROR)
            with m.Elif(~known):
                m.d.sync += status.eq(Status.BAD_OPCODE)
            with m.Elif(~work):
                m.d.sync += status.eq(Status.OK)
            with m.Elif(bad_any):
                m.d.sync += status.eq(Mux(is_layer, Status.BAD_LAYER, Status.BAD_FIELD))
            with m.Elif(~is_layer):
                m.d.comb += go(_State.REQUEST)
                m.d.sync += is_layer.eq(1)
            with m.Else():
                m.d.comb += go(_State.MULTIPLY)

        with in_only(_State.MULTIPLY) as go:
            with m.If(multiplied):
                m.d.comb += go(_State.ROUND)

        with in_only(_State.ROUND) as go:
            m.d.comb += go(_State.ADD)
            m.d.sync += [
                o_job.gate_up_words.eq(gate_up + gate_up_rows),
                o_job.down_words.eq(down + down_rows),
            ]

        with in_only(_State.ADD) as go:
            m.d.comb += go(_State.START)
            m.d.sync += [
                o_job.gate_up_words.eq(
                    Mux(o_job.linear, 0, o_job.gate_up_words + gate_up_scales)),
                o_job.down_words.eq(o_job.down_words + down_scales),
            ]

        with in_only(_State.START) as go:
            m.d.comb += self.o_job.valid.eq(1)
            with m.If(self.o_job.ready):
                m.d.comb += go(_State.RUN)

        with in_only(_State.RUN) as go:
            m.d.sync += [
                nonfinite.eq(self.i_nonfinite),
                nonfinite_token.eq(self.i_nonfinite_token),
                overflows.eq(self.i_overflows),
            ]
            with m.If(self.i_done):
                m.d.comb += go(_State.FINISH)
                m.d.sync += ran.eq(1)

        with in_only(_State.FINISH) as go:
            m.d.comb += go(_State.WRITE)
            with m.If(self.fault_window):
                m.d.sync += status.eq(Status.WINDOW)
            with m.Elif(self.fault_bus):
                m.d.sync += status.eq(Status.BUS_ERROR)
            with m.Elif(nonfinite):
                m.d.sync += status.eq(Status.NONFINITE)
            with m.Elif(overflows != 0):
                m.d.sync += status.eq(Status.OVERFLOW)
            with m.Else():
                m.d.sync += status.eq(Status.OK)

        with in_only(_State.WRITE) as go:
            m.d.comb += self.writer.request.valid.eq(~holding)
            m.d.sync += [cycles.eq(cycles), sent.eq(0), detail.eq(0), fault_or_zero.eq(0)]
            # What these come from holds; chosen here, the state's decision is a short one.
            with m.Switch(status):
                with m.Case(Status.WINDOW, Status.BUS_ERROR):
                    m.d.sync += fault_or_zero.eq(self.fault_address)
                with m.Case(Status.BAD_OPCODE):
                    m.d.sync += detail.eq(opcode)
                with m.Case(Status.BAD_FIELD, Status.BAD_LAYER):
                    m.d.sync += detail.eq(bad_word)
                with m.Case(Status.NONFINITE):
                    m.d.sync += detail.eq(nonfinite_token)
                with m.Case(Status.OVERFLOW):
                    m.d.sync += detail.eq(overflows)
            with m.If(self.writer.request.ready & ~holding):
                m.d.comb += go(_State.LOAD)

        with in_only(_State.LOAD) as go:
            m.d.comb += go(_State.SEND)
            m.d.sync += cycles.eq(cycles)

        with in_only(_State.SEND) as go:
            m.d.comb += self.writer.data.valid.eq(1)
            m.d.sync += cycles.eq(cycles)
            with m.If(self.writer.data.ready):
                m.d.sync += sent.eq(sent + 1)
                with m.If(sent == beats - 1):
                    m.d.comb += go(_State.ACKNOWLEDGE)

        with in_only(_State.ACKNOWLEDGE) as go:
            with m.If(self.writer.done):
                m.d.comb += go(_State.IDLE)
                m.d.sync += [
                    cq_tail.eq(cq_next),
                    phase.eq(phase ^ cq_wraps),
                    self.o_irq.eq(1),
                    self.count_commands.eq(1),
                ]
                with m.If(ran):
                    m.d.sync += [
                        self.count_tokens.eq(o_job.tokens),
                        self.count_overflows.eq(overflows),
                    ]

        with in_only(_State.DRAIN) as go:
            with m.If(held):
                m.d.comb += go(_State.WRITE)
                m.d.sync += [status.eq(stop_status), ran.eq(0)]

        with in_only(_State.RESET) as go:
            m.d.sync += stopping.eq(0)
            with m.If(held):
                m.d.comb += go(_State.IDLE)
                m.d.sync += [
                    sq_head.eq(0), cq_tail.eq(0), phase.eq(1),
                    self.o_reset_done.eq(1),
                ]

        m.d.sync += state.eq(functools.reduce(operator.or_, following.values()))
        with m.If(state[_State.LOAD] | Mux(
                state[_State.COLLECT], self.reader.valid,
                state[_State.SEND] & self.writer.data.ready)):
            # Sent as it is received: by a shift.
            m.d.sync += entry.eq(Mux(
                state[_State.LOAD], completion,
                Cat(entry, self.reader.data)[8 * config.port_bytes:]))

        with m.If(running & ~stopping & (aborted | expired)):
            m.d.sync += [
                stopping.eq(1),
                stop_status.eq(Mux(aborted, Status.ABORTED, Status.WATCHDOG)),
            ]
        with m.If(self.i_soft_reset):  # wins over whatever the state does
            m.d.sync += [state.eq(1 << _State.RESET), drained.eq(0)]
        return m
