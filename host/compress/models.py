"""Compressed layers in a transformers model, and in a device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moeaccel.closing import Closing
from moeaccel.host.compress.layer import MoELayer
from moeaccel.host.compress.low_rank import LowRankLayer, factors_of
from moeaccel.host.compress.method import Tokens, stored
from moeaccel.host.device import Device
from moeaccel.host.errors import UnsupportedExperts
from moeaccel.host.quality.experts import (
    FastExperts,
    Observed,
    experts_modules,
    float_experts,
    observe,
    use_layers,
)

__all__ = ["DeviceLayer", "RoutedExperts", "layers_of", "observed"]


class RoutedExperts:
    """A compressed layer in the place of a model's experts: routes by itself, in torch.

    Parameters
    ----------
    layer : :class:`MoELayer`
    planes : :class:`int`
        As in :class:`moeaccel.host.quality.experts.FastExperts`; 0: float weights, too.
    """

    def __init__(self, layer: MoELayer, planes: int = 2) -> None:
        self._layer = layer
        if planes and factors_of(layer):  # t and z of products are not quantised here
            self._experts = FastExperts(stored(layer).experts, 0)
        else:
            self._experts = FastExperts(layer.quantised() if planes else layer.experts, planes)

    def __call__(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Return y; ids and weights of the model's own router are not looked at."""
        routing = self._layer.route(x.float().numpy())
        return self._experts(x, torch.from_numpy(routing.ids), torch.from_numpy(routing.weights))


class DeviceLayer(Closing):
    """A compressed layer in a device's memory, until it is closed; the host routes.

    Parameters
    ----------
    device : :class:`Device`
    layer : :class:`MoELayer`
    activation_bits : :class:`int`
    """

    def __init__(self, device: Device, layer: MoELayer, activation_bits: int = 16) -> None:
        self._layer = layer
        self._products = LowRankLayer(device, layer, activation_bits) if factors_of(
            layer) else None
        if self._products is None:
            self.experts = device.load_quantised(layer.quantised(),
                                                 activation_bits=activation_bits)

    def __call__(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return y, (T, H), of x, (T, H)."""
        if self._products is not None:
            return self._products(x)
        routing = self._layer.route(x)
        return self.experts(x, routing.ids, routing.weights.astype(np.float32))

    def close(self) -> None:
        """Free the device memory; a second call does nothing."""
        (self.experts if self._products is None else self._products).close()


def observed(model: Any, texts: Sequence[torch.Tensor]) -> list[Observed]:
    """Return what each layer of experts is asked while the model reads texts, (1, T) each."""
    found: list[dict[int, Observed]] = []
    floats = [FastExperts(float_experts(weights), 0) for _, weights in experts_modules(model)]
    for tokens in texts:
        layers, seen = observe(floats)
        with torch.inference_mode(), use_layers(model, layers):
            model(tokens, use_cache=False)
        found.append(seen)
    return [Observed(*(np.concatenate([getattr(seen[i], name) for seen in found])
                       for name in ("x", "ids", "weights"))) for i in range(len(floats))]


def layers_of(model: Any, texts: Sequence[torch.Tensor], *,
              weight_format: str = "int4_g32") -> tuple[list[MoELayer], list[Tokens]]:
    """Return the layers of a model with their routers, and the x that each meets in texts.

    Parameters
    ----------
    model : transformers model
        With a softmax router behind each layer's ``gate.weight``.
    texts : sequence of int64 tensors, (1, T)
    weight_format : :class:`str`
        For all experts.

    Raises
    ------
    UnsupportedExperts
        If a router does something else than a softmax: what the model chose for the texts has to be
        what the layer here chooses.
    """
    seen = observed(model, texts)
    parents = {id(child): parent for parent in model.modules() for child in parent.children()}
    layers = []
    for index, ((module, weights), asked) in enumerate(
            zip(experts_modules(model), seen, strict=True)):
        router = getattr(getattr(parents[id(module)], "gate", None), "weight", None)
        experts = float_experts(weights)
        if not isinstance(router, torch.Tensor) or router.shape[0] != len(experts):
            raise UnsupportedExperts(f"layer {index} must have a router gate.weight with a row for "
                                     f"each of its {len(experts)} experts")
        sums = asked.weights.sum(axis=1)
        layer = MoELayer.of(experts, router.detach().float().numpy(), asked.ids.shape[1],
                            renormalise=bool(np.allclose(sums, 1, atol=1e-3)),
                            weight_format=weight_format)
        routing = layer.route(asked.x)
        mine, theirs = (
            np.stack([np.where(ids == e, values, 0).sum(axis=1) for e in range(len(experts))])
            for ids, values in ((routing.ids, routing.weights), (asked.ids, asked.weights)))
        if not np.allclose(mine, theirs, atol=1e-3):
            raise UnsupportedExperts(f"router of layer {index} must be a softmax of gate.weight, "
                                     "with or without renormalising; this one weighs differently")
        layers.append(layer)
    return layers, [asked.x for asked in seen]
