"""Loads of weights when tokens are computed in order, and when a window of them is reordered."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from moeaccel.host.errors import InvalidOption

__all__ = ["Loads", "loads"]


@dataclass(frozen=True)
class Loads:
    """How often the experts of a layer are loaded for some tokens.

    Parameters
    ----------
    window : :class:`int`
        Tokens whose pairs may change places.
    pairs, loads : :class:`int`
        Of tokens and experts; of weights.
    """

    window: int
    pairs: int
    loads: int

    @property
    def reuse(self) -> float:
        """Pairs for each load."""
        return self.pairs / self.loads if self.loads else 0.0


def loads(ids: np.ndarray, *, window: int, slots: int) -> Loads:
    """Count the loads of one layer.

    Of each window of tokens the pairs are sorted by expert, as Space-Mate's out-of-order router
    does it with samples (ISSCC 2024), and as this accelerator does it with all tokens of a command;
    with a window of one token they are in order. An expert that is in a slot is not loaded again;
    of the slots the one goes that was used longest ago.

    Parameters
    ----------
    ids : integer, (tokens, top_k)
        -1: no expert.
    window, slots : :class:`int`
        At least 1.

    Raises
    ------
    InvalidOption
        If window or slots are below 1.
    """
    if window < 1 or slots < 1:
        raise InvalidOption(f"window and slots must be at least 1, not {window} and {slots}")
    held: OrderedDict[int, None] = OrderedDict()
    pairs = count = 0
    for begin in range(0, len(ids), window):
        part = ids[begin : begin + window]
        chosen = part[part >= 0]
        pairs += chosen.size
        order = chosen.tolist() if window == 1 else sorted(
            set(chosen.tolist()), key=lambda e: (e not in held, e))  # what is there comes first
        for expert in order:
            if expert in held:
                held.move_to_end(expert)
                continue
            count += 1
            if len(held) == slots:
                held.popitem(last=False)
            held[expert] = None
    return Loads(window, pairs, count)
