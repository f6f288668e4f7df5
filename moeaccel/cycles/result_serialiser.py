"""Results behind the array, element by element."""

from __future__ import annotations

from moeaccel.config import AcceleratorConfig

SERIALISER_CYCLES = 6
"""ResultSerialiser: from a result to its first element, but for the normaliser."""

ADDER_CYCLES = 12
"""FloatAdder."""


def element_cycles(config: AcceleratorConfig, *, biased: bool = False) -> int:
    """Return the cycles from a result of the array to its first element.

    It is normalised in a stage for each shift, two for one beyond 16, one for the last two, and two
    to round. The adder adds its own, where a section has biases.
    """
    shifts = (config.joined_bits - 2).bit_length()
    return SERIALISER_CYCLES + shifts + (shifts > 5) - 1 + 2 + ADDER_CYCLES * biased


class Results:
    """What the serialiser still has to do between sections: last step, and its last results.

    ``biased``: those went through the adder.
    """

    def __init__(self, config: AcceleratorConfig) -> None:
        self.end = 0
        self.history = [-1] * config.result_places
        self.biased = False

    @property
    def taken(self) -> int:
        """Cycle in which the last element of the last result was chosen."""
        return self.history[-1]
