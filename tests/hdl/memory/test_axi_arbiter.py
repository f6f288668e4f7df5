"""AxiArbiter between two or three masters and a slave that answers in any order it may."""

import random
from collections import deque
from itertools import pairwise

import pytest
from amaranth.sim import Simulator

from moeaccel.hdl.memory.axi_arbiter import AxiArbiter
from tests.support.axi_master import AxiMaster

ID_WIDTH = 2
SIZE = 1 << 12


class Slave:
    """A memory: different ids are answered in random order, beats interleaved."""

    def __init__(self, axi, *, seed, stall=0.0):
        self.axi, self.random, self.stall = axi, random.Random(seed), stall
        self.memory = bytearray(self.random.randbytes(SIZE))
        self.ar, self.aw, self.w_cycles = [], [], []

    def beat(self, address):
        return int.from_bytes(self.memory[address:address + 8], "little")

    async def serve(self, ctx):
        axi, rng, held, cycle = self.axi, self.random, {}, 0
        reads, responses, writes, words = {}, {}, deque(), deque()
        offered = {}
        fields = {"ar": ("araddr", "arlen", "arid", "arsize", "arburst"),
                  "aw": ("awaddr", "awlen", "awid", "awsize", "awburst"),
                  "w": ("wdata", "wstrb", "wlast")}
        while True:
            go = {channel: rng.random() >= self.stall for channel in fields}
            for channel in fields:
                ctx.set(getattr(axi, f"{channel}ready"), go[channel])
            for channel, queues in (("r", reads), ("b", responses)):
                waiting = [i for i, queue in queues.items() if queue]
                if channel not in offered and waiting and rng.random() >= self.stall:
                    offered[channel] = rng.choice(waiting)
                ctx.set(getattr(axi, f"{channel}valid"), channel in offered)
                ctx.set(getattr(axi, f"{channel}id"), offered.get(channel, rng.randrange(8)))
            if "r" in offered:
                address, left = reads[offered["r"]][0]
                ctx.set(axi.rdata, self.beat(address))
                ctx.set(axi.rlast, left == 1)
                ctx.set(axi.rresp, address >> 3 & 3)
            if "b" in offered:
                ctx.set(axi.bresp, responses[offered["b"]][0])
            names = [name for group in fields.values() for name in group]
            valids = [f"{channel}valid" for channel in fields]
            _, _, *values = await ctx.tick().sample(
                *(getattr(axi, name) for name in (*names, *valids, "rready", "bready")))
            v = dict(zip((*names, *valids, "rready", "bready"), values, strict=True))
            for channel, group in fields.items():
                now = tuple(v[name] for name in group) if v[f"{channel}valid"] else None
                assert channel not in held or now == held[channel], f"{channel} changed"
                held.pop(channel, None)
                if now is not None and not go[channel]:
                    held[channel] = now
            if "r" in offered and v["rready"]:
                queue = reads[offered.pop("r")]
                address, left = queue[0]
                queue[0] = (address + 8, left - 1)
                if left == 1:
                    queue.popleft()
            if "b" in offered and v["bready"]:
                responses[offered.pop("b")].popleft()
            if v["arvalid"] and go["ar"]:
                self.ar.append((cycle, v["arid"]))
                reads.setdefault(v["arid"], deque()).append((v["araddr"], v["arlen"] + 1))
            if v["awvalid"] and go["aw"]:
                self.aw.append((cycle, v["awid"]))
                writes.append((v["awaddr"], v["awlen"] + 1, v["awid"]))
            if v["wvalid"] and go["w"]:
                assert writes or words or v["awvalid"], "data before its address"
                self.w_cycles.append(cycle)
                words.append((v["wdata"], v["wstrb"], v["wlast"]))
            while writes and len(words) >= writes[0][1]:
                address, beats, i = writes.popleft()
                responses.setdefault(i, deque()).append(address >> 3 & 3)
                for k in range(beats):
                    word, strobes, last = words.popleft()
                    assert last == (k == beats - 1)
                    for byte in range(8):
                        if strobes >> byte & 1:
                            self.memory[address + 8 * k + byte] = word >> 8 * byte & 255
            cycle += 1


