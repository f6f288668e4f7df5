"""RegisterFile and Counters: every kind of access to every register."""

import random

import pytest
from amaranth.sim import Simulator

from moeaccel.config import PRESETS
from moeaccel.hdl.control.register_file import CLEARED_BY_SOFT_RESET, RegisterFile
from moeaccel.interface.registers import ADDRESS_BITS, REGISTERS, Access, built_values

OKAY, SLVERR = 0, 2
ONES = 0xFFFF_FFFF
CONSTANTS = ("ID", "VERSION", *built_values(PRESETS["tiny"]))


class Host:
    """An AXI4-Lite master with seeded stalls; address and data in either order."""

    def __init__(self, dut, seed=0, stall=0.0):
        self.axil = dut.axil
        self.random = random.Random(seed)
        self.stall = stall

    async def _wait(self, ctx):
        while self.random.random() < self.stall:
            await ctx.tick()

    async def write(self, ctx, address, value, strobes=0b1111):
        axil, pending = self.axil, ["aw", "w"]
        ctx.set(axil.awaddr, address)
        ctx.set(axil.wdata, value)
        ctx.set(axil.wstrb, strobes)
        late = self.random.choice([None, "aw", "w"]) if self.stall else None
        for k in range(100):
            ctx.set(axil.awvalid, "aw" in pending and (late != "aw" or k > 3))
            ctx.set(axil.wvalid, "w" in pending and (late != "w" or k > 3))
            if not pending:
                break
            values = await ctx.tick().sample(
                axil.awvalid & axil.awready, axil.wvalid & axil.wready)
            for name, took in zip(("aw", "w"), values[2:], strict=True):
                if took:
                    pending.remove(name)
        await self._wait(ctx)
        ctx.set(axil.bready, 1)
        response, = await ctx.tick().sample(axil.bresp).until(axil.bvalid)
        ctx.set(axil.bready, 0)
        return response

    async def read(self, ctx, address):
        axil = self.axil
        await self._wait(ctx)
        ctx.set(axil.araddr, address)
        ctx.set(axil.arvalid, 1)
        await ctx.tick().until(axil.arready)
        ctx.set(axil.arvalid, 0)
        await self._wait(ctx)
        ctx.set(axil.rready, 1)
        value, response = await ctx.tick().sample(axil.rdata, axil.rresp).until(axil.rvalid)
        ctx.set(axil.rready, 0)
        return value, response


def simulate(dut, *testbenches, background=()):
    sim = Simulator(dut)
    sim.add_clock(1e-6)
    for testbench in testbenches:
        sim.add_testbench(testbench)
    for testbench in background:
        sim.add_testbench(testbench, background=True)
    sim.run()


def used_bits(register):
    return sum((1 << f.bits) - 1 << f.offset for f in register.fields) or ONES


def of(access):
    return [r for r in REGISTERS.values() if r.access is access]


@pytest.mark.parametrize("stall", [0.0, 0.5])
def test_reset_values_and_read_only_registers(stall):
    dut = RegisterFile(PRESETS["tiny"])
    host = Host(dut, stall=stall)
    rng = random.Random(1)

    async def testbench(ctx):
        driven = {r.name: r.reset for r in REGISTERS.values()}
        driven |= built_values(PRESETS["tiny"])
        for register in of(Access.RO):
            if register.name not in CONSTANTS:
                driven[register.name] = rng.getrandbits(32)
                ctx.set(getattr(dut, f"ro_{register.name.lower()}"), driven[register.name])
        for register in of(Access.RO):
            assert await host.write(ctx, register.address, ONES) == OKAY
        for register in REGISTERS.values():
            assert await host.read(ctx, register.address) == (driven[register.name], OKAY), register

    simulate(dut, testbench)


@pytest.mark.parametrize("stall", [0.0, 0.5])
def test_read_write_registers_honour_strobes(stall):
    dut = RegisterFile(PRESETS["tiny"])
    host = Host(dut, seed=2, stall=stall)
    rng = random.Random(3)
    shadow = {r.name: r.reset for r in of(Access.RW)}
    strobes_seen = []

    async def testbench(ctx):
        for register in of(Access.RW) * 3:
            value, strobes = rng.getrandbits(32), rng.randrange(16)
            mask = sum(0xFF << 8 * i for i in range(4) if strobes >> i & 1)
            old = shadow[register.name]
            shadow[register.name] = (value & mask | old & ~mask) & used_bits(register)
            assert await host.write(ctx, register.address, value, strobes) == OKAY
            strobes_seen.append(register.name)
        for register in of(Access.RW):
            assert await host.read(ctx, register.address) == (shadow[register.name], OKAY)
            assert ctx.get(getattr(dut, f"rw_{register.name.lower()}")) == shadow[register.name]
            if register.name.endswith("_LO"):
                name = register.name[:-3]
                assert ctx.get(getattr(dut, f"rw_{name.lower()}")) == (
                    shadow[f"{name}_HI"] << 32 | shadow[f"{name}_LO"])
        # Doorbells return to 0, nothing else does.
        ctx.set(dut.clear, 1)
        await ctx.tick()
        ctx.set(dut.clear, 0)
        for register in of(Access.RW):
            wanted = 0 if register.name in CLEARED_BY_SOFT_RESET else shadow[register.name]
            assert await host.read(ctx, register.address) == (wanted, OKAY)

    pulses = []

    async def watch(ctx):
        names = [r.name for r in of(Access.RW)]
        signals = [getattr(dut, f"stb_{name.lower()}") for name in names]
        async for _, _, *values in ctx.tick().sample(*signals):
            pulses.extend(n for n, v in zip(names, values, strict=True) if v)

    simulate(dut, testbench, background=[watch])
    assert pulses == strobes_seen


