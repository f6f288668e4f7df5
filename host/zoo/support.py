"""What the device lacks for a model of the zoo: found out by asking the driver, with small weights
on a golden device, so that it needs no list that somebody keeps."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeaccel.activations import activation
from moeaccel.config import (
    DIM_MAX,
    EXPERTS_MAX,
    ROUTER_SCORES,
    TOP_K_MAX,
    AcceleratorConfig,
    preset,
)
from moeaccel.errors import MoeAccelError
from moeaccel.formats import BLOCK
from moeaccel.host.device import Device
from moeaccel.host.errors import LimitExceeded, UnsupportedExperts
from moeaccel.host.opening import open_device
from moeaccel.host.routing import check_router
from moeaccel.router.choices import MODES
from moeaccel.router.settings import RouterError
from moeaccel.zoo.routers import settings_of
from moeaccel.zoo.schema import ExpertKind, Model

__all__ = ["Support", "Supports", "equipped", "expert_options", "expert_refusal", "known",
           "largest", "routing_refusal"]

_MEMORY_BYTES = 1 << 24


@dataclass(frozen=True)
class Support:
    """What the device can do of a model.

    Parameters
    ----------
    router, experts : :class:`str`
        Why not; empty where it can.
    """

    router: str
    experts: str

    @property
    def runs(self) -> str:
        """``yes``: the device routes and has the experts; ``experts``: the host routes; ``no``."""
        if self.experts:
            return "no"
        return "experts" if self.router else "yes"

    @property
    def reason(self) -> str:
        """What is missing, empty where nothing is."""
        return "; ".join(filter(None, (self.experts, self.router)))


def equipped(config: str | AcceleratorConfig) -> AcceleratorConfig:
    """Return a configuration with second up rows, and with a router of every score and mode."""
    chosen = preset(config)
    return chosen.replace(
        name=f"{chosen.name} with all for models", second_up=True, router=ROUTER_SCORES,
        router_top_k=TOP_K_MAX, router_modes=MODES)


def largest(config: str | AcceleratorConfig, dim: int) -> AcceleratorConfig:
    """Return a configuration with ``max_dim`` raised to a dimension, where it is too small."""
    chosen = preset(config)
    if dim <= chosen.max_dim:
        return chosen
    return chosen.replace(name=f"{chosen.name}-{DIM_MAX}", max_dim=DIM_MAX,
                          tile_words=max(chosen.tile_words, DIM_MAX // BLOCK))


def expert_options(kind: ExpertKind) -> dict[str, Any]:
    """Return the keyword arguments of :meth:`Device.load_experts` that say what an expert is.

    Where the driver has no such argument, or no such activation, it has not that kind of expert.
    Biases are True here, for the arrays of which only the caller knows.
    """
    options: dict[str, Any] = {
        "activation": kind.form if kind.form == "embedding" else kind.activation,
        "gated": kind.gated}
    if kind.second_up:
        options["second_up"] = True
    if kind.limit is not None:
        options["limit"] = kind.limit
    if kind.limit_behind is not None:
        options |= {"activation": "silu", "limit": kind.limit_behind, "limit_behind": True}
    if kind.bias is not None:
        options["gate_up_bias"] = True
    if kind.bias is not None and kind.bias != "gate_up":
        options["down_bias"] = True
    if kind.norm:
        options["norm"] = True
    return options


class Supports:
    """Ask a golden device; use it as a context manager.

    Parameters
    ----------
    config : :class:`str` or :class:`AcceleratorConfig`
        What the device was built from.
    """

    def __init__(self, config: str | AcceleratorConfig = "wide512") -> None:
        self._config = equipped(largest(config, DIM_MAX))
        self._device = open_device("golden", config=self._config, memory_bytes=_MEMORY_BYTES)
        self._experts: dict[str, str] = {}

    def __enter__(self) -> Supports:
        return self

    def __exit__(self, *_: object) -> None:
        self._device.close()

    def __call__(self, model: Model) -> Support:
        """Return what it can do of a model."""
        text = model.expert.text
        if text not in self._experts:
            self._experts[text] = expert_refusal(self._device, model.expert)
        return Support(router=routing_refusal(self._config, model),
                       experts=self._experts[text] or _too_large(self._config, model))


def expert_refusal(device: Device, kind: ExpertKind) -> str:
    """Return why the driver does not take experts of that kind; empty if it does."""
    options = expert_options(kind)
    rows = kind.matrices - 1
    gate_up = np.full((1, rows * BLOCK, BLOCK), 0.5, np.float32)
    down = np.full((1, BLOCK, BLOCK), 0.5, np.float32)
    for name, array in (("gate_up_bias", gate_up[:, :, 0]), ("down_bias", down[:, :, 0])):
        if name in options:
            options[name] = array
    try:
        known(device, options)
        device.load_experts(gate_up, down, quantiser="amax", **options).close()
    except MoeAccelError as error:
        return f"experts: {kind.text}: {error}"
    return ""


def known(device: Device, options: dict[str, Any]) -> None:
    """Refuse arguments that the driver has not.

    Raises
    ------
    FormatError
        For an activation.
    UnsupportedExperts
        For an argument.
    """
    has = inspect.signature(device.load_experts).parameters
    activation(options["activation"])
    lacking = [name for name in options if name not in has]
    if lacking:
        raise UnsupportedExperts(
            f"experts must be what load_experts has arguments for, but it has none for "
            f"{', '.join(lacking)}")


def routing_refusal(config: AcceleratorConfig, model: Model, size: tuple[int, int] | None = None
                    ) -> str:
    """Return why a device of that configuration does not route as a model does; empty if it does.

    Parameters
    ----------
    size : (int, int), optional
        Outputs of the router, and of them chosen, where they are not the model's own.
    """
    outputs, top_k = size or (
        (model.n_experts or 16) + model.router.identity_experts, model.top_k or 2)
    try:
        check_router(config, settings_of(model, experts=outputs, top_k=top_k))
    except (RouterError, LimitExceeded) as error:
        return f"router: {model.router.flavour}: {error}"
    return ""


def _too_large(config: AcceleratorConfig, model: Model) -> str:
    """Return why no configuration holds the model's dimensions; empty if one does."""
    dim = max((dim for widths in model.expert_widths for dim in widths), default=0)
    if dim > config.max_dim:
        return f"experts: dimensions must be at most {config.max_dim}, not {dim}"
    if (model.n_experts or 0) > EXPERTS_MAX:
        return f"experts: there must be at most {EXPERTS_MAX}, not {model.n_experts}"
    return ""
