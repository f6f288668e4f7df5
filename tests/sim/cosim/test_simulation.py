"""The harness against the stand-in: data, timing, errors, independence."""

import dataclasses
import threading
from fractions import Fraction

import numpy as np
import pytest

from moeaccel.sim.cosim.memory import MemoryModel, MemoryStats, StallModel
from moeaccel.sim.cosim.simulation import CoSimulation, StopReason
from moeaccel.sim.errors import (
    ModelStopped,
    ProtocolError,
    RegisterResponseError,
    SimulationError,
    SimulationTimeout,
)
from tests.sim import copy_engine as engine
from tests.sim.copy_engine import Fault

SOURCE = 0x0010_0000
TARGET = 0x4000_0000
SIZE = 1 << 31


def start(cosim, *, beats, source=SOURCE, target=TARGET, fault=Fault.NONE):
    """Tell the engine to copy."""
    for register, value in ((engine.SOURCE, source), (engine.TARGET, target)):
        cosim.reg_write(register, value & 0xFFFF_FFFF)
        cosim.reg_write(register + 4, value >> 32)
    cosim.reg_write(engine.BEATS, beats)
    cosim.reg_write(engine.FAULT, fault)
    cosim.reg_write(engine.CONTROL, 1)


def copy(cosim, *, beats, seed=0, max_cycles=1_000_000, read_port=0, write_port=0, **where):
    """Copy random bytes, check them and return the cycles that it took."""
    source, target = where.get("source", SOURCE), where.get("target", TARGET)
    count = beats * cosim.data_bytes
    data = np.random.default_rng(seed).integers(0, 256, count, dtype=np.uint8)
    cosim.mem_write(source, data, port=read_port)
    start(cosim, beats=beats, **where)
    cycles = cosim.wait_irq(max_cycles=max_cycles)
    assert cosim.reg_read(engine.STATUS) == engine.STATUS_DONE
    assert np.array_equal(cosim.mem_read(target, count, port=write_port), data)
    # Nothing beside it
    beside = cosim.mem_view(target + count, 4096, port=write_port)
    assert not beside.any()
    assert not cosim.mem_view(target - 4096, 4096, port=write_port).any()
    cosim.reg_write(engine.STATUS, 0)
    assert not cosim.irq
    return cycles


@pytest.fixture(params=["model64", "model512"])
def model(request):
    return request.getfixturevalue(request.param)


# -- data and timing -----------------------------------------------------------------------------

@pytest.mark.parametrize("latency", [1, 40, 200])
def test_ideal_memory_is_one_port_with_a_fixed_latency(model, latency):
    with CoSimulation(model, memory=MemoryModel.ideal(latency, size=SIZE)) as cosim:
        copy(cosim, beats=1)
        stats = cosim.stats()
        assert stats.read_busy_cycles == latency
        assert stats.read_beats == stats.write_beats == 1
        assert stats.bytes_read == stats.bytes_written == cosim.data_bytes
        assert stats.write_wait_cycles == 0


def test_ideal_memory_streams_a_beat_in_every_cycle(model64):
    with CoSimulation(model64, memory=MemoryModel.ideal(10, size=SIZE)) as cosim:
        copy(cosim, beats=20_000)
        stats = cosim.stats()
        first = min(stats.first_read_cycle, stats.first_write_cycle)
        last = max(stats.last_read_cycle, stats.last_write_cycle)
        # Reads and writes share the one port.
        assert 40_000 <= last - first + 1 <= 40_000 * 1.002
        assert stats.read_bursts == stats.write_bursts == 20_000 // 16


def test_two_full_ports_copy_a_beat_in_every_cycle(model64):
    with CoSimulation(model64, memory=MemoryModel(size=SIZE, read_latency=10)) as cosim:
        copy(cosim, beats=20_000)
        stats = cosim.stats()
        assert stats.last_read_cycle - stats.first_read_cycle + 1 == 20_000


@pytest.mark.parametrize("rate", [Fraction(1, 3), 3, Fraction(27, 4), 8])
@pytest.mark.parametrize("shared", [False, True])
def test_bandwidth_is_exact(model64, rate, shared):
    beats = 4000
    memory = MemoryModel(size=SIZE, read_latency=5, bytes_per_cycle=rate, shared=shared)
    with CoSimulation(model64, memory=memory) as cosim:
        copy(cosim, beats=beats)
        stats = cosim.stats()
        cycles = stats.last_write_cycle - stats.first_read_cycle + 1
        expected = beats * 8 * (2 if shared else 1) / rate
        assert expected * 0.97 - 200 <= cycles <= expected * 1.01 + 200


