"""A SerialLink in Amaranth's simulator: its line, its buses, and what goes wrong on them."""

import random
from collections import deque

from amaranth.sim import Simulator

from moeaccel.hdl.boards.serial_link import SerialLink
from moeaccel.interface.link import FrameReader, Reply, Request, frame

OKAY, SLVERR, DECERR = 0, 2, 3
CLOCK_S = 1e-8


class LinkBench:
    """A SerialLink with a memory, registers, and a host's end of the line.

    ``memory`` is a bytearray, ``registers`` a dict by address (others answer SLVERR); beats beyond
    the memory answer DECERR. ``stall`` is the probability that a channel rests in a cycle.
    ``hang`` names buses ("memory", "registers") that do not answer. ``accesses`` lists what the
    buses saw: ("memory", "write", address, data, strobes) and so on.
    """

    def __init__(self, *, divisor=4, seed=0, stall=0.0, memory_bytes=1 << 16, **options):
        self.dut = SerialLink(baud_divisor=divisor, id_width=2, **options)
        self.divisor, self.stall = divisor, stall
        self.random = random.Random(seed)
        self.memory = bytearray(self.random.randbytes(memory_bytes))
        self.registers = {4 * k: self.random.getrandbits(32) for k in range(8)}
        self.hang = set()
        self.accesses = []
        self.cycle = 0
        self.received = []  # (cycle of its last bit, byte)
        self.replies = []
        self.damaged = 0
        self._reader = FrameReader()
        self._number = 0

    # -- the host's end --------------------------------------------------------------------------
    def request(self, opcode, address=0, *, payload=b"", count=None, **fields):
        """Return the next request."""
        request = Request(number=self._number, opcode=opcode, address=address, payload=payload,
                          count=len(payload) if count is None else count, **fields)
        self._number = (self._number + 1) % 256
        return request

    async def send(self, ctx, data):
        """Send bytes without gaps."""
        for byte in data:
            for bit in (0, *(byte >> k & 1 for k in range(8)), 1):
                ctx.set(self.dut.i_rx, bit)
                await ctx.tick().repeat(self.divisor)

    async def wait(self, ctx, count=1, *, byte_times=3000):
        """Return the next ``count`` replies."""
        for _ in range(byte_times):
            if len(self.replies) >= count:
                replies, self.replies = self.replies[:count], self.replies[count:]
                return replies
            await ctx.tick().repeat(10 * self.divisor)
        raise AssertionError(f"only {len(self.replies)} of {count} replies came")

    async def ask(self, ctx, request):
        """Send a request and return its reply."""
        await self.send(ctx, frame(request.content()))
        reply, = await self.wait(ctx)
        return reply

    def received_bytes(self):
        """Take the bytes received so far."""
        received, self.received = self.received, []
        return received

    async def _listen(self, ctx):
        dut, divisor = self.dut, self.divisor
        while True:
            if ctx.get(dut.o_tx):
                await ctx.changed(dut.o_tx)
            begin = self.cycle
            await ctx.tick().repeat(divisor + divisor // 2)
            byte = 0
            for k in range(8):
                byte |= ctx.get(dut.o_tx) << k
                await ctx.tick().repeat(divisor)
            assert ctx.get(dut.o_tx) == 1, "no stop bit"
            self.received.append((begin + 10 * divisor, byte))
            for content in self._reader.feed(bytes([byte])):
                assert content is not None, "the device sent a damaged frame"
                self.replies.append(Reply.parse(content))

    # -- the buses -------------------------------------------------------------------------------
    def _rest(self):
        return self.stall and self.random.random() < self.stall

    async def _serve(self, ctx, name, bus, write, read):
        """Answer one bus; check that nothing changes before it is taken."""
        fields = {"aw": ("awaddr",), "w": ("wdata", "wstrb"), "ar": ("araddr",)}
        flat = [getattr(bus, f) for c, names in fields.items() for f in (f"{c}valid", *names)]
        driven = {}

        def drive(name, value):
            if driven.get(name) != value:
                driven[name] = value
                ctx.set(getattr(bus, name), value)

        held, taken = {}, {}
        valids = [getattr(bus, f"{channel}valid") for channel in fields]
        sample = ctx.tick().sample(*flat)
        while True:
            if not (held or taken or driven.get("bvalid") or driven.get("rvalid")) \
                    and not any(ctx.get(valid) for valid in valids):
                await ctx.changed(*valids)
            _, _, *values = await sample
            flow = iter(values)
            for channel, names in fields.items():
                valid = next(flow)
                now = tuple(next(flow) for _ in names)
                assert channel not in held or (valid and now == held[channel]), \
                    f"{channel} changed before it was taken"
                held.pop(channel, None)
                if valid and driven.get(f"{channel}ready"):
                    taken[channel] = now
                elif valid:
                    held[channel] = now
                drive(f"{channel}ready", name not in self.hang and not self._rest())
            for answer in ("b", "r"):
                if driven.get(f"{answer}valid"):
                    drive(f"{answer}valid", 0)
                    drive(f"{answer}resp", SLVERR)
            drive("rdata", 0x55)
            if name in self.hang or self._rest():
                continue
            if "aw" in taken and "w" in taken:
                access = *taken.pop("aw"), *taken.pop("w")
                self.accesses.append((name, "write", *access))
                drive("bresp", write(*access))
                drive("bvalid", 1)
            elif "ar" in taken:
                access = taken.pop("ar")
                self.accesses.append((name, "read", *access))
                value, response = read(*access)
                drive("rdata", value)
                drive("rresp", response)
                drive("rvalid", 1)

    def _memory_write(self, address, value, strobes):
        if address >= len(self.memory):
            return DECERR
        for k, byte in enumerate(value.to_bytes(8, "little")):
            if strobes >> k & 1:
                self.memory[address + k] = byte
        return OKAY

    def _memory_read(self, address):
        beat = self.memory[address : address + 8]
        return int.from_bytes(beat, "little"), OKAY if len(beat) == 8 else DECERR

    def _register_write(self, address, value, strobes):
        assert strobes == 15
        if address not in self.registers:
            return SLVERR
        self.registers[address] = value
        return OKAY

    def _register_read(self, address):
        return self.registers.get(address, 0), OKAY if address in self.registers else SLVERR

    def run(self, testbench):
        """Simulate until the testbench ends."""
        async def main(ctx):
            ctx.set(self.dut.i_rx, 1)
            await testbench(ctx)

        sim = self._simulator()
        sim.add_testbench(main)
        sim.run()

    def start(self):
        """Simulate as ``feed`` and ``poll`` ask for it: a device for a SerialStandIn."""
        async def main(ctx):
            ctx.set(self.dut.i_rx, 1)
            while True:
                if self._to_send:
                    await self.send(ctx, bytes([self._to_send.popleft()]))
                else:
                    await ctx.tick()

        self._to_send = deque()
        self._now = 0
        self._running = self._simulator()
        self._running.add_testbench(main, background=True)

    def feed(self, data):
        """Take bytes, let the time of some pass, and return what was received."""
        self._to_send += data
        return self.poll()

    def poll(self):
        """Let the time of a few bytes pass, and return what was received."""
        self._now += 8 * 10 * self.divisor
        self._running.run_until(self._now * CLOCK_S)
        return bytes(byte for _, byte in self.received_bytes())

    def _simulator(self):
        async def check_constants(ctx):
            axi = self.dut.axi
            while True:
                await ctx.changed(axi.awvalid, axi.arvalid)
                assert ctx.get(axi.awlen) == ctx.get(axi.arlen) == 0
                assert ctx.get(axi.awsize) == ctx.get(axi.arsize) == 3
                assert ctx.get(axi.wlast) & ctx.get(axi.bready) & ctx.get(axi.rready)

        async def count(ctx):
            async for _ in ctx.tick():
                self.cycle += 1

        async def memory(ctx):
            await self._serve(ctx, "memory", self.dut.axi, self._memory_write, self._memory_read)

        async def registers(ctx):
            await self._serve(ctx, "registers", self.dut.axil, self._register_write,
                              self._register_read)

        sim = Simulator(self.dut)
        sim.add_clock(CLOCK_S)
        for background in (count, self._listen, memory, registers, check_constants):
            sim.add_testbench(background, background=True)
        return sim
