"""Fold: every input comes from the chain, every output reaches the pin."""

import numpy as np
import pytest
from amaranth.hdl import Module
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out
from amaranth.sim import Simulator

from moeaccel.fpga.fold import Fold


class Adder(wiring.Component):
    """Add two numbers, with a stream and a nested signature, so that both directions are mixed."""

    i: In(stream.Signature(3))
    side: Out(wiring.Signature({"a": In(4), "b": Out(6)}))

    def elaborate(self, platform):
        m = Module()
        m.d.comb += [self.i.ready.eq(self.i.valid), self.side.b.eq(self.i.payload + self.side.a)]
        return m


def test_the_pin_shows_the_parity_of_the_outputs():
    """Each input has its bit of the chain; two levels of XOR and their registers follow."""
    dut = Fold(Adder())
    bits = np.random.default_rng(1).integers(0, 2, 64).tolist()
    seen = []

    async def bench(ctx):
        for bit in bits:
            ctx.set(dut.i_serial, bit)
            await ctx.tick()
            seen.append(ctx.get(dut.o_serial))

    sim = Simulator(dut)
    sim.add_clock(1e-8)
    sim.add_testbench(bench)
    sim.run()
    chain, parity = 0, []
    for bit in bits:
        payload, valid, a = chain & 7, chain >> 3 & 1, chain >> 4
        parity.append(((payload + a).bit_count() + valid) & 1)
        chain = (chain << 1 | bit) & 255
    assert seen[2:] == parity[:-2]
    assert set(seen) == {0, 1}


def test_constructor():
    with pytest.raises(TypeError, match="block must be a component, not 'adder'"):
        Fold("adder")