def test_more_bandwidth_than_a_beat_serves_both_directions(model64):
    memory = MemoryModel(size=SIZE, read_latency=5, bytes_per_cycle=16, shared=True)
    with CoSimulation(model64, memory=memory) as cosim:
        assert copy(cosim, beats=4000) < 4200


def test_refresh_takes_its_share(model64):
    memory = MemoryModel(size=SIZE, read_latency=5)
    with CoSimulation(model64, memory=memory) as cosim:
        without = copy(cosim, beats=9000)
    memory = dataclasses.replace(memory, refresh_interval=100, refresh_cycles=10)
    with CoSimulation(model64, memory=memory) as cosim:
        cycles = copy(cosim, beats=9000)
    assert cycles == pytest.approx(without / 0.9, rel=0.01)


def test_rows_of_one_bank_cost_and_other_banks_hide_it(model64):
    # 128-byte bursts; rows of 128 bytes. The reader keeps many bursts outstanding.
    def cycles(banks, miss):
        memory = MemoryModel(size=SIZE, read_latency=10, row_bytes=128, banks=banks,
                             row_miss_cycles=miss)
        with CoSimulation(model64, memory=memory) as cosim:
            return copy(cosim, beats=3200)

    free = cycles(1, 0)
    assert cycles(8, 20) <= free + 50
    # 200 rows; between two of them the bank opens the next one, and no beat moves.
    assert cycles(1, 20) == pytest.approx(free + 199 * 19, abs=20)


def test_dram_model_is_near_its_peak(model512):
    memory = MemoryModel.dram(size=SIZE, clock_mhz=200)
    with CoSimulation(model512, memory=memory) as cosim:
        cycles = copy(cosim, beats=50_000)
        lost = memory.refresh_cycles / memory.refresh_interval
        assert 100_000 < cycles < 100_000 / (1 - lost) * 1.12


def test_outstanding_bursts_are_bounded(model64):
    memory = MemoryModel(size=SIZE, read_latency=100, max_reads=3, max_writes=2)
    with CoSimulation(model64, memory=memory) as cosim:
        copy(cosim, beats=2000)
        assert cosim.stats().most_reads == 3
        assert cosim.stats().most_writes == 2


@pytest.mark.parametrize("seed", range(24))
def test_random_memories_keep_the_data(model, seed):
    memory = MemoryModel.random(seed, size=SIZE)
    stalls = StallModel.uniform(0.3, length=5)
    with CoSimulation(model, memory=memory, register_stalls=stalls, seed=seed) as cosim:
        copy(cosim, beats=1003, seed=seed)
        copy(cosim, beats=77, seed=seed + 1, target=TARGET + (1 << 20), source=0)


def test_same_seed_same_run(model64):
    def run(seed):
        with CoSimulation(model64, memory=MemoryModel.random(seed, size=SIZE)) as cosim:
            copy(cosim, beats=500)
            return cosim.cycle, cosim.stats()

    assert run(5) == run(5)
    assert run(5) != run(6)


def test_bursts_of_different_ids_overtake_each_other(model64):
    # In order, the engine's reads never wait for each other; out of order, its writer does.
    memory = MemoryModel(size=SIZE, read_latency=60)
    with CoSimulation(model64, memory=memory) as cosim:
        in_order = copy(cosim, beats=2000)
    for interleave in (False, True):
        other = dataclasses.replace(memory, reorder=True, interleave=interleave)
        with CoSimulation(model64, memory=other) as cosim:
            assert copy(cosim, beats=2000) > in_order


# -- errors on the buses -------------------------------------------------------------------------

def test_addresses_outside_the_memory_are_slave_errors(model):
    memory = MemoryModel.ideal(size=1 << 20)
    with CoSimulation(model, memory=memory) as cosim:
        start(cosim, beats=16, source=1 << 20, target=0)
        cosim.wait_irq(max_cycles=10_000)
        assert cosim.reg_read(engine.STATUS) == engine.STATUS_DONE | engine.STATUS_READ_ERROR
        assert not (cosim.mem_read(0, 16 * cosim.data_bytes) == 0).any()  # nobody may use it
        cosim.reg_write(engine.STATUS, 0)
        start(cosim, beats=16, source=0, target=1 << 39)
        cosim.wait_irq(max_cycles=10_000)
        assert cosim.reg_read(engine.STATUS) == engine.STATUS_DONE | engine.STATUS_WRITE_ERROR


