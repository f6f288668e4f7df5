"""Everything between a checked command and the memory port: dispatch, stream, multiply, combine."""

from amaranth import *
from amaranth.lib import stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from moeaccel.config import AcceleratorConfig
from moeaccel.hdl import layouts
from moeaccel.hdl.activation_loader import ActivationLoader
from moeaccel.hdl.activation_unit import ActivationUnit
from moeaccel.hdl.combiner import Combiner
from moeaccel.hdl.dispatcher import Dispatcher
from moeaccel.hdl.dot_array import DotArray
from moeaccel.hdl.hidden_buffer import HiddenBuffer
from moeaccel.hdl.lane_buffer import LaneBuffer
from moeaccel.hdl.result_serialiser import ResultSerialiser
from moeaccel.hdl.sequencer import Sequencer, step
from moeaccel.hdl.tile_buffer import TileBuffer
from moeaccel.hdl.weight_streamer import WeightStreamer

__all__ = ["READERS", "WRITERS", "Engine"]

READERS = ("dispatcher", "loader", "combiner", "streamer")
"""Readers of memory; the weight stream comes last, for it asks for all that is left."""

WRITERS = ("combiner",)

EVENTS = ("busy", "starved_weights", "starved_activations", "stalled_output", "idle",
          "expert_passes", "assignments")
"""Counters that the engine drives."""


