"""Experts in on-chip memory: what an expert buffer would hold, and what it would save.

No hardware has such a buffer yet. This is its model, byte by byte, driven by routing traces and
measured with the cycle model (``moeaccel bench expert-buffer``).
"""

from moeaccel.host.buffering.buffer import Counts, ExpertBuffer
from moeaccel.host.buffering.predictions import PREDICTIONS, Prediction, prediction
from moeaccel.host.buffering.reorder import Loads, loads
from moeaccel.host.buffering.replay import Call, Outcome, replay

__all__ = ["PREDICTIONS", "Call", "Counts", "ExpertBuffer", "Loads", "Outcome", "Prediction",
           "loads", "prediction", "replay"]
