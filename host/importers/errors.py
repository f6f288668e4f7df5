"""Errors of checkpoints."""

from moeaccel.host.errors import HostError

__all__ = ["CheckpointError", "ClosedCheckpoint", "DamagedCheckpoint", "ForeignCheckpoint",
           "InexactWeights"]


class CheckpointError(HostError, ValueError):
    """Base of the errors of :mod:`moeaccel.host.importers`."""


class ClosedCheckpoint(CheckpointError):
    """A checkpoint, or a file of quantised experts, that was closed before it was read."""


class DamagedCheckpoint(CheckpointError):
    """A file that cannot be read, ends too early or contradicts itself; the message names the file,
    and the tensor and the offset in bytes where there is one."""


class ForeignCheckpoint(CheckpointError):
    """A file of another kind or version, or weights in a way that no family here reads."""


class InexactWeights(CheckpointError):
    """Weights that the format cannot hold exactly, where nothing else was to be taken."""
