"""A model of the zoo made small: the same router and the same experts, at sizes that simulate in a
moment, with weights that formats hold exactly.

What is left between float and device is then its own rounding, and anything else is a mistake.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from moeaccel.config import AcceleratorConfig
from moeaccel.host.errors import LimitExceeded
from moeaccel.host.zoo.reference import ExpertWeights, RouterWeights, Routes, layer, logits, route
from moeaccel.router.settings import RouterSettings
from moeaccel.zoo.routers import settings_of
from moeaccel.zoo.schema import Model

__all__ = ["Case", "Size", "case", "reduced"]

_MOST_EXPERTS = 48
_TOKENS = 16
_WIDTH = 64

_Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Size:
    """Sizes of a reduced model.

    Parameters
    ----------
    tokens, d_in, d_expert, experts, top_k : :class:`int`
    identities, sinks : :class:`int`
        Outputs of the router behind the experts.
    """

    tokens: int
    d_in: int
    d_expert: int
    experts: int
    top_k: int
    identities: int
    sinks: int

    @property
    def outputs(self) -> int:
        """Outputs of the router."""
        return self.experts + self.identities + self.sinks


def reduced(model: Model, config: AcceleratorConfig) -> Size:
    """Return the sizes for a model on a configuration.

    Groups, groups kept and top-k are the model's own; experts are halved until there are few, as
    long as groups stay whole and hold top-k. Where nothing is published: 16 experts, top-2.

    Raises
    ------
    LimitExceeded
        If the configuration is too small for it.
    """
    kind = model.router
    original, k = model.n_experts or 16, model.top_k or 2
    experts = original
    most = min(_MOST_EXPERTS, config.max_experts)

    def outputs(number: int) -> int:
        return number + kind.identity_experts * number // original + kind.sinks

    while outputs(experts) > most:
        half = experts // 2
        if experts % 2 or half % kind.groups or half * kind.keep_groups // kind.groups < k:
            break
        experts = half
    if outputs(experts) > config.max_experts:
        raise LimitExceeded(
            f"config {config.name!r} must have at least {outputs(experts)} experts for "
            f"{model.name} at its smallest (groups and top-{k} are its own), not "
            f"{config.max_experts}")
    d_expert = model.d_expert or _WIDTH
    return Size(_TOKENS, _WIDTH, _WIDTH if d_expert % 64 == 0 else 96, experts, k,
                outputs(experts) - experts - kind.sinks, kind.sinks)


@dataclass(frozen=True)
class Case:
    """A reduced model with its weights and x, and what is right for them.

    Parameters
    ----------
    model : :class:`Model`
    size : :class:`Size`
    x : float32 array, (T, H)
    router : :class:`RouterWeights`
    logits : float32 array, (T, N)
        Without bias.
    routes : :class:`Routes`
    gate_up, down : float32 array, (E, rows, H), (E, H, I)
        Sinks are the last experts.
    gate_up_bias, down_bias : float32 array, (E, rows), (E, H), optional
    """

    model: Model
    size: Size
    x: _Floats
    router: RouterWeights
    logits: _Floats
    routes: Routes
    gate_up: _Floats
    down: _Floats
    gate_up_bias: _Floats | None
    down_bias: _Floats | None

    @property
    def settings(self) -> RouterSettings:
        """Its router in the device's words.

        Raises
        ------
        RouterError
            See :func:`moeaccel.zoo.routers.settings_of`.
        """
        size = self.size
        return settings_of(self.model, experts=size.experts + size.identities, top_k=size.top_k,
                           tokens=size.tokens)

    @property
    def y(self) -> NDArray[np.float64]:
        """What is right, (T, H)."""
        def part(values: _Floats | None, e: int) -> torch.Tensor | None:
            return None if values is None else torch.from_numpy(values[e]).double()

        experts = [ExpertWeights(
            torch.from_numpy(self.gate_up[e]).double(), torch.from_numpy(self.down[e]).double(),
            part(self.gate_up_bias, e), part(self.down_bias, e)) for e in range(len(self.down))]
        return layer(self.model.expert, torch.from_numpy(self.x).double(), self.routes, experts,
                     weight_on=self.model.router.weight_on).numpy()


def case(model: Model, config: AcceleratorConfig, *, seed: int = 0) -> Case:
    """Draw a case.

    A capacity that is a number of tokens becomes a small one, and every capacity is felt. Weights
    are whole numbers below 128 times a power of two, which ``mxint8`` holds exactly; biases and
    router weights are bfloat16 numbers. Rows reach beyond limits where there are some.

    Raises
    ------
    LimitExceeded
        See :func:`reduced`.
    UnsupportedExperts
        If there is no float reference for it (:mod:`~moeaccel.host.zoo.reference`).
    """
    size = reduced(model, config)
    if model.router.capacity is not None and model.router.capacity.tokens is not None:
        few = replace(model.router.capacity, tokens=size.tokens // 4)
        model = replace(model, router=replace(model.router, capacity=few))
    kind = model.router
    rng = np.random.default_rng([seed, zlib.crc32(model.key.encode())])

    def whole(shape: tuple[int, ...], deviation: float) -> _Floats:
        exponent = round(np.log2(deviation / (73 * np.sqrt(shape[-1]))))
        return np.ldexp(rng.integers(-127, 128, shape).astype(np.float32), exponent)

    def bfloat16(*shape: int, deviation: float) -> torch.Tensor:
        drawn = torch.from_numpy(rng.standard_normal(shape, np.float32) * np.float32(deviation))
        return drawn.bfloat16().float()

    x = bfloat16(size.tokens, size.d_in, deviation=1.0).numpy()
    rows = (size.outputs, size.d_in)
    sharpness = 1.5 / np.sqrt(size.d_in)
    router = RouterWeights(
        bfloat16(*((3, *rows) if kind.logits == "attention" else rows), deviation=sharpness),
        bfloat16(size.outputs, deviation=0.5) if kind.bias else None,
        bfloat16(size.outputs, deviation=0.05) if kind.selection_bias else None,
        torch.from_numpy(np.ldexp(np.float32(1), rng.integers(-2, 3, size.outputs)))
        if kind.expert_scale else None)
    if kind.capacity is not None:  # an expert that many want, by weights as large as the others
        x[:, :16], router.weight[0, :16] = 1.0, 0.25
    if kind.logits == "mlp":  # they come from a network that is the host's, whatever it computes
        found = bfloat16(size.tokens, size.outputs, deviation=1.5)
    else:
        found = logits(kind, torch.from_numpy(x), replace(router, bias=None))
    experts, expert = size.experts + size.sinks, model.expert
    deviation = 4.0 if expert.limit or expert.limit_behind else 1.5
    rows_of_h = expert.matrices - 1
    gate_up = whole((experts, rows_of_h * size.d_expert, size.d_in), deviation)
    down = whole((experts, size.d_in, size.d_expert), 1.0)
    biased = (expert.bias is not None, expert.bias == "both")
    biases = [bfloat16(*shape, deviation=0.5).numpy() if there else None for there, shape in zip(
        biased, (gate_up.shape[:2], down.shape[:2]), strict=True)]
    routes = route(kind, size.top_k, found if router.bias is None else found + router.bias, router)
    return Case(model, size, x, router, found.numpy(), routes, gate_up, down, *biases)
