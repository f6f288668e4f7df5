"""Weights of published checkpoints, brought into the formats of the device.

``open_checkpoint`` opens one, ``import_checkpoint`` writes its experts to a file in a device
format, ``open_quantised`` opens that. ``convert`` and ``expert_rows`` serve weights that a program
has in memory as integers and scales. How weights are stored is a file each of ``families/``.
"""

from moeaccel.host.importers.checkpoint import Checkpoint, ExpertLayer, open_checkpoint
from moeaccel.host.importers.coded import Coded, Fit, convert, expert_rows
from moeaccel.host.importers.errors import (
    CheckpointError,
    ClosedCheckpoint,
    DamagedCheckpoint,
    ForeignCheckpoint,
    InexactWeights,
)
from moeaccel.host.importers.quantised_file import import_checkpoint, open_quantised

__all__ = ["Checkpoint", "CheckpointError", "ClosedCheckpoint", "Coded", "DamagedCheckpoint",
           "ExpertLayer", "Fit", "ForeignCheckpoint", "InexactWeights", "convert", "expert_rows",
           "import_checkpoint", "open_checkpoint", "open_quantised"]
