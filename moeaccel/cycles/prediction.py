"""What a command is predicted to take."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Prediction:
    """What a command is predicted to take; ``cycles`` is the completion's field.

    The five counters add up to ``cycles``; the device counts idle cycles between commands, too.

    Parameters
    ----------
    cycles, busy, starved_weights, starved_activations, stalled_output, idle : :class:`int`
    bytes_read_weights, bytes_read_other, bytes_written : :class:`int`
    """

    cycles: int = 0
    busy: int = 0
    starved_weights: int = 0
    starved_activations: int = 0
    stalled_output: int = 0
    idle: int = 0
    bytes_read_weights: int = 0
    bytes_read_other: int = 0
    bytes_written: int = 0

    def __add__(self, other: Prediction) -> Prediction:
        names = self.__dataclass_fields__
        return Prediction(**{name: getattr(self, name) + getattr(other, name) for name in names})
