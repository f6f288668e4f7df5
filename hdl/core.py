"""One memory channel's part of the machine: its weights, its array, its rows of h and y."""

from amaranth import *
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import exact_log2

from moeaccel.config import AcceleratorConfig
from moeaccel.hdl import layouts
from moeaccel.hdl.activations.activation_unit import ActivationUnit
from moeaccel.hdl.activations.lane_buffer import LaneBuffer
from moeaccel.hdl.array.dot_array import DotArray
from moeaccel.hdl.array.result_serialiser import ResultSerialiser
from moeaccel.hdl.combine.row_sums import RowSums, stripe_address, sums_word
from moeaccel.hdl.dispatch.sequencer import step
from moeaccel.hdl.weights.tile_buffer import TileBuffer
from moeaccel.hdl.weights.weight_streamer import WeightStreamer

__all__ = ["BUSY", "Core"]

BUSY = ("array", "tiles", "streamer", "serialiser", "x_lanes", "i_")
"""What the names of those submodules and ports begin with that change in nearly every cycle in
which there is work: all between weights and sums. A simulator that skips what is idle need not look
there."""


class Core(wiring.Component):
    """Multiply the rows of one channel with the tokens that all cores hold.

    ::

        i_weights --> WeightStreamer --> TileBuffer --+
                                                      v
        x_*, h_* ---> x, h LaneBuffer ------------> DotArray --> ResultSerialiser --> ActivationUnit
                                                                        |                   |
                                                                     RowSums            o_hidden

    What is behind the array is there as often as results come in a cycle.

    Cores start every step in the same cycle: ``i_take`` comes when all of them have its weights.
    So whatever does not depend on weights is the same in all cores in every cycle: ``o_free``,
    ``o_result``, ``base_address``, ``slot_address``, ``o_down_done`` and what is beside the value
    of ``o_hidden``; core 0 speaks for all.

    Parameters
    ----------
    config : :class:`AcceleratorConfig`
    family : :class:`str`
        FPGA family of the multipliers.

    Members
    -------
    i_weights, i_section
        What to stream, and the shapes of the sections in it.
    o_weights_idle : :py:`Out(1)`
        With an expert buffer: nothing of ``i_weights`` is on its way, two cycles behind it.
    reader : :py:`Out(layouts.ReadClientSignature(config))`
    o_available, i_take, i_tile_end, i_rewind, i_free
        Read side of the tile buffer.
    i_step, i_tag : :py:`In(step(config))`, :py:`In(layouts.result_tag(config))`
        The step that ``i_take`` starts.
    i_form : :py:`In(layouts.hidden_form(config))`
        Of the pass whose rows of h are computed.
    i_grid_exponent
        Of the command.
    x_en, x_address, x_data, h_en, h_address, h_data
        Write ports of the lane buffers.
    o_free, o_result
        Results that have a place behind the array; pulse, one has arrived there.
    base_address, base_data
        Base exponents, one cycle later.
    o_hidden_valid, o_hidden
        Elements of h of this core alone: those of layouts.hidden_elements for one channel.
    slot_address, i_weight
        Slot and slot table bank of an output, and the slot's weight, one cycle later.
    o_down_done : :py:`Out(1)`
        Pulse: the last output of a pass is in the y buffer.
    o_overflow, o_underflow
        How many outputs are beyond the grid, and how many the grid makes zero, in this cycle.
    i_draining, sums_r_address, sums_r_data, sums_w_en, sums_w_address, sums_w_data
        The y buffer's ports for the Combiner.
    """

    def __init__(self, config: AcceleratorConfig, family="generic"):
        self._config = config
        self._family = family
        lanes = data.ArrayLayout(layouts.lane(config), config.token_lanes)
        word = sums_word(config)
        super().__init__({
            "i_weights": In(stream.Signature(layouts.stream_request(config))),
            "i_section": In(stream.Signature(layouts.section(config))),
            **({"o_weights_idle": Out(1)} if config.buffer_slots else {}),
            "reader": Out(layouts.ReadClientSignature(config)),
            "o_available": Out(1),
            "i_take": In(1),
            "i_tile_end": In(1),
            "i_rewind": In(1),
            "i_free": In(1),
            "i_step": In(step(config)),
            "i_tag": In(layouts.result_tag(config)),
            "i_form": In(layouts.hidden_form(config)),
            "i_grid_exponent": In(signed(8)),
            "x_en": In(config.token_lanes),
            "x_address": In(layouts.lane_address_bits(config) + 1),
            "x_data": In(lanes),
            "h_en": In(config.token_lanes),
            "h_address": In(layouts.lane_address_bits(config)),
            "h_data": In(lanes),
            "o_free": Out(range(config.result_places + 1)),
            "o_result": Out(1),
            "base_address": Out(layouts.base_address(config)),
            "base_data": In(signed(layouts.EXPONENT_BITS)),
            "o_hidden_valid": Out(1),
            "o_hidden": Out(layouts.hidden_elements(config.replace(channels=1))),
            "slot_address": Out(layouts.slot_address_bits(config)),
            "i_weight": In(layouts.internal_float()),
            "o_down_done": Out(1),
            "o_overflow": Out(range(config.results_per_cycle + 1)),
            "o_underflow": Out(range(config.results_per_cycle + 1)),
            "i_draining": In(config.y_banks),
            "sums_r_address": In(stripe_address(config)),
            "sums_r_data": Out(word),
            "sums_w_en": In(word.length),
            "sums_w_address": In(stripe_address(config)),
            "sums_w_data": In(word),
        })

    def elaborate(self, platform):
        m = Module()
        config = self._config
        m.submodules.streamer = streamer = WeightStreamer(config)
        m.submodules.tiles = tiles = TileBuffer(config)
        m.submodules.x_lanes = x_lanes = LaneBuffer(config, 2)
        m.submodules.h_lanes = h_lanes = LaneBuffer(config, 1)
        tag_shape = layouts.result_tag(config)
        m.submodules.array = array = DotArray(config, self._family, tag_width=tag_shape.size)
        results = config.results_per_cycle
        serialisers = [ResultSerialiser(config, part) for part in range(results)]
        activations = [ActivationUnit(config, self._family, part) for part in range(results)]
        sums = [RowSums(config, self._family) for _ in range(results)]
        for name, parts in (
                ("serialiser", serialisers), ("activation", activations), ("sums", sums)):
            for part, block in enumerate(parts):
                m.submodules[f"{name}{part or ''}"] = block

        # Weights
        wiring.connect(m, wiring.flipped(self.i_weights), streamer.i_request)
        wiring.connect(m, wiring.flipped(self.i_section), tiles.i_section)
        wiring.connect(m, wiring.flipped(self.reader), streamer.reader)
        wiring.connect(m, streamer.o_word, tiles.i_word)
        if config.buffer_slots:
            m.d.comb += self.o_weights_idle.eq(streamer.o_idle)

        # Steps: the tile buffer answers a cycle after the step starts, the lane buffers when the
        # array wants lanes
        assert tiles.READ_LATENCY_CYCLES == 1
        assert x_lanes.READ_LATENCY_CYCLES == 1 + array.LANES_LATER_CYCLES == 3
        started = Signal(step(config))
        tag = Signal(tag_shape)
        hidden = Signal()
        of_hidden = Signal()
        # A token's planes are in lanes side by side.
        tokens = [tag.slots > lane for lane in range(config.token_lanes)]
        pairs = [tokens[lane >> 1] for lane in range(config.token_lanes)]
        m.d.comb += [
            self.o_available.eq(tiles.o_available),
            tiles.i_take.eq(self.i_take),
            tiles.i_tile_end.eq(self.i_tile_end),
            tiles.i_rewind.eq(self.i_rewind),
            tiles.i_free.eq(self.i_free),
            x_lanes.r_address.eq(Cat(self.i_step.lane_address, self.i_step.x_bank)),
            x_lanes.r_en.eq(self.i_take & ~self.i_step.hidden),
            h_lanes.r_address.eq(self.i_step.lane_address),
            h_lanes.r_en.eq(self.i_take & self.i_step.hidden),
            array.i_first.eq(started.first),
            array.i_last.eq(started.last),
            array.i_used.eq(Mux(tag.two_planes, Cat(pairs), Cat(tokens))),
            array.i_format.eq(started.format),
            array.i_codes.eq(tiles.o_codes),
            array.i_scales.eq(tiles.o_scales),
            *(getattr(array, f"i_{name}").eq(getattr(tiles, f"o_{name}"))
              for name in ("zeros", "minima", "selects") if hasattr(tiles, f"o_{name}")),
            array.i_lanes.eq(Mux(of_hidden, h_lanes.r_data, x_lanes.r_data)),
            array.i_tag.eq(tag),
        ]
        m.d.sync += [array.i_valid.eq(self.i_take), started.eq(self.i_step), tag.eq(self.i_tag),
                     hidden.eq(started.hidden), of_hidden.eq(hidden)]
        for name, lanes in (("x", x_lanes), ("h", h_lanes)):
            m.d.comb += [
                lanes.w_en.eq(getattr(self, f"{name}_en")),
                lanes.w_address.eq(getattr(self, f"{name}_address")),
                lanes.w_data.eq(getattr(self, f"{name}_data")),
            ]

        # Results: consecutive rows come at once; each part has its own
        exponents = tiles.o_row_exponents
        lead, lead_element = serialisers[0], serialisers[0].o_element
        m.d.comb += [
            exponents.ready.eq(lead.i_row_exponents.ready),
            self.o_free.eq(lead.o_free),
            self.o_result.eq(array.o_valid),
            self.base_address.eq(lead.base_address),
            self.slot_address.eq(Cat(lead_element.p.slot, lead_element.p.slot_bank)),
            self.o_down_done.eq(sums[0].o_pass_done),
            self.o_overflow.eq(sum(part.o_overflow for part in sums)),
            self.o_underflow.eq(sum(part.o_underflow for part in sums)),
        ]
        for part, serialiser in enumerate(serialisers):
            m.d.comb += [
                serialiser.i_valid.eq(array.o_valid),
                serialiser.i_tag.eq(array.o_tag),
                serialiser.i_row_exponents.valid.eq(exponents.valid),
                serialiser.i_row_exponents.payload.eq(Cat(
                    exponents.payload[row] for row in range(part, config.rows, results))),
                serialiser.base_data.eq(self.base_data),
            ]
            if config.bias:
                m.d.comb += serialiser.i_row_biases.eq(Cat(
                    tiles.o_row_biases[row] for row in range(part, config.rows, results)))
            if results == 1:
                m.d.comb += serialiser.i_sums.eq(array.o_sums)
            else:  # in the order of its rows
                with m.Switch(data.View(tag_shape, array.o_tag).row_order):
                    for number, order in enumerate(layouts.row_orders(config)):
                        with m.Case(number):
                            m.d.comb += serialiser.i_sums.eq(Cat(
                                array.o_sums[entry * config.token_lanes + lane]
                                for entry in layouts.rows_of_part(config, order, part)
                                for lane in range(config.token_lanes)))
            element, activation, own = serialiser.o_element, activations[part], sums[part]
            m.d.comb += [
                activation.i_element.valid.eq(element.valid),
                activation.i_element.payload.eq(element.payload),
                activation.i_form.eq(self.i_form),
                self.o_hidden.value[part].eq(activation.o_element.p.value),
                own.i_valid.eq(element.valid & element.p.combine),
                own.i_element.slot.eq(element.p.slot),
                own.i_element.row.eq(element.p.row >> exact_log2(results)),
                own.i_element.value.eq(element.p.value),
                own.i_fresh.eq(element.p.fresh),
                own.i_bank.eq(element.p.y_bank),
                own.i_last.eq(element.p.last),
                own.i_weight.eq(self.i_weight),
                own.i_grid_exponent.eq(self.i_grid_exponent),
                own.i_draining.eq(self.i_draining),
                own.r_address.eq(self.sums_r_address),
                own.w_address.eq(self.sums_w_address),
                own.w_en.eq(Cat(self.sums_w_en[part::results])),
            ]
            for lane, at in enumerate(range(part, self.sums_r_data.shape().length, results)):
                m.d.comb += [
                    self.sums_r_data[at].eq(own.r_data[lane]),
                    own.w_data[lane].eq(self.sums_w_data[at]),
                ]
        first = activations[0].o_element
        m.d.comb += [
            self.o_hidden_valid.eq(first.valid),
            self.o_hidden.slot.eq(first.p.slot),
            self.o_hidden.index.eq(first.p.index),
            self.o_hidden.last.eq(first.p.last),
            self.o_hidden.bank.eq(first.p.bank),
            self.o_hidden.full.eq(activations[-1].o_element.valid),
        ]
        if results > 1:
            m.d.comb += activations[0].i_up.eq(serialisers[1].o_element.p.value)
        return m
