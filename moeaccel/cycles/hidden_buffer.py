"""h on its way to the array: gate and up become elements, a token's h is quantised."""

from __future__ import annotations

from moeaccel.config import AcceleratorConfig
from moeaccel.cycles.result_serialiser import element_cycles

ACTIVATION_CYCLES = 29
"""ActivationUnit: from up to h. Clamp, position, table and output (11), three multipliers, each
with 3 to round."""
QUANTISER_CYCLES = 9
"""BlockQuantiser: from the last elements of a block to the lane buffer."""


def elements_cycle(config: AcceleratorConfig, taken: int, *, biased: bool = False) -> int:
    """Return the cycle in which all of h is known to be there: elements, h, and three registers.

    Parameters
    ----------
    taken : :class:`int`
        Cycle in which the last element is chosen.
    biased : :class:`bool`
        The rows have biases.
    """
    tree = (config.channels * config.results_per_cycle).bit_length() - 1
    return taken + element_cycles(config, biased=biased) - 1 + ACTIVATION_CYCLES + 3 + tree


def ready_cycles(config: AcceleratorConfig, begin: int, d_expert: int, through: list[int]
                 ) -> list[int]:
    """Return the cycle in which h of each group is there: slot by slot through the quantiser.

    Parameters
    ----------
    begin : :class:`int`
        Cycle in which all of h is there, and may be quantised.
    d_expert : :class:`int`
    through : list of int
        Slots of the groups up to each.
    """
    groups = d_expert // config.quantiser_lanes
    return [begin + slot * groups + QUANTISER_CYCLES + 5 for slot in through]
