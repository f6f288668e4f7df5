"""What the experts of a layer will be asked: statistics of their inputs, from tokens that went
through the layer, so that quantising spends its errors where they matter least."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moeaccel.activations import hidden as hidden_of
from moeaccel.formats import QUANTISERS
from moeaccel.host.errors import InvalidOption, InvalidTensor
from moeaccel.host.tensors import Tensor, float32, indices, shape_of

__all__ = ["Calibration", "calibrated"]

LEAST_TOKENS = 64
"""Experts that fewer tokens went to are given others in addition, evenly spaced ones: statistics of
a few tokens say little about the next."""


class Calibration:
    """Tokens that a layer met, and where its router sent them.

    Parameters
    ----------
    x : float tensor, (T, H)
        Inputs of the experts.
    ids : integer tensor, (T, K)
        Experts of each token.
    d_model, num_experts : :class:`int`
        Of the layer.

    Raises
    ------
    InvalidTensor
        If x or ids do not fit the layer, x is not finite, or there are no tokens.
    """

    def __init__(self, x: Tensor, ids: Tensor, *, d_model: int, num_experts: int) -> None:
        tokens, found = shape_of("calibration x", x, "T", "H")
        shape = shape_of("calibration ids", ids, "T", "K")
        if not tokens or found != d_model or shape[0] != tokens:
            raise InvalidTensor(
                f"calibration must be x of the shape (T, {d_model}) and ids of the shape (T, K) "
                f"for at least one token, not {(tokens, found)} and {shape}")
        self._x = float32("calibration x", x)
        if not np.isfinite(self._x).all():
            token = int((~np.isfinite(self._x)).any(axis=1).argmax())
            raise InvalidTensor(f"calibration x must be finite, but token {token} is not; find the "
                                "layer that made it")
        self._ids = indices("calibration ids", ids, num_experts)

    def tokens(self, expert: int | None) -> NDArray[np.float32]:
        """Return the inputs that stand for those of an expert, all for a shared one (None)."""
        if expert is None:
            return self._x
        own = (self._ids == expert).any(axis=1)
        missing = LEAST_TOKENS - int(own.sum())
        if missing > 0:
            others = np.flatnonzero(~own)
            own[others[:: max(1, len(others) // missing)][:missing]] = True
        return self._x[own]

    def moments(self, expert: int | None, gate_up: NDArray[np.float32], d_expert: int,
                activation: str, limit: float | None, gate_limit: float | None = None, *,
                second: bool, bias: NDArray[np.float32] | None = None
                ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the moments of the inputs of an expert's two matrices.

        Parameters
        ----------
        expert : :class:`int`, optional
            Left out for a shared one.
        gate_up : float32 array, (2 I, H), (I, H) or (3 I, H)
            Its weights, gate rows, then up rows if there are any, for the inputs of down.
        d_expert, activation, limit, gate_limit
            I, and how rows become h (:func:`moeaccel.activations.hidden`).
        second : :class:`bool`
            Second moments, else mean squares.
        bias : float32 array, (2 I,) or (I,), optional
            Of its rows.

        Returns
        -------
        pair of float64 arrays
            (H,) and (I,), or (H, H) and (I, I).
        """
        x = self.tokens(expert).astype(np.float64)
        with np.errstate(over="ignore", invalid="ignore"):  # of weights that quantising refuses
            rows = x @ gate_up.T.astype(np.float64) + (0 if bias is None else bias)
            hidden = hidden_of(rows, d_expert, activation, limit, gate_limit)
        return _moments(x, second), _moments(hidden, second)


def _moments(x: NDArray[np.float64], second: bool) -> NDArray[np.float64]:
    return x.T @ x / len(x) if second else (x * x).mean(axis=0)


def calibrated(quantiser: str, tokens: tuple[Tensor, Tensor] | None, *, d_model: int,
               num_experts: int) -> Calibration | None:
    """Return the statistics that a quantiser is to use, None for none.

    Raises
    ------
    InvalidOption
        If there is no such quantiser, or tokens and quantiser do not go together.
    InvalidTensor
        If the tokens are none of this layer.
    """
    if quantiser not in QUANTISERS:
        raise InvalidOption(f"quantiser must be one of {', '.join(QUANTISERS)}, not {quantiser!r}")
    if tokens is None:
        if quantiser == "gptq":
            raise InvalidOption("quantiser 'gptq' must have a calibration: give calibration=(x, "
                                "ids) of tokens that went through this layer")
        return None
    if quantiser == "amax":
        raise InvalidOption("calibration must be left out for the quantiser 'amax', which cannot "
                            "use it; take 'search' or 'gptq'")
    if not isinstance(tokens, tuple | list) or len(tokens) != 2:
        raise InvalidOption("calibration must be a pair (x, ids) of tensors, not "
                            f"{type(tokens).__name__}")
    return Calibration(*tokens, d_model=d_model, num_experts=num_experts)
