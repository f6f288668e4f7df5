"""Calls of experts modules that are looked at, or were answered, and are not computed."""

from __future__ import annotations

import contextvars
from typing import NamedTuple

import torch

from moeaccel.host.plugins.transformers.modules import Weights

__all__ = ["Call", "answered", "probed"]


class Call(NamedTuple):
    """A call of an experts module: whose, and what decides whether the device can do it."""

    module: torch.nn.Module
    weights: Weights | None
    top_k: int
    reason: str | None


probed: contextvars.ContextVar[list[Call] | None] = contextvars.ContextVar(
    "moeaccel_probed", default=None)
"""Where calls are noted down instead of executed."""

answered: contextvars.ContextVar[torch.Tensor | None] = contextvars.ContextVar(
    "moeaccel_answered", default=None)
"""What the next call gives, for those who look at an experts module whose block is computed."""
