"""Where the array's multipliers and the memories beside it lie on an LFE5U-85F.

An ECP5's multipliers and block RAMs lie in a few rows across the device. Placers find good sites
for logic, but hardly for 128 multipliers of which each has two factors to share and a sum to join:
left alone, each product crosses a quarter of the device, and the wires of all of them stand in each
other's way. So what shares is put side by side: the multipliers of two lanes of a block, all rows
and tokens, next to them those of the next two lanes, along the rows of the device; and each memory
of weights and activations as near as can be to the multipliers that it feeds.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from moeaccel.config import BLOCK, AcceleratorConfig

__all__ = ["floorplan"]

_COLUMNS = (4, 13, 22, 31, 40, 49, 58, 69, 78, 87, 96, 105, 114)
"""X of the tiles of multipliers, and of those of block RAMs."""

_MULTIPLIERS = ((0, "MULT18_0"), (1, "MULT18_1"), (4, "MULT18_4"), (5, "MULT18_5"))
_MULTIPLIER_ROWS = (10, 34, 58)
_RAMS = ((0, "EBR0"), (4, "EBR2"))
_RAM_ROWS = (22, 46)
"""What we use of a tile, as X within it and name, and Y of the tiles. Of block RAMs those between
rows of multipliers, and every other one: each has a hundred wires."""

_CENTRE = (58, 69)
"""Tiles of the middle row for the multipliers that scale sums, which come from everywhere."""

_RAM_BITS = 36

Site = tuple[int, int, str]
"""X, Y and name."""


def _multiplier_sites() -> list[Site]:
    """Return sites, neighbours one after another: along a row, back along the next, and so on.

    In the middle row the tiles in its middle are left out, in the others those at the ends.
    """
    first, middle, last = _MULTIPLIER_ROWS
    tiles = [
        *((x, first) for x in _COLUMNS[1:-1]),
        *((x, middle) for x in reversed(_COLUMNS) if x not in _CENTRE),
        *((x, last) for x in _COLUMNS[1:-1]),
    ]
    return [(x + dx, y, name) for x, y in tiles for dx, name in _MULTIPLIERS]


def _memories(config: AcceleratorConfig) -> Iterator[tuple[str, list[tuple[int, int, int]]]]:
    """Yield each block RAM's cell, with the (row, token, lane) of the multipliers that it feeds."""
    rows, tokens = range(config.row_multipliers), range(config.token_lanes)
    for name, token in product(("x_lanes", "h_lanes"), tokens):
        for i in range(0, 8 * BLOCK, _RAM_BITS):  # mantissas of 8 bits, and what is left the shift
            lanes = range(i // 8, min((i + _RAM_BITS - 1) // 8 + 1, BLOCK))
            yield f"{name}.lane{token}.mem.0.{i // _RAM_BITS}", list(product(rows, [token], lanes))
    codes = list(product(rows, range(BLOCK)))  # of 8 bits, in the order of the word
    for i in range(0, 8 * len(codes), _RAM_BITS):
        feeds = codes[i // 8:(i + _RAM_BITS - 1) // 8 + 1]
        yield f"tiles.ring.mem.0.{i // _RAM_BITS}", [
            (row, token, lane) for (row, lane), token in product(feeds, tokens)]


def floorplan(config: AcceleratorConfig) -> str:
    """Return Yosys commands that give cells of a mapped accelerator their sites.

    None, if the array has more multipliers than there are sites, or more than one core. What has no
    site is placed by nextpnr.
    """
    multipliers = [(row, token, lane + k) for lane, token, row, k in product(
        range(0, BLOCK, 2), range(config.token_lanes), range(config.row_multipliers), (0, 1))]
    sites = dict(zip(multipliers, _multiplier_sites(), strict=False))
    if len(sites) < len(multipliers) or config.channels > 1:
        return ""
    placed = {"array.multiply{}_{}_{}.mult18x18d".format(*key): site for key, site in sites.items()}
    centre = [(x + dx, _MULTIPLIER_ROWS[1], name) for x in _CENTRE for dx, name in _MULTIPLIERS]
    scales = product(range(config.rows), range(config.token_lanes))
    placed |= {f"array.scale{row}_{token}*.mult18x18d": site
               for (row, token), site in zip(scales, centre, strict=False)}
    corner = [(_COLUMNS[-1] + dx, _MULTIPLIER_ROWS[-1], name) for dx, name in _MULTIPLIERS]
    placed |= {f"activation.{name}.mult18x18d": site for name, site in zip(
        ("interpolate", "activate", "gated"), corner, strict=False)}

    free = [(x + dx, y, name) for y, x, (dx, name) in product(_RAM_ROWS, _COLUMNS, _RAMS)]
    for cell, feeds in _memories(config):
        x, y = (sum(sites[key][axis] for key in feeds) / len(feeds) for axis in (0, 1))
        nearest = min(free, key=lambda site: abs(site[0] - x) + abs(site[1] - y))
        free.remove(nearest)
        placed[cell] = nearest
    return "\n".join(
        f'setattr -set BEL "X{x}/Y{y}/{name}" */c:*core0.{cell}'
        for cell, (x, y, name) in placed.items())
