"""The transport without a simulator: it only hands on."""

import importlib
import math
from types import SimpleNamespace

import numpy as np
import pytest

from moeaccel.config import PRESETS
from moeaccel.host import open_device
from moeaccel.host.errors import DeviceClosed, InvalidOption
from moeaccel.host.transports.golden import GoldenTransport
from moeaccel.host.transports.rtl import RtlTransport


class Simulation:
    """The interface of a co-simulation, with the golden model inside."""

    def __init__(self, size=1 << 20):
        self.golden = GoldenTransport(PRESETS["tiny"], memory_bytes=size)
        self.memory_models = (SimpleNamespace(size=size),)
        self.cycle = 0
        self.closed = False

    def reg_read(self, address):
        return self.golden.register_read(address)

    def reg_write(self, address, value):
        self.golden.register_write(address, value)

    def mem_read(self, address, count, *, port):
        assert port == 0
        return self.golden.memory_read(address, count)

    def mem_write(self, address, data, *, port):
        assert port == 0
        self.golden.memory_write(address, data)

    def run(self, max_cycles):
        self.cycle += 1 if self.irq else max_cycles

    @property
    def irq(self):
        return self.golden.wait_interrupt(0)

    def close(self):
        self.closed = True


def test_a_driver_works_on_it():
    simulation = Simulation()
    transport = RtlTransport(PRESETS["tiny"], simulation=simulation)
    with open_device(transport, config="tiny") as device:
        assert transport.simulation is simulation
        linear = device.load_linear(np.eye(32, dtype=np.float32), weight_format="mxint8")
        x = np.arange(64, dtype=np.float32).reshape(2, 32)
        assert np.allclose(linear(x), x, rtol=1e-2)
    assert simulation.closed
    with pytest.raises(DeviceClosed, match="open a new device"):
        transport.register_read(0)
    transport.close()


def test_a_timeout_is_a_number_of_cycles():
    simulation = Simulation()
    transport = RtlTransport(PRESETS["tiny"], simulation=simulation, cycles_per_second=1000)
    assert not transport.wait_interrupt(0.0123)
    assert simulation.cycle == 13
    assert not transport.wait_interrupt(0)
    assert simulation.cycle == 13
    assert not transport.wait_interrupt(math.inf)
    assert simulation.cycle == 13 + (1 << 62)


def test_options_go_to_the_builder(monkeypatch):
    built = {}

    def build(config, *, memory, threads=1):
        if threads < 1:
            raise ValueError("Thread count must be positive")
        built.update(config=config, memory=memory, threads=threads)
        return Simulation(memory.size)

    monkeypatch.setattr(importlib.import_module("moeaccel.sim"), "build_accelerator", build)
    with open_device("rtl", config="tiny", memory_bytes=1 << 21, threads=2) as device:
        assert device.transport.memory_bytes == 1 << 21
    assert built["config"] is PRESETS["tiny"]
    assert built["threads"] == 2
    memory = SimpleNamespace(size=1 << 21)
    with open_device("rtl", config="tiny", memory=memory):
        assert built["memory"] is memory
    with pytest.raises(InvalidOption, match="memory_bytes must be that of memory"):
        open_device("rtl", config="tiny", memory=memory, memory_bytes=1 << 20)
    with pytest.raises(InvalidOption, match="cycles_per_second"):
        open_device("rtl", config="tiny", cycles_per_second=0)
    with pytest.raises(InvalidOption, match=r"option of rtl must be .*threads.*not 'thread'"):
        open_device("rtl", config="tiny", thread=2)
    with pytest.raises(InvalidOption, match="memory must be a MemoryModel, not 3"):
        open_device("rtl", config="tiny", memory=3)
    with pytest.raises(InvalidOption, match=r"options of rtl must .*Thread count"):
        open_device("rtl", config="tiny", threads=0)
