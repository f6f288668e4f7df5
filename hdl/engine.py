"""Everything between a checked command and the memory ports: dispatch, multiply, combine."""

import functools

from amaranth import *
from amaranth.hdl import Assert
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from moeaccel.config import AcceleratorConfig
from moeaccel.hdl import layouts
from moeaccel.hdl.activations.activation_loader import ActivationLoader
from moeaccel.hdl.activations.hidden_buffer import HiddenBuffer
from moeaccel.hdl.combine.combiner import Combiner
from moeaccel.hdl.core import Core
from moeaccel.hdl.dispatch.dispatcher import Dispatcher
from moeaccel.hdl.dispatch.sequencer import Sequencer
from moeaccel.hdl.router.route_unit import RouteUnit
from moeaccel.hdl.verilog.verilog_target import add_replicas
from moeaccel.hdl.weights.expert_buffer import ExpertBuffer, amount_bits
from moeaccel.interface.commands import NonFinite
from moeaccel.interface.registers import BUFFER_COUNTERS

__all__ = ["CORE", "READERS", "STREAMER", "Engine"]

CORE = "core"
"""Name of the cores among the submodules, with the number of a channel behind it."""

STREAMER = "streamer"
"""The reader that every channel has (layouts.channel_name)."""

READERS = ("dispatcher", "loader", "combiner", STREAMER)
"""Readers of channel 0; the weight stream comes last, for it asks for all that is left."""

EVENTS = ("busy", "starved_weights", "starved_activations", "stalled_output", "idle",
          "expert_passes", "assignments")
"""Counters that the engine drives."""


