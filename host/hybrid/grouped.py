"""The torch device's part in bfloat16: one grouped product for each of gate and up, and down."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from moeaccel import activations
from moeaccel.formats import QuantisedMatrix
from moeaccel.host.errors import UnsupportedExperts
from moeaccel.host.layers import Experts
from moeaccel.image import Expert

__all__ = ["ACTIVATIONS", "Grouped"]

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu, "relu": functional.relu, "gelu": functional.gelu,
    "gelu_tanh": lambda g: functional.gelu(g, approximate="tanh"),
    "relu2": lambda g: functional.relu(g).square(),
    "gpt_oss": lambda g: g * (1.702 * g).sigmoid()}
"""Those of :data:`moeaccel.activations.ACTIVATIONS`, for torch."""


class _Dense(NamedTuple):
    """Experts' weights, bfloat16.

    Parameters
    ----------
    gate_up : (slots, rows, d_model)
        Gate rows, then up rows.
    down : (slots, d_model, d_expert)
    """

    gate_up: torch.Tensor
    down: torch.Tensor


def _decoded(matrix: QuantisedMatrix, device: torch.device) -> torch.Tensor:
    """Return a matrix in bfloat16: the integers move, and become numbers where they are used."""
    def there(array: NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True)

    exponent = there(matrix.shift).int() + there(matrix.row_exponent).int()[:, None]
    scale = torch.ldexp(there(matrix.significand).float(), exponent)
    rows, columns = matrix.integers.shape
    integers = there(matrix.integers).float().view(rows, scale.shape[1], -1)
    values = integers * scale[:, :, None]
    if (minimum := matrix.group_terms()[1]) is not None:
        rows_of = there(matrix.row_exponent).int()[:, None]
        values += torch.ldexp(there(minimum.astype(np.float32)), rows_of)[:, :, None]
    return values.view(rows, columns).bfloat16()


class Grouped:
    """Weights in bfloat16; see :class:`moeaccel.host.hybrid.exact.Exact` for the methods.

    Parameters
    ----------
    experts : :class:`Experts`
    device : :class:`torch.device`

    Raises
    ------
    UnsupportedExperts
        If experts differ in activation, limit or width, or have biases, second up rows, or limits
        behind the activation.
    """

    def __init__(self, experts: Experts, device: torch.device) -> None:
        kinds = {(s.activation, s.gated, s.limit, s.d_expert) for s in experts.shapes}
        if len(kinds) > 1:
            raise UnsupportedExperts(
                f"experts of a layer must be alike on the torch device, but are of {len(kinds)} "
                "kinds of activation, limit and width; resident_math=\"exact\" takes them")
        if any(s.gate_up_biased or s.down_biased or s.second_up or s.gate_limit
               for s in experts.shapes):
            raise UnsupportedExperts(
                "experts must have no biases, second up rows, or limits behind the activation, on "
                "the torch device in bfloat16; resident_math=\"exact\" takes them")
        activation, self._gated, self._limit, _ = kinds.pop()
        self._activation = ACTIVATIONS[activation]
        self._up_offset = activations.activation(activation).up_offset
        self._device = device
        self._d_model = experts.shapes[0].d_model
        self._sections = experts.shapes[0].sections

    @staticmethod
    def input(x: torch.Tensor) -> torch.Tensor:
        """Return x as the accelerator gets it."""
        return x

    def hold(self, slots: int) -> _Dense:
        """Return room for some experts."""
        return _Dense(*(torch.zeros((slots, section.rows, section.k), dtype=torch.bfloat16,
                                    device=self._device) for section in self._sections))

    def grown(self, held: _Dense) -> _Dense:
        """Return it with room for one more."""
        return _Dense(*(torch.cat(pair) for pair in zip(held, self.hold(1), strict=True)))

    def put(self, held: _Dense, slot: int, image: Expert) -> None:
        """Put an expert into it."""
        gate_up = _decoded(image.gate_up, self._device)
        if self._gated:
            half = len(gate_up) // 2
            held.gate_up[slot, :half] = gate_up[0::2]
            held.gate_up[slot, half:] = gate_up[1::2]
        else:
            held.gate_up[slot] = gate_up
        held.down[slot] = _decoded(image.down, self._device)

    def compute(self, x: torch.Tensor, ids: NDArray[np.int32], weights: torch.Tensor,
                held: _Dense) -> torch.Tensor:
        """Return y of some experts, float32, (T, d_model)."""
        tokens, columns = np.nonzero(ids >= 0)
        slots = ids[tokens, columns]
        order = np.argsort(slots, kind="stable")
        tokens, columns = tokens[order], columns[order]
        counts = np.bincount(slots, minlength=len(held.down))
        at = torch.from_numpy(tokens).to(x.device)
        ends = torch.from_numpy(np.cumsum(counts).astype(np.int32)).to(x.device)
        filled = functional.pad(x, (0, -x.shape[1] % 32)).bfloat16()
        h = self._hidden(functional.grouped_mm(
            filled[at], held.gate_up.transpose(1, 2), offs=ends))
        y = functional.grouped_mm(h, held.down.transpose(1, 2), offs=ends)[:, : self._d_model]
        factor = weights[at, torch.from_numpy(columns).to(x.device)].float()
        out = torch.zeros((len(x), self._d_model), dtype=torch.float32, device=x.device)
        return out.index_add_(0, at, y.float() * factor[:, None])

    def _hidden(self, rows: torch.Tensor) -> torch.Tensor:
        gate, up = rows.chunk(2, dim=1) if self._gated else (rows, None)
        if self._limit is not None:
            gate = gate.clamp(max=self._limit)
            up = None if up is None else up.clamp(-self._limit, self._limit)
        h = self._activation(gate)
        return (h if up is None else h * (up + self._up_offset)).contiguous()

    def join(self, like: torch.Tensor, own: torch.Tensor | None, rows: NDArray[np.int64],
             theirs: torch.Tensor | None) -> torch.Tensor:
        """Return y, (T, d_model), of the type and place of ``like``."""
        total = torch.zeros(like.shape, device=like.device) if own is None else own
        if theirs is not None:
            total.index_add_(0, torch.from_numpy(rows).to(like.device), theirs.float())
        return total.to(like)
