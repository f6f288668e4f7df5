"""The floorplan: sites that the device has, each used once, for cells that the design has."""

import re

from moeaccel.config import preset
from moeaccel.fpga.floorplan import floorplan
from moeaccel.hdl.core import Core
from moeaccel.hdl.verilog_target import generate

_LINE = re.compile(r'setattr -set BEL "X(\d+)/Y(\d+)/(\w+)" \*/c:\*core0\.(.*)$')


def _sites(config):
    return {m[4]: (int(m[1]), int(m[2]), m[3])
            for m in map(_LINE.match, floorplan(config).splitlines())}


def test_sites_are_the_devices_and_used_once():
    sites = _sites(preset("ulx3s"))
    assert len(set(sites.values())) == len(sites) == 128 + 8 + 3 + 32 + 15
    for cell, (x, y, name) in sites.items():
        kind, number = re.match(r"(MULT18_|EBR)(\d)$", name).groups()
        step, rows = {"MULT18_": (1, (10, 34, 58)), "EBR": (2, (22, 46))}[kind]
        assert y in rows
        assert (x - step * int(number)) in {*range(4, 59, 9), *range(69, 115, 9)}
        assert (kind == "EBR") == (".mem." in cell)


def test_what_shares_is_near():
    """The four multipliers of a pair of lanes lie in a tile, those of the next token beside it."""
    sites = _sites(preset("ulx3s"))
    for lane in range(0, 32, 2):
        tiles = []
        for token in range(2):
            xs, ys = zip(*(sites[f"array.multiply{row}_{token}_{lane + k}.mult18x18d"][:2]
                           for row in range(2) for k in range(2)), strict=True)
            assert max(xs) - min(xs) == 5
            assert len(set(ys)) == 1
            tiles.append((min(xs), ys[0]))
        (x0, y0), (x1, y1) = tiles
        assert abs(x0 - x1) + abs(y0 - y1) <= 33  # from the end of a row to the next one


def test_cells_have_the_names_of_the_designs():
    text = generate(Core(preset("ulx3s"), "ecp5"), "core")
    for cell in _sites(preset("ulx3s")):
        *path, name = cell.replace("*", "").split(".")
        if ".mem." in cell:
            path, name = path[:-1], "mem"
        for instance in path:
            assert re.search(rf"\b{instance}\b", text), cell
    assert re.search(r"\bmult18x18d\b", text)


def test_several_cores_have_none():
    assert floorplan(preset("hbm32")) == ""
