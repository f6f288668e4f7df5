"""What quantising costs, as numbers to act on: of a layer's weights, and of a call's x.

Nothing here changes a bit. What the numbers say:

* A large relative error of the weights: take a format with more bits or smaller groups
  (:data:`moeaccel.formats.FORMATS`; errors of Gaussian weights are 0.8 % in ``mxint8``, 9 % in
  ``int4_g32``, 10 % in ``int4_g128``, 11 % in ``mxfp4``), or give ``calibration=``.
* Many coarsened scales: the groups of a row differ by more than the format's shifts reach; a format
  whose scales are powers of two (``mxint8``, ``mxfp4``) reaches further.
* Many elements of x flushed to zero: they share a block with an outlier, or lie far below the
  largest element of their token. ``activation_bits=16`` keeps 8 bits more of every element.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moeaccel.arithmetic import ELEMENT_BITS, EXPONENT_RANGE, quantise_float32, split_float32
from moeaccel.config import BLOCK
from moeaccel.grid import Squares

__all__ = ["ActivationReport", "WeightReport", "measure_activations"]

WEIGHT_ERROR_WARNING = 0.2
"""Relative error of a kind of matrix from which loading warns."""

COARSENED_WARNING = 0.05
"""Share of coarsened scales from which loading warns."""

FLUSHED_WARNING = 0.05
"""Share of x's nonzero elements flushed to zero from which a layer warns, once. (Of Gaussian x,
``a8`` flushes 1 %, ``a16`` nothing.)"""

SAMPLED_TOKENS = 16
"""Tokens of a call whose x is kept and looked at: at most 16 rows of memory for each layer."""


@dataclass(frozen=True)
class WeightReport:
    """What quantising a layer's weights cost.

    Parameters
    ----------
    weight_format : :class:`str`
        Its name; of a layer with several their names, joined by commas.
    relative_error : :class:`dict` of :class:`str` to :class:`float`, optional
        Relative Frobenius error of each kind of matrix (``gate_up`` and ``down``, or ``weight``)
        over all experts. None where no float weights were given.
    worst_expert, worst_error
        Expert with the largest relative error, and that error; None likewise.
    groups, coarsened : :class:`int`
        Scales, and those that the format's range within a row made coarser.
    """

    weight_format: str
    relative_error: dict[str, float] | None
    worst_expert: int | None
    worst_error: float | None
    groups: int
    coarsened: int

    @property
    def warning(self) -> str | None:
        """What a user should know at once; None if all is well."""
        said = []
        for kind, error in (self.relative_error or {}).items():
            if error >= WEIGHT_ERROR_WARNING:
                said.append(f"relative error of {kind} in {self.weight_format} is {error:.1%}")
        if self.coarsened >= COARSENED_WARNING * self.groups > 0:
            said.append(f"{self.coarsened} of {self.groups} scales of {self.weight_format} were "
                        "coarsened to their row's range")
        return f"{', '.join(said)}; try another weight_format" if said else None


class WeightErrors:
    """Collects the errors of a layer's matrices, expert by expert.

    Parameters
    ----------
    weight_format : :class:`str`
    """

    def __init__(self, weight_format: str) -> None:
        self._format = weight_format
        self._errors: dict[str, tuple[float, float]] = {}
        self._worst: tuple[float, int] | None = None
        self._groups = self._coarsened = 0

    def add(self, expert: int, matrices: dict[str, Squares], *, groups: int,
            coarsened: int) -> None:
        """Add one expert's matrices by their kind."""
        self._groups += groups
        self._coarsened += coarsened
        error = total = 0.0
        for kind, found in matrices.items():
            if found.error is None:
                return
            before = self._errors.get(kind, (0.0, 0.0))
            self._errors[kind] = before[0] + found.error, before[1] + found.total
            error, total = error + found.error, total + found.total
        if self._worst is None or _relative(error, total) > self._worst[0]:
            self._worst = _relative(error, total), expert

    def report(self) -> WeightReport:
        """Return the sum of what was added."""
        worst_error, worst_expert = self._worst or (None, None)
        return WeightReport(
            self._format, {kind: _relative(*sums) for kind, sums in self._errors.items()} or None,
            worst_expert, worst_error, self._groups, self._coarsened)


