"""Errors of routing traces."""

from moeaccel.host.errors import HostError

__all__ = ["ForeignTrace", "InvalidTrace", "TornTrace", "TraceError", "UnknownPreset"]


class TraceError(HostError, ValueError):
    """Base of the errors of :mod:`moeaccel.host.traces`."""


class InvalidTrace(TraceError):
    """Ids, weights, requests or positions that cannot be a trace."""


class TornTrace(TraceError):
    """A file that cannot be read, or that ends too early or is damaged."""


class ForeignTrace(TraceError):
    """A file of another kind or version, or of another model than was expected."""


class UnknownPreset(TraceError):
    """A name that no preset of the generator has."""