@pytest.mark.parametrize("response", ["SLVERR", "DECERR"])
def test_injected_errors(model64, response):
    with CoSimulation(model64, memory=MemoryModel.ideal(size=SIZE)) as cosim:
        cosim.mem_write(SOURCE, np.full(800, 7, np.uint8))
        cosim.inject_error(TARGET + 400, 1, response=response, reads=False)
        start(cosim, beats=100)
        cosim.wait_irq(max_cycles=10_000)
        assert cosim.reg_read(engine.STATUS) == engine.STATUS_DONE | engine.STATUS_WRITE_ERROR
        written = cosim.mem_read(TARGET, 800) == 7
        assert not written[400:408].any()
        assert written[:400].all()
        assert written[408:].all()

        cosim.clear_errors()
        cosim.reg_write(engine.STATUS, 0)
        cosim.inject_error(SOURCE + 799, 1, response=response, writes=False)
        start(cosim, beats=99)
        cosim.wait_irq(max_cycles=10_000)
        assert cosim.reg_read(engine.STATUS) == engine.STATUS_DONE
        cosim.reg_write(engine.STATUS, 0)
        start(cosim, beats=100)
        cosim.wait_irq(max_cycles=10_000)
        assert cosim.reg_read(engine.STATUS) == engine.STATUS_DONE | engine.STATUS_READ_ERROR


def test_register_errors_are_typed(model64):
    with CoSimulation(model64) as cosim:
        assert cosim.reg_read(engine.ID) == engine.ID_VALUE
        with pytest.raises(RegisterResponseError, match="read at 0xffc was answered with SLVERR"):
            cosim.reg_read(engine.NOTHING)
        with pytest.raises(RegisterResponseError, match="write at 0xffc") as caught:
            cosim.reg_write(engine.NOTHING, 1)
        assert caught.value.response == 2
        assert cosim.reg_read(engine.ID) == engine.ID_VALUE


# -- bounded waits -------------------------------------------------------------------------------

def test_every_wait_is_bounded(model64):
    with CoSimulation(model64, register_timeout=50) as cosim:
        begin = cosim.cycle
        assert cosim.run(1234) is StopReason.CYCLES
        assert cosim.cycle == begin + 1234
        with pytest.raises(SimulationTimeout, match="No interrupt within 1000 cycles"):
            cosim.wait_irq(max_cycles=1000)
        assert cosim.run(0) is StopReason.CYCLES
        start(cosim, beats=1)
        assert cosim.run(1000) is StopReason.IRQ
        assert cosim.run(1000) is StopReason.IRQ
        begin = cosim.cycle
        assert cosim.run(10, until_irq=False) is StopReason.CYCLES
        assert cosim.cycle == begin + 10


def test_a_register_access_without_an_answer_times_out(model64):
    with CoSimulation(model64, register_timeout=50, strict=False,
                      register_stalls=StallModel(b=0.9)) as cosim:
        # The response is dropped before it is taken, sooner or later.
        cosim.reg_write(engine.FAULT, Fault.DROP_BVALID)

        def write_often():
            for _ in range(100):
                cosim.reg_write(engine.BEATS, 1)

        with pytest.raises(SimulationTimeout, match=r"write at 0x020 got no answer within 50"):
            write_often()
        with pytest.raises(SimulationTimeout):
            cosim.reg_read(engine.ID)
        cosim.reset()
        assert cosim.reg_read(engine.ID) == engine.ID_VALUE


def test_reset_in_the_middle_of_a_copy(model64):
    memory = MemoryModel.random(2, size=SIZE)
    with CoSimulation(model64, memory=memory) as cosim:
        start(cosim, beats=1000)
        cosim.run(300)
        before = cosim.cycle
        cosim.reset(cycles=10)
        assert cosim.cycle > before
        cosim.mem_write(TARGET, np.zeros(1 << 16, np.uint8))
        copy(cosim, beats=1000)


# -- the protocol checker ------------------------------------------------------------------------

WAITING = MemoryModel(size=SIZE, stalls=StallModel.uniform(0.5, length=3), seed=3)


