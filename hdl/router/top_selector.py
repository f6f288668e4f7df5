"""The largest of a stream of keys, in order."""

from amaranth import *
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

__all__ = ["TopSelector"]


class TopSelector(wiring.Component):
    """Keep the ``places`` largest keys of a stream, in order, with what belongs to them.

    Golden model: `_top` of :mod:`moeaccel.golden.router`. Of equal keys, those that came first come
    first::

        i_key --> [place 0] --> [place 1] --> ... --> [place n - 1] --> dropped

    Each place keeps the larger of its key and the one that comes, and hands on the other, which is
    at least as large as all behind it if it was kept before: it is not compared again.

    Latency: a key has its place at most ``places`` cycles later. Throughput: one key a cycle, no
    flow control. Reset, and ``i_clear``: empty, and what was under way is forgotten.

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
        valid, key, name = self.i_valid, self.i_key, self.i_id
        kept = C(0)  # it was in the place before: no key behind it is larger
        for place in range(self._places):
            here = Signal(signed(self._key_bits), name=f"key{place}", reset_less=True)
            on_valid, on_kept = Signal(name=f"on_valid{place}"), Signal(name=f"on_kept{place}")
            on_key = Signal(signed(self._key_bits), name=f"on_key{place}", reset_less=True)
            on_name = Signal(self._id_bits, name=f"on_id{place}", reset_less=True)
            some, took = self.o_some[place], Signal(name=f"took{place}")
            m.d.comb += took.eq(valid & (kept | ~some | (key > here)))
            m.d.sync += [
                on_valid.eq(valid & some), on_kept.eq(took),
                on_key.eq(Mux(took, here, key)), on_name.eq(Mux(took, self.o_ids[place], name))]
            with m.If(took):
                m.d.sync += [some.eq(1), here.eq(key), self.o_ids[place].eq(name)]
            with m.If(self.i_clear):
                m.d.sync += [some.eq(0), on_valid.eq(0)]
            valid, kept, key, name = on_valid, on_kept, on_key, on_name
        return m
