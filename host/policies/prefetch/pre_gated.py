"""Gates that were trained to speak one layer early."""

from __future__ import annotations

import numpy as np

from moeaccel.host.policies.prefetch.base import Ahead, Guess, Prefetch

__all__ = ["PreGated"]


class PreGated(Prefetch):
    """The gate of layer l chooses the experts of layer l + 1, so that their weights move while l is
    computed (Pre-gated MoE, arXiv 2308.12066). Every guess is right, since it is the route; but the
    gates are retrained and choose otherwise than the model's own: lossy. The first layer has its
    own gate, and nothing early.
    """

    name = "pre-gated"
    lossless = False

    def guess(self, layer: int, uses: np.ndarray, ahead: Ahead) -> list[Guess]:
        """Return the route of the next layer; see :meth:`Prefetch.guess`."""
        if ahead.uses is None or layer + 1 >= self.n_layers:
            return []
        return [Guess(layer + 1, ahead.busiest(layer + 1))]