@pytest.mark.parametrize(("fault", "channel", "text"), [
    (Fault.DROP_ARVALID, "axi_mem.AR", "VALID was dropped before READY"),
    (Fault.CHANGE_AWADDR, "axi_mem.AW", "changed while waiting for READY"),
    (Fault.CHANGE_WDATA, "axi_mem.W", "data, strobes or WLAST changed"),
    (Fault.WLAST_EARLY, "axi_mem.W", "WLAST does not fit the burst"),
    (Fault.WLAST_MISSING, "axi_mem.W", "WLAST is missing in beat 16"),
    (Fault.NARROW, "axi_mem.AR", "SIZE is 4 bytes, not the bus width of 8"),
    (Fault.FIXED_BURST, "axi_mem.AR", "BURST is 0, not INCR"),
    (Fault.DATA_FIRST, "axi_mem.W", "write data without an address"),
    (Fault.DROP_BVALID, "axil.B", "VALID was dropped before READY"),
    (Fault.NEVER_READY, "axi_mem.R", "nothing for 500 cycles from RREADY"),
    (Fault.NO_DATA, "axi_mem.W", "nothing for 500 cycles from the data of an accepted address"),
])
def test_checker_catches(model64, fault, channel, text):
    memory = dataclasses.replace(WAITING, response_timeout=500)
    stalls = StallModel.uniform(0.5, length=3)
    with CoSimulation(model64, memory=memory, strict=False, register_stalls=stalls,
                      register_timeout=200) as cosim:
        try:
            for _ in range(20 if fault is Fault.DROP_BVALID else 1):
                start(cosim, beats=64, fault=fault)
        except SimulationTimeout:
            assert fault is Fault.DROP_BVALID
        cosim.run(3000)
        found = cosim.violations()
        assert any(one.channel == channel and text in one.text for one in found), found
        assert cosim.violation_count >= len(found) > 0
        with pytest.raises(ProtocolError, match="violations of the AXI protocol"):
            cosim.check()
        cosim.clear_violations()
        cosim.check()


def test_checker_catches_a_4k_crossing(model64):
    with CoSimulation(model64, strict=False) as cosim:
        start(cosim, beats=16, source=0x1FC0)
        cosim.run(1000)
        assert [str(one).split(": ", 1)[1] for one in cosim.violations()] == [
            "axi_mem.AR: burst of 16 beats at 0x1fc0 crosses a 4 KiB boundary"]


def test_checker_catches_overlapping_accesses(model64):
    for offset, expected in ((0, "write to 0x100000 while a read of it is outstanding"),
                             (128, "read of 0x100080 before the write to it is acknowledged")):
        with CoSimulation(model64, strict=False) as cosim:
            start(cosim, beats=64, target=SOURCE + offset)
            cosim.run(1000)
            assert expected in {one.text for one in cosim.violations()}
    allowed = dataclasses.replace(MemoryModel.ideal(), check_races=False)
    with CoSimulation(model64, memory=allowed) as cosim:
        start(cosim, beats=64, target=SOURCE + 128)
        cosim.wait_irq(max_cycles=1000)


def test_a_strict_simulation_stops_at_the_first_violation(model64):
    with CoSimulation(model64, memory=WAITING) as cosim:
        # The write to CONTROL is the last one, and its response can come before the read.
        with pytest.raises(ProtocolError, match=r"cycle \d+: axi_mem\.AR: SIZE is 4") as caught:
            copy(cosim, beats=640, fault=Fault.NARROW)
        assert caught.value.count == 1
        assert cosim.cycle < 1000


def test_an_interrupt_before_the_acknowledgement_shows_old_data(model64):
    memory = MemoryModel(size=SIZE, write_latency=100)
    with CoSimulation(model64, memory=memory) as cosim:
        cosim.mem_write(SOURCE, np.full(128, 9, np.uint8))
        start(cosim, beats=16, fault=Fault.IRQ_EARLY)
        cosim.wait_irq(max_cycles=1000)
        assert not cosim.mem_view(TARGET, 128).any()
        cosim.run(200, until_irq=False)
        assert (cosim.mem_view(TARGET, 128) == 9).all()


def test_a_failed_assertion_of_the_rtl(model64):
    with CoSimulation(model64) as cosim:
        with pytest.raises(ModelStopped, match="trap register was set"):
            cosim.reg_write(engine.TRAP, 1)
        assert "Assertion failed" in cosim.log
        cosim.reset()
        copy(cosim, beats=10)


# -- the back door -------------------------------------------------------------------------------

