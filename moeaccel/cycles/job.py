"""A command, its passes, and the moments that its blocks tell each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from moeaccel.config import BLOCK, AcceleratorConfig
from moeaccel.cycles.schedule import Event
from moeaccel.image import Section
from moeaccel.interface.commands import ElementType
from moeaccel.plan import Pass, Plan, plan

Pairs = NDArray[np.integer]


@dataclass
class PassEvents:
    """What becomes of a pass.

    Attributes
    ----------
    told : :class:`Event`
        Its sections are to be announced.
    offered, awaited, handed : :class:`Event`
        The dispatcher has prepared it; the sequencer can take it; it has.
    x_loaded : :class:`Event`
        If it has tokens of its own.
    x_free : :class:`Event`
        It needs its x no more.
    issued, in_y : :class:`Event`
        Its last step has started; its last output is in the y buffer.
    retired : :class:`Event`
    """

    told: Event = field(default_factory=Event)
    offered: Event = field(default_factory=Event)
    awaited: Event = field(default_factory=Event)
    handed: Event = field(default_factory=Event)
    x_loaded: Event = field(default_factory=Event)
    x_free: Event = field(default_factory=Event)
    issued: Event = field(default_factory=Event)
    in_y: Event = field(default_factory=Event)
    retired: Event = field(default_factory=Event)


@dataclass(frozen=True)
class Job:
    """A command.

    Parameters
    ----------
    config : :class:`AcceleratorConfig`
    experts : mapping of int to tuple of :class:`Section`
        What the images hold of the experts with tokens.
    ids : integer array, (T, K)
    num_experts, d_in, d_out, planes : :class:`int`
        Of the layer.
    latency : :class:`int`
        Of the memory.
    gemm : :class:`bool`
        Every token goes to the first experts, with weight 1.
    held : :class:`bool`
        Ids and weights are there: a router has made them.
    x_type, y_type : :class:`ElementType`
    buffered : sequence of :class:`int`
        Beats of each pass's image that the expert buffer has, none when left out; in a PREFETCH, of
        each expert's.
    loads : sequence of :class:`int`, optional
        It is a PREFETCH: the beats that it brings of each of its experts.
    """

    config: AcceleratorConfig
    experts: Mapping[int, tuple[Section, ...]]
    ids: Pairs
    num_experts: int
    d_in: int
    d_out: int
    planes: int
    latency: int
    gemm: bool
    x_type: ElementType = ElementType.FLOAT32
    y_type: ElementType = ElementType.FLOAT32
    held: bool = False
    buffered: Sequence[int] = ()
    loads: Sequence[int] | None = None

    @cached_property
    def plan(self) -> Plan:
        """Its passes."""
        return plan(self.ids, self.num_experts, self.config.max_slots // self.planes)

    @property
    def passes(self) -> tuple[Pass, ...]:
        """Its passes."""
        return self.plan.passes

    @cached_property
    def events(self) -> tuple[PassEvents, ...]:
        """Of each pass."""
        return tuple(PassEvents() for _ in self.passes)

    @cached_property
    def sets(self) -> tuple[int, ...]:
        """Of each pass: the last pass of the set of tokens before its own; -1 if there is none."""
        before, found = -1, []
        for n, now in enumerate(self.passes):
            if not now.same:
                before = n - 1
            found.append(before)
        return tuple(found)

    @cached_property
    def order(self) -> tuple[tuple[int, int], ...]:
        """Sections in the order in which they run: pass, and which section of it.

        With two banks of h the second section of a pass follows the first one of the next, but goes
        ahead of a pass with one section.
        """
        found: list[tuple[int, int]] = []
        owed: list[tuple[int, int]] = []
        for n, now in enumerate(self.passes):
            single = len(self.experts[now.expert]) == 1
            if single:
                found += [*owed, (n, 0)]
                owed = []
            elif self.config.hidden_banks == 1:
                found += [(n, 0), (n, 1)]
            else:
                found += [(n, 0), *owed]
                owed = [(n, 1)]
        return tuple(found + owed)

    def x_user(self, n: int) -> int | None:
        """Return the last pass of the set before the one before that of pass ``n``, if any.

        Its x was where that of pass ``n`` goes, and its y, if there are two banks.
        """
        before = self.sets[n]
        return self.sets[before] if before >= 0 and self.sets[before] >= 0 else None

    @property
    def per_group(self) -> int:
        """Tokens of a group."""
        return self.config.token_lanes // self.planes

    @property
    def steps_in(self) -> int:
        """Blocks of x."""
        return self.d_in // BLOCK

    @property
    def steps_out(self) -> int:
        """Blocks of y."""
        return self.d_out // BLOCK

    def beats(self, elements: int, size: int) -> int:
        """Beats of so many elements of ``size`` bytes."""
        return -(-elements * size // self.config.port_bytes)