def _relative(error: float, total: float) -> float:
    """Return a relative Frobenius error from sums of squares; nothing lost of nothing is 0."""
    return float(np.sqrt(error / total)) if total else 0.0


@dataclass(frozen=True)
class ActivationReport:
    """What quantising a call's x cost (h is quantised on the device, and not seen here).

    Parameters
    ----------
    tokens : :class:`int`
        Tokens that were looked at: of more than 16, up to 16 evenly spaced ones.
    relative_error : :class:`float`
        Relative Frobenius error of their x. An outlier makes it small, since it is large itself:
        look at ``flushed``.
    worst_token, worst_error : :class:`int`, :class:`float`
        Row of x with the largest relative error, and that error.
    elements, flushed : :class:`int`
        Nonzero elements, and those that became zero.
    blocks, coarsened : :class:`int`
        Nonzero blocks of 32, and those that lie more than 10 powers of two below their token's
        largest element, so that they keep fewer bits than the others.
    """

    tokens: int
    relative_error: float
    worst_token: int
    worst_error: float
    elements: int
    flushed: int
    blocks: int
    coarsened: int

    @property
    def warning(self) -> str | None:
        """What a user should know at once; None if all is well."""
        if not self.elements or self.flushed < FLUSHED_WARNING * self.elements:
            return None
        return (f"{self.flushed / self.elements:.1%} of x's elements became zero when x was "
                "quantised, next to larger ones of their block or token")


SAMPLED_BYTES = 64 << 10
"""And so many bytes of it: more take longer to copy than all else in a call."""


def sampling_step(tokens: int, row_bytes: int) -> int:
    """Return n where a call keeps every n-th token of x."""
    most = min(SAMPLED_TOKENS, max(1, SAMPLED_BYTES // row_bytes))
    return max(1, -(-tokens // most))


def measure_activations(x: NDArray[np.float32], planes: int, *, step: int = 1) -> ActivationReport:
    """Quantise x as the device does and compare.

    Parameters
    ----------
    x : float32 array, (T, K)
        Values that are not finite count as zero.
    planes : :class:`int`
        1 (``a8``) or 2 (``a16``).
    step : :class:`int`
        Tokens from one row to the next, for ``worst_token``.
    """
    x = np.where(np.isfinite(x), x, np.float32(0))
    x = np.pad(x, ((0, 0), (0, -x.shape[1] % BLOCK)))
    quantised = quantise_float32(x, planes)[0].to_float64()
    exact = x.astype(np.float64)
    error = ((quantised - exact) ** 2).sum(axis=1)
    total = (exact * exact).sum(axis=1)
    relative = np.sqrt(np.divide(error, total, out=np.zeros_like(error), where=total > 0))
    worst = int(relative.argmax()) if len(x) else 0
    significand, exponent, _ = split_float32(x)
    top = np.where(significand == 0, -(1 << 20), exponent + ELEMENT_BITS - 1)
    block_top = top.reshape(len(x), -1, BLOCK).max(axis=2)
    there = block_top > -(1 << 20)
    below = block_top < block_top.max(axis=1, keepdims=True, initial=-(1 << 20)) - EXPONENT_RANGE
    return ActivationReport(
        tokens=len(x), relative_error=_relative(float(error.sum()), float(total.sum())),
        worst_token=worst * step, worst_error=float(relative[worst]) if len(x) else 0.0,
        elements=int((x != 0).sum()), flushed=int(((x != 0) & (quantised == 0)).sum()),
        blocks=int(there.sum()), coarsened=int((there & below).sum()))
