"""Parses the weight stream into steps and keeps each tile for its replays."""

from amaranth import *
from amaranth.lib import data, fifo, memory, stream, wiring
from amaranth.lib.wiring import In, Out

from moeaccel.config import AcceleratorConfig
from moeaccel.formats import SHIFT_BITS, SIGNIFICAND_BITS
from moeaccel.hdl import layouts

__all__ = ["TileBuffer", "scale_layout"]


def scale_layout(config):
    """Return a step's scales: for each row a significand (bits 0 to 10) and a shift (above)."""
    return data.ArrayLayout(16, config.rows)


class TileBuffer(wiring.Component):
    """Take a section's words apart and hold its steps in a ring until the array has replayed them.

        i_section --> [what comes next] ---------+
        i_word -----> [row word]  --> per tile --|--> [FIFO] --------------> o_row_exponents
                 |--> [scale word] --> per step -|--+
                 +------------- weight word -----|--+--> [ring, tile_words] --> o_codes, o_scales

    Words come in the order of :mod:`moeaccel.image`. A step is its weight word and one scale for
    each row, in one form for all formats: an 11-bit significand (1 in power-of-two formats) and a
    5-bit shift. In 4-bit formats the array's entry ``e`` is row ``e`` of the tile; in 8-bit formats
    entry ``rm`` is that of multiplier row ``rm`` and entries from ``row_multipliers`` on are zero.

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
        accepted = Signal()
        incoming = Signal()
        m.d.comb += [
            self.i_word.ready.eq(~word_valid | accepted),
            incoming.eq(self.i_word.valid & self.i_word.ready),
            word_follows.eq(incoming | (word_valid & ~accepted)),
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
        packed, real_scale = Signal(), Signal()
        formats = config.weight_formats
        group_last = Signal(range(max(f.steps_per_group for f in formats)))  # steps_per_group - 1
        # Down to 0 and to 1; that they are there is known from registers.
        steps_last, steps_left = (Signal(layouts.steps_bits(config)) for _ in range(2))
        tiles_left = Signal(self.i_section.p.tiles.shape())
        one_step, tile_end, tiles_end = Signal(), Signal(), Signal()
        group_step = Signal.like(group_last)
        row_position, scale_position = Signal(4), Signal(5)
        row_stride, scale_stride = Signal(3), Signal(3)
        row_next, scale_next, weight_next = Signal(), Signal(), Signal()  # one of them
        step_first = Signal()
        group_end = Signal()
        row_after, scale_after = Signal(4), Signal(5)
        row_wraps, scale_wraps = Signal(), Signal()  # one of these is 0
        rows_used, scales_used = Signal(), Signal()  # with this weight word; the next is no weight
        weight_accepted = Signal()
        m.d.comb += [
            weight_accepted.eq(accepted & weight_next),
            group_end.eq(tile_end | (group_step == group_last)),
            row_after.eq(row_position + row_stride),
            scale_after.eq(scale_position + scale_stride),
            rows_used.eq(tile_end & row_wraps),
            scales_used.eq(group_end & scale_wraps),
            section_end.eq(weight_accepted & tile_end & tiles_end),
        ]
        row_word, scale_word = (Signal(word_bits, reset_less=True) for _ in range(2))
        row_word_after = Mux(row_stride[1], row_word >> 32 * multiplier_rows,
                             row_word >> 16 * multiplier_rows)
        if config.bias:
            row_word_after = Mux(
                row_stride[2], row_word >> 64 * multiplier_rows, row_word_after)
        with m.If(accepted):
            with m.If(row_next):
                m.d.sync += [row_word.eq(word), row_next.eq(0), weight_next.eq(~scale_next)]
            with m.Elif(scale_next):
                m.d.sync += [scale_word.eq(word), scale_next.eq(0), weight_next.eq(1)]
            with m.Else():
                m.d.sync += [row_next.eq(rows_used), scale_next.eq(scales_used),
                             weight_next.eq(~(rows_used | scales_used)),
                             steps_left.eq(steps_left - 1), tile_end.eq(steps_left == 1),
                             step_first.eq(0), group_step.eq(group_step + 1)]
                with m.If(group_end):
                    m.d.sync += [group_step.eq(0), scale_position.eq(scale_after),
                                 scale_wraps.eq(scale_after + scale_stride == 1 << 5),
                                 scale_word.eq(
                                     Mux(scale_stride[2], scale_word >> 32 * multiplier_rows,
                                         Mux(scale_stride[1], scale_word >> 16 * multiplier_rows,
                                             scale_word >> 8 * multiplier_rows)))]
                with m.If(tile_end):
                    m.d.sync += [steps_left.eq(steps_last), tile_end.eq(one_step),
                                 step_first.eq(1), tiles_left.eq(tiles_left - 1),
                                 tiles_end.eq(tiles_left == 2),
                                 row_position.eq(row_after),
                                 row_wraps.eq(row_after + row_stride == 1 << 4),
                                 row_word.eq(row_word_after)]
        with m.If(load):
            m.d.sync += [
                active.eq(1), waiting_valid.eq(0),
                steps_last.eq(waiting.steps - 1), steps_left.eq(waiting.steps - 1),
                one_step.eq(waiting.steps == 1), tile_end.eq(waiting.steps == 1),
                tiles_left.eq(waiting.tiles), tiles_end.eq(waiting.tiles == 1),
                step_first.eq(1), group_step.eq(0),
                row_position.eq(0), scale_position.eq(0), row_wraps.eq(0), scale_wraps.eq(0),
                row_next.eq(1), scale_next.eq(1), weight_next.eq(0),
            ]
            with m.Switch(waiting.format):
                for fmt in formats:
                    with m.Case(fmt.code):
                        entry_bytes = (2 if fmt.packed else 1) * fmt.scale_bits // 8
                        m.d.sync += [
                            packed.eq(fmt.packed), real_scale.eq(fmt.real_scale),
                            group_last.eq(fmt.steps_per_group - 1),
                            row_stride.eq(2 if fmt.packed else 1), scale_stride.eq(entry_bytes),
                        ]
                        if config.bias:
                            with m.If(waiting.biased):
                                m.d.sync += row_stride.eq(4 if fmt.packed else 2)

        # -- the step's scales, and the tile's row exponents --------------------------------------
        # In 8-bit formats what is beyond row_multipliers is not used.
        shifts = scale_word[:8 * rows]
        scales = Signal(scale_layout(config))
        with m.If(real_scale):
            m.d.comb += scales.eq(scale_word[:16 * rows])
        with m.Else():
            for row in range(rows):
                m.d.comb += scales[row].eq(
                    Cat(C(1, SIGNIFICAND_BITS), shifts[8 * row:8 * row + SHIFT_BITS]))
            with m.If(~packed):
                for row in range(multiplier_rows, rows):
                    m.d.comb += scales[row].eq(0)

        # A tile's biases lie behind its row exponents, and each has as many as the tile has rows.
        row_data = [row_word[:16 * rows]]
        if config.bias:
            behind = 16 * multiplier_rows
            row_data.append(Mux(
                packed, row_word[16 * rows:][:16 * rows], row_word[behind:][:16 * rows]))
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
            shape=word_bits + 16 * rows, depth=depth, init=[],
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
            fits.eq((rows_fit & room1) | (~weight_next & (~accepted | (row_next & scale_next)))),
            fits_after.eq((rows_fit & room2) | rows_used | scales_used),
        ]
        m.d.sync += [
            room1.eq(~Mux(weight_accepted, full1, full0)),
            room2.eq(~Mux(weight_accepted, full1 | full2, full0 | full1)),
            rows_fit.eq(row_fifo.w_level < self._row_exponent_depth - self.ROWS_MARGIN),
            accepted.eq(word_follows & (
                load | (active & ~section_end & Mux(weight_accepted, fits_after, fits)))),
        ]
        m.d.comb += [
            write.addr.eq(tail[:-1]), write.data.eq(Cat(word, scales)),
            write.en.eq(weight_accepted),
            read.addr.eq(head[:-1]), read.en.eq(self.i_take),
            self.o_codes.eq(read.data[:word_bits]),
            self.o_scales.eq(read.data[word_bits:]),
        ]
        with m.If(weight_accepted):
            m.d.sync += [tail.eq(tail1), tail1.eq(tail2), tail2.eq(tail2 + 1)]
        rewind = Signal()
        m.d.comb += rewind.eq(self.i_tile_end & self.i_rewind)
        with m.If(self.i_take):
            m.d.sync += [
                head.eq(Mux(rewind, base, head1)),
                head1.eq(Mux(rewind, base1, head1 + 1)),
                # After a rewind there is always a word: that of the tile's first step.
                self.o_available.eq(weight_accepted | rewind | (head1 != tail)),
                Assert(self.o_available, "the step that was taken is not there"),
                Assert(~(rewind & self.i_free), "a tile that is needed again must not be freed"),
            ]
            with m.If(self.i_free | (self.i_tile_end & ~self.i_rewind)):
                m.d.sync += [base.eq(head1), base1.eq(head1 + 1)]
        with m.Else():
            m.d.sync += self.o_available.eq(weight_accepted | (head != tail))
        return m
