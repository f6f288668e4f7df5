"""A behavioural AXI4 memory that checks its master."""

import random
from collections import deque

OKAY, SLVERR = 0, 2


class AxiMemory:
    """A memory behind an AXI4 port of a component in Amaranth's simulator.

    Addresses are taken modulo ``size``. Every burst must be one of whole beats that keeps AXI's
    rules, is no longer than ``max_burst`` and lies in ``window``; every channel must hold what it
    offers until it is taken. Reads of different ids are answered in random order, their beats
    interleaved, not before ``latency`` cycles have passed. ``stall`` is the probability that a
    channel rests in a cycle; while ``hold()`` is true, all rest. Bursts that start in ``refuse``
    are answered with SLVERR, and such writes are not performed. While ``off`` is true the memory is
    in reset: it takes nothing, and forgets what it was asked.
    """

    def __init__(self, axi, *, size, max_burst, seed=0, stall=0.0, latency=0, refuse=(),
                 hold=lambda: False, window=None, cycle_limit=10000):
        self.axi = axi
        self.width = len(axi.wdata) // 8
        self.max_burst = max_burst
        self.random = random.Random(seed)
        self.stall, self.latency, self.refuse, self.hold = stall, latency, refuse, hold
        self.window = window or (0, size)
        self.cycle_limit = cycle_limit
        self.memory = bytearray(self.random.randbytes(size))
        self.cycle = 0
        self.ar, self.aw, self.r_cycles, self.w_beats = [], [], [], []
        self.unanswered = 0
        self.off = False

    def beat(self, address):
        """Return the beat at an address as an integer."""
        address %= len(self.memory)
        return int.from_bytes(self.memory[address:address + self.width], "little")

    async def serve(self, ctx):
        """Answer the port: a background testbench."""
        axi, rng = self.axi, self.random
        reads = {}
        writes, w_queue, responses = deque(), deque(), deque()
        held = {}
        while True:
            if self.off:
                for queue in (reads, writes, w_queue, responses, held):
                    queue.clear()
            self.unanswered = sum(map(len, reads.values())) + len(writes) + len(responses)
            hold = self.hold() or self.off
            go = [not hold and rng.random() >= self.stall for _ in range(5)]
            ctx.set(axi.arready, go[0])
            ctx.set(axi.awready, go[1])
            ctx.set(axi.wready, go[2])
            ready = [i for i, queue in reads.items() if queue and queue[0][2] <= self.cycle]
            ctx.set(axi.rvalid, 0)
            ctx.set(axi.rdata, rng.getrandbits(8 * self.width))
            ctx.set(axi.rid, rng.randrange(16))
            ctx.set(axi.rlast, rng.random() < 0.5)
            ctx.set(axi.rresp, SLVERR)
            if ready and go[3]:
                i = rng.choice(ready)
                start, left, _, first = reads[i][0]
                ctx.set(axi.rvalid, 1)
                ctx.set(axi.rid, i)
                ctx.set(axi.rdata, self.beat(start))
                ctx.set(axi.rresp, SLVERR if first in self.refuse else OKAY)
                ctx.set(axi.rlast, left == 1)
                self.r_cycles.append(self.cycle)
                if left == 1:
                    reads[i].popleft()
                else:
                    reads[i][0] = (start + self.width, left - 1, 0, first)
            answer = bool(responses and go[4])
            ctx.set(axi.bvalid, answer)
            ctx.set(axi.bresp, responses.popleft() if answer else SLVERR)
            names = ("arvalid", "araddr", "arlen", "arid", "arsize", "arburst",
                     "awvalid", "awaddr", "awlen", "awsize", "awburst",
                     "wvalid", "wdata", "wstrb", "wlast", "rready", "bready")
            _, _, *values = await ctx.tick().sample(*(getattr(axi, name) for name in names))
            v = dict(zip(names, values, strict=True))
            assert v["rready"] and v["bready"]
            for channel, fields in (
                ("ar", ("araddr", "arlen", "arid")), ("aw", ("awaddr", "awlen")),
                ("w", ("wdata", "wstrb", "wlast")),
            ):
                now = tuple(v[name] for name in fields) if v[channel + "valid"] else None
                if held.get(channel) is not None:
                    assert now == held[channel], f"{channel} changed before it was taken"
                held[channel] = now
            for k, channel in enumerate(("ar", "aw")):
                if not (v[channel + "valid"] and go[k]):
                    continue
                held[channel] = None
                address, beats = v[channel + "addr"], v[channel + "len"] + 1
                end = address + beats * self.width
                assert 1 << v[channel + "size"] == self.width
                assert v[channel + "burst"] == 1
                assert beats <= self.max_burst
                assert address // 4096 == (end - 1) // 4096
                assert self.window[0] <= address
                assert end <= self.window[1]
                if channel == "ar":
                    self.ar.append((self.cycle, v["arid"], address, beats))
                    queue = reads.setdefault(v["arid"], deque())
                    queue.append((address, beats, self.cycle + self.latency, address))
                else:
                    self.aw.append((self.cycle, address, beats))
                    writes.append((address, beats))
            if v["wvalid"] and go[2]:
                held["w"] = None
                self.w_beats.append((self.cycle, v["wstrb"]))
                w_queue.append((v["wdata"], v["wstrb"], v["wlast"]))
            while writes and len(w_queue) >= writes[0][1]:
                address, beats = writes.popleft()
                for k in range(beats):
                    word, strobes, last = w_queue.popleft()
                    assert last == (k == beats - 1)
                    assert strobes in (0, (1 << self.width) - 1)
                    if strobes and address not in self.refuse:
                        at = (address + k * self.width) % len(self.memory)
                        self.memory[at:at + self.width] = word.to_bytes(self.width, "little")
                responses.append(SLVERR if address in self.refuse else OKAY)
            self.cycle += 1
            assert self.cycle < self.cycle_limit, "the test hangs"
