"""What a benchmark would refuse after minutes of building and drawing, refused at once."""

from __future__ import annotations

from moeaccel.config import TOP_K_MAX, AcceleratorConfig
from moeaccel.formats import weight_format
from moeaccel.host.benchmark import BenchmarkError, routing
from moeaccel.host.benchmark_moe import router_of, shared_widths
from moeaccel.host.errors import LimitExceeded
from moeaccel.host.limits import check_layer
from moeaccel.host.routing import check_router
from moeaccel.image import ExpertShape, LinearShape
from moeaccel.router.settings import RouterSettings
from moeaccel.zoo import Model

__all__ = ["MOST_BYTES", "check_experts", "check_product", "check_routed", "routed_config"]

MOST_BYTES = 1 << 32
"""Most bytes of x, and of a product's weights, in float32: what a benchmark draws."""


def check_experts(model: Model, config: AcceleratorConfig, *, weight_format_name: str,
                  tokens: int, kind: str) -> None:
    """Refuse a layer of a model that cannot be measured on a configuration.

    Parameters
    ----------
    tokens : :class:`int`
    kind : :class:`str`
        Of the routing.

    Raises
    ------
    BenchmarkError
        For sizes that were not published, a routing that there is not, and too many tokens.
    LimitExceeded, FormatError
        For what the configuration does not do.
    """
    routing(1, 2, 1, kind=kind, seed=0)
    widths = model.expert_widths
    if not (model.n_experts and model.top_k and len(widths) == 1):
        what = ("are of several kinds" if len(widths) > 1 else "were not published")
        raise BenchmarkError(f"model must have layers of one known size, but those of "
                             f"{model.key} {what}; use another one of `moeaccel models`")
    d_in, d_expert = widths[0]
    shape = ExpertShape(weight_format(weight_format_name), d_in, d_expert, config.row_multipliers,
                        config.channels, gated=model.expert.gated)
    check_layer(config, [shape] * model.n_experts)
    _check_bytes("tokens", tokens, 4 * tokens * d_in, "x")


def check_routed(model: Model, config: AcceleratorConfig, *, weight_format_name: str, tokens: int
                 ) -> None:
    """Refuse a layer whose router, or shared experts, the configuration does not do.

    Raises
    ------
    BenchmarkError
        If it is not a matrix, or the size of shared experts was not published.
    LimitExceeded, RouterError
        For what the configuration, or the device's settings, do not have.
    """
    settings = _routed(model, tokens)
    check_router(config, settings)
    widths = shared_widths(model)
    if settings.top_k + len(widths) > TOP_K_MAX:
        raise LimitExceeded(f"top_k and shared experts must be at most {TOP_K_MAX} together, not "
                            f"{settings.top_k} and {len(widths)}")
    each = [model.expert.d_expert or 1] * (model.n_experts or 1)
    check_layer(config, [
        ExpertShape(weight_format(weight_format_name), model.d_model or 1, width,
                    config.row_multipliers, config.channels, gated=model.expert.gated)
        for width in (*each, *widths)])


def routed_config(model: Model, config: AcceleratorConfig, *, tokens: int) -> AcceleratorConfig:
    """Return a configuration with what the router of a model asks of it beside: its score, where
    there is no router at all, and the modes that it lacks.

    Raises
    ------
    BenchmarkError, RouterError
        As in :func:`check_routed`.
    """
    settings = _routed(model, tokens)
    lacking = [mode for mode in settings.modes if mode not in config.router_modes]
    if not config.router:
        config = config.replace(name=f"{config.name}, {settings.score} router",
                                router=(settings.score,))
    if lacking:
        config = config.replace(name=f"{config.name}, {', '.join(lacking)}",
                                router_modes=(*config.router_modes, *lacking))
    return config


def _routed(model: Model, tokens: int) -> RouterSettings:
    if model.router.logits != "linear":
        raise BenchmarkError(f"model must have a router that is a matrix, not {model.name!r}")
    return router_of(
        model, experts=model.n_experts or 1, top_k=model.top_k or 1, tokens=tokens)


def check_product(config: AcceleratorConfig, *, weight_format_name: str, m: int, k: int, n: int
                  ) -> None:
    """Refuse a product ``y = x W^T``, x (m, k), W (n, k), that cannot be measured.

    Raises
    ------
    BenchmarkError
        If it is too large to be drawn.
    LimitExceeded, FormatError
        For what the configuration does not do.
    """
    check_layer(config, [LinearShape(weight_format(weight_format_name), n, k,
                                     config.row_multipliers, config.channels)])
    _check_bytes("m", m, 4 * m * k, "x")
    _check_bytes("n", n, 4 * n * k, "weights")


def _check_bytes(name: str, value: int, size: int, what: str) -> None:
    if size > MOST_BYTES:
        raise BenchmarkError(f"{name} must be such that {what} take at most {MOST_BYTES >> 30} GiB "
                             f"in float32, not {value}: {size:,} bytes")
