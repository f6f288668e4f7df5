"""SerialLink bit by bit: requests, damage, repetition, dead buses, speed."""

import random

import pytest

from moeaccel.hdl.boards.serial_link import SerialLink
from moeaccel.host.errors import AccessFailed
from moeaccel.host.transports.serial import SerialTransport
from moeaccel.interface.link import (
    HELLO_BYTES,
    MAX_PAYLOAD,
    WINDOW,
    Hello,
    Opcode,
    Status,
    frame,
)
from tests.support.serial_device import SerialStandIn
from tests.support.serial_line import LinkBench

READ, WRITE = Opcode.MEMORY_READ, Opcode.MEMORY_WRITE


def word(value):
    return value.to_bytes(4, "little")


@pytest.mark.parametrize("stall", [0.0, 0.6])
def test_registers_and_memory(stall):
    """Any alignment and length; only the bytes named change; replies echo and count."""
    bench = LinkBench(stall=stall, memory_bytes=1 << 12)

    async def testbench(ctx):
        hello = await bench.ask(ctx, bench.request(
            Opcode.HELLO, 0x89AB_CDEF, count=HELLO_BYTES, attempt=9))
        assert Hello.parse(hello.payload) == Hello(nonce=0x89AB_CDEF, memory_bytes=1 << 25)
        assert (hello.number, hello.expected, hello.attempt) == (0, 1, 9)
        value = bench.random.getrandbits(32)
        await bench.ask(ctx, bench.request(Opcode.REGISTER_WRITE, 12, payload=word(value)))
        assert bench.registers[12] == value
        reply = await bench.ask(ctx, bench.request(Opcode.REGISTER_READ, 12, count=4))
        assert reply.payload == word(value)
        image = bytearray(bench.memory)
        for address, count in [(8, 8), (3, 1), (15, 2), (29, 27), (4095, 1), (7, 0)]:
            data = bench.random.randbytes(count)
            reply = await bench.ask(ctx, bench.request(WRITE, address, payload=data))
            assert reply.status is Status.OK
            image[address : address + count] = data
            assert bench.memory == image
            reply = await bench.ask(ctx, bench.request(READ, address, count=count))
            assert (reply.status, reply.payload) == (Status.OK, data)
        assert reply.expected == bench.request(READ).number

    bench.run(testbench)
    assert {a[:2] for a in bench.accesses} == {
        (bus, kind) for bus in ("memory", "registers") for kind in ("read", "write")}


def test_numbers():
    """What was executed is not executed again, what is ahead is not executed at all."""
    bench = LinkBench()

    async def testbench(ctx):
        async def ask(request, status=Status.OK):
            reply = await bench.ask(ctx, request)
            assert (reply.number, reply.attempt, reply.status) == (
                request.number, request.attempt, status)
            return reply

        # Before HELLO number 0 is expected.
        bench._number = 200
        assert (await ask(bench.request(READ, count=8), Status.OUT_OF_ORDER)).payload == b""
        bench._number = 253
        assert (await ask(bench.request(Opcode.HELLO, count=HELLO_BYTES))).expected == 254
        # A write, one that fails, a read; then all of them again.
        write = bench.request(WRITE, 16, payload=b"first")
        wrong = bench.request(Opcode.REGISTER_WRITE, 0xFFC, payload=b"none")
        read = bench.request(READ, 16, count=5)
        await ask(write)
        await ask(wrong, Status.BUS_ERROR)
        assert (await ask(read)).payload == b"first"
        bench.memory[16:21] = b"other"
        accesses = len(bench.accesses)
        await ask(write)
        await ask(wrong, Status.BUS_ERROR)
        assert len(bench.accesses) == accesses
        assert bench.memory[16:21] == b"other"
        assert (await ask(read)).payload == b"other"
        # One is missing: later ones are refused, their payload is dropped.
        missing = bench.request(WRITE, 32, payload=b"missing")
        ahead = bench.request(WRITE, 64, payload=b"ahead")
        before = bytes(bench.memory)
        assert (await ask(ahead, Status.OUT_OF_ORDER)).expected == missing.number
        assert bench.memory == before
        await ask(missing)
        await ask(ahead)
        assert bench.memory[64:69] == b"ahead"
        # The oldest of a window can be asked again, the one before it not.
        for _ in range(WINDOW - 2):
            await ask(bench.request(READ, 0, count=1))
        await ask(missing)
        await ask(bench.request(READ, 0, count=1))
        await ask(missing, Status.OUT_OF_ORDER)

    bench.run(testbench)