class Bench:
    def __init__(self, *, masters=2, seed=0, stall=0.0, slave_stall=None, cycle_limit=20_000):
        self.dut = AxiArbiter(addr_width=32, data_width=64, id_width=ID_WIDTH, masters=masters)
        self.masters = [
            AxiMaster(getattr(self.dut, f"master{i}"), seed=seed + i, stall=stall,
                      cycle_limit=cycle_limit) for i in range(masters)]
        self.slave = Slave(self.dut.slave, seed=seed,
                           stall=stall if slave_stall is None else slave_stall)

    def run(self):
        """Let the masters do what they have queued."""
        async def testbench(ctx):
            for master in self.masters:
                await master.until_idle(ctx)

        simulator = Simulator(self.dut)
        simulator.add_clock(1e-6)
        for agent in (self.slave, *self.masters):
            simulator.add_testbench(agent.serve, background=True)
        simulator.add_testbench(testbench)
        simulator.run()


@pytest.mark.parametrize(("masters", "stall", "seed"), [(2, 0.0, 1), (2, 0.5, 2), (3, 0.3, 3)])
def test_random_traffic(masters, stall, seed):
    """Each master reads one part of memory and writes another; all get what is theirs."""
    bench = Bench(masters=masters, stall=stall, seed=seed)
    rng, part = random.Random(seed), SIZE // 4
    image = bytearray(bench.slave.memory)
    expected = []
    for k, master in enumerate(bench.masters):
        reads = {i: [] for i in range(4)}
        writes = {i: [] for i in range(4)}
        for _ in range(25):
            i, beats = rng.randrange(4), rng.randint(1, 12)
            address = 8 * rng.randrange(part // 8 - beats)
            master.read(address, beats, i)
            words = [bench.slave.beat(address + 8 * b) for b in range(beats)]
            reads[i].append((words, [(address >> 3) + b & 3 for b in range(beats)]))
            i, beats = rng.randrange(4), rng.randint(1, 12)
            address = (1 + k) * part + 8 * rng.randrange(part // 8 - beats)
            words = [rng.getrandbits(64) for _ in range(beats)]
            strobes = [rng.getrandbits(8) for _ in range(beats)]
            master.write(address, words, i, strobes)
            writes[i].append(address >> 3 & 3)
            for b, (word, mask) in enumerate(zip(words, strobes, strict=True)):
                for byte in range(8):
                    if mask >> byte & 1:
                        image[address + 8 * b + byte] = word >> 8 * byte & 255
        expected.append((reads, writes))
    bench.run()
    for master, (reads, writes) in zip(bench.masters, expected, strict=True):
        for i in range(4):
            assert [(a, b) for j, a, b in master.answers if j == i] == reads[i]
            assert [r for j, r in master.acknowledged if j == i] == writes[i]
    assert bench.slave.memory == image


@pytest.mark.parametrize("busy", [0, 1])
def test_a_lone_master_has_every_cycle(busy):
    """Addresses, beats read and beats written: one in each cycle."""
    bench = Bench()
    master = bench.masters[busy]
    for k in range(30):
        master.read(8 * k, 1, k % 4)
        master.write(2048 + 64 * (k % 8), [1, 2, 3], k % 4)
    bench.run()
    assert [b - a for (a, _), (b, _) in pairwise(bench.slave.ar)] == [1] * 29
    assert [b - a for a, b in pairwise(bench.slave.w_cycles)] == [1] * 89
    assert [b - a for a, b in pairwise(master.r_cycles)] == [1] * 29


@pytest.mark.parametrize("slave_stall", [0.0, 0.5])
def test_masters_take_turns(slave_stall):
    """As long as all have addresses waiting."""
    bench = Bench(masters=3, slave_stall=slave_stall)
    for master in bench.masters:
        for k in range(20):
            master.read(8 * k, 1)
            master.write(2048 + 8 * k, [k])
    bench.run()
    for requests in (bench.slave.ar, bench.slave.aw):
        owners = [i >> ID_WIDTH for _, i in requests]
        first = owners[0]
        assert owners == [(first + k) % 3 for k in range(60)]


@pytest.mark.parametrize("masters", [1, 17, 2.0])
def test_arguments(masters):
    with pytest.raises(ValueError, match=f"masters must be from 2 to 16, not {masters}"):
        AxiArbiter(addr_width=32, data_width=64, id_width=2, masters=masters)
