"""Functions as linear segments."""

from amaranth import *
from amaranth.lib import memory, wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import exact_log2

from moeaccel.hdl.array.multiplier import Multiplier
from moeaccel.hdl.pipeline import Pipeline
from moeaccel.router.tables import FRACTION_BITS, VALUE_BITS, Lines

__all__ = ["LineTable"]


class LineTable(wiring.Component):
    """Interpolate: bit for bit :mod:`moeaccel.router.tables`, a call of its `Lines`.

    Latency LATENCY_CYCLES, one a cycle, no flow control, no valid bit: what comes out belongs to
    what went in.

    Parameters
    ----------
    tables : :class:`Lines`
        One, or several of as many segments that all rise or all fall.
    family : :class:`str`
        FPGA family: see :class:`~moeaccel.hdl.array.multiplier.Multiplier`.

    Members
    -------
    i_table : :py:`In(range(len(tables)))`
        Which of them.
    i_position : :py:`In`
        Segment and, in the low bits, position within it.
    o_value : :py:`Out(24)`
    """

    LATENCY_CYCLES = 3 + Multiplier.LATENCY_CYCLES

    def __init__(self, *tables, family="generic"):
        if not tables or not all(isinstance(table, Lines) for table in tables):
            raise TypeError(f"tables must be Lines, not {tables!r}")
        if len({(table.segments, table.rises) for table in tables}) != 1:
            raise ValueError("tables must have as many segments, and all rise or all fall")
        self._tables = tables
        self._family = family
        self._index_bits = exact_log2(tables[0].segments)
        super().__init__({
            "i_table": In(range(len(tables))),
            "i_position": In(self._index_bits + FRACTION_BITS),
            "o_value": Out(VALUE_BITS),
        })

    def elaborate(self, platform):
        m = Module()
        words = [word for table in self._tables for word in table.packed()]
        m.submodules.rom = rom = memory.Memory(
            shape=max(words).bit_length(), depth=len(words), init=words)
        read = rom.read_port()
        pipe = Pipeline(m, C(1))
        m.d.comb += read.addr.eq(Cat(self.i_position[FRACTION_BITS:], self.i_table))
        s = pipe.stage(part=self.i_position[:FRACTION_BITS])
        # Block RAM is slow to answer, and the multiplier may be far: registers behind it.
        s = pipe.stage(word=read.data, part=s.part)
        node, step = s.word[:VALUE_BITS], s.word[VALUE_BITS:]
        m.submodules.product = product = Multiplier(
            len(step) + 1, FRACTION_BITS + 1, family=self._family)
        m.d.comb += [product.i_a.eq(step), product.i_b.eq(s.part)]
        s = pipe.delay(Multiplier.LATENCY_CYCLES, node=node)
        # node + round(product), or node - round(product), with one carry chain.
        half = 1 << (FRACTION_BITS - 1)
        if self._tables[0].rises:
            value = Cat(C(half, FRACTION_BITS), s.node) + product.o_product
        else:
            value = Cat(C(half - 1, FRACTION_BITS), s.node) - product.o_product
        s = pipe.stage(value=value[FRACTION_BITS:FRACTION_BITS + VALUE_BITS])
        assert pipe.depth == self.LATENCY_CYCLES
        m.d.comb += self.o_value.eq(s.value)
        return m