@pytest.mark.parametrize("seed", range(2))
def test_damaged_frames_are_never_executed(seed):
    """Flipped, lost and doubled bytes, cuts, noise: nothing happens, and the next frame is read."""
    rng = random.Random(seed)
    bench = LinkBench(memory_bytes=256, seed=seed)

    async def testbench(ctx):
        before = bytes(bench.memory)
        for damage in ("flip", "lose", "double", "cut", "noise"):
            sent = frame(bench.request(WRITE, 8, payload=rng.randbytes(16)).content())
            at = rng.randrange(len(sent) - 1)
            match damage:
                case "flip":
                    sent = sent[:at] + bytes([sent[at] ^ 1 << rng.randrange(8)]) + sent[at + 1 :]
                case "lose":
                    sent = sent[:at] + sent[at + 1 :]
                case "double":
                    sent = sent[: at + 1] + sent[at:]
                case "cut":
                    sent = sent[:at + 1] + b"\0"
                case "noise":
                    sent = rng.randbytes(20) + b"\0"
            bench._number -= 1
            await bench.send(ctx, sent)
            await ctx.tick().repeat(10 * 4 * 40)
            assert bench.replies[0].opcode == Opcode.NOTICE
            assert {reply.status for reply in bench.replies} == {Status.DAMAGED}
            bench.replies.clear()
            assert bench.memory == before
            assert not [a for a in bench.accesses if a[1] == "write"]
            reply = await bench.ask(ctx, bench.request(READ, 0, count=3))
            assert (reply.status, reply.payload) == (Status.OK, before[:3])

    bench.run(testbench)


@pytest.mark.slow
def test_a_frame_that_does_not_fit_is_damaged():
    """Requests pile up behind a bus that hangs; what does not fit is lost, and can be repeated."""
    bench = LinkBench(bus_timeout_cycles=1 << 18)
    first, *later = [bench.request(WRITE, 8 * k, payload=bytes([k + 1]) * MAX_PAYLOAD)
                     for k in range(4)]

    async def testbench(ctx):
        bench.hang.add("memory")
        for request in (first, *later):
            await bench.send(ctx, frame(request.content()))
        bench.hang.clear()
        replies = await bench.wait(ctx, 4)
        assert [r.status for r in replies] == [Status.OK] * 3 + [Status.DAMAGED]
        assert replies[-1].expected == later[-1].number
        reply = await bench.ask(ctx, later[-1])
        assert reply.status is Status.OK
        assert bench.memory[24 : 24 + MAX_PAYLOAD] == bytes([4]) * MAX_PAYLOAD

    bench.run(testbench)


def test_bad_requests():
    bench = LinkBench()

    async def testbench(ctx):
        for fields in (
            {"opcode": Opcode.HELLO, "count": 4},
            {"opcode": READ, "count": MAX_PAYLOAD + 1},
            {"opcode": READ, "count": 0xFFFF},
            {"opcode": Opcode.REGISTER_READ, "count": 8},
            {"opcode": Opcode.REGISTER_READ, "address": 2, "count": 4},
            {"opcode": Opcode.REGISTER_READ, "address": 1 << 12, "count": 4},
            {"opcode": Opcode.REGISTER_WRITE, "payload": b"12345"},
            {"opcode": Opcode.NOTICE},
            {"opcode": 8},
            {"opcode": 15, "payload": b"unknown"},
        ):
            request = bench.request(**fields)
            reply = await bench.ask(ctx, request)
            assert (reply.status, reply.payload) == (Status.BAD_REQUEST, b"")
            assert (reply.opcode, reply.expected) == (request.opcode, request.number + 1)
        assert bench.accesses == []
        reply = await bench.ask(ctx, bench.request(READ, 5, count=2))
        assert reply.payload == bench.memory[5:7]

    bench.run(testbench)


