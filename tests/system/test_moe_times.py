"""When things happen in a MOE: between its jobs, between tasks, and while nothing is on the bus."""

import re
from dataclasses import replace

import numpy as np
import pytest

from moeaccel.host import Router, open_device
from moeaccel.host.errors import CommandFailed
from moeaccel.host.transports.rtl import RtlTransport
from moeaccel.interface.commands import Status
from moeaccel.sim import CoSimulation, MemoryModel
from tests.support.pair import write_register
from tests.system.test_moe import SIZE, draw, load
from tests.system.test_routing import CONFIG

pytestmark = pytest.mark.timeout(900)  # the first test builds a model

BLOCK = 64


@pytest.fixture
def open_rtl(model_of):
    """Return a function that opens the RTL behind an ideal memory of some latency."""
    opened = []

    def get(latency, **options):
        memory = replace(MemoryModel.ideal(latency=latency, size=SIZE), check_unwritten=True)
        simulation = CoSimulation(model_of(CONFIG), memory=memory, strict=False)
        opened.append(open_device(RtlTransport(CONFIG, simulation=simulation), config=CONFIG,
                                  timeout_s=20.0, **options))
        return opened[-1], simulation

    yield get
    for device in opened:
        device.close()


def turn(rtl, simulation, **settings):
    """Return the cycles of one token from the last beat of the router's matrix to the first of an
    expert: beats of blocks that are said to be unwritten are seen."""
    with load(rtl, **settings) as moe:
        x = draw(np.random.default_rng(1), 1, settings.get("d_model", 64)) * 8
        y = moe(x)
        plane, experts = moe._tasks[0].plane, moe.experts
        ends = plane._images.address + 2 * plane.shape.memory_bytes - (
            plane.shape.memory_bytes - plane.shape.image_bytes)
        last = (ends - 1) // BLOCK
        firsts, at = [], experts._images.address
        for shape in (*experts.shapes, *experts.shared_shapes):
            firsts.append((at + shape.header_bytes) // BLOCK)
            at += shape.memory_bytes
        simulation._written[0][[last, *firsts]] = 0
        simulation.clear_violations()
        again = moe(x)
        seen = [(one.cycle, int(re.search(r"read of (0x[0-9a-f]+)", one.text)[1], 16) // BLOCK)
                for one in simulation.violations()]
        simulation.clear_violations()
        simulation._written[0][[last, *firsts]] = 1
        assert (y == again).all()
        assert {block for _, block in seen} <= {last, *firsts}
        return (min(cycle for cycle, block in seen if block != last)
                - max(cycle for cycle, block in seen if block == last))


@pytest.mark.parametrize("settings", [
    {}, {"experts": 40, "d_model": 32, "top_k": 8}, {"shared": 2}], ids=str)
def test_from_the_router_to_an_expert(open_rtl, settings):
    """Two latencies, of an entry and of an image: nobody waits for what is written, nor for the
    router's table. What lies between is two cycles for each expert, whose logits are loaded and
    then read, and some for all of them."""
    experts = settings.get("experts", 16)
    found = [turn(*open_rtl(latency), **settings) for latency in (80, 95, 110)]
    assert [cycles - found[0] for cycles in found[1:]] == [2 * 15, 2 * 30]
    assert 2 * experts < found[0] - 2 * 80 <= 2 * experts + 320


def test_tasks_follow_without_a_bubble(open_rtl):
    """Four commands in the ring: as many cycles with one router as with two in turn, and each
    takes what it takes alone. The routers are equal, so that the work is."""
    rtl, simulation = open_rtl(100)
    rng = np.random.default_rng(5)
    router = Router(draw(rng, 16, 64) * 8, top_k=2)
    x = draw(rng, 20, 64) * 8
    with rtl.load_moe([router, router], draw(rng, 16, 64, 64), draw(rng, 16, 64, 32)) as moe:
        spans, cycles = [], []
        for tasks in ((0, 0, 0, 0), (0, 1, 0, 1), (1, 1, 1, 1)):
            handles = [moe.submit(x, task=task) for task in tasks]
            begin = simulation.cycle
            results = [moe.sync(handle) for handle in handles]
            spans.append(simulation.cycle - begin)
            cycles.append([handle.cycles for handle in handles])
            assert all((one == results[0]).all() for one in results)
    assert cycles[0] == cycles[1] == cycles[2] and len(set(cycles[0])) == 1
    assert spans[0] == spans[1] == spans[2]


@pytest.mark.parametrize("order", ["rank", "priority"])
def test_the_watchdog_sees_a_capacity_at_work(open_rtl, order):
    """It walks over 248 pairs for 1,736 cycles, or more, without a beat of memory."""
    rtl, _ = open_rtl(20)
    rng = np.random.default_rng(6)
    router = Router(experts=64, top_k=8, capacity=5, capacity_order=order)
    logits = rng.standard_normal((31, 64)).astype(np.float32)
    ids, weights = rtl.route(router, logits)
    write_register(rtl, "WATCHDOG", 150)
    again = rtl.route(router, logits)
    assert (ids == again[0]).all() and (weights == again[1]).all()
    write_register(rtl, "WATCHDOG", 30)  # less than memory takes
    with pytest.raises(CommandFailed) as failed:
        rtl.route(router, logits)
    assert failed.value.status == Status.WATCHDOG
