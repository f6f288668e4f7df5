"""Experts in on-chip memory: what an expert buffer holds, and what it saves.

A model of it, byte by byte, driven by routing traces and measured with the cycle model
(``moeaccel bench expert-buffer``); predictions of what the next layer will use, for the model and
for a device that has such a buffer.
"""

from moeaccel.host.buffering.buffer import Counts, ExpertBuffer
from moeaccel.host.buffering.predictions import PREDICTIONS, Prediction, prediction
from moeaccel.host.buffering.prefetcher import Prefetcher
from moeaccel.host.buffering.reorder import Loads, loads
from moeaccel.host.buffering.replay import Call, Outcome, replay

__all__ = ["PREDICTIONS", "Call", "Counts", "ExpertBuffer", "Loads", "Outcome", "Prediction",
           "Prefetcher", "loads", "prediction", "replay"]