def test_bus_errors():
    """Codes of both buses; a block ends at its first error, and nothing wraps."""
    bench = LinkBench(memory_bytes=64)

    async def testbench(ctx):
        async def ask(status, *args, **fields):
            reply = await bench.ask(ctx, bench.request(*args, **fields))
            assert reply.status is status
            return reply

        await ask(Status.BUS_ERROR, Opcode.REGISTER_READ, 0x800, count=4)
        await ask(Status.BUS_ERROR, Opcode.REGISTER_WRITE, 0x800, payload=b"1234")
        assert len((await ask(Status.NO_MEMORY, READ, 56, count=20)).payload) == 20
        accesses = len(bench.accesses)
        await ask(Status.NO_MEMORY, WRITE, 56, payload=bytes(30))
        assert bench.memory[56:] == bytes(8)
        assert len(bench.accesses) == accesses + 2
        before = bytes(bench.memory)
        await ask(Status.NO_MEMORY, WRITE, 0xFFFF_FFF0, payload=bytes(30))
        bench.memory.extend(bytes(8))
        assert bench.memory[:64] == before
        assert (await ask(Status.OK, READ, 64, count=8)).payload == bytes(8)

    bench.run(testbench)


def test_addresses_end_where_the_bus_ends():
    bench = LinkBench(addr_width=10, memory_bytes=1 << 10)

    async def testbench(ctx):
        before = bytes(bench.memory)
        for request in (bench.request(WRITE, 1020, payload=bytes(20)),
                        bench.request(WRITE, 1 << 31, payload=bytes(8))):
            assert (await bench.ask(ctx, request)).status is Status.NO_MEMORY
        assert bench.memory == before[:1020] + bytes(4)

    bench.run(testbench)


@pytest.mark.parametrize("bus", ["memory", "registers"])
def test_a_bus_that_hangs(bus):
    """A code after the timeout; the other bus goes on; the late answer is for nobody."""
    bench = LinkBench(bus_timeout_cycles=1 << 9)

    def access(name, kind, address=8):
        opcode = {("memory", "read"): READ, ("memory", "write"): WRITE,
                  ("registers", "read"): Opcode.REGISTER_READ,
                  ("registers", "write"): Opcode.REGISTER_WRITE}[name, kind]
        options = {"payload": b"1234"} if kind == "write" else {"count": 4}
        return bench.request(opcode, address, **options)

    async def testbench(ctx):
        other, = {"memory", "registers"} - {bus}
        for kind in ("read", "write"):
            bench.hang.add(bus)
            for late in ("read", "write"):
                reply = await bench.ask(ctx, access(bus, kind if late == "read" else late))
                assert reply.status is Status.BUS_TIMEOUT
                assert (await bench.ask(ctx, access(other, late))).status is Status.OK
            bench.hang.clear()
            accesses = len(bench.accesses)
            await ctx.tick().repeat(20)
            assert bench.accesses[accesses:] and bench.accesses[-1][:2] == (bus, kind)
            reply = await bench.ask(ctx, access(bus, "read", 16))
            assert reply.status is Status.OK
            assert reply.payload == (
                bench.memory[16:20] if bus == "memory" else word(bench.registers[16]))

    bench.run(testbench)


def test_interrupt():
    """A notice when it rises, its level in every reply, and no notice for what a reply told."""
    bench = LinkBench()

    async def testbench(ctx):
        assert not (await bench.ask(ctx, bench.request(READ))).interrupt
        for _ in range(2):
            ctx.set(bench.dut.i_irq, 1)
            notice, = await bench.wait(ctx)
            assert (notice.opcode, notice.status, notice.interrupt) == (
                Opcode.NOTICE, Status.OK, True)
            ctx.set(bench.dut.i_irq, 0)
            assert not (await bench.ask(ctx, bench.request(READ))).interrupt
        bench.hang.add("memory")
        await bench.send(ctx, frame(bench.request(READ, count=1).content()))
        await ctx.tick().repeat(100)
        ctx.set(bench.dut.i_irq, 1)
        bench.hang.clear()
        reply, = await bench.wait(ctx)
        assert (reply.opcode, reply.interrupt) == (READ, True)
        await ctx.tick().repeat(10 * 4 * 20)
        assert bench.replies == []

    bench.run(testbench)