def test_a_strobe_comes_with_the_new_value():
    dut = RegisterFile(PRESETS["tiny"])
    host = Host(dut)

    async def testbench(ctx):
        await host.write(ctx, REGISTERS["SQ_TAIL"].address, 7)

    async def watch(ctx):
        assert await ctx.tick().sample(dut.rw_sq_tail).until(dut.stb_sq_tail) == (7,)

    simulate(dut, testbench, watch)


def test_pulses_last_one_cycle():
    dut = RegisterFile(PRESETS["tiny"])
    host = Host(dut)
    seen = []

    async def testbench(ctx):
        address = REGISTERS["CONTROL"].address
        for value, strobes in [(1, 15), (2, 15), (3, 15), (ONES, 0b1110), (~3 & ONES, 15), (2, 1)]:
            assert await host.write(ctx, address, value, strobes) == OKAY
            assert await host.read(ctx, address) == (0, OKAY)

    async def watch(ctx):
        async for _, _, *values in ctx.tick().sample(
                dut.pulse_control_soft_reset, dut.pulse_control_abort):
            if any(values):
                seen.append(tuple(values))

    simulate(dut, testbench, background=[watch])
    assert seen == [(1, 0), (0, 1), (1, 1), (0, 1)]


def test_interrupts():
    dut = RegisterFile(PRESETS["tiny"])
    host = Host(dut)
    status, enable = REGISTERS["IRQ_STATUS"].address, REGISTERS["IRQ_ENABLE"].address

    async def pulse(ctx, signal):
        ctx.set(signal, 1)
        await ctx.tick()
        ctx.set(signal, 0)
        await ctx.tick()

    async def testbench(ctx):
        await pulse(ctx, dut.set_irq_status_reset_done)
        assert await host.read(ctx, status) == (2, OKAY)
        assert not ctx.get(dut.irq)
        await host.write(ctx, enable, 1)
        assert not ctx.get(dut.irq)
        await pulse(ctx, dut.set_irq_status_completion)
        assert ctx.get(dut.irq)
        assert await host.read(ctx, status) == (3, OKAY)
        await host.write(ctx, status, 2)  # writing 0 keeps
        assert await host.read(ctx, status) == (1, OKAY)
        await host.write(ctx, status, 1, 0b1110)  # as does a strobe of 0
        assert await host.read(ctx, status) == (1, OKAY)
        await host.write(ctx, status, ONES)
        assert await host.read(ctx, status) == (0, OKAY)
        await ctx.tick()
        assert not ctx.get(dut.irq)
        # An event in the very cycle of the clear is kept.
        ctx.set(dut.set_irq_status_completion, 1)
        await host.write(ctx, status, ONES)
        ctx.set(dut.set_irq_status_completion, 0)
        assert await host.read(ctx, status) == (1, OKAY)

    simulate(dut, testbench)


def test_unmapped_addresses():
    dut = RegisterFile(PRESETS["tiny"])
    host = Host(dut)
    mapped = {r.address for r in REGISTERS.values()}
    holes = [a for a in range(0, 1 << ADDRESS_BITS, 4) if a not in mapped]

    async def testbench(ctx):
        before = [ctx.get(getattr(dut, f"rw_{r.name.lower()}")) for r in of(Access.RW)]
        for address in holes[:20] + holes[-3:]:
            assert await host.write(ctx, address, ONES) == SLVERR
            assert await host.read(ctx, address) == (0, SLVERR)
        assert [ctx.get(getattr(dut, f"rw_{r.name.lower()}")) for r in of(Access.RW)] == before

    simulate(dut, testbench)


def test_latency():
    dut = RegisterFile(PRESETS["tiny"])
    axil = dut.axil
    cycles = {}

    async def testbench(ctx):
        ctx.set(axil.arvalid, 1)
        ctx.set(axil.awvalid, 1)
        ctx.set(axil.wvalid, 1)
        await ctx.tick()
        ctx.set(axil.arvalid, 0)
        ctx.set(axil.awvalid, 0)
        ctx.set(axil.wvalid, 0)
        for cycle in range(1, 5):
            for name in ("rvalid", "bvalid"):
                if ctx.get(getattr(axil, name)):
                    cycles.setdefault(name, cycle)
            await ctx.tick()

    simulate(dut, testbench)
    assert cycles == {"rvalid": 3, "bvalid": 2}


def test_arguments():
    with pytest.raises(TypeError, match="config must be an AcceleratorConfig, not 'tiny'"):
        RegisterFile("tiny")
