"""The demo model with its tokens routed on the device, held to the host's routes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from moeaccel.config import AcceleratorConfig
from moeaccel.host.demo import CHECKPOINT
from moeaccel.host.demo.run import generate
from moeaccel.host.demo.tasks import check_prompt
from moeaccel.host.device import Device
from moeaccel.host.opening import open_device
from moeaccel.host.routing import Router

__all__ = ["RoutedDemo", "run_routed"]


@dataclass(frozen=True)
class RoutedDemo:
    """What prompts gave with routes of the host and of the device.

    Parameters
    ----------
    host_answers, device_answers : list[str]
    tokens : :class:`int`
        Routed on the device, of all layers.
    differences : :class:`int`
        Of these, tokens that went to other experts than the host would have sent them.
    weight_error : :class:`float`
        Largest difference of a weight, relative to the host's.
    """

    host_answers: list[str]
    device_answers: list[str]
    tokens: int
    differences: int
    weight_error: float


class _Routes:
    """A forward hook of routers: the device's routes in the place of theirs, compared."""

    def __init__(self, device: Device, router: Router) -> None:
        self._device, self._router = device, router
        self.tokens = self.differences = 0
        self.weight_error = 0.0

    def __call__(self, module: torch.nn.Module, given: Any, made: Any) -> Any:
        """Return logits, weights and ids, as Qwen3's router does."""
        logits, host_weights, host_ids = made
        ids, weights = self._device.route(self._router, logits)
        order, host_order = ids.argsort(dim=1), host_ids.argsort(dim=1)
        same = (ids.gather(1, order) == host_ids.gather(1, host_order)).all(dim=1)
        error = weights.gather(1, order) / host_weights.gather(1, host_order) - 1
        self.tokens += len(ids)
        self.differences += int((~same).sum())
        if same.any():
            self.weight_error = max(self.weight_error, float(error[same].abs().max()))
        return logits, weights, ids


def run_routed(prompts: Sequence[str], *, device: str, config: str | AcceleratorConfig
               ) -> RoutedDemo:
    """Answer prompts with the host's routes, and again with the device's; experts are the host's.

    Parameters
    ----------
    prompts : sequence of str
        Of the demo's tasks, each ending in ``=``.
    device, config
        As for :func:`moeaccel.host.open_device`; the configuration must have a router.

    Raises
    ------
    LimitExceeded
        If the device has no such router.
    InvalidOption
        If the model does not know a prompt's characters.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for prompt in prompts:
        check_prompt(prompt)
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    model: Any = AutoModelForCausalLM.from_pretrained(CHECKPOINT)
    host_answers, _ = generate(model, tokenizer, prompts)
    layers = [layer.mlp.gate for layer in model.model.layers]
    router = Router(experts=model.config.num_experts, top_k=model.config.num_experts_per_tok,
                    renormalize="sum")
    with ExitStack() as stack:
        opened = stack.enter_context(open_device(device, config=config))
        routes = _Routes(opened, router)
        for gate in layers:
            stack.callback(gate.register_forward_hook(routes).remove)
        device_answers, _ = generate(model, tokenizer, prompts)
    return RoutedDemo(host_answers, device_answers, routes.tokens, routes.differences,
                      routes.weight_error)
