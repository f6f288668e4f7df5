"""How many array words a section has."""

from dataclasses import replace

from amaranth import *
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import exact_log2

from moeaccel.config import BLOCK, AcceleratorConfig
from moeaccel.hdl import layouts
from moeaccel.image import STEPS_PER_PATTERN_WORD, Section

__all__ = ["SectionWords"]


class SectionWords(wiring.Component):
    """Derive ``Section.words`` and ``Section.tiles`` of :mod:`moeaccel.image` from a shape.

    Tiles times a tile's weight words, and tiles times groups, are made by shifting and adding.

    Latency: ``o_done`` is 1 from B + 3 cycles after ``i_start`` on, where B is the bits of a tile's
    weight words, until the next start. Reset: not done.

    Parameters
    ----------
    config : :class:`AcceleratorConfig`

    Members
    -------
    i_start : :py:`In(1)`
    i_format, i_steps : :py:`In(config.format_bits)`, :py:`In(layouts.steps_bits(config))`
        Of the section; constant from ``i_start`` to ``o_done``, as are the next ones.
    i_biased : :py:`In(1)`
        Rows have biases.
    i_row_blocks : :py:`In((config.most_rows // BLOCK).bit_length())`
        Rows of the section on all channels, divided by 32; 1 or more.
    o_done : :py:`Out(1)`
    o_words : :py:`Out(32)`
    o_tiles : :py:`Out(config.most_rows.bit_length())`
        Of each channel.
    o_short : :py:`Out(exact_log2(config.rows))`
        By how many rows those of a channel miss a multiple of the array's.
    """

    def __init__(self, config):
        if not isinstance(config, AcceleratorConfig):
            raise TypeError(f"config must be an AcceleratorConfig, not {config!r}")
        self._config = config
        super().__init__({
            "i_start": In(1),
            "i_format": In(config.format_bits),
            "i_steps": In(layouts.steps_bits(config)),
            "i_biased": In(1),
            "i_row_blocks": In((config.most_rows // BLOCK).bit_length()),
            "o_done": Out(1),
            "o_words": Out(32),
            "o_tiles": Out(config.most_rows.bit_length()),
            "o_short": Out(exact_log2(config.rows)),
        })

    def elaborate(self, platform):
        m = Module()
        config = self._config
        constants = {
            f.code: Section(f, 2 * BLOCK, BLOCK, config.row_multipliers, config.channels)
            for f in config.weight_formats}
        rows = self.i_row_blocks << exact_log2(BLOCK)
        tiles = Signal.like(self.o_tiles)
        tile_words, groups = Signal.like(self.i_steps), Signal.like(self.i_steps)
        row_words, scale_words, pattern_words = Signal(32), Signal(32), Signal(32)
        weights, entries = Signal(32), Signal(32)

        def up(value, divisor):
            return (value + (divisor - 1)) >> exact_log2(divisor)

        with m.Switch(self.i_format):
            for code, section in constants.items():
                with m.Case(code):
                    fmt = section.format
                    # Entries come together where a word's steps have one each.
                    together = max(1, fmt.steps_per_word // fmt.steps_per_group)
                    m.d.comb += [
                        tiles.eq(up(rows, section.tile_rows * section.channels)),
                        tile_words.eq(up(self.i_steps, fmt.steps_per_word)),
                        groups.eq(up(self.i_steps, together * fmt.steps_per_group)),
                    ]
                    m.d.sync += [
                        row_words.eq(up(self.o_tiles, section.tiles_per_row_word)),
                        scale_words.eq(up(entries, section.entries_per_scale_word // together)),
                    ]
                    if config.bias:
                        with m.If(self.i_biased):
                            m.d.sync += row_words.eq(
                                up(self.o_tiles, replace(section, biased=True).tiles_per_row_word))
                    if config.parts > 1:
                        m.d.sync += pattern_words.eq(
                            0 if fmt.parts == 1
                            else up(weights, STEPS_PER_PATTERN_WORD))
        stepping, multiplied, rounded = Signal(), Signal(), Signal()
        multiplicand = Signal(32)
        left_words, left_groups = Signal.like(self.i_steps), Signal.like(self.i_steps)
        m.d.sync += [
            self.o_tiles.eq(tiles),
            self.o_short.eq(-(rows >> exact_log2(config.channels))),
            multiplied.eq(0), rounded.eq(multiplied),
            self.o_words.eq(weights + row_words + scale_words + pattern_words),
        ]
        with m.If(rounded):
            m.d.sync += self.o_done.eq(1)
        with m.If(stepping):
            m.d.sync += [
                multiplicand.eq(multiplicand << 1),
                left_words.eq(left_words >> 1), left_groups.eq(left_groups >> 1),
            ]
            with m.If(left_words[0]):
                m.d.sync += weights.eq(weights + multiplicand)
            with m.If(left_groups[0]):
                m.d.sync += entries.eq(entries + multiplicand)
            with m.If(~left_words[1:].any()):  # groups never have more bits
                m.d.sync += [stepping.eq(0), multiplied.eq(1)]
        with m.If(self.i_start):
            m.d.sync += [
                stepping.eq(1), multiplicand.eq(tiles), left_words.eq(tile_words),
                left_groups.eq(groups), weights.eq(0), entries.eq(0), self.o_done.eq(0),
                multiplied.eq(0), rounded.eq(0),
            ]
        return m
