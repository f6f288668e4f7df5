"""The device's block floats in torch: the values of :func:`moeaccel.arithmetic.quantise_float32`,
without its integers."""

from __future__ import annotations

import torch

from moeaccel.arithmetic import ELEMENT_BITS, EXPONENT_RANGE, RAISE_THRESHOLD
from moeaccel.config import BLOCK

__all__ = ["block_floats"]

_NEVER = -(1 << 20)
_SMALLEST = -149 + ELEMENT_BITS - 1  # floor(log2) of float32's least normal number


def block_floats(x: torch.Tensor, planes: int) -> torch.Tensor:
    """Return x as the device multiplies it.

    Parameters
    ----------
    x : float32 tensor, (T, K)
        Finite. Subnormal numbers count as zero.
    planes : :class:`int`
        1 (``a8``) or 2 (``a16``).

    Returns
    -------
    float32 tensor, (T, K): exactly ``mantissa * 2**(shift + base)``.
    """
    tokens, k = x.shape
    filled = torch.nn.functional.pad(x, (0, -k % BLOCK)).reshape(tokens, -1, BLOCK)
    largest = filled.abs().amax(dim=2)
    fraction, exponent = torch.frexp(largest)
    top = torch.where(exponent - 1 >= _SMALLEST, exponent - 1, _NEVER)
    token_top = top.amax(dim=1, keepdim=True)
    floor = torch.where(token_top == _NEVER, 0, token_top - EXPONENT_RANGE)
    shift = (top - floor).clamp(min=0)
    if planes == 2:  # blocks that would round beyond balanced digits
        shift += (top >= floor) & (fraction * 2.0**ELEMENT_BITS >= RAISE_THRESHOLD)
    unit = (shift + floor - (6 if planes == 1 else 14))[:, :, None]
    mantissa = torch.ldexp(filled, -unit).round_()  # half to even, as the device
    if planes == 1:
        mantissa.clamp_(-127, 127)
    return torch.ldexp(mantissa, unit).reshape(tokens, -1)[:, :k]
