"""Drawn calls that route on the device: what a case says of them, and what they are made of."""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moeaccel.config import AcceleratorConfig
from moeaccel.cycles import Prediction
from moeaccel.cycles.moe import predict_moe
from moeaccel.cycles.route_unit import predict_route
from moeaccel.image import ExpertShape, LinearShape
from moeaccel.router.choices import GroupScore, Renormalize, Score
from moeaccel.router.settings import RouterSettings

if TYPE_CHECKING:
    from moeaccel.host.calls import Pending
    from moeaccel.host.device import Device
    from moeaccel.host.routing import Router

__all__ = ["LogitRoutes", "Routed", "draw_routed"]

_SHARED_MOST = 8


@dataclass(frozen=True, kw_only=True)
class Routed:
    """The router of a call, in the words of :class:`moeaccel.router.settings.RouterSettings`.

    Parameters
    ----------
    only : bool
        ROUTE, from logits to ids and weights; else MOE, from x to y.
    bias, selection_bias : bool
        Whether there are such.
    shared : int
        Experts behind the call's own that every token goes to.
    """

    only: bool = False
    top_k: int = 1
    score: str = "softmax"
    renormalize: str = "none"
    groups: int = 1
    keep_groups: int = 1
    group_score: str = "max"
    bias: bool = False
    selection_bias: bool = False
    shared: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.shared, int) or not 0 <= self.shared <= _SHARED_MOST or (
                self.only and self.shared):
            raise ValueError(f"shared must be from 0 to {_SHARED_MOST}, and 0 of logits only, not "
                             f"{self.shared!r}")

    def settings(self, experts: int) -> RouterSettings:
        """Return them.

        Raises
        ------
        RouterError
            If there are no such.
        """
        own = asdict(self)
        for name in ("only", "bias", "selection_bias", "shared"):
            del own[name]
        epsilon = 2.0**-10 if self.renormalize in ("sum_eps", "clamp") else 0.0
        return RouterSettings(experts=experts, epsilon=epsilon, **own)

    def router(self, experts: int, weight: NDArray[np.float32] | None, rng: np.random.Generator
               ) -> Router:
        """Return it, with tables that are drawn."""
        from moeaccel.host.routing import Router

        tables = {name: rng.standard_normal(experts).astype(np.float32) / 4 if there else None
                  for name, there in (("bias", self.bias),
                                      ("selection_bias", self.selection_bias))}
        settings = asdict(self.settings(experts))
        del settings["experts"]
        return Router(weight, experts=experts, **tables, **settings)

    def predict(self, config: AcceleratorConfig, shapes: list[ExpertShape], *, experts: int,
                tokens: int, d_in: int, planes: int) -> Prediction:
        """Return what the cycle model says, as if every token went to the first experts.

        Parameters
        ----------
        shapes : list of ExpertShape
            With the shared ones.
        experts : int
            That are routed to.
        """
        settings = self.settings(experts)
        biased = self.selection_bias and settings.biases_scores
        tables = self.bias or self.selection_bias
        if self.only:
            return predict_route(config, settings, tokens, biased=biased, tables=tables)
        plane = next(fmt for fmt in config.weight_formats if fmt.weight_bits == 8)
        section = LinearShape(plane, experts, d_in, config.row_multipliers, config.channels).section
        ids = np.tile([*range(self.top_k), *range(experts, len(shapes))], (tokens, 1))
        return predict_moe(
            config, settings, section, {e: shape.sections for e, shape in enumerate(shapes)}, ids,
            len(shapes), d_model=shapes[0].gate_up.k, planes=planes, biased=biased, tables=tables)


class LogitRoutes:
    """What routes by logits, called as a layer is.

    Parameters
    ----------
    device : Device
    router : moeaccel.host.Router
    """

    def __init__(self, device: Device, router: Router) -> None:
        self._device, self._router = device, router

    def submit(self, logits: NDArray[np.float32]) -> Pending:
        """Send them."""
        from moeaccel.host.routing import submit

        return submit(self._device, self._router, logits)

    def sync(self, handle: Pending) -> NDArray[np.float32]:
        """Return ids and weights side by side, (T, 2 k)."""
        ids, weights = handle.result()
        return np.hstack([ids.astype(np.float32), weights])


def draw_routed(draw: random.Random, limits: AcceleratorConfig) -> dict[str, Any]:
    """Return what a call has instead that routes: its experts, and how."""
    only = draw.random() < 0.3
    experts = draw.choice((1, 2, 5, 8, 16, 33, 64, limits.max_experts) if only
                          else (1, 2, 5, 8, 16))
    score = Score[draw.choice(limits.router).upper()]
    identity = score is Score.IDENTITY
    groups = draw.choice([count for count in (1, 1, 2, 4, 8) if experts % count == 0])
    keep = draw.randint(1, groups)
    top2 = not identity and experts // groups > 1 and draw.random() < 0.5
    return {"experts": experts, "routed": Routed(
        only=only, score=score.key, groups=groups, keep_groups=keep,
        top_k=draw.randint(1, min(8, limits.router_top_k, keep * experts // groups)),
        renormalize=(Renormalize.SOFTMAX_TOP_K if identity else draw.choice(list(Renormalize))).key,
        group_score=(GroupScore.TOP2_SUM if top2 else GroupScore.MAX).key,
        bias=draw.random() < 0.3, selection_bias=draw.random() < 0.4,
        shared=0 if only else draw.choice((0, 0, 1, 2)))}