class Engine(wiring.Component):
    """Execute one checked command at a time.

    See ``hdl/README.md`` for the picture. A reset (of the whole engine, by ``ResetInserter``) drops
    the command; the memory port must be flushed with it.

    Parameters
    ----------
    config : :class:`AcceleratorConfig`
    family : :class:`str`
        FPGA family of the multipliers.

    Members
    -------
    i_job : :py:`In(stream.Signature(layouts.job(config)))`
    o_done : :py:`Out(1)`
        Pulse: everything is written and acknowledged; the three results below hold.
    o_nonfinite, o_nonfinite_token, o_overflows
        NaN or infinity in x, and its lowest token; outputs beyond the grid.
    dispatcher, loader, combiner, streamer : :py:`Out(layouts.ReadClientSignature(config))`
    combiner_writer : :py:`Out(layouts.WriteClientSignature(config))`
    count_busy, ... : pulses for the counters EVENTS
    """

    def __init__(self, config: AcceleratorConfig, family="generic"):
        self._config = config
        self._family = family
        super().__init__({
            "i_job": In(stream.Signature(layouts.job(config))),
            "o_done": Out(1),
            "o_nonfinite": Out(1),
            "o_nonfinite_token": Out(layouts.token_bits(config)),
            "o_overflows": Out(32),
            **{name: Out(layouts.ReadClientSignature(config)) for name in READERS},
            **{f"{name}_writer": Out(layouts.WriteClientSignature(config)) for name in WRITERS},
            **{f"count_{name}": Out(1) for name in EVENTS},
        })

    def elaborate(self, platform):
        m = Module()
        config = self._config
        m.submodules.dispatcher = dispatcher = Dispatcher(config)
        m.submodules.streamer = streamer = WeightStreamer(config)
        m.submodules.tiles = tiles = TileBuffer(config)
        m.submodules.loader = loader = ActivationLoader(config)
        m.submodules.x_lanes = x_lanes = LaneBuffer(config, 2)
        m.submodules.h_lanes = h_lanes = LaneBuffer(config, 1)
        m.submodules.sequencer = sequencer = Sequencer(config)
        tag_shape = layouts.result_tag(config)
        m.submodules.array = array = DotArray(config, self._family, tag_width=tag_shape.size)
        m.submodules.serialiser = serialiser = ResultSerialiser(config)
        m.submodules.activation = activation = ActivationUnit(config, self._family)
        m.submodules.hidden = hidden = HiddenBuffer(config)
        m.submodules.combiner = combiner = Combiner(config, self._family)
        job = dispatcher.o_job

        # Commands
        wiring.connect(m, job=wiring.flipped(self.i_job), dispatcher=dispatcher.i_job)
        running = Signal()
        finished = Signal()
        in_machine = Signal(2)  # passes handed out and not retired
        m.d.sync += in_machine.eq(
            in_machine + (sequencer.i_pass.valid & sequencer.i_pass.ready) - sequencer.o_retired)
        overflows = Signal(32)
        begin = self.i_job.valid & self.i_job.ready
        m.d.comb += [
            finished.eq(running & dispatcher.o_done & (in_machine == 0) & combiner.o_idle),
            loader.i_clear.eq(begin),
            self.o_nonfinite.eq(loader.o_nonfinite),
            self.o_nonfinite_token.eq(loader.o_nonfinite_token),
            self.o_overflows.eq(overflows),
        ]
        m.d.sync += self.o_done.eq(finished)
        with m.If(begin):
            m.d.sync += [running.eq(1), overflows.eq(0)]
        with m.Else():
            with m.If(finished):
                m.d.sync += running.eq(0)
            m.d.sync += overflows.eq(overflows + combiner.o_overflow)

        # Memory
        for name, block in (("dispatcher", dispatcher), ("loader", loader), ("combiner", combiner),
                            ("streamer", streamer)):
            wiring.connect(m, outside=wiring.flipped(getattr(self, name)), block=block.reader)
        wiring.connect(m, outside=wiring.flipped(self.combiner_writer), block=combiner.writer)

        # Slot tables: one copy for each reader
        entry = layouts.slot(config)
        for name, address, answer, field in (
            ("loader", loader.slot_address, loader.slot_token, "token"),
            ("combiner", combiner.slot_address, combiner.slot_data, None),
        ):
            shape = layouts.token_bits(config) if field else entry
            m.submodules[f"slots_{name}"] = table = Memory(
                shape=shape, depth=2 * config.max_slots, init=[])
            write, read = table.write_port(), table.read_port()
            value = dispatcher.slot_w_data
            m.d.comb += [
                write.en.eq(dispatcher.slot_w_en), write.addr.eq(dispatcher.slot_w_address),
                write.data.eq(value[field] if field else value),
                read.addr.eq(address), answer.eq(read.data),
            ]

        # Weights
        wiring.connect(m, dispatcher=dispatcher.o_weights, streamer=streamer.i_request)
        wiring.connect(m, dispatcher=dispatcher.o_section, tiles=tiles.i_section)
        wiring.connect(m, streamer=streamer.o_word, tiles=tiles.i_word)

        # Activations
        wiring.connect(m, dispatcher=dispatcher.o_load, loader=loader.i_request)
        m.d.comb += [
            loader.i_two_planes.eq(job.two_planes), loader.i_steps.eq(job.steps_in),
            loader.i_x_address.eq(job.x_address),
        ]
        for lanes, source in ((x_lanes, loader), (h_lanes, hidden)):
            m.d.comb += [
                lanes.w_en.eq(source.w_en), lanes.w_address.eq(source.w_address),
                lanes.w_data.eq(source.w_data),
            ]
        base = layouts.base_address(config)
        m.submodules.bases = bases = Memory(
            shape=signed(layouts.EXPONENT_BITS), depth=1 << base.size, init=[])
        x_base, h_base, base_read = bases.write_port(), bases.write_port(), bases.read_port()
        m.d.comb += [
            x_base.en.eq(loader.base_en), x_base.data.eq(loader.base_data),
            x_base.addr.eq(Cat(loader.base_address, C(0, 1))),
            h_base.en.eq(hidden.base_en), h_base.data.eq(hidden.base_data),
            h_base.addr.eq(Cat(hidden.base_address, C(0b10, 2))),
            base_read.addr.eq(serialiser.base_address),
            serialiser.base_data.eq(base_read.data),
        ]

        # Steps: the tile and lane buffers answer together, one cycle after the step starts
        assert tiles.READ_LATENCY_CYCLES == x_lanes.READ_LATENCY_CYCLES == 1
        wiring.connect(m, dispatcher=dispatcher.o_pass, sequencer=sequencer.i_pass)
        started = Signal(step(config))
        tag = Signal(tag_shape)
        m.d.comb += [
            dispatcher.i_retired.eq(sequencer.o_retired),
            sequencer.i_job.eq(job),
            sequencer.i_available.eq(tiles.o_available),
            tiles.i_take.eq(sequencer.o_take),
            tiles.i_tile_end.eq(sequencer.o_tile_end),
            tiles.i_rewind.eq(sequencer.o_rewind),
            tiles.i_free.eq(sequencer.o_free),
            x_lanes.r_address.eq(Cat(sequencer.o_step.lane_address, sequencer.o_step.x_bank)),
            x_lanes.r_en.eq(sequencer.o_take & ~sequencer.o_step.hidden),
            h_lanes.r_address.eq(sequencer.o_step.lane_address),
            h_lanes.r_en.eq(sequencer.o_take & sequencer.o_step.hidden),
            array.i_first.eq(started.first),
            array.i_last.eq(started.last),
            array.i_format.eq(job.format),
            array.i_codes.eq(tiles.o_codes),
            array.i_scales.eq(tiles.o_scales),
            array.i_lanes.eq(Mux(started.hidden, h_lanes.r_data, x_lanes.r_data)),
            array.i_tag.eq(tag),
        ]
        m.d.sync += [
            array.i_valid.eq(sequencer.o_take), started.eq(sequencer.o_step),
            tag.eq(sequencer.o_tag),
        ]

        # Results
        wiring.connect(m, tiles=tiles.o_row_exponents, serialiser=serialiser.i_row_exponents)
        element = serialiser.o_element
        m.d.comb += [
            serialiser.i_valid.eq(array.o_valid),
            serialiser.i_sums.eq(array.o_sums),
            serialiser.i_tag.eq(array.o_tag),
            sequencer.i_free.eq(serialiser.o_free),
            sequencer.i_result.eq(array.o_valid),
            activation.i_element.valid.eq(element.valid & ~element.p.down),
            activation.i_element.payload.eq(element.payload),
            combiner.i_valid.eq(element.valid & element.p.down),
            combiner.i_element.slot.eq(element.p.slot),
            combiner.i_element.row.eq(element.p.row),
            combiner.i_element.value.eq(element.p.value),
            combiner.i_slot_bank.eq(element.p.slot_bank),
            combiner.i_fresh.eq(element.p.fresh),
            combiner.i_last.eq(element.p.last),
        ]

        # h
        wiring.connect(m, activation=activation.o_element, hidden=hidden.i_element)
        m.d.comb += [
            hidden.i_start.eq(sequencer.o_hidden_start),
            hidden.i_count.eq(sequencer.o_pass.count),
            hidden.i_two_planes.eq(job.two_planes),
            hidden.i_steps.eq(job.steps_hidden),
            sequencer.i_slots_ready.eq(hidden.o_slots_ready),
            sequencer.i_loaded.eq(loader.o_done),
        ]

        # y
        wiring.connect(m, sequencer=sequencer.o_drain, combiner=combiner.i_drain)
        wiring.connect(m, dispatcher=dispatcher.o_zero, combiner=combiner.i_zero)
        m.d.comb += [
            combiner.i_grid_exponent.eq(job.grid_exponent),
            combiner.i_steps_out.eq(job.steps_out),
            combiner.i_y_address.eq(job.y_address),
            combiner.i_workspace_address.eq(job.workspace_address),
            sequencer.i_down_done.eq(combiner.o_pass_done),
            sequencer.i_drained.eq(combiner.o_drained),
        ]

        m.d.comb += [
            self.count_busy.eq(sequencer.o_take),
            self.count_starved_weights.eq(sequencer.o_starved_weights),
            self.count_starved_activations.eq(sequencer.o_starved_activations),
            self.count_stalled_output.eq(sequencer.o_stalled_output),
            self.count_idle.eq(~sequencer.o_active),
            self.count_expert_passes.eq(sequencer.o_retired),
            self.count_assignments.eq(dispatcher.o_assignments),
        ]
        return m