class Engine(wiring.Component):
    """Execute one checked command at a time.

    See ``hdl/README.md`` for the picture, and for who waits for whom. A command is done when every
    pass is handed out and has retired, which its drain precedes, and the combiner is idle. A reset
    drops the command; the memory ports must be flushed with it. What is not a core's: x is
    quantised once and goes to all cores, h comes from all of them and goes to all of them, y is
    drained from all.

    Parameters
    ----------
    config : :class:`AcceleratorConfig`
    family : :class:`str`
        FPGA family of the multipliers.

    Members
    -------
    i_job : :py:`In(stream.Signature(layouts.job(config)))`
        Accepted when the one before is done; a ``route`` that ``continues`` a product, beside it.
        A ``route`` holds until ``o_done``.
    o_done : :py:`Out(1)`
        Pulse: everything is written and acknowledged, and ``o_result`` holds. Never for a product
        that ``precedes``, whose end is in that of its ``route``; for a ``route`` that ``precedes``
        when its pairs are on their way to memory.
    o_result : :py:`Out(layouts.job_result(config))`
    dispatcher, loader, combiner, streamer : :py:`Out(layouts.ReadClientSignature(config))`
    streamer1, ... : :py:`Out(layouts.ReadClientSignature(config))`
        Of the other channels.
    combiner_writer : :py:`Out(layouts.WriteClientSignature(config))`
    router, router_writer : :py:`Out(layouts.ReadClientSignature(config))` and its writer
        With a router.
    o_progress : :py:`Out(1)`
        The array started a step, or the router was at work.
    count_busy, ... : pulses for the counters EVENTS
    i_forget, count_buffer_hits, ... : :class:`~moeaccel.hdl.weights.expert_buffer.ExpertBuffer`'s
        With an expert buffer. A reset empties it, too.
    """

    def __init__(self, config: AcceleratorConfig, family="generic"):
        self._config = config
        self._family = family
        streamers = [layouts.channel_name(STREAMER, c) for c in range(1, config.channels)]
        super().__init__({
            "i_job": In(stream.Signature(layouts.job(config))),
            "o_done": Out(1),
            "o_result": Out(layouts.job_result(config)),
            "o_progress": Out(1),
            **{name: Out(layouts.ReadClientSignature(config)) for name in (*READERS, *streamers)},
            "combiner_writer": Out(layouts.WriteClientSignature(config)),
            **({"router": Out(layouts.ReadClientSignature(config)),
                "router_writer": Out(layouts.WriteClientSignature(config))}
               if config.router else {}),
            **{f"count_{name}": Out(1) for name in EVENTS},
            **({"i_forget": In(1), **{
                f"count_{name}": Out(amount_bits(config) if name.startswith("bytes") else 1)
                for name in BUFFER_COUNTERS}} if config.buffer_slots else {}),
        })

    def elaborate(self, platform):
        m = Module()
        config = self._config
        m.submodules.dispatcher = dispatcher = Dispatcher(config)
        m.submodules.loader = loader = ActivationLoader(config)
        m.submodules.sequencer = sequencer = Sequencer(config)
        m.submodules.hidden = hidden = HiddenBuffer(config)
        m.submodules.combiner = combiner = Combiner(config)
        cores = add_replicas(
            m, platform, CORE, functools.partial(Core, config, self._family),
            range(config.channels))
        lead = cores[0]
        job = dispatcher.o_job
        weight = Signal(layouts.internal_float())  # of the slot that the cores look up

        # Commands
        running = Signal()
        m.d.comb += [
            dispatcher.i_job.payload.eq(self.i_job.payload),
            dispatcher.i_job.valid.eq(self.i_job.valid & ~running),
            self.i_job.ready.eq(dispatcher.i_job.ready & ~running),
        ]
        finished = Signal()
        in_machine = Signal(range(config.slot_banks + 1))  # passes handed out and not retired
        m.d.sync += in_machine.eq(
            in_machine + (sequencer.i_pass.valid & sequencer.i_pass.ready) - sequencer.o_retired)
        begin = dispatcher.i_job.valid & dispatcher.i_job.ready
        m.d.comb += [
            finished.eq(running & dispatcher.o_done & (in_machine == 0) & combiner.o_idle),
        ]
        done = finished
        requests = dispatcher.o_weights
        if config.buffer_slots:
            requests = self._buffer(m, dispatcher, cores, running, finished)
        route = None
        if config.router:
            route, done = self._route(m, running, dispatcher, combiner, finished)
        # All of it holds before ``finished``: dispatcher and loader are done, and a pass retires
        # behind its last output.
        result = Signal(layouts.job_result(config), reset_less=True)
        m.d.comb += self.o_result.eq(result)
        m.d.sync += [
            self.o_done.eq(done), loader.i_clear.eq(begin),
            result.bad_expert.eq(dispatcher.o_bad),
            result.expert.eq(dispatcher.o_bad_expert),
            result.word.eq(dispatcher.o_bad_word),
            result.nonfinite.eq(loader.o_nonfinite | dispatcher.o_nonfinite),
            result.what.eq(Mux(loader.o_nonfinite, NonFinite.X, NonFinite.ROUTING_WEIGHT)),
            result.token.eq(Mux(
                loader.o_nonfinite, loader.o_nonfinite_token, dispatcher.o_nonfinite_token)),
        ]
        continues, first = C(0), Signal()  # the first job of a command
        if route is not None:
            continues = self.i_job.p.continues
            before = Signal.like(result)
            with m.If(self.o_done):
                m.d.sync += before.eq(result)
            with m.If(first):
                m.d.sync += before.nonfinite.eq(0)
            with m.If(self.i_job.p.route):
                logit = [result.nonfinite.eq(route.o_nonfinite), result.what.eq(NonFinite.LOGIT),
                         result.token.eq(route.o_token)]
                with m.If(~continues):  # what the others say is of the job before
                    m.d.sync += [result.bad_expert.eq(0), *logit]
                with m.Elif(~loader.o_nonfinite):
                    m.d.sync += logit
            with m.Elif(before.nonfinite):
                m.d.sync += [result.nonfinite.eq(1), result.what.eq(before.what),
                             result.token.eq(before.token)]
        with m.If(begin):
            m.d.sync += running.eq(1)
        with m.Elif(finished):
            m.d.sync += running.eq(0)
        m.d.comb += first.eq(self.i_job.valid & self.i_job.ready & ~continues)
        with m.If(first):
            m.d.sync += [result.overflows.eq(0), result.underflows.eq(0)]
        with m.Else():
            m.d.sync += [
                result.overflows.eq(
                    result.overflows + sum(core.o_overflow for core in cores)
                    + (route.o_saturated if route is not None else 0)),
                result.underflows.eq(result.underflows + sum(core.o_underflow for core in cores)),
            ]

        # Memory
        for name, block in (("dispatcher", dispatcher), ("loader", loader), ("combiner", combiner)):
            wiring.connect(m, outside=wiring.flipped(getattr(self, name)), block=block.reader)
        for channel, core in enumerate(cores):
            outside = getattr(self, layouts.channel_name(STREAMER, channel))
            wiring.connect(m, outside=wiring.flipped(outside), block=core.reader)
        wiring.connect(m, outside=wiring.flipped(self.combiner_writer), block=combiner.writer)
        if route is not None:
            # A single token's logits do not go by the router. At a bad expert there are none, and
            # what is written are sums.
            holds, closed = Signal(), Signal()  # such a job, long before its logits
            m.d.sync += [holds.eq(job.precedes & (job.tokens == 1)),
                         closed.eq(holds & ~dispatcher.o_bad & ~route.o_takes)]
            with m.If(closed):
                m.d.comb += [self.combiner_writer.data.valid.eq(0),
                             combiner.writer.data.ready.eq(0)]

        # Slot tables: one copy for each reader, of what it looks at
        for name, address, answer, fields in (
            ("loader", loader.slot_address, loader.slot_token, ("token",)),
            ("cores", lead.slot_address, weight, ("weight",)),
            ("combiner", combiner.slot_address, combiner.slot_data, ("token", "first", "last")),
        ):
            entry = layouts.slot(config)
            kept = data.StructLayout({field: entry[field].shape for field in fields})
            m.submodules[f"slots_{name}"] = table = Memory(
                shape=kept, depth=config.slot_banks * config.max_slots, init=[])
            write, read = table.write_port(), table.read_port()
            m.d.comb += [
                write.en.eq(dispatcher.slot_w_en), write.addr.eq(dispatcher.slot_w_address),
                read.addr.eq(address)]
            for field in fields:
                m.d.comb += [
                    write.data[field].eq(dispatcher.slot_w_data[field]),
                    (answer[field] if len(fields) > 1 else answer).eq(read.data[field])]

        # Weights: a request is for all channels
        for source, name in ((requests, "i_weights"),
                             (dispatcher.o_section, "i_section")):
            sinks = [getattr(core, name) for core in cores]
            m.d.comb += source.ready.eq(Cat(sink.ready for sink in sinks).all())
            for sink in sinks:
                others = [other.ready for other in sinks if other is not sink]
                m.d.comb += [sink.payload.eq(source.payload),
                             sink.valid.eq(Cat(source.valid, others).all())]

        # Activations
        wiring.connect(m, dispatcher=dispatcher.o_load, loader=loader.i_request)
        m.d.comb += [
            loader.i_two_planes.eq(job.two_planes), loader.i_steps.eq(job.steps_in),
            loader.i_x_address.eq(job.x_address), loader.i_narrow.eq(job.x_narrow),
            loader.i_can_wait.eq(sequencer.o_x_can_wait),
        ]
        for core in cores:
            m.d.comb += [
                core.x_en.eq(loader.w_en), core.x_address.eq(loader.w_address),
                core.x_data.eq(loader.w_data),
                core.h_en.eq(hidden.w_en), core.h_address.eq(hidden.w_address),
                core.h_data.eq(hidden.w_data),
            ]
        wanted = lead.base_address
        of_hidden = Signal()
        m.d.sync += of_hidden.eq(wanted.hidden)
        bases = {}
        hidden_bank = wanted.bank[:layouts.hidden_bank_bits(config)]
        for name, block, address in (("x", loader, Cat(wanted.slot, wanted.bank)),
                                     ("h", hidden, Cat(wanted.slot, hidden_bank))):
            m.submodules[f"{name}_bases"] = memory = Memory(
                shape=signed(layouts.EXPONENT_BITS), depth=1 << len(address), init=[],
                attrs={"no_rw_check": 1})  # a base is never needed in the cycle that writes it
            write, read = memory.write_port(), memory.read_port()
            m.d.comb += [
                write.en.eq(block.base_en), write.addr.eq(block.base_address),
                write.data.eq(block.base_data), read.addr.eq(address),
            ]
            bases[name] = read.data
        m.d.comb += [
            core.base_data.eq(Mux(of_hidden, bases["h"], bases["x"])) for core in cores]

        # Steps. Core 0 speaks for all: a step starts when all have its weights, and nothing behind
        # it waits.
        wiring.connect(m, dispatcher=dispatcher.o_pass, sequencer=sequencer.i_pass)
        for name in ("o_result", "o_hidden_valid", "o_down_done"):
            m.d.sync += [
                Assert(getattr(core, name) == getattr(lead, name), "cores must run in step")
                for core in cores[1:]]
        m.d.comb += [
            dispatcher.i_retired.eq(sequencer.o_retired),
            dispatcher.i_x_free.eq(sequencer.o_x_free),
            sequencer.i_job.eq(job),
            sequencer.i_ended.eq(dispatcher.o_bad),
            sequencer.i_available.eq(Cat(core.o_available for core in cores).all()),
            sequencer.i_free.eq(lead.o_free),
            sequencer.i_result.eq(lead.o_result),
        ]
        for core in cores:
            m.d.comb += [
                core.i_take.eq(sequencer.o_take),
                core.i_tile_end.eq(sequencer.o_tile_end),
                core.i_rewind.eq(sequencer.o_rewind),
                core.i_free.eq(sequencer.o_free),
                core.i_step.eq(sequencer.o_step),
                core.i_tag.eq(sequencer.o_tag),
                core.i_form.eq(sequencer.o_form),
                core.i_grid_exponent.eq(job.grid_exponent),
            ]

        # h
        elements = hidden.i_elements
        m.d.comb += [
            elements.valid.eq(lead.o_hidden_valid),
            elements.p.slot.eq(lead.o_hidden.slot),
            elements.p.index.eq(lead.o_hidden.index),
            elements.p.last.eq(lead.o_hidden.last),
            elements.p.bank.eq(lead.o_hidden.bank),
            elements.p.full.eq(lead.o_hidden.full),
            *(elements.p.value[part * len(cores) + i].eq(core.o_hidden.value[part])
              for i, core in enumerate(cores) for part in range(config.results_per_cycle)),
            hidden.i_start.eq(sequencer.o_hidden_start),
            hidden.i_count.eq(sequencer.o_pass.count),
            hidden.i_two_planes.eq(job.two_planes),
            hidden.i_steps.eq(sequencer.o_pass.work.sections[1].dims.steps),
            hidden.i_bank.eq(sequencer.o_pass.slot_bank),
            sequencer.i_slots_ready.eq(hidden.o_slots_ready),
            sequencer.i_hidden_complete.eq(hidden.o_complete),
            sequencer.i_loaded.eq(loader.o_done),
        ]

        # y
        wiring.connect(m, sequencer=sequencer.o_drain, combiner=combiner.i_drain)
        wiring.connect(m, dispatcher=dispatcher.o_zero, combiner=combiner.i_zero)
        if config.buffer_slots:  # a PREFETCH has no rows
            with m.If(job.prefetch):
                m.d.comb += [combiner.i_zero.valid.eq(0), dispatcher.o_zero.ready.eq(1)]
        m.d.comb += [
            combiner.i_grid_exponent.eq(job.grid_exponent),
            combiner.i_steps_out.eq(job.steps_out),
            combiner.i_y_address.eq(job.y_address),
            combiner.i_narrow.eq(job.y_narrow),
            combiner.i_workspace_address.eq(job.workspace_address),
            combiner.i_can_wait.eq(sequencer.o_y_can_wait),
            sequencer.i_down_done.eq(lead.o_down_done),
            sequencer.i_drained.eq(combiner.o_drained),
        ]
        for i, core in enumerate(cores):
            m.d.comb += [
                core.i_weight.eq(weight),
                core.i_draining.eq(combiner.o_draining),
                core.sums_r_address.eq(combiner.r_address),
                core.sums_w_address.eq(combiner.w_address),
            ]
            for lane, at in enumerate(range(i, len(combiner.r_data), len(cores))):
                m.d.comb += [
                    combiner.r_data[at].eq(core.sums_r_data[lane]),
                    core.sums_w_en[lane].eq(combiner.w_en[at]),
                    core.sums_w_data[lane].eq(combiner.w_data[at]),
                ]

        m.d.comb += [
            self.o_progress.eq(
                sequencer.o_take | (C(0) if route is None else route.o_moves)),
            self.count_busy.eq(sequencer.o_take),
            self.count_starved_weights.eq(sequencer.o_starved_weights),
            self.count_starved_activations.eq(sequencer.o_starved_activations),
            self.count_stalled_output.eq(sequencer.o_stalled_output),
            self.count_idle.eq(~sequencer.o_active),
            self.count_expert_passes.eq(sequencer.o_retired),
            self.count_assignments.eq(dispatcher.o_assignments),
        ]
        return m

    def _buffer(self, m, dispatcher, cores, running, finished):
        """Ask the expert buffer for weights; a PREFETCH is done when no streamer has any left.

        Return its requests.
        """
        m.submodules.buffer = buffer = ExpertBuffer(self._config)
        wiring.connect(m, dispatcher=dispatcher.o_weights, buffer=buffer.i_request)
        m.d.comb += [
            buffer.i_forget.eq(self.i_forget),
            *(getattr(self, f"count_{name}").eq(getattr(buffer, f"count_{name}"))
              for name in BUFFER_COUNTERS)]
        with m.If(dispatcher.o_job.prefetch):
            m.d.comb += finished.eq(
                running & dispatcher.o_done & buffer.o_idle
                & Cat(core.o_weights_idle for core in cores).all())
        return buffer.o_request

    def _route(self, m, running, dispatcher, combiner, finished):
        """Give a job that routes to the router, and to nobody else; it may run beside the product
        whose logits it waits for.

        Return the router, and whether a job is done.
        """
        m.submodules.route = route = RouteUnit(self._config, self._family)
        job, routing, routed, done = self.i_job.p, Signal(), Signal(), Signal()
        m.d.comb += [
            dispatcher.i_job.valid.eq(self.i_job.valid & ~running & ~routing & ~job.route),
            self.i_job.ready.eq(
                Mux(job.route, ~routing, dispatcher.i_job.ready & ~running & ~routing)),
            route.i_job.eq(job),
            route.i_start.eq(self.i_job.valid & self.i_job.ready & job.route),
            route.i_there.eq(~running),
            route.i_none.eq(job.continues & dispatcher.o_bad),
            route.i_logits.valid.eq(
                combiner.writer.data.valid & combiner.writer.data.ready & ~dispatcher.o_bad),
            route.i_logits.data.eq(combiner.writer.data.payload),
            routed.eq(routing & ~running & Mux(job.precedes, route.o_sent, route.o_idle)),
            done.eq((finished & ~dispatcher.o_job.precedes) | routed),
        ]
        m.d.sync += routing.eq((routing | route.i_start) & ~routed)
        # A command is done when the router's writes are, too; its product is what it waits for.
        with m.If(~routing & ~route.o_idle):
            m.d.comb += finished.eq(0)
        m.d.comb += dispatcher.i_pairs.eq(route.o_pairs)
        wiring.connect(m, outside=wiring.flipped(self.router), block=route.reader)
        wiring.connect(m, outside=wiring.flipped(self.router_writer), block=route.writer)
        return route, done
