"""A writer's requests, one behind another."""

import pytest

from tests.hdl.memory.test_memory_port import Bench, start


@pytest.mark.parametrize("stall", [0.0, 0.4])
def test_a_request_need_not_wait_for_the_one_before(stall):
    """Rows follow each other; ``done`` comes when memory has all of them."""
    bench = Bench(latency=40, stall=stall, seed=3)
    sizes = [1, 70, 64, 3, 130]
    rows = [[bench.random.getrandbits(64) for _ in range(size)] for size in sizes]

    async def ask(ctx):
        for i, row in enumerate(rows):
            await bench.request(ctx, bench.writers[1], 4096 * i + 8, len(row))

    async def give(ctx):
        for row in rows:
            await bench.send(ctx, bench.writers[1], row)
        assert not bench.done[1]
        await bench.until_done(ctx, 1)
        for i, row in enumerate(rows):
            assert [bench.beat(4096 * i + 8 + 8 * k) for k in range(len(row))] == row
        await bench.request(ctx, bench.writers[0], 0, 1)  # now it is another's turn
        await bench.send(ctx, bench.writers[0], [7])
        await bench.until_done(ctx, 0)

    bench.run(start(ask), start(give))
    assert bench.done == [1, 1] and bench.beat(0) == 7
    beats = [cycle for cycle, _ in bench.w_beats][:sum(sizes)]
    if not stall:
        assert beats[-1] - beats[0] < sum(sizes) + 40
