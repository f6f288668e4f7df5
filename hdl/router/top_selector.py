"""The largest of a stream of keys, in order."""

from amaranth import *
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

__all__ = ["TopSelector"]


class TopSelector(wiring.Component):
    """Keep the ``places`` largest keys of a stream, in order, with what belongs to them.

    Golden model: `_top` of :mod:`moeaccel.golden.router`. Of equal keys, those that came first come
    first::

        i_key --> [key] --> compared with all places --> [key, larger than which] --> places

    All places take a key at once: those with less move one place on. A key is compared with the
    places while the one before it is put among them, so that it is known whether it is larger than
    what a place is about to have: what it had, what the place before had, or that one.

    Latency: a key has its place LATENCY_CYCLES later. Throughput: one key a cycle, no flow control.
    Reset, and ``i_clear``: empty, and what was under way is forgotten.

    Parameters
    ----------
    places, key_bits, id_bits : :class:`int`

    Members
    -------
    i_clear : :py:`In(1)`
    i_valid, i_key, i_id : :py:`In(1)`, :py:`In(signed(key_bits))`, :py:`In(id_bits)`
    o_some : :py:`Out(places)`
        Which places have a key.
    o_ids : :py:`Out(ArrayLayout(id_bits, places))`
    """

    LATENCY_CYCLES = 3

    def __init__(self, places, *, key_bits, id_bits):
        for name, value in (("places", places), ("key_bits", key_bits), ("id_bits", id_bits)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, not {value!r}")
        self._places = places
        self._key_bits = key_bits
        self._id_bits = id_bits
        super().__init__({
            "i_clear": In(1),
            "i_valid": In(1),
            "i_key": In(signed(key_bits)),
            "i_id": In(id_bits),
            "o_some": Out(places),
            "o_ids": Out(data.ArrayLayout(id_bits, places)),
        })

    @property
    def places(self):
        """Keys that are kept."""
        return self._places

    def elaborate(self, platform):
        m = Module()
        shape = signed(self._key_bits)
        arrived, due = Signal(), Signal()
        keys = [Signal(shape, name=name, reset_less=True) for name in ("arrived_key", "due_key")]
        ids = [Signal(self._id_bits, name=name, reset_less=True)
               for name in ("arrived_id", "due_id")]
        m.d.sync += [
            arrived.eq(self.i_valid), keys[0].eq(self.i_key), ids[0].eq(self.i_id),
            due.eq(arrived), keys[1].eq(keys[0]), ids[1].eq(ids[0]),
        ]
        here = [Signal(shape, name=f"key{place}", reset_less=True) for place in range(self._places)]
        larger = Signal(self._places)  # the key that is due, than that of each place
        takes = Signal(self._places)
        above = Signal(self._places)  # the key that has arrived, than that of each place
        m.d.comb += [
            takes.eq(Mux(due, larger, 0)),
            *(above[place].eq(~self.o_some[place] | (keys[0] > key))
              for place, key in enumerate(here)),
        ]
        above_due = keys[0] > keys[1]
        for place in range(self._places):
            moved = takes[place - 1] if place else C(0)  # what was in the place before comes here
            m.d.sync += larger[place].eq(
                Mux(takes[place], Mux(moved, above[place - 1], above_due), above[place]))
            with m.If(takes[place]):
                m.d.sync += [
                    here[place].eq(Mux(moved, here[place - 1], keys[1])),
                    self.o_ids[place].eq(Mux(moved, self.o_ids[place - 1], ids[1])),
                    self.o_some[place].eq(Mux(moved, self.o_some[place - 1], 1)),
                ]
        with m.If(self.i_clear):
            m.d.sync += [self.o_some.eq(0), arrived.eq(0), due.eq(0)]
        return m
