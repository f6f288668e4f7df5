"""A predictor in the place of the routers."""

from __future__ import annotations

from moeaccel.host.policies.prefetch.look_ahead import LookAhead

__all__ = ["HashRoutes"]


class HashRoutes(LookAhead):
    """SiDA (arXiv 2310.18859): what its hash function, an LSTM on the tokens' embeddings, predicts
    is what is computed, so that every guess is right and the routers do not run: lossy. A replay
    keeps the routes of the trace and gives the guesses the published chance to be among them (top-3
    hits of 0.917 to 0.990 on Switch models), so that what it moves is what a correction would cost.
    """

    name = "hash-routes"
    lossless = False
