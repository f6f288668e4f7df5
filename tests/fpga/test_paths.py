"""The estimate of slow paths, on netlists small enough to be added up by hand."""

import pytest

from moeaccel.fpga import paths
from moeaccel.fpga.paths import Netlist, slowest_paths

INPUTS = ("A", "B", "C", "D", "DI", "CE", "CLK", "A0", "B0", "A1", "CIN", "ADA0")


def module(**cells):
    """Return a netlist of cells (type, {port: net or nets}); net n is called ``n<number>``."""
    built, nets = {}, set()
    for name, (kind, ports) in cells.items():
        bits = {port: list(net) if isinstance(net, tuple) else [net]
                for port, net in ports.items()}
        built[name] = {"type": kind, "connections": bits, "port_directions": {
            port: "input" if port in INPUTS else "output" for port in ports}}
        nets |= {bit for found in bits.values() for bit in found if isinstance(bit, int)}
    return {"cells": built, "netnames": {f"n{i}": {"bits": [i]} for i in nets}}


def register(source, output):
    return "TRELLIS_FF", {"DI": source, "CLK": 1, "Q": output}


def wire(readers):
    return paths.WIRE_NS + readers * paths.WIRE_FAN_OUT_NS + (readers > 8) * paths.WIRE_FAR_NS


def test_a_path_is_the_sum_of_its_parts():
    netlist = Netlist(module(
        a=register("0", 2), lut=("LUT4", {"A": 2, "B": "1", "Z": 3}), b=register(3, 4)))
    slowest, _ = [*slowest_paths(netlist, 5), None]
    assert slowest.end == "b.DI" and slowest.nets == ["n3", "n2"]
    assert slowest.delay_ns == pytest.approx(
        0.52 + wire(1) + 0.24 + wire(1) + paths.SETUP_NS, abs=0.005)


def test_carries_have_no_wires_between_them():
    chain = {f"c{i}": ("CCU2C", {"CIN": 10 + i, "A0": 2, "COUT": 11 + i}) for i in range(3)}
    netlist = Netlist(module(
        a=register("0", 2), **chain, end=("CCU2C", {"CIN": 13, "S0": 30}), b=register(30, 31)))
    assert netlist.arrival(30) == pytest.approx(0.52 + wire(3) + 0.45 + 2 * 0.06 + 0.45)


def test_fan_out_and_block_rams_count():
    readers = {f"r{i}": register(2, 100 + i) for i in range(12)}
    netlist = Netlist(module(ram=("DP16KD", {"ADA0": "0", "DOA0": 2}), **readers))
    assert netlist.ends()[0][0] == pytest.approx(5.7 + wire(12) + paths.SETUP_NS)
    assert len(slowest_paths(netlist, 5)) == 5


def test_clocks_end_no_path():
    netlist = Netlist(module(a=register("0", 2), b=("TRELLIS_FF", {"CLK": 2, "Q": 3})))
    assert netlist.ends() == []
