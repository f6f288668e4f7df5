"""Memory models refuse parameters that mean nothing."""

import dataclasses
from fractions import Fraction

import pytest

from moeaccel.sim.cosim.memory import MemoryModel, StallModel


@pytest.mark.parametrize(("fields", "message"), [
    ({"size": 4095}, "Memory size must be an integer"),
    ({"size": 5000}, "multiple of 4096, not 5000"),
    ({"read_latency": 0}, "Read latency must be an integer"),
    ({"write_latency": 1.5}, "Write latency must be an integer"),
    ({"read_latency_most": -1}, "Most read latency"),
    ({"write_latency_most": 1 << 31}, "Most write latency"),
    ({"last_beat_delay": -1}, "Delay of last beats"),
    ({"row_bytes": 512, "last_beat_delay": 1}, "A memory with rows"),
    ({"row_bytes": 512, "read_latency_most": 50}, "A memory with rows"),
    ({"max_reads": 0}, "Outstanding reads"),
    ({"max_writes": True}, "Outstanding writes"),
    ({"bytes_per_cycle": 0}, "positive fraction, not 0"),
    ({"bytes_per_cycle": 0.5}, "positive fraction, not 0.5"),
    ({"bytes_per_cycle": Fraction(1, 1 << 40)}, "terms below"),
    ({"refresh_interval": 10, "refresh_cycles": 10}, "Refresh length"),
    ({"refresh_cycles": 1}, "Refresh length"),
    ({"banks": 0}, "Bank count"),
    ({"seed": -1}, "Seed"),
    ({"never_refuse": True, "stalls": StallModel(w=0.1)}, "never refuses"),
    ({"never_refuse": True, "refresh_interval": 100}, "never refuses"),
])
def test_bad_parameters(fields, message):
    with pytest.raises(ValueError, match=message):
        MemoryModel(**fields)


def test_bad_stalls():
    with pytest.raises(ValueError, match=r"probability r must be in \[0, 1\), not 1"):
        StallModel(r=1)
    with pytest.raises(ValueError, match="Stall length"):
        StallModel(length=0)


def test_presets():
    ideal = MemoryModel.ideal(123)
    assert (ideal.read_latency, ideal.shared, ideal.never_refuse) == (123, True, True)
    assert MemoryModel.random(7) == MemoryModel.random(7)
    assert len({MemoryModel.random(seed) for seed in range(50)}) == 50
    dram = MemoryModel.dram(bytes_per_cycle=Fraction(64, 3), clock_mhz=100)
    assert (dram.refresh_interval, dram.refresh_cycles) == (780, 35)
    with pytest.raises(dataclasses.FrozenInstanceError):
        dram.size = 0
