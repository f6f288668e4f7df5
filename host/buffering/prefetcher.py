"""Predictions for a device: routes in, PREFETCH out."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from moeaccel.config import TOP_K_MAX
from moeaccel.host.buffering.predictions import Oracle, Prediction, prediction as find
from moeaccel.host.errors import InvalidOption
from moeaccel.host.layers import Experts
from moeaccel.host.options import whole
from moeaccel.host.prefetch import check_buffer, most_bytes
from moeaccel.host.rings import Command
from moeaccel.host.tensors import indices, shape_of

__all__ = ["Prefetcher"]


class Prefetcher:
    """Tell a device what the next layer will probably use, when the route of this one is known.

    ``for each layer: y = layer(x, ids, weights); prefetcher.observe(index, ids)``. The experts with
    the best chances are brought, as many as the buffer has slots, or fewer, where no more are
    predicted.

    Parameters
    ----------
    layers : sequence of :class:`Experts`
        In the order in which a forward pass calls them, all with as many experts, on one device.
    prediction : :class:`str` or type of :class:`Prediction`
        One of :data:`PREDICTIONS`, but no oracle: nobody tells it what will be.
    top_k : :class:`int`
        Experts of a token.
    budget : :class:`int`, optional
        Bytes that one PREFETCH brings at most, so many of the likeliest experts as fit: those of
        the cycles for which memory is idle between two calls, say. The next call waits for it.

    Raises
    ------
    InvalidOption
        If layers are not of one device, or differ in experts; for an oracle and a wrong top_k.
    LimitExceeded
        If the device has no expert buffer.
    UnknownPolicy
        If there is no such prediction.
    """

    def __init__(self, layers: Sequence[Experts], prediction: str | type[Prediction] = "circular",
                 *, top_k: int, budget: int | None = None) -> None:
        if not isinstance(layers, Sequence) or not all(
                isinstance(layer, Experts) for layer in layers):
            raise InvalidOption("layers must be a sequence of what load_experts() returned")
        alike = {(id(layer.device), layer.num_experts) for layer in layers}
        if len(alike) != 1:
            raise InvalidOption("layers must be one or more, of one device and with as many "
                                f"experts, not {len(layers)} of {len(alike)} kinds")
        kind = find(prediction) if isinstance(prediction, str) else prediction
        if not (isinstance(kind, type) and issubclass(kind, Prediction)) or kind is Oracle:
            raise InvalidOption("prediction must be one that looks at routes alone, by name or "
                                f"as a subclass of Prediction, not {prediction!r}")
        top_k = whole("top_k", top_k, least=1, most=TOP_K_MAX)
        self._budget = budget if budget is None else whole("budget", budget, least=0,
                                                           unit=" bytes")
        self._layers = tuple(layers)
        self._device, self._experts = layers[0].device, layers[0].num_experts
        most = check_buffer(self._device.config)
        self._most = max(1, most // max(layer.row_blocks for layer in layers))
        self._prediction = kind(n_layers=len(layers), n_experts=self._experts, top_k=top_k)
        self._sent: list[Command] = []

    def begin_pass(self, *, new_request: bool = False) -> None:
        """Hear that a forward pass begins, and whether a request begins with it."""
        self._prediction.begin_pass(new_request=new_request)

    def observe(self, layer: int, ids: Any) -> Command | None:
        """Hear the route of a layer, and bring what the next one in the ring may use.

        Parameters
        ----------
        layer : :class:`int`
            Its index.
        ids : integer tensor, (T, K)
            As the layer's call has them.

        Returns
        -------
        :class:`Command` or None
            The PREFETCH; None where nothing is predicted, or the budget takes not one expert.

        Raises
        ------
        InvalidOption, InvalidTensor
            If there is no such layer, or ids are none.
        CommandFailed
            If an earlier PREFETCH has failed.
        """
        layer = whole("layer", layer, least=0, most=len(self._layers) - 1)
        self.check()
        shape_of("ids", ids, "T", "K")
        named = indices("ids", ids, self._experts).reshape(-1)
        uses = np.bincount(named[named >= 0], minlength=self._experts)
        best = self._prediction.following(layer, uses, None)[: self._most].tolist()
        following = self._layers[(layer + 1) % len(self._layers)]
        if self._budget is not None:
            needed = itertools.accumulate(most_bytes(following, expert) for expert in best)
            best = best[: sum(so_far <= self._budget for so_far in needed)]
        if not best:
            return None
        command = self._device.prefetch(following, best)
        self._sent.append(command)
        return command

    def check(self) -> None:
        """Raise what has gone wrong with those that have completed."""
        done = [command for command in self._sent if command.completion is not None]
        self._sent = [command for command in self._sent if command.completion is None]
        for command in done:
            if (error := command.error()) is not None:
                raise error
