"""Where the array's multipliers lie on an LFE5U-85F.

An ECP5's multipliers lie in three rows across the device. Placers find good sites for logic, but
hardly for 128 multipliers of which each has two factors to share and a sum to join: left alone,
each product crosses a quarter of the device and the wires of all of them stand in each other's way.
So what shares is put side by side: the multipliers of two lanes of a block, all rows and tokens,
and next to them those of the next two lanes, along the rows of the device.
"""

from __future__ import annotations

from itertools import product

from moeaccel.config import BLOCK, AcceleratorConfig

__all__ = ["floorplan"]

_COLUMNS = (13, 22, 31, 40, 49, 58, 69, 78, 87, 96, 105)
"""X of the tiles of multipliers, but for those at both ends, which are left to the others."""

_TILE = ((0, "MULT18_0"), (1, "MULT18_1"), (4, "MULT18_4"), (5, "MULT18_5"))
"""Multipliers of a tile: X from its first one, and name."""

_ROWS = (10, 34, 58)

_SITES = [
    f"X{x + dx}/Y{y}/{name}"
    for row, y in enumerate(_ROWS) for x in _COLUMNS[::-1 if row % 2 else 1] for dx, name in _TILE]
"""Neighbours one after another: along the first row, back along the second, and so on."""


def floorplan(config: AcceleratorConfig) -> dict[str, str]:
    """Return the sites of the multipliers of a mapped accelerator's array, by ends of their names.

    Empty, if there are more of them than sites, or more than one core. nextpnr places all else.
    """
    multipliers = [
        f"core0.array.multiply{row}_{token}_{lane + k}.mult18x18d"
        for lane, token, row, k in product(
            range(0, BLOCK, 2), range(config.token_lanes), range(config.row_multipliers), (0, 1))]
    if len(multipliers) > len(_SITES) or config.channels > 1:
        return {}
    return dict(zip(multipliers, _SITES, strict=False))
