"""AXI4 masters for the Amaranth simulator."""

import random
from collections import deque

INCR = 1


class AxiMaster:
    """Drive an AXI4 slave with bursts, and check how it answers.

    ``read`` and ``write`` queue bursts, which are issued in that order, reads and writes
    independently. Answers must come in order within an id; a channel must hold what it offers.
    ``stall`` is the probability that a channel rests in a cycle; channels named in ``stalls`` have
    one of their own. ``answers`` holds ``(id, beats, responses)`` of each read and ``acknowledged``
    ``(id, response)`` of each write, in order of arrival; ``r_cycles`` the cycles of R beats.
    """

    def __init__(self, axi, *, seed=0, stall=0.0, stalls=None, cycle_limit=20000):
        self.axi = axi
        self.width = len(axi.wdata) // 8
        self.random = random.Random(seed)
        self.stalls = dict.fromkeys(("ar", "aw", "w", "r", "b"), stall) | (stalls or {})
        self.cycle_limit = cycle_limit
        self.ar, self.aw, self.w = deque(), deque(), deque()
        self.answers, self.acknowledged, self.r_cycles, self.ar_cycles = [], [], [], []
        self.open_reads, self.open_writes = {}, {}
        self.cycle = 0

    @property
    def idle(self):
        """Everything queued is answered."""
        return not (self.ar or self.aw or self.w or any(self.open_reads.values())
                    or any(self.open_writes.values()))

    def read(self, address, beats, i=0):
        """Queue a read burst."""
        self.ar.append((i, address, beats))

    def write(self, address, words, i=0, strobes=None):
        """Queue a write burst of beats as integers."""
        self.aw.append((i, address, len(words)))
        full = (1 << self.width) - 1
        for k, word in enumerate(words):
            self.w.append((word, full if strobes is None else strobes[k], k == len(words) - 1))

    async def until_idle(self, ctx):
        """Wait for all answers."""
        while not self.idle:
            await ctx.tick()

    async def serve(self, ctx):
        """Drive the port: a background testbench."""
        axi, rng = self.axi, self.random
        offered = dict.fromkeys(("ar", "aw", "w"), False)
        held = {}
        partial = {}
        address_fields = ("id", "addr", "len")
        watched = {"r": ("rid", "rdata", "rresp", "rlast"), "b": ("bid", "bresp")}
        for channel in ("ar", "aw"):
            ctx.set(getattr(axi, f"{channel}size"), self.width.bit_length() - 1)
            ctx.set(getattr(axi, f"{channel}burst"), INCR)
        while True:
            for channel, queue in (("ar", self.ar), ("aw", self.aw), ("w", self.w)):
                if queue and not offered[channel]:
                    offered[channel] = rng.random() >= self.stalls[channel]
                ctx.set(getattr(axi, f"{channel}valid"), offered[channel])
                if offered[channel] and channel == "w":
                    data, strobes, last = queue[0]
                    ctx.set(axi.wdata, data)
                    ctx.set(axi.wstrb, strobes)
                    ctx.set(axi.wlast, last)
                elif offered[channel]:
                    i, address, beats = queue[0]
                    for name, value in zip(address_fields, (i, address, beats - 1), strict=True):
                        ctx.set(getattr(axi, f"{channel}{name}"), value)
            ready = {channel: rng.random() >= self.stalls[channel] for channel in ("r", "b")}
            ctx.set(axi.rready, ready["r"])
            ctx.set(axi.bready, ready["b"])
            names = ("arready", "awready", "wready", "rvalid", "bvalid", *watched["r"],
                     *watched["b"])
            _, _, *values = await ctx.tick().sample(*(getattr(axi, name) for name in names))
            v = dict(zip(names, values, strict=True))

            for channel, queue in (("ar", self.ar), ("aw", self.aw), ("w", self.w)):
                if offered[channel] and v[f"{channel}ready"]:
                    offered[channel] = False
                    entry = queue.popleft()
                    if channel == "ar":
                        self.ar_cycles.append(self.cycle)
                        self.open_reads.setdefault(entry[0], deque()).append(entry)
                    elif channel == "aw":
                        self.open_writes.setdefault(entry[0], deque()).append(entry)
            for channel, fields in watched.items():
                now = tuple(v[name] for name in fields) if v[f"{channel}valid"] else None
                if channel in held:
                    assert now == held[channel], f"{channel} changed before it was taken"
                held.pop(channel, None)
                if now is not None and not ready[channel]:
                    held[channel] = now
            if v["rvalid"] and ready["r"]:
                i = v["rid"]
                self.r_cycles.append(self.cycle)
                beats = partial.setdefault(i, [])
                beats.append((v["rdata"], v["rresp"]))
                assert self.open_reads.get(i), f"an answer for id {i}, which has asked for nothing"
                assert v["rlast"] == (len(beats) == self.open_reads[i][0][2])
                if v["rlast"]:
                    self.open_reads[i].popleft()
                    self.answers.append((i, *map(list, zip(*partial.pop(i), strict=True))))
            if v["bvalid"] and ready["b"]:
                assert self.open_writes.get(v["bid"]), f"nothing to acknowledge for {v['bid']}"
                self.open_writes[v["bid"]].popleft()
                self.acknowledged.append((v["bid"], v["bresp"]))
            self.cycle += 1
            assert self.cycle < self.cycle_limit, "the test hangs"
