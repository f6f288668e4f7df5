"""Parameters that the host gives up for the device's images of them, and their way back."""

from __future__ import annotations

import logging
import weakref

import numpy as np
import torch
from numpy.typing import NDArray

from moeaccel.host.errors import HostError
from moeaccel.host.hybrid.images import read_expert
from moeaccel.host.layers import Experts
from moeaccel.host.plugins.transformers.modules import Weights

__all__ = ["GivenUp", "is_given_up"]

logger = logging.getLogger(__name__)


class GivenUp:
    """Parameters that became views of one element each, which is no number.

    Parameters
    ----------
    weights : :class:`Weights`
        Theirs; they are not kept alive.
    """

    def __init__(self, weights: Weights) -> None:
        self._layout = weights._replace(**dict.fromkeys(_TENSORS))
        self._tensors = {name: weakref.ref(tensor) for name in _TENSORS
                         if (tensor := getattr(weights, name)) is not None}
        for tensor in weights.tensors:
            one = torch.full((1,), torch.nan, dtype=torch.float32, device=tensor.device)
            tensor.data = one.to(tensor.dtype).expand(tensor.shape)

    def restore(self, experts: Experts) -> None:
        """Let the parameters have what the device has: what they were, as it was quantised.

        FP8 weights, and those of a device that does not answer, stay as they are; a warning says
        so.
        """
        found = {name: of() for name, of in self._tensors.items()}
        given = {name: tensor for name, tensor in found.items() if tensor is not None}
        if len(given) < len(found) or not is_given_up(self._layout._replace(**given)):
            return  # the model is gone, or has other weights by now
        if "gate_up_scale" in given:
            logger.warning("weights of a layer stay given up: FP8 with scales cannot be restored")
            return
        try:
            values = _read(self._layout._replace(**given), experts)
        except HostError as error:
            logger.warning("weights of a layer stay given up: %s", error)
            return
        for name, tensor in given.items():
            tensor.data = values[name].to(device=tensor.device, dtype=tensor.dtype)


_TENSORS = ("gate_up", "down", "gate_up_scale", "down_scale", "gate_up_bias", "down_bias")


def is_given_up(weights: Weights) -> bool:
    """Return whether parameters are such views."""
    return weights.down.numel() > 1 and not any(weights.down.stride())


def _read(weights: Weights, experts: Experts) -> dict[str, torch.Tensor]:
    """Return what the device has of each parameter, float32."""
    found = {name: torch.empty(tensor.shape) for name in _TENSORS
             if (tensor := getattr(weights, name)) is not None}
    for e in range(len(weights.down)):
        image = read_expert(experts, e)
        d_model, d_expert = experts.shapes[e].d_model, experts.shapes[e].d_expert
        for name, matrix, rows, columns in (
                ("gate_up", image.gate_up, d_expert, d_model), ("down", image.down, d_model,
                                                               d_expert)):
            paired = name == "gate_up" and weights.gated
            for kind, values in ((name, matrix.dequantise()[:, :columns]),
                                 (f"{name}_bias", matrix.bias_values)):
                if kind in found:
                    part = _arranged(values, rows, paired, weights.interleaved)
                    turn = weights.transposed and kind == name
                    found[kind][e] = torch.from_numpy(part.T if turn else part)
    return found


def _arranged(values: NDArray[np.floating], rows: int, paired: bool, interleaved: bool
              ) -> NDArray[np.float32]:
    """Return rows, which alternate in images, as a module has them."""
    if paired:
        gate, up = values[0::2][:rows], values[1::2][:rows]
        values = np.stack([gate, up], axis=1).reshape(-1, *values.shape[1:]) if interleaved else (
            np.concatenate([gate, up]))
    else:
        values = values[:rows]
    return np.ascontiguousarray(values, np.float32)
