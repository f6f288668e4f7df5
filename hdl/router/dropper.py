"""Which of a token's chosen experts are kept."""

from amaranth import *
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import ceil_log2

from moeaccel.config import AcceleratorConfig
from moeaccel.hdl import layouts
from moeaccel.hdl.layouts import SCORE_WIDTH
from moeaccel.hdl.pipeline import Pipeline
from moeaccel.hdl.router.leading import WIDTH
from moeaccel.hdl.sequential_multiplier import SequentialMultiplier
from moeaccel.router.choices import PART_BITS

__all__ = ["Dropper"]


class Dropper(wiring.Component):
    """Drop chosen experts: golden model, `_kept` of :mod:`moeaccel.golden.router`.

    ::

        i_first --> x threshold --+
        i_total --> x top_p ------+--> compare, one of the chosen after another --> o_kept, o_total
        score_data, i_left -------+

    Latency: ``o_done`` comes LATENCY_CYCLES, top_k, and the bits of threshold or top_p, whichever
    has more, behind ``i_start``. Reset: idle.

    Parameters
    ----------
    config : :class:`AcceleratorConfig`
        With modes of a router that drop.

    Members
    -------
    i_form : :py:`In(layouts.router_form(config))`
    i_start : :py:`In(1)`
        Pulse. What follows holds from it to ``o_done``.
    i_some : :py:`In(config.router_top_k)`
        The chosen that there are.
    i_first, i_total : :py:`In`
        The first one's score, and the sum of all, 0 for those that are not there.
    score_address, score_data : :py:`Out`, :py:`In`
        The chosen one's score, a cycle later.
    i_capped, o_next, i_left : :py:`In(1)`, :py:`Out(1)`, :py:`In(1)`
        Capacities count: whether they leave the next pair, a cycle after it is asked for. With that
        mode.
    o_done : :py:`Out(1)`
        Pulse.
    o_kept, o_total : :py:`Out`
        Those that are left, and the sum of their scores; from ``o_done`` to ``i_start``.
    """

    LATENCY_CYCLES = 5

    def __init__(self, config):
        if not isinstance(config, AcceleratorConfig) or not config.router_drops:
            raise TypeError("config must be an AcceleratorConfig with modes of a router that drop, "
                            f"not {config!r}")
        self._config = config
        super().__init__({
            "i_form": In(layouts.router_form(config)),
            "i_start": In(1),
            "i_some": In(config.router_top_k),
            "i_first": In(SCORE_WIDTH),
            "i_total": In(WIDTH),
            "score_address": Out(max(1, ceil_log2(config.router_top_k))),
            "score_data": In(SCORE_WIDTH),
            "i_capped": In(1),
            "o_next": Out(1),
            "i_left": In(1),
            "o_done": Out(1),
            "o_kept": Out(config.router_top_k),
            "o_total": Out(WIDTH),
        })

    def elaborate(self, platform):
        m = Module()
        form, modes = self.i_form, self._config.router_modes
        factors = {name: value for name, value in (
            ("threshold", self.i_first), ("top_p", self.i_total)) if name in modes}
        products, ready = {}, C(1)
        for name, value in factors.items():
            m.submodules[name] = product = SequentialMultiplier(len(value), PART_BITS + 1)
            m.d.comb += [product.i_start.eq(self.i_start), product.i_a.eq(value),
                         product.i_b.eq(form[name])]
            products[name] = product.o_product
            ready &= product.o_done

        walking, place = Signal(), Signal(range(self._config.router_top_k + 1))
        last = place + 1 == form.top_k
        m.d.comb += [
            self.score_address.eq(place),
            self.o_next.eq(walking & self.i_capped),
        ]
        pipe = Pipeline(m, walking)
        s = pipe.stage(some=self.i_some.bit_select(place[:len(self.score_address)], 1), last=last)
        s = pipe.stage(some=s.some & (~self.i_capped | self.i_left), score=self.score_data,
                       last=s.last)
        before = Signal(WIDTH)
        keep = s.some
        if "threshold" in modes:
            keep &= (s.score << PART_BITS) >= products["threshold"]
        if "top_p" in modes:
            keep &= (form.top_p == 0) | ((before << PART_BITS) < products["top_p"])
        with m.If(pipe.valid):
            m.d.sync += before.eq(before + s.score)
        s = pipe.stage(keep=keep, score=s.score, last=s.last)
        at = Signal.like(place)
        with m.If(pipe.valid):
            m.d.sync += [at.eq(at + 1),
                         self.o_kept.bit_select(at[:len(self.score_address)], 1).eq(s.keep)]
            with m.If(s.keep):
                m.d.sync += self.o_total.eq(self.o_total + s.score)
        m.d.sync += self.o_done.eq(pipe.valid & s.last)

        with m.FSM():
            with m.State("IDLE"):
                m.d.sync += [place.eq(0), at.eq(0), before.eq(0)]
                with m.If(self.i_start):
                    m.d.sync += [self.o_kept.eq(0), self.o_total.eq(0)]
                    m.next = "MULTIPLY"
            with m.State("MULTIPLY"):
                with m.If(ready):
                    m.next = "WALK"
            with m.State("WALK"):
                m.d.comb += walking.eq(1)
                m.d.sync += place.eq(place + 1)
                with m.If(last):
                    m.next = "END"
            with m.State("END"):
                with m.If(self.o_done):
                    m.next = "IDLE"
        return m
