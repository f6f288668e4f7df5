"""Weights of published checkpoints, brought into the formats of the device.

``open_checkpoint`` opens one; ``convert`` and ``expert_rows`` do the same for weights that a
program has in memory as integers and scales. How weights are stored is a file each of
``families/``.
"""

from moeaccel.host.importers.checkpoint import Checkpoint, ExpertLayer, open_checkpoint
from moeaccel.host.importers.coded import Coded, Fit, convert, expert_rows
from moeaccel.host.importers.errors import (
    CheckpointError,
    DamagedCheckpoint,
    ForeignCheckpoint,
    InexactWeights,
)

__all__ = ["Checkpoint", "CheckpointError", "Coded", "DamagedCheckpoint", "ExpertLayer", "Fit",
           "ForeignCheckpoint", "InexactWeights", "convert", "expert_rows", "open_checkpoint"]