def test_replies_have_no_gaps():
    """Reads asked for at once fill the line from the first byte to the last."""
    bench = LinkBench()

    async def testbench(ctx):
        for k in range(3):
            await bench.send(ctx, frame(bench.request(READ, 64 * k + 1, count=64).content()))
        replies = await bench.wait(ctx, 3)
        assert b"".join(r.payload for r in replies) == b"".join(
            bench.memory[64 * k + 1 : 64 * k + 65] for k in range(3))

    bench.run(testbench)
    cycles = [cycle for cycle, _ in bench.received]
    assert len(cycles) == 3 * (64 + 10)
    # The first byte is sent at once, since number 0 ends its COBS block.
    assert cycles[-1] - cycles[1] == (len(cycles) - 2) * 10 * bench.divisor


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_block_transfers_move_the_lines_rate():
    """Payload bytes, times the cycles of a byte on the line, over the cycles that they took."""
    bench = LinkBench(stall=0.3)
    blocks = 4
    share = {}

    async def testbench(ctx):
        await bench.ask(ctx, bench.request(READ))
        data = bench.random.randbytes(blocks * MAX_PAYLOAD)
        begin = bench.cycle
        for k in range(blocks):
            await bench.send(ctx, frame(bench.request(
                WRITE, 3 + k * MAX_PAYLOAD,
                payload=data[k * MAX_PAYLOAD : (k + 1) * MAX_PAYLOAD]).content()))
        replies = await bench.wait(ctx, blocks)
        share["write"] = len(data) * 10 * bench.divisor / (bench.cycle - begin)
        assert {r.status for r in replies} == {Status.OK}
        assert bench.memory[3 : 3 + len(data)] == data
        begin = bench.cycle
        for k in range(blocks):
            await bench.send(ctx, frame(bench.request(
                READ, 3 + k * MAX_PAYLOAD, count=MAX_PAYLOAD).content()))
        replies = await bench.wait(ctx, blocks)
        share["read"] = len(data) * 10 * bench.divisor / (bench.cycle - begin)
        assert b"".join(r.payload for r in replies) == data

    bench.run(testbench)
    assert min(share.values()) >= 0.94, share


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_host_on_the_rtl(tmp_path):
    """Both real ends; the device is far slower than its line, and nothing is sent twice."""
    bench = LinkBench(seed=3)
    bench.start()
    port = SerialStandIn(bench, tmp_path / "port")
    try:
        with SerialTransport(port.path) as transport:
            for address, value in bench.registers.items():
                assert transport.register_read(address) == value
            data = bench.random.randbytes(60)
            transport.memory_write(13, data)
            transport.register_write(8, 77)
            assert transport.memory_read(13, 60).tobytes() == data
            assert bench.memory[13:73] == data
            assert transport.register_read(8) == 77
            transport.register_write(0x800, 1)
            with pytest.raises(AccessFailed, match="register write of 4 bytes at 0x800"):
                transport.wait_interrupt(0)
            assert transport._attempt == 0
    finally:
        port.unplug()
    writes = [a for a in bench.accesses if a[:2] == ("registers", "write")]
    assert writes == [("registers", "write", 8, 77, 15), ("registers", "write", 0x800, 1, 15)]


@pytest.mark.parametrize(("options", "message"), [
    ({"baud_divisor": 3}, "divisor must be an integer from 4 on, not 3"),
    ({"addr_width": 33}, "addr_width must be from 4 to 32, not 33"),
    ({"memory_bytes": 1000}, "memory_bytes must be a power of two from 16 on, not 1000"),
    ({"bus_timeout_cycles": 8}, "bus_timeout_cycles must be a power of two from 16 on, not 8"),
    ({"id_width": 0}, "id_width must be 1 or more, not 0"),
])
def test_parameters(options, message):
    with pytest.raises(ValueError, match=message):
        SerialLink(**({"baud_divisor": 4, "id_width": 1} | options))