def test_memory_by_the_back_door(model64):
    with CoSimulation(model64, memory=MemoryModel.ideal(size=1 << 36)) as cosim:
        far = (1 << 36) - 4096
        cosim.mem_write(far, b"abc")
        assert cosim.mem_read(far, 4).tobytes() == b"abc\0"
        cosim.mem_write(0, np.arange(6, dtype=np.float32).reshape(2, 3)[:, ::2])
        assert cosim.mem_read(0, 16).view(np.float32).tolist() == [0, 2, 3, 5]
        view = cosim.mem_view(8, 8)
        cosim.mem_write(8, b"\x01" * 8)
        assert view.tolist() == [1] * 8
        with pytest.raises(ValueError, match="within 0x1000000000 bytes"):
            cosim.mem_read(far, 4097)
        with pytest.raises(ValueError, match="Memory port must be in"):
            cosim.mem_read(0, 1, port=1)
    assert view.tolist() == [1] * 8  # the memory outlives the model
    with pytest.raises(SimulationError, match="closed"):
        cosim.run(1)
    cosim.close()


def test_statistics_start_again(model64):
    with CoSimulation(model64) as cosim:
        empty = cosim.stats()
        assert empty.first_read_cycle is None
        assert empty.last_write_cycle is None
        copy(cosim, beats=32)
        assert cosim.stats().bytes_read == 256
        assert cosim.stats().most_reads == 2
        cosim.clear_stats()
        assert cosim.stats() == empty
        assert isinstance(empty, MemoryStats)


# -- several of them -----------------------------------------------------------------------------

def test_instances_are_independent(model64, model512):
    memory = MemoryModel.random(1, size=SIZE)
    with CoSimulation(model64, memory=memory) as alone:
        expected = copy(alone, beats=3000), alone.stats()

    with (CoSimulation(model64, memory=memory) as one,
          CoSimulation(model64, memory=memory) as two,
          CoSimulation(model512) as other):
        two.mem_write(0, b"two")
        start(two, beats=5)  # never run to its end
        copy(other, beats=100)
        assert (copy(one, beats=3000), one.stats()) == expected
        assert two.stats().write_beats == 0
        assert one.mem_read(0, 3).tobytes() == b"\0\0\0"


def test_instances_in_threads(model64):
    results = {}

    def work(seed):
        with CoSimulation(model64, memory=MemoryModel.random(seed, size=SIZE)) as cosim:
            results[seed] = copy(cosim, beats=5000, seed=seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [0, 1, 2, 3]


def test_memory_ports_have_memories_of_their_own(model_split):
    assert model_split.memory_ports == ("axi_mem", "axi_mem_1")
    memories = MemoryModel.random(4, size=SIZE), MemoryModel.ideal(7, size=SIZE)
    with CoSimulation(model_split, memory=memories) as cosim:
        assert cosim.data_bytes == 4
        copy(cosim, beats=1000, write_port=1)
        assert not cosim.mem_view(TARGET, 4096).any()
        assert not cosim.mem_view(SOURCE, 4096, port=1).any()
        assert cosim.stats().read_beats == cosim.stats(port=1).write_beats == 1000
        assert cosim.stats().write_beats == cosim.stats(port=1).read_beats == 0
    with pytest.raises(ValueError, match="one or 2, not 3"):
        CoSimulation(model_split, memory=[MemoryModel.ideal()] * 3)


# -- waves ---------------------------------------------------------------------------------------

def test_waves_on_demand(model_waves, tmp_path):
    with CoSimulation(model_waves, memory=MemoryModel.ideal(size=SIZE)) as cosim:
        copy(cosim, beats=10)
        for name in ("first.fst", "second.fst"):
            cosim.start_waves(tmp_path / name)
            copy(cosim, beats=100, target=TARGET + (1 << 20))
            cosim.stop_waves()
            cosim.run(100)
            content = (tmp_path / name).read_bytes()
            assert content[0] == 0  # an FST file begins with its header block,
            assert int.from_bytes(content[1:9], "big") == 329  # which has this length
            assert len(content) > 2000
        with pytest.raises(SimulationError, match="cannot be written"):
            cosim.start_waves(tmp_path / "missing" / "waves.fst")
        cosim.run(10)


def test_waves_need_their_variant(model64, tmp_path):
    with (CoSimulation(model64) as cosim,
          pytest.raises(SimulationError, match="waves=True")):
        cosim.start_waves(tmp_path / "waves.fst")
