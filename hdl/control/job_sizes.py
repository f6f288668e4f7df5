"""How much memory a job uses: words of its images' sections, ends of its arrays."""

from amaranth import *
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import exact_log2

from moeaccel.config import BLOCK, AcceleratorConfig
from moeaccel.hdl import layouts
from moeaccel.image import Section
from moeaccel.interface.commands import ENTRY_BYTES, LAYER, SUBMISSION

__all__ = ["JobSizes"]

_UNIT = exact_log2(ENTRY_BYTES)  # addresses are aligned to it


def _word_of(structure, name):
    return next(field.word for field in structure if field.name == name)


class JobSizes(wiring.Component):
    """Derive Section.words of a job's sections, and see that all it may touch has an address.

    x, ids, weights, y, the workspace, and the images of all experts up to the last word must end
    within the address space: nothing behind this block asks for an address beyond, so that
    additions there need no carry. Of a GEMM ids and weights count as of any command.

    Products are made by shifting and adding, all at once, of the index of the *last* unit: they
    begin with -1, and ``base + last`` has a carry if ``last > ~base``.

    Latency: ``o_done`` B + 6 cycles after ``i_start``, where B is the bits of the largest of
    steps_in, steps_hidden, steps_out, top_k, num_experts - 1; ``o_word`` one cycle later. It stays
    until the next start.

    Parameters
    ----------
    config : :class:`AcceleratorConfig`
        Limits, widths, format constants.

    Members
    -------
    i_start : :py:`In(1)`
    i_job : :py:`In(job(config))`
        All but its words, from ``i_start`` to ``o_done``. Values outside the limits of their fields
        are harmless, and so is what comes of them.
    o_done : :py:`Out(1)`
    o_gate_up_words, o_down_words : :py:`Out(32)`
    o_bad_field, o_bad_layer : :py:`Out(1)`
        Something of the submission, or of the layer, runs beyond the address space.
    o_word : :py:`Out(range(ENTRY_BYTES // 4))`
        The lowest 32-bit word that says where it begins; the submission's first.
    """

    def __init__(self, config):
        if not isinstance(config, AcceleratorConfig):
            raise TypeError(f"config must be an AcceleratorConfig, not {config!r}")
        self._config = config
        super().__init__({
            "i_start": In(1),
            "i_job": In(layouts.job(config)),
            "o_done": Out(1),
            "o_gate_up_words": Out(32),
            "o_down_words": Out(32),
            "o_bad_field": Out(1),
            "o_bad_layer": Out(1),
            "o_word": Out(range(ENTRY_BYTES // 4)),
        })

    def _words(self, m, *, load, step, sections):
        """Derive Section.words of each of ``sections``, pairs (rows, steps).

        The multipliers are loaded with ``load``; they take one bit of the steps in each cycle of
        ``step``. Returns the bits that are left, and for each section (product, row words, scale
        words, which are a cycle behind).
        """
        config = self._config
        constants = {
            f.code: Section(f, 2 * BLOCK, BLOCK, config.row_multipliers, config.channels)
            for f in config.weight_formats}
        left = []
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

            with m.Switch(self.i_job.format):
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
            left.append(left_steps)  # groups never have more bits
            results.append((weights, row_words, scale_words))
        return left, results

    def _last_units(self, m, *, load, step, phases):
        """Return the bits that are left, and the index of the last unit behind each address."""
        config, job = self._config, self.i_job
        words_log2 = exact_log2(config.word_bytes) - _UNIT
        most_words = 2 * max(
            Section(f, 2 * config.max_dim, config.max_dim, config.row_multipliers,
                    config.channels).words for f in config.weight_formats)
        most_image = ((config.max_experts - 1 << 32) >> _UNIT) + (most_words << words_log2)
        left_out, left_k, left_experts = (
            Signal.like(value, name=f"left_{name}")
            for name, value in (("out", job.steps_out), ("k", job.top_k),
                                ("experts", job.num_experts)))
        pairs = Signal(config.max_assignments.bit_length())
        x, y = (Signal((2 * config.max_tokens * config.max_steps).bit_length(), name=name)
                for name in ("x", "y"))
        images = Signal(most_image.bit_length())
        tokens = Signal(max(len(x) - 1, len(pairs)))  # doubled with each bit of a factor
        stride = Signal(len(images))
        left_in = Signal.like(job.steps_in)
        with m.If(load):
            m.d.sync += [
                left_in.eq(job.steps_in), left_out.eq(job.steps_out), left_k.eq(job.top_k),
                left_experts.eq(job.num_experts - 1),
                tokens.eq(job.tokens), stride.eq(job.stride >> _UNIT),
                *(last.eq(-1) for last in (pairs, x, y, images)),
            ]
        with m.If(step):
            m.d.sync += [tokens.eq(tokens << 1), stride.eq(stride << 1)]
            for left, last, factor in ((left_in, x, tokens << 1), (left_out, y, tokens << 1),
                                       (left_k, pairs, tokens)):
                m.d.sync += left.eq(left >> 1)
                with m.If(left[0]):
                    m.d.sync += last.eq(last + factor)
            m.d.sync += left_experts.eq(left_experts >> 1)
        with m.If((step & left_experts[0]) | phases[2] | phases[3]):
            words = Mux(phases[2], self.o_gate_up_words, self.o_down_words) << words_log2
            m.d.sync += images.eq(images + Mux(step, stride, words))
        floats = _UNIT - 2
        return [left_out, left_k, left_experts], {
            "x_address": x, "ids_address": pairs >> floats, "weights_address": pairs >> floats,
            "y_address": y, "workspace_address": Cat(C(1, 1), y), "image_address": images}

    def elaborate(self, platform):
        m = Module()
        job = self.i_job
        stepping = Signal()
        multiplied = Signal()
        # Behind the products, a cycle each: round, add; gate and up, down; compare.
        phases = Signal(5)
        sections = (job.steps_hidden << exact_log2(2 * BLOCK), job.steps_in), (
            job.steps_out << exact_log2(BLOCK), job.steps_hidden)
        left, ((gate_up, gate_up_rows, gate_up_scales), (down, down_rows, down_scales)) = \
            self._words(m, load=self.i_start, step=stepping, sections=sections)
        more, last_units = self._last_units(m, load=self.i_start, step=stepping, phases=phases)
        m.d.comb += multiplied.eq(~Cat(bits[1:].any() for bits in (*left, *more)).any())
        m.d.sync += phases.eq(Cat(stepping & multiplied, phases))
        with m.If(stepping & multiplied):
            m.d.sync += stepping.eq(0)
        with m.If(phases[0]):
            m.d.sync += [self.o_gate_up_words.eq(gate_up + gate_up_rows),
                         self.o_down_words.eq(down + down_rows)]
        with m.If(phases[1]):
            m.d.sync += [
                self.o_gate_up_words.eq(Mux(job.linear, 0, self.o_gate_up_words + gate_up_scales)),
                self.o_down_words.eq(self.o_down_words + down_scales),
            ]
        with m.If(phases[4]):
            m.d.sync += self.o_done.eq(1)

        beyond = {name: Signal(name=f"beyond_{name}") for name in last_units}
        for name, last in last_units.items():
            m.d.sync += beyond[name].eq(last > ~job[name][_UNIT:])
        m.d.comb += self.o_bad_layer.eq(beyond.pop("image_address"))
        m.d.comb += self.o_bad_field.eq(Cat(*beyond.values()).any())
        m.d.sync += self.o_word.eq(_word_of(LAYER, "image_address"))
        for name in reversed(beyond):
            with m.If(beyond[name]):
                m.d.sync += self.o_word.eq(_word_of(SUBMISSION, name))
        with m.If(self.i_start):
            m.d.sync += [stepping.eq(1), phases.eq(0), self.o_done.eq(0)]
        return m
