"""What the parts of a command processor tell each other."""

import enum
from contextlib import contextmanager

from amaranth import *
from amaranth.utils import exact_log2

from moeaccel.hdl import layouts
from moeaccel.hdl.layouts import job
from moeaccel.interface.commands import ENTRY_BYTES, MOE_BLOCK
from moeaccel.router.choices import GROUPS_MAX

__all__ = ["ALIGNMENT_BITS", "DRAIN_CYCLES", "FETCHING", "RESTING", "State", "Wires"]

DRAIN_CYCLES = 16
"""Cycles for which the engine's reset and the port's flush are held at least."""

ALIGNMENT_BITS = exact_log2(ENTRY_BYTES)
_CYCLES_BITS = 48


class State(enum.IntEnum):
    """States, each a bit of its own: most of what a state does is one gate behind it."""

    IDLE = 0
    REQUEST = 1  # ask for the submission or the layer
    COLLECT = 2  # its beats
    LIMIT = 3  # what depends on another field
    CHECK = 4  # every field, into one bit each
    JOIN = 5  # the bits
    DECIDE = 6
    MEASURE = 7  # ends of everything in memory
    START = 8  # hand over the job
    RUN = 9
    FINISH = 10
    WRITE = 11  # announce the completion
    LOAD = 12  # put it together
    SEND = 13  # its beats
    ACKNOWLEDGE = 14
    STOPPED = 15  # the completion could not be written: wait for the host
    DRAIN = 16  # abort, watchdog: then complete
    RESET = 17  # soft reset: then forget
    TURN = 18  # the next of several structures comes to the front


RESTING = (State.IDLE, State.WRITE, State.LOAD, State.SEND, State.ACKNOWLEDGE, State.STOPPED,
           State.DRAIN, State.RESET)
"""Where abort and watchdog end nothing."""

FETCHING = (State.REQUEST, State.COLLECT)

_ENDED = (*FETCHING, State.DECIDE, State.START, State.RUN, State.FINISH)
"""Where they do; the others take a few cycles at most."""


class Wires:
    """What the parts of a command processor tell each other."""

    def __init__(self, config):
        # States; the next one, by the one that it follows.
        self.state = Signal(len(State), init=1 << State.IDLE)
        self.following = {s: Signal(len(State), name=f"after_{s.name.lower()}") for s in State}

        # The structures being read, behind one another; the one that is looked at, or the
        # completion being sent, is at the front, where beats come in.
        self.entry = Signal(8 * ENTRY_BYTES * (len(MOE_BLOCK) if config.router else 1))
        self.front = self.entry[-8 * ENTRY_BYTES:]
        self.is_layer = Signal()
        self.fetch_address = Signal(config.address_bits - ALIGNMENT_BITS)
        self.completion = Signal(8 * ENTRY_BYTES)

        # The submission, and the job that becomes of it.
        self.opcode = Signal(8)
        self.tag = Signal(16)
        self.work = Signal()
        self.known = Signal()
        self.routes = Signal()  # its layer is a router
        self.groups = Signal(range(GROUPS_MAX + 1))
        self.bad_router, self.bad_top_k = Signal(), Signal()
        self.job = Signal(job(config))

        # MOE: the structure at the front, of three, which all have been checked; its product, for
        # whose logits and x the others must be.
        self.moe = Signal()
        self.part = Signal(2)
        self.checked = Signal()
        self.product = Signal()
        self.precedes = Signal()  # a job comes behind that which is handed over
        self.steps_in, self.steps_out = (
            Signal(layouts.steps_bits(config), name=f"product_{name}") for name in ("in", "out"))
        self.mismatch = Signal()
        self.of_logits = Signal()  # some of what has overflown

        # What has become of it.
        self.status = Signal(8)
        self.result = Signal(layouts.job_result(config))
        self.ran = Signal()
        self.measured = Signal()
        self.bad_word = Signal(range(ENTRY_BYTES // 4))
        self.again = Signal()  # the completion could not be written
        self.cycles = Signal(_CYCLES_BITS)

        # Abort and watchdog.
        self.stopping = Signal()
        self.holding = Signal()
        self.drained = Signal(range(DRAIN_CYCLES))
        self.waited = Signal()
        self.bad_rings = Signal()

    def at(self, *states):
        """Return whether the state is one of some."""
        return Cat(self.state[s] for s in states).any()

    @contextmanager
    def only(self, m, s):
        """Open a block for one state, and yield what makes the statement to go to another."""
        following = self.following[s]
        with m.If(self.state[s]):
            m.d.comb += following.eq(1 << s)
            yield lambda to: following.eq(1 << to)
            if s in _ENDED:  # once the submission's tag is known
                with m.If(self.stopping & (self.is_layer if s in FETCHING else 1)):
                    m.d.comb += following.eq(1 << State.DRAIN)
