"""What is missing and light comes in low precision, or not at all."""

from __future__ import annotations

from typing import Any

import numpy as np

from moeaccel.host.errors import InvalidOption
from moeaccel.host.policies.routing.base import Call, Routed, Routing

__all__ = ["MixedPrecision"]


class MixedPrecision(Routing):
    """Of slots that are not resident: with s the weight of the slots before it, ``s <= high`` takes
    the expert as it is, ``s <= low`` its low-precision copy, anything above skips it (HOBBIT, arXiv
    2411.01433; the thresholds of its authors are not published in a text that was read).

    Parameters
    ----------
    high, low : :class:`float`
        Shares of a token's weight, ``0 <= high <= low``.
    **options
        See :class:`Routing`.
    """

    name = "mixed-precision"

    def __init__(self, *, high: float = 0.6, low: float = 0.9, **options: Any) -> None:
        super().__init__(**options)
        if not 0 <= high <= low:
            raise InvalidOption(f"high and low must be 0 <= high <= low, not {high!r} and {low!r}")
        self.high, self.low = high, low

    def route(self, call: Call) -> Routed:
        """Return the route, and which slots of it are in low precision."""
        before = call.share_before()
        light = (before > self.high) & (call.ids >= 0) & ~call.resident[call.ids]
        if not np.count_nonzero(light):
            return Routed(call.ids, call.weights)
        skipped = light & (before > self.low)
        if not np.count_nonzero(skipped):
            return Routed(call.ids, call.weights, low=light)
        ids = np.where(skipped, -1, call.ids)
        return Routed(ids, call.weights, before=call.weights, low=light & ~skipped)
