"""Memory behind read clients, for the Amaranth simulator."""

from collections import deque


def serve_reads(port, memory, config, rng, *, latency=5, stall=0.0):
    """Return a process that answers a read client from ``memory`` (a bytearray)."""
    async def process(ctx):
        now, pending = 0, deque()
        while True:
            ready = rng.random() >= stall
            ctx.set(port.request.ready, ready)
            if pending and pending[0][0] <= now and rng.random() >= stall:
                _, data, last = pending.popleft()
                ctx.set(port.valid, 1)
                ctx.set(port.data, data)
                ctx.set(port.last, last)
            else:
                ctx.set(port.valid, 0)
            _, _, valid, request = await ctx.tick().sample(
                port.request.valid, port.request.payload)
            now += 1
            if valid and ready:
                assert request.address % config.port_bytes == 0
                assert request.beats > 0
                for beat in range(request.beats):
                    start = request.address + beat * config.port_bytes
                    assert start + config.port_bytes <= len(memory)
                    word = int.from_bytes(memory[start: start + config.port_bytes], "little")
                    pending.append((now + latency, word, beat + 1 == request.beats))
    return process
