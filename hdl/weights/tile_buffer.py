"""Parses the weight stream into steps and keeps each tile for its replays."""

import functools
import operator
from dataclasses import dataclass

from amaranth import *
from amaranth.lib import data, fifo, memory, stream, wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import exact_log2

from moeaccel.config import BLOCK, AcceleratorConfig
from moeaccel.formats import (
    MINIMUM_SHIFT_BITS,
    MINIMUM_SHIFT_MAX,
    SHIFT_BITS,
    SIGNIFICAND_BITS,
    ZERO_POINT_BITS,
)
from moeaccel.hdl import layouts

__all__ = ["TileBuffer", "minimum_layout", "scale_layout", "select_bits", "zero_layout"]


def scale_layout(config):
    """Return a step's scales: for each field of each part of a multiplier row a significand (bits 0
    to 10) and a shift (above); entry ``(multiplier row * splits + part) * 2 + field``."""
    return data.ArrayLayout(16, 2 * config.row_multipliers * config.splits)


def zero_layout(config):
    """Return a step's zero points: for each field of a multiplier row."""
    return data.ArrayLayout(ZERO_POINT_BITS, 2 * config.row_multipliers)


def minimum_layout(config):
    """Return a step's minima: for each field of a multiplier row a significand, a shift above it,
    and above that whether it is negative."""
    return data.ArrayLayout(
        data.StructLayout({"significand": SIGNIFICAND_BITS, "shift": MINIMUM_SHIFT_BITS,
                           "negative": 1}), 2 * config.row_multipliers)


def select_bits(config):
    """Return the bits of a step's pattern: for each multiplier of a lane, which of four."""
    return 2 * BLOCK * config.row_multipliers


@dataclass(frozen=True)
class _Kind:
    """How scales are stored, and whose they are: what formats may have in common."""

    packed: bool
    parts: int
    scales_per_step: int
    scale_bits: int
    real_scale: bool
    max_shift: int
    zero_point: bool
    minimum: bool


def _kind(fmt):
    return _Kind(fmt.packed, fmt.parts, fmt.scales_per_step, fmt.scale_bits, fmt.real_scale,
                 fmt.max_shift, fmt.zero_point, fmt.minimum)


def _entry_bytes(fmt):
    """Return the bytes of the scales of a tile's step for each multiplier row."""
    return fmt.rows(1) * fmt.scales_per_step * fmt.scale_bits // 8


