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
        (n, 2 d_expert), gate and up rows in turn, or (n, d_expert) of an expert that is not gated.
    expert : :class:`Expert`
        Activation, whether it is gated, and limit.
    """
    act = activation(expert.activation)
    limit = None if expert.limit is None else float32_to_internal(
        np.array(expert.limit, np.float32))
    if expert.gated:
        return gated(rows[:, 0::2], rows[:, 1::2], act, limit)
    return ungated(rows, act, limit)
