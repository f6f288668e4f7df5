"""Registers behind block RAMs move into them where the silicon has just that, and nowhere else;
cells get their sites."""

import copy

import pytest

from moeaccel.fpga.netlist import absorb_output_registers, place

CLOCK, ENABLE, RESET = 1, 2, 3


def cell(kind, outputs, parameters, **connections):
    return {"type": kind, "parameters": parameters,
            "port_directions": {p: "output" if p.startswith(outputs) else "input"
                                for p in connections},
            "connections": {p: [net] for p, net in connections.items()}}


def register(data, q, *, enable=None, reset="0"):
    parameters = {"CLKMUX": "CLK", "CEMUX": "1 " if enable is None else "CE", "LSRMUX": "LSR"}
    return cell("TRELLIS_FF", "Q", parameters, CLK=CLOCK, CE=enable or "x", LSR=reset, DI=data, Q=q)


def ram():
    """Return a memory whose port B drives nets 10 and 11; DOB2 is read by none, DOA0 by none."""
    return cell("DP16KD", "DO", {"CLKAMUX": "CLKA", "CLKBMUX": "CLKB", "REGMODE_B": "NOREG"},
                CLKA=CLOCK, CLKB=CLOCK, OCEB="1", DOA0=9, DOB0=10, DOB1=11, DOB2=12)


def design(**registers):
    return {"modules": {"top": {"cells": {"ram": ram(), **registers}}}}


@pytest.mark.parametrize("enable", [None, ENABLE])
def test_absorbed(enable):
    netlist = design(a=register(10, 20, enable=enable), b=register(11, 21, enable=enable),
                     reader=register(20, 30, enable=enable))
    assert absorb_output_registers(netlist) == 2
    cells = netlist["modules"]["top"]["cells"]
    assert set(cells) == {"ram", "reader"}
    assert cells["ram"]["parameters"]["REGMODE_B"] == "OUTREG"
    assert [cells["ram"]["connections"][port] for port in ("DOB0", "DOB1", "DOB2", "OCEB")] == [
        [20], [21], [12], [enable or "1"]]


@pytest.mark.parametrize("registers", [
    {"a": register(10, 20)},  # the other output goes elsewhere
    {"a": register(10, 20), "b": register(11, 21), "c": register(11, 22)},
    {"a": register(10, 20), "b": register(11, 21, enable=ENABLE)},
    {"a": register(10, 20), "b": register(11, 21, reset=RESET)},
    {"a": register(10, 20), "b": register(11, 21) | {"type": "LUT4"}},
], ids=["one output", "two readers", "two enables", "reset", "no register"])
def test_left_alone(registers):
    netlist = design(**registers)
    if len(registers) == 1:
        netlist["modules"]["top"]["cells"]["logic"] = cell("LUT4", "Z", {}, A=11, Z=40)
    before = copy.deepcopy(netlist)
    assert absorb_output_registers(netlist) == 0
    assert netlist == before


@pytest.mark.parametrize("change", [{"CLKMUX": "INV"}, {"CEMUX": "INV"}])
def test_inverted_controls_are_left_alone(change):
    netlist = design(a=register(10, 20), b=register(11, 21))
    netlist["modules"]["top"]["cells"]["a"]["parameters"] |= change
    assert absorb_output_registers(netlist) == 0


def test_another_clock_is_left_alone():
    netlist = design(a=register(10, 20), b=register(11, 21))
    netlist["modules"]["top"]["cells"]["ram"]["connections"]["CLKB"] = [RESET]
    assert absorb_output_registers(netlist) == 0


def test_cells_are_placed_by_the_ends_of_their_names():
    netlist = {"modules": {
        "top": {"cells": {name: {"attributes": {}} for name in ("a.b.c", "a.xb.c", "a.b.c_LUT4")}},
        "part": {"cells": {"x.a.b.d": {"attributes": {"keep": 1}}}},
    }}
    place(netlist, {"b.c": "X1", "a.b.d": "X2"})
    cells = netlist["modules"]["top"]["cells"] | netlist["modules"]["part"]["cells"]
    assert {name: cell["attributes"] for name, cell in cells.items()} == {
        "a.b.c": {"BEL": "X1"}, "a.xb.c": {}, "a.b.c_LUT4": {}, "x.a.b.d": {"keep": 1, "BEL": "X2"}}


def test_a_site_for_a_cell_that_is_not_there_is_refused():
    with pytest.raises(KeyError, match=r"no cell named \.\.\.b\.d"):
        place({"modules": {"top": {"cells": {"a.b.c": {"attributes": {}}}}}},
              {"b.c": "X1", "b.d": "X2"})
