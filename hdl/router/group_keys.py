"""Scores of groups of experts."""

from amaranth import *
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from moeaccel.config import AcceleratorConfig
from moeaccel.hdl import layouts
from moeaccel.hdl.pipeline import Pipeline
from moeaccel.router.choices import GROUPS_MAX
from moeaccel.router.tables import WORD_BITS, WORD_MIN

__all__ = ["GroupKeys"]


class GroupKeys(wiring.Component):
    """Make a key of each group, of the keys of its experts: the largest, or the sum of two.

    Golden model: `_group_keys` of :mod:`moeaccel.golden.router`. Keys come in the order of experts.

    A key is compared while the one before it is taken, with what will be the largest then, as by
    :class:`~moeaccel.hdl.router.top_selector.TopSelector`.

    Latency: a group's key comes LATENCY_CYCLES behind its last expert's; one key a cycle, no flow
    control. Reset, and ``i_clear``: the next key is that of expert 0.

    Parameters
    ----------
    config : :class:`AcceleratorConfig`
        With a router.

    Members
    -------
    i_form : :py:`In(layouts.router_form(config))`
        Of all tokens, from a cycle before the first key on.
    i_clear : :py:`In(1)`
        After the last expert of a token.
    i_valid, i_key : :py:`In(1)`, :py:`In(signed(32))`
    o_at : :py:`Out(range(GROUPS_MAX))`
        The group of the expert whose key comes in.
    o_valid, o_key, o_group : :py:`Out(1)`, :py:`Out(signed(33))`, :py:`Out(range(GROUPS_MAX))`
    """

    LATENCY_CYCLES = 3

    def __init__(self, config):
        if not isinstance(config, AcceleratorConfig):
            raise TypeError(f"config must be an AcceleratorConfig, not {config!r}")
        super().__init__({
            "i_form": In(layouts.router_form(config)),
            "i_clear": In(1),
            "i_valid": In(1),
            "i_key": In(signed(WORD_BITS)),
            "o_at": Out(range(GROUPS_MAX)),
            "o_valid": Out(1),
            "o_key": Out(signed(WORD_BITS + 1)),
            "o_group": Out(range(GROUPS_MAX)),
        })

    def elaborate(self, platform):
        m = Module()
        form, key = self.i_form, self.i_key
        in_group, final = Signal.like(form.group_size), Signal.like(form.group_size)
        m.d.sync += final.eq(form.group_size - 1)  # known long before keys
        group_ends = in_group == final
        with m.If(self.i_valid):
            m.d.sync += [in_group.eq(Mux(group_ends, 0, in_group + 1)),
                         self.o_at.eq(self.o_at + group_ends)]
        with m.If(self.i_clear):
            m.d.sync += self.o_at.eq(0)
        best, second = (Signal(signed(WORD_BITS), name=name) for name in ("best", "second"))
        better, good = (Signal(signed(WORD_BITS), name=name) for name in ("better", "good"))
        pipe = Pipeline(m, self.i_valid, "due")
        due = pipe.stage(key=key, fresh=in_group == 0, ends=group_ends, group=self.o_at)
        # Of the key that is due: more than the best, and than the second.
        more, some = Signal(), Signal()
        takes, larger = pipe.valid, more | due.fresh
        m.d.comb += [
            better.eq(Mux(larger, due.key, best)),
            good.eq(Mux(larger, Mux(due.fresh, WORD_MIN, best), Mux(some, due.key, second))),
        ]
        with m.If(takes):
            m.d.sync += [best.eq(better), second.eq(good)]
        more_than = {"due": key > due.key, "best": key > best, "second": key > second}
        m.d.sync += [
            more.eq(Mux(takes & larger, more_than["due"], more_than["best"])),
            # What is least of all may count as more than that.
            some.eq(Mux(takes, Mux(larger, due.fresh | more_than["best"],
                                   Mux(some, more_than["due"], more_than["second"])),
                        more_than["second"])),
        ]
        pipe = Pipeline(m, takes & due.ends, "group")
        s = pipe.stage(better=better, good=good, group=due.group)
        s = pipe.stage(key=Mux(form.top2, s.better + s.good, s.better)[:WORD_BITS + 1].as_signed(),
                       group=s.group)
        assert pipe.depth + 1 == self.LATENCY_CYCLES
        m.d.comb += [self.o_valid.eq(pipe.valid), self.o_key.eq(s.key), self.o_group.eq(s.group)]
        return m
