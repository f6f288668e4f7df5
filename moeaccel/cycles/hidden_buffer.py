"""h on its way to the array: gate and up become elements, a token's h is quantised."""

from __future__ import annotations

from moeaccel.config import AcceleratorConfig
from moeaccel.cycles.result_serialiser import element_cycles

ACTIVATION_CYCLES = 28
"""ActivationUnit: from up to h. Clamp, position, table and output (10), three multipliers, each
with 3 to round."""
QUANTISER_CYCLES = 9
"""BlockQuantiser: from the last elements of a block to the lane buffer."""


def ready_cycles(config: AcceleratorConfig, taken: int, d_expert: int, through: list[int], *,
                 biased: bool = False) -> list[int]:
    """Return the cycle in which h of each group is there.

    Elements, h, and three registers until all of it is known to be there; then slot by slot through
    the quantiser.

    Parameters
    ----------
    taken : :class:`int`
        Cycle in which the last element is chosen.
    d_expert : :class:`int`
    through : list of int
        Slots of the groups up to each.
    biased : :class:`bool`
        The rows have biases.
    """
    tree = config.channels.bit_length() - 1
    element = element_cycles(config, biased=biased)
    all_there = taken + element - 1 + ACTIVATION_CYCLES + 3 + tree
    groups = d_expert // config.quantiser_lanes
    return [all_there + slot * groups + QUANTISER_CYCLES + 5 for slot in through]
