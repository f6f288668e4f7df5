"""Configurations with what presets have not."""

import numpy as np

from moeaccel.config import PRESETS
from moeaccel.formats import ALL_FORMATS, MINIMUM_SHIFT_MAX

EVERY = PRESETS["tiny"].replace(name="every", formats=tuple(ALL_FORMATS), second_up=True)
"""``tiny`` with all formats, and with second up rows."""


def place(config, fmt, row):
    """Return (multiplier row, part of ``config.splits``, field) of a tile's row in the array."""
    fields = 2 if fmt.packed else 1
    rm, within = divmod(row, fields * fmt.parts)
    part, field = divmod(within, fields)
    return rm, part * (config.splits // fmt.parts), field


def scale_entries(config, fmt, scales):
    """Return the array's scales for those of a tile's rows, (rows, scales of a block).

    Both fields of an 8-bit weight have the scale of their row; what no row has is 0.
    """
    entries = [0] * (2 * config.row_multipliers * config.splits)
    for row, some in enumerate(scales):
        rm, part, field = place(config, fmt, row)
        for i, scale in enumerate(some):
            at = part + i * (config.splits // len(some)) if len(some) > 1 else part
            for f in (field,) if fmt.packed else (0, 1):
                entries[(rm * config.splits + at) * 2 + f] = int(scale)
    return entries


def sum_entry(config, fmt, row):
    """Return which of the array's sums is that of a tile's row."""
    rm, part, field = place(config, fmt, row)
    return (rm * config.parts + part * config.parts // config.splits) * 2 + field


def random_minima(rng, shape):
    """Return minima of all sizes and either sign."""
    shift = rng.integers(0, MINIMUM_SHIFT_MAX + 1, shape)
    return (rng.integers(-2047, 2048, shape) << shift).astype(np.int32)


def bits(values, width):
    """Return numbers side by side, the first in the lowest bits."""
    return sum(int(value) << width * i for i, value in enumerate(values))
