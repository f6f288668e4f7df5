"""The gated activation: pairs of rows become h."""

from __future__ import annotations

from moeaccel.activations import activation
from moeaccel.arithmetic import InternalFloat, Ints
from moeaccel.tables import gated


def hidden(gate_up: InternalFloat, name: str) -> tuple[Ints, Ints]:
    """Return h, (n, d_expert), as the (significand, exponent) that the quantiser takes.

    Parameters
    ----------
    gate_up : :class:`InternalFloat`
        (n, 2 d_expert), gate and up rows in turn.
    name : :class:`str`
        Activation.
    """
    return gated(gate_up[:, 0::2], gate_up[:, 1::2], activation(name))
