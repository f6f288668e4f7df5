"""The activation: rows become h."""

from __future__ import annotations

import numpy as np

from moeaccel.activations import activation
from moeaccel.arithmetic import InternalFloat, Ints, float32_to_internal
from moeaccel.image import Expert
from moeaccel.tables import gated, ungated


def hidden(rows: InternalFloat, expert: Expert) -> tuple[Ints, Ints]:
    """Return h, (n, d_expert), as the (significand, exponent) that the quantiser takes.

    Parameters
    ----------
    rows : :class:`InternalFloat`
        (n, rows_of_h * d_expert), in the order of images.
    expert : :class:`Expert`
        Activation, limits, and how many rows become an element.
    """
    act = activation(expert.activation)
    limit, gate_limit = (
        None if number is None else float32_to_internal(np.array(number, np.float32))
        for number in (expert.limit, expert.gate_limit))
    every = expert.rows_of_h
    gate = rows[:, 0::every]
    if every == 1:
        return ungated(gate, act, limit if gate_limit is None else gate_limit)
    second = rows[:, 3::every] if every == 4 else None
    return gated(gate, rows[:, 1::every], act, limit, gate_limit, second)
