"""Errors of policies."""

from moeaccel.host.errors import HostError

__all__ = ["BudgetTooSmall", "PolicyError", "PolicyFailed", "UnknownPolicy", "UnsupportedPolicy"]


class PolicyError(HostError):
    """Base of the errors of :mod:`moeaccel.host.policies`."""


class UnknownPolicy(PolicyError, ValueError):
    """A name that no policy, system or machine has."""


class BudgetTooSmall(PolicyError, ValueError):
    """Memory that does not hold one expert, or a machine that does not hold the model."""


class PolicyFailed(PolicyError, RuntimeError):
    """A policy raised, or gave what cannot be done; the layer, and what it gave, are named."""


class UnsupportedPolicy(PolicyError, ValueError):
    """A policy that knows what comes, or changes routes, where a model really runs."""