def _entries(config, kind, scale_word):
    """Return the scales of a step, as :func:`scale_layout` has them, for the low end of a word."""
    entries = []
    for rm in range(config.row_multipliers):
        for part in range(config.splits):
            for field in range(2):
                # Parts are as far apart as they are in the array: the first, middle, or all ones.
                within = kind.parts * kind.scales_per_step
                at, other = divmod(part, config.splits // within)
                if other:
                    entries.append(C(0, 16))
                    continue
                row_part, scale = (0, at) if kind.parts == 1 else (at, 0)
                row = rm * kind.parts + row_part
                if kind.packed:
                    row = 2 * row + field
                stored = scale_word.word_select(row * kind.scales_per_step + scale,
                                                kind.scale_bits)
                if kind.real_scale:
                    significand, shift = stored[:SIGNIFICAND_BITS], stored[SIGNIFICAND_BITS:]
                else:
                    significand, shift = C(1, SIGNIFICAND_BITS), stored
                shift = shift[:SHIFT_BITS]
                if kind.max_shift < (1 << SHIFT_BITS) - 1:
                    shift = Mux(shift > kind.max_shift, kind.max_shift, shift)[:SHIFT_BITS]
                entries.append(Cat(significand, shift))
    return entries


class TileBuffer(wiring.Component):
    """Take a section's words apart and hold its steps in a ring until the array has replayed them.

        i_section --> [what comes next] ---------+
        i_word -----> [row word]  --> per tile --|--> [FIFO] --------------> o_row_exponents
                 |--> [scale word] --> per step -|--+
                 |--> [pattern word] > per step -|--+
                 +------------- weight word -----|--+--> [ring, tile_words] --> o_codes, o_scales

    Words come in the order of :mod:`moeaccel.image`. A step is its weight word and the scales of
    its rows, in one form for all formats: an 11-bit significand (1 in power-of-two formats) and a
    5-bit shift, at most the format's largest. They are in the order of the array
    (:func:`scale_layout`): both fields of an 8-bit weight have the row's, and parts that a format
    has not have zeros. Zero points, minima and patterns (which of its four elements of x each
    multiplier takes) come with them. The word of a 2-bit format becomes two steps, one a cycle; the
    second of a tile with an odd number of steps is left out, in its cycle nothing enters.

    Write side: one word per cycle while the ring and the FIFO of row exponents have room, also
    across tiles; between sections one cycle is lost. Read side: when ``o_available``, the sequencer
    may strobe ``i_take``; the step's data is on the outputs READ_LATENCY_CYCLES after it, until the
    next one's. One take per cycle, also across rewinds and tile ends; a word may be taken two
    cycles after it was accepted, and what is taken makes room three cycles later. A tile's room is
    free when its last group has ended; to free it word by word, so that the next tile is not held
    up by a ring which one tile nearly fills, hold ``i_free`` during the last group. Reset
    empties everything.

    Parameters
    ----------
    config : :class:`AcceleratorConfig`
    row_exponent_depth : :class:`int`
        Tiles whose row exponents are stored; at least 4. Words wait when another ROWS_MARGIN would
        not fit.

    Members
    -------
    i_section : :py:`In(stream.Signature(layouts.section(config)))`
        Shape of the words that follow: format, steps and tiles (both at least 1), and whether rows
        have biases. One waits while one is parsed.
    i_word : :py:`In(stream.Signature(8 * config.word_bytes))`
    o_available : :py:`Out(1)`
        The current step can be taken.
    i_take : :py:`In(1)`
        The array starts the current step; only when ``o_available``.
    i_tile_end : :py:`In(1)`
        With ``i_take``: this is the last step of the tile.
    i_rewind : :py:`In(1)`
        With ``i_tile_end``: the tile is needed again; the current step is its first.
    i_free : :py:`In(1)`
        With ``i_take``, optional: the step is not needed again. Never in a group that ends with
        ``i_rewind``.
    o_codes : :py:`Out(8 * config.word_bytes)`
    o_scales : :py:`Out(scale_layout(config))`
    o_zeros, o_minima, o_selects : :py:`Out(zero_layout(config))`,
            :py:`Out(minimum_layout(config))`, :py:`Out(select_bits(config))`
        Where the configuration has formats with zero points, with minima, with N:M patterns.
    o_row_exponents : :py:`Out(stream.Signature(ArrayLayout(signed(16), config.rows)))`
        One element for each tile, in order.
    o_row_biases : :py:`Out(ArrayLayout(16, config.rows))`
        Of a configuration with biases: those of the same tile, where its section has some.
    """

    READ_LATENCY_CYCLES = 1
    ROWS_MARGIN = 3
    """Tiles that may begin before the FIFO of row exponents is seen to be nearly full."""

    def __init__(self, config, *, row_exponent_depth=32):
        if not isinstance(config, AcceleratorConfig):
            raise TypeError(f"config must be an AcceleratorConfig, not {config!r}")
        if not isinstance(row_exponent_depth, int) or row_exponent_depth < 4:
            raise ValueError("row_exponent_depth must be an integer of at least 4, "
                             f"not {row_exponent_depth!r}")
        self._config = config
        self._row_exponent_depth = row_exponent_depth
        super().__init__({
            "i_section": In(stream.Signature(layouts.section(config))),
            "i_word": In(stream.Signature(8 * config.word_bytes)),
            "o_available": Out(1),
            "i_take": In(1),
            "i_tile_end": In(1),
            "i_rewind": In(1),
            "i_free": In(1),
            "o_codes": Out(8 * config.word_bytes),
            "o_scales": Out(scale_layout(config)),
            **({"o_zeros": Out(zero_layout(config))} if config.zero_points else {}),
            **({"o_minima": Out(minimum_layout(config))} if config.minima else {}),
            **({"o_selects": Out(select_bits(config))} if config.parts > 1 else {}),
            "o_row_exponents": Out(stream.Signature(data.ArrayLayout(signed(16), config.rows))),
            **({"o_row_biases": Out(data.ArrayLayout(16, config.rows))} if config.bias else {}),
        })

    @property
    def config(self):
        """Configuration."""
        return self._config

    @property
    def row_exponent_depth(self):
        """Tiles whose row exponents are stored."""
        return self._row_exponent_depth

    def elaborate(self, platform):
        config = self._config
        m = Module()
        multiplier_rows, rows = config.row_multipliers, config.rows
        word_bits = 8 * config.word_bytes
        depth = config.tile_words

        # -- one word waits; that the parser accepts it in this cycle is known from a register -----
        word = Signal(word_bits, reset_less=True)
        word_valid, word_follows = Signal(), Signal()
        accepted = Signal()  # it, or the first of its two steps
        word_used = Signal()
        incoming = Signal()
        m.d.comb += [
            self.i_word.ready.eq(~word_valid | word_used),
            incoming.eq(self.i_word.valid & self.i_word.ready),
            word_follows.eq(incoming | (word_valid & ~word_used)),
        ]
        m.d.sync += word_valid.eq(word_follows)
        with m.If(incoming):
            m.d.sync += word.eq(self.i_word.payload)

        # -- sections: one waits, one is parsed ---------------------------------------------------
        waiting = Signal(layouts.section(config))
        waiting_valid = Signal()
        active = Signal()
        section_end = Signal()  # its last word is accepted
        load = Signal()
        m.d.comb += [
            load.eq(waiting_valid & ~active),
            self.i_section.ready.eq(~waiting_valid),
        ]
        with m.If(self.i_section.valid & self.i_section.ready):
            m.d.sync += [
                waiting_valid.eq(1), waiting.eq(self.i_section.payload),
                Assert((self.i_section.p.steps != 0) & (self.i_section.p.tiles != 0),
                       "a section must not be empty"),
                Assert(self.i_section.p.steps <= depth, "a tile must fit the ring"),
            ]
        with m.If(section_end):
            m.d.sync += active.eq(0)

        # -- where the parser is ------------------------------------------------------------------
        # Positions within row and scale words count in units of 16 and 8 bits for each multiplier
        # row. A word is used up when its position wraps; until then it is shifted, so that what is
        # needed next is at its low end.
        formats = config.weight_formats
        halved = [f for f in formats if f.steps_per_word > 1]
        kinds = list(dict.fromkeys(_kind(f) for f in formats))
        kind = Signal(range(max(2, len(kinds))))
        sparse = Signal()
        row_strides = sorted({f.rows(1) for f in formats})
        bias_strides = sorted({2 * one for one in row_strides if config.bias})
        row_strides = sorted({*row_strides, *bias_strides})
        scale_strides = sorted({_entry_bytes(f) for f in formats})
        assert row_strides[-1] <= 1 << 4 and scale_strides[-1] < 1 << 5
        group_last = Signal(range(max(f.steps_per_group for f in formats)))  # steps_per_group - 1
        # Down to 0 and to 1; that they are there is known from registers.
        steps_last, steps_left = (Signal(layouts.steps_bits(config)) for _ in range(2))
        tiles_left = Signal(self.i_section.p.tiles.shape())
        one_step, tile_end, tiles_end = Signal(), Signal(), Signal()
        group_step = Signal.like(group_last)
        row_position, scale_position = Signal(4), Signal(5)
        row_stride, scale_stride = Signal(5), Signal(5)  # powers of two
        pattern_position = Signal(2)
        # What is still to come before the next weight; then that.
        row_next, scale_next, pattern_next, weight_next = Signal(), Signal(), Signal(), Signal()
        step_first = Signal()
        group_end = Signal()
        row_after, scale_after = Signal(4), Signal(5)
        row_wraps, scale_wraps = Signal(), Signal()  # one of these is 0
        # With this weight word; the next is no weight.
        rows_used, scales_used, patterns_used = Signal(), Signal(), Signal()
        others_used, two_next = Signal(), Signal()
        weight_accepted = Signal()
        # Of a word with two steps: it is the second one's turn, which there is not.
        two_steps, second, blank = Signal(), Signal(), Signal()
        steps_before = Signal.like(steps_last)  # the last step, or half of a word
        m.d.comb += [
            word_used.eq(accepted & ~(weight_next & two_steps & ~second)),
            weight_accepted.eq(accepted & weight_next),
            group_end.eq(tile_end | (group_step == group_last)),
            row_after.eq(row_position + row_stride),
            scale_after.eq(scale_position + scale_stride),
            rows_used.eq(tile_end & row_wraps),
            scales_used.eq(group_end & scale_wraps),
            patterns_used.eq(sparse & (pattern_position == 3)),
            others_used.eq(rows_used | scales_used | patterns_used),
            two_next.eq((row_next & (scale_next | pattern_next)) | (scale_next & pattern_next)),
            section_end.eq(weight_accepted & tile_end & tiles_end),
        ]
        row_word, scale_word = (Signal(word_bits, reset_less=True) for _ in range(2))
        pattern_word = Signal(word_bits, reset_less=True)

        def moved(value, stride, strides, bits):
            """Return a word without its low entries, of which it has ``stride``."""
            return functools.reduce(operator.or_, (
                (value >> bits * one * multiplier_rows)
                & stride[exact_log2(one)].replicate(word_bits) for one in strides))

        with m.If(accepted):
            with m.If(row_next):
                m.d.sync += [row_word.eq(word), row_next.eq(0),
                             weight_next.eq(~(scale_next | pattern_next))]
            with m.Elif(scale_next):
                m.d.sync += [scale_word.eq(word), scale_next.eq(0), weight_next.eq(~pattern_next)]
            with m.Elif(pattern_next):
                m.d.sync += [pattern_word.eq(word), pattern_next.eq(0), weight_next.eq(1)]
            with m.Else():
                m.d.sync += [row_next.eq(rows_used), scale_next.eq(scales_used),
                             pattern_next.eq(patterns_used), weight_next.eq(~others_used),
                             pattern_position.eq(pattern_position + 1),
                             pattern_word.eq(pattern_word >> select_bits(config)),
                             steps_left.eq(steps_left - 1), tile_end.eq(steps_left == 1),
                             step_first.eq(0), group_step.eq(group_step + 1),
                             second.eq(two_steps & ~second)]
                with m.If(group_end):
                    m.d.sync += [group_step.eq(0), scale_position.eq(scale_after),
                                 scale_wraps.eq(scale_after + scale_stride == 1 << 5),
                                 scale_word.eq(moved(
                                     scale_word, scale_stride, scale_strides, 8))]
                with m.If(tile_end):
                    m.d.sync += [steps_left.eq(steps_last), tile_end.eq(one_step),
                                 step_first.eq(1), tiles_left.eq(tiles_left - 1),
                                 tiles_end.eq(tiles_left == 2),
                                 row_position.eq(row_after),
                                 row_wraps.eq(row_after + row_stride == 1 << 4),
                                 row_word.eq(moved(row_word, row_stride, row_strides, 16))]
        with m.If(load):
            m.d.sync += [
                active.eq(1), waiting_valid.eq(0),
                steps_last.eq(steps_before), steps_left.eq(steps_before),
                one_step.eq(steps_before == 0), tile_end.eq(steps_before == 0),
                tiles_left.eq(waiting.tiles), tiles_end.eq(waiting.tiles == 1),
                step_first.eq(1), group_step.eq(0),
                row_position.eq(0), scale_position.eq(0), row_wraps.eq(0), scale_wraps.eq(0),
                pattern_position.eq(0), second.eq(0),
                row_next.eq(1), scale_next.eq(1), weight_next.eq(0),
            ]
            with m.Switch(waiting.format):
                for fmt in formats:
                    with m.Case(fmt.code):
                        m.d.sync += [
                            kind.eq(kinds.index(_kind(fmt))),
                            sparse.eq(fmt.parts > 1), pattern_next.eq(fmt.parts > 1),
                            group_last.eq(fmt.steps_per_group - 1),
                            row_stride.eq(fmt.rows(1)), scale_stride.eq(_entry_bytes(fmt)),
                        ]
                        if config.bias:
                            stride = 2 * fmt.rows(1)
                            with m.If(waiting.biased):
                                m.d.sync += [row_stride.eq(stride), row_wraps.eq(stride == 1 << 4)]

        m.d.comb += steps_before.eq(waiting.steps - 1)
        stored = weight_accepted
        codes = word
        if halved:
            halves, odd = Signal(), Signal()
            stored = Signal()
            m.d.comb += [
                halves.eq(layouts.is_format(waiting.format, halved)),
                blank.eq(second & odd & tile_end), stored.eq(weight_accepted & ~blank),
            ]
            with m.If(halves):
                m.d.comb += steps_before[0].eq(1)
            with m.If(load):
                m.d.sync += [two_steps.eq(halves), odd.eq(waiting.steps[0])]
            codes = Cat(Cat(Mux(second, nibble[2:], nibble[:2]), nibble[2:]) for nibble in (
                word.word_select(i, 4) for i in range(word_bits // 4)))

        # -- the step's scales, and the tile's row exponents --------------------------------------
        scales = Signal(scale_layout(config))
        zeros, minima = Signal(zero_layout(config)), Signal(minimum_layout(config))
        with m.Switch(kind):
            for number, one in enumerate(kinds):
                with m.Case(number):
                    for entry, value in enumerate(_entries(config, one, scale_word)):
                        m.d.comb += scales[entry].eq(value)
                    if one.zero_point:
                        for row in range(2 * multiplier_rows):
                            m.d.comb += zeros[row].eq(scale_word.word_select(row, 32)[16:])
                    if one.minimum:
                        for row, minimum in enumerate(minima):
                            m.d.comb += minimum.eq(scale_word.word_select(row, 32)[16:])
        step = [codes, scales]
        if config.zero_points:
            step.append(zeros)
        if config.minima:
            step.append(Cat(Cat(
                minimum.significand,
                Mux(minimum.shift > MINIMUM_SHIFT_MAX, MINIMUM_SHIFT_MAX,
                    minimum.shift)[:MINIMUM_SHIFT_BITS],
                minimum.negative) for minimum in minima))
        if config.parts > 1:
            step.append(pattern_word[:select_bits(config)])

        # A tile's biases lie behind its row exponents, and each has as many as the tile has rows.
        row_data = [row_word[:16 * rows]]
        if config.bias:
            row_data.append(moved(row_word, row_stride, bias_strides, 8)[:16 * rows])
        row_width = sum(len(part) for part in row_data)
        m.submodules.row_exponents = row_fifo = fifo.SyncFIFOBuffered(
            width=row_width, depth=self._row_exponent_depth)
        m.d.sync += Assert(~row_fifo.w_en | row_fifo.w_rdy, "row exponents must have a place")
        m.d.comb += [
            row_fifo.w_en.eq(weight_accepted & step_first),
            row_fifo.w_data.eq(Cat(*row_data)),
            self.o_row_exponents.valid.eq(row_fifo.r_rdy),
            self.o_row_exponents.payload.eq(row_fifo.r_data[:16 * rows]),
            row_fifo.r_en.eq(self.o_row_exponents.ready),
        ]
        if config.bias:
            m.d.comb += self.o_row_biases.eq(row_fifo.r_data[16 * rows:])

        # -- ring ---------------------------------------------------------------------------------
        m.submodules.ring = ring = memory.Memory(
            shape=sum(len(Value.cast(part)) for part in step), depth=depth, init=[],
            attrs={"no_rw_check": 1})  # a word is never read in the cycle in which it is written
        write, read = ring.write_port(), ring.read_port()
        # Of each pointer, the one behind it is in a register, too: nothing is added on the way to a
        # comparison.
        tail, tail1, tail2 = (  # the next word is written to tail
            Signal(range(2 * depth), init=i, name=f"tail{i}") for i in range(3))
        head, head1 = (  # current step
            Signal(range(2 * depth), init=i, name=f"head{i}") for i in range(2))
        base, base1 = (  # oldest word that is still needed; a rewind goes here
            Signal(range(2 * depth), init=i, name=f"base{i}") for i in range(2))
        # Room for a word and for two. What is taken out makes room two cycles later.
        room1, room2 = Signal(init=1), Signal(init=1)
        rows_fit = Signal()
        fits, fits_after = Signal(), Signal()
        full0, full1, full2 = (
            (pointer ^ base) == depth for pointer in (tail, tail1, tail2))
        m.d.comb += [
            # Words other than weights need no room.
            fits.eq((rows_fit & room1) | (~weight_next & (~accepted | two_next))),
            fits_after.eq((rows_fit & room2) | others_used),
        ]
        m.d.sync += [
            room1.eq(~Mux(stored, full1, full0)),
            room2.eq(~Mux(stored, full1 | full2, full0 | full1)),
            rows_fit.eq(row_fifo.w_level < self._row_exponent_depth - self.ROWS_MARGIN),
            accepted.eq(word_follows & (
                load | (active & ~section_end & Mux(weight_accepted, fits_after, fits)))),
        ]
        m.d.comb += [
            write.addr.eq(tail[:-1]), write.data.eq(Cat(*step)),
            write.en.eq(stored),
            read.addr.eq(head[:-1]), read.en.eq(self.i_take),
            Cat(self.o_codes, self.o_scales, *(
                getattr(self, name) for name in ("o_zeros", "o_minima", "o_selects")
                if hasattr(self, name))).eq(read.data),
        ]
        with m.If(stored):
            m.d.sync += [tail.eq(tail1), tail1.eq(tail2), tail2.eq(tail2 + 1)]
        rewind = Signal()
        m.d.comb += rewind.eq(self.i_tile_end & self.i_rewind)
        with m.If(self.i_take):
            m.d.sync += [
                head.eq(Mux(rewind, base, head1)),
                head1.eq(Mux(rewind, base1, head1 + 1)),
                # After a rewind there is always a word: that of the tile's first step.
                self.o_available.eq(stored | rewind | (head1 != tail)),
                Assert(self.o_available, "the step that was taken is not there"),
                Assert(~(rewind & self.i_free), "a tile that is needed again must not be freed"),
            ]
            with m.If(self.i_free | (self.i_tile_end & ~self.i_rewind)):
                m.d.sync += [base.eq(head1), base1.eq(head1 + 1)]
        with m.Else():
            m.d.sync += self.o_available.eq(stored | (head != tail))
        return m
