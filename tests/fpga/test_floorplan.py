"""The floorplan: sites that the device has, each used once, for cells that the design has."""

import re

from moeaccel.config import preset
from moeaccel.fpga.floorplan import floorplan
from moeaccel.hdl.core import Core
from moeaccel.hdl.verilog.verilog_target import generate

_CELL = re.compile(r"core0\.array\.(\w+)\.mult18x18d")
_SITE = re.compile(r"X(\d+)/Y(\d+)/MULT18_(\d)")


def _sites(config):
    return {_CELL.fullmatch(cell)[1]: tuple(map(int, _SITE.fullmatch(site).groups()))
            for cell, site in floorplan(config).items()}


def test_sites_are_the_devices_and_used_once():
    sites = _sites(preset("ulx3s"))
    assert len(set(sites.values())) == len(sites) == 128
    for x, y, number in sites.values():
        assert number in (0, 1, 4, 5)
        assert x - number in {*range(13, 59, 9), *range(69, 106, 9)}
        assert y in (10, 34, 58)


def test_what_shares_is_near():
    """The four multipliers of a pair of lanes lie in a tile, those of the next token beside it."""
    sites = _sites(preset("ulx3s"))
    for lane in range(0, 32, 2):
        tiles = []
        for token in range(2):
            xs, ys = zip(*(sites[f"multiply{row}_{token}_{lane + k}"][:2]
                           for row in range(2) for k in range(2)), strict=True)
            assert max(xs) - min(xs) == 5
            assert len(set(ys)) == 1
            tiles.append((min(xs), ys[0]))
        (x0, y0), (x1, y1) = tiles
        assert (abs(x0 - x1), abs(y0 - y1)) in {(9, 0), (11, 0), (0, 24)}


def test_multipliers_have_the_names_of_the_design():
    text = generate(Core(preset("ulx3s"), "ecp5"), "core")
    for name in _sites(preset("ulx3s")):
        assert re.search(rf"\b{name}\b", text), name


def test_several_cores_have_none():
    assert floorplan(preset("hbm32")) == {}
