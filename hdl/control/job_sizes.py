"""How much memory a job's arrays take: where they end."""

from amaranth import *
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import exact_log2

from moeaccel.config import AcceleratorConfig
from moeaccel.hdl import layouts
from moeaccel.interface.commands import ENTRY_BYTES, LAYER, SUBMISSION, field_of

__all__ = ["JobSizes"]

_UNIT = exact_log2(ENTRY_BYTES)  # addresses are aligned to it


class JobSizes(wiring.Component):
    """See that all arrays of a job have an address.

    x, ids, weights, y, the workspace and the expert table must end within the address space, and
    images are looked at by ``ExpertTable``: nothing behind these asks for an address beyond, so
    that additions there need no carry. Of a GEMM ids and weights count as of any command.

    Products are made by shifting and adding, all at once, of the index of the *last* unit: they
    begin with -1, and ``base + last`` has a carry if ``last > ~base``.

    Latency: ``o_done`` B + 2 cycles after ``i_start``, where B is the bits of the largest of
    steps_in, steps_out and top_k; ``o_word`` one cycle later. It stays until the next start.

    Parameters
    ----------
    config : :class:`AcceleratorConfig`
        Limits, widths.

    Members
    -------
    i_start : :py:`In(1)`
    i_job : :py:`In(job(config))`
        From ``i_start`` to ``o_done``. Values outside the limits of their fields are harmless, and
        so is what comes of them.
    o_done : :py:`Out(1)`
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
            "o_bad_field": Out(1),
            "o_bad_layer": Out(1),
            "o_word": Out(range(ENTRY_BYTES // 4)),
        })

    def elaborate(self, platform):
        m = Module()
        config, job = self._config, self.i_job
        stepping, multiplied, compared = Signal(), Signal(), Signal()
        pairs = Signal(config.max_assignments.bit_length())
        x, y = (Signal((config.max_tokens * config.max_steps).bit_length(), name=name)
                for name in ("x", "y"))  # blocks of 32 elements: units in bfloat16
        tokens = Signal(max(len(x), len(pairs)))  # doubled with each bit of a factor
        left_in, left_out, left_k = (
            Signal.like(value, name=f"left_{name}")
            for name, value in (("in", job.steps_in), ("out", job.steps_out), ("k", job.top_k)))
        with m.If(self.i_start):
            m.d.sync += [
                left_in.eq(job.steps_in), left_out.eq(job.steps_out), left_k.eq(job.top_k),
                tokens.eq(job.tokens), *(last.eq(-1) for last in (pairs, x, y)),
            ]
        with m.If(stepping):
            m.d.sync += tokens.eq(tokens << 1)
            for left, last in ((left_in, x), (left_out, y), (left_k, pairs)):
                m.d.sync += left.eq(left >> 1)
                with m.If(left[0]):
                    m.d.sync += last.eq(last + tokens)
        m.d.comb += multiplied.eq(
            ~Cat(left[1:].any() for left in (left_in, left_out, left_k)).any())
        m.d.sync += compared.eq(stepping & multiplied)
        with m.If(stepping & multiplied):
            m.d.sync += stepping.eq(0)
        with m.If(compared):
            m.d.sync += self.o_done.eq(1)

        def twice(last):
            """Return the last unit of twice as many."""
            return Cat(C(1, 1), last)

        last_expert = Signal.like(job.num_experts)
        m.d.sync += last_expert.eq(job.num_experts - 1)
        floats = _UNIT - 2
        last_units = {
            "x_address": Mux(job.x_narrow, x, twice(x)),
            "ids_address": pairs >> floats, "weights_address": pairs >> floats,
            "y_address": Mux(job.y_narrow, y, twice(y)), "workspace_address": twice(twice(y)),
            "table_address": last_expert}
        beyond = {name: Signal(name=f"beyond_{name}") for name in last_units}
        for name, last in last_units.items():
            # What the job says has been chosen from several by then: a register behind that.
            space = Signal.like(job[name][_UNIT:], name=f"units_behind_{name}")
            m.d.sync += [space.eq(~job[name][_UNIT:]), beyond[name].eq(last > space)]
        m.d.comb += self.o_bad_layer.eq(beyond.pop("table_address"))
        m.d.comb += self.o_bad_field.eq(Cat(*beyond.values()).any())
        m.d.sync += self.o_word.eq(field_of(LAYER, "table_address").word)
        for name in reversed(beyond):
            with m.If(beyond[name]):
                m.d.sync += self.o_word.eq(field_of(SUBMISSION, name).word)
        with m.If(self.i_start):
            m.d.sync += [stepping.eq(1), self.o_done.eq(0)]
        return m
