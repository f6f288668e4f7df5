"""What the zoo knows of a model: the fields of ``models.json``, and what each means.

The file is a list of objects, one a model. A field that is left out has the default stated here;
null stands for what was not published. :func:`parse` refuses anything else.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any

from moeaccel.errors import MoeAccelError
from moeaccel.router import choices, flavours as families

__all__ = ["FLAVOURS", "FORMS", "ORIGINS", "Capacity", "ExpertKind", "Model", "RouterKind",
           "Shared", "ZooError", "key_of", "parse"]

FLAVOURS: dict[str, str] = {key: flavour.text for key, flavour in families.FLAVOURS.items()} | {
    "R12i": "sigmoid, chosen with a bias, divided by the sum of chosen and always-on experts, "
            "times a scale (Inkling)",
    "R12k": "top-k of logits with a bias, sigmoid of those without (Kolibri-1)",
    "R12z": "softmax, top-1, of logits from a network with state across layers (ZAYA1)",
    "R12d": "product keys over experts of one neuron (Doge)",
}
"""Routers by flavour: where scores come from, how experts are chosen, what their weights are."""

FORMS: dict[str, tuple[int, str]] = {
    "glu": (3, "down (act(gate x) * up x)"),
    "mlp": (2, "down act(up x)"),
    "openmoe_glu": (4, "down (a * act(b) * up x) with a and b the halves of gate x"),
    "embedding": (2, "one neuron: a row of two tables"),
}
"""Matrices of d_in by d_expert in an expert, and its formula, by form."""

ORIGINS: dict[str, str] = {
    "config": "a published configuration or official script",
    "paper": "a paper",
    "param_check": "confirmed by the exact number of parameters",
    "config_default": "defaults of the class in transformers that documents this checkpoint",
    "low": "secondary, uncertain",
    "semantics_only": "what it computes is known, sizes are not",
}
"""Where a row's sizes are from."""

_ACTS = {"gpt_oss": "gpt_oss_swiglu(alpha=1.702)"}
"""Activations whose limit belongs to them."""

_LOGITS = ("linear", "over_deviation", "attention", "mlp", "product_keys")


class ZooError(MoeAccelError, ValueError):
    """A row of the zoo that is not as :mod:`moeaccel.zoo.schema` says."""


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """How many tokens an expert takes of a call of T; later ones are dropped.

    Parameters
    ----------
    tokens : :class:`int`, optional
        That many; else ``floor(top_k * factor * T / experts)``.
    factor : :class:`float`, optional
    least : :class:`int`
        At least that many.
    even : :class:`bool`
        Rounded up to an even number.
    order : :class:`str`
        Who is first: ``rank`` (all first choices by token, then all second ones), or ``priority``
        (tokens with the larger first weight before others).
    """

    tokens: int | None = None
    factor: float | None = None
    least: int = 1
    even: bool = False
    order: str = "rank"

    def __call__(self, tokens: int, experts: int, top_k: int) -> int:
        """Return it for a call."""
        if self.tokens is not None:
            return self.tokens
        assert self.factor is not None
        room = int(top_k * self.factor * tokens / experts)
        return max(room + (room % 2 if self.even else 0), self.least)


@dataclass(frozen=True, kw_only=True)
class RouterKind:
    """How a model's router chooses experts and weighs them.

    Parameters
    ----------
    flavour : :class:`str`
        One of :data:`FLAVOURS`.
    score, renormalize, group_score, weight_on : :class:`str`
        As in :class:`moeaccel.router.settings.RouterSettings`, as are ``epsilon``, ``groups``,
        ``keep_groups`` and ``mixer``.
    scale : :class:`float`, optional
        Factor of the weights; null: not published.
    bias : :class:`bool`
        Logits have a bias.
    selection_bias : :class:`str`, optional
        What a bias for the choice alone is added to: ``scores`` or ``logits``.
    identity_experts : :class:`int`
        Experts behind the others that return x.
    capacity : :class:`Capacity`, optional
    logits : :class:`str`
        ``linear``: a matrix times x. Else arithmetic of its own: ``over_deviation`` (divided by
        their standard deviation), ``attention``, ``mlp``, ``product_keys``.
    hashed_layers : :class:`int`
        First layers that look experts up by the token's id.
    expert_scale : :class:`bool`
        Each expert has a factor, applied to its weight at the end.
    sinks : :class:`int`
        Always-on experts that share in the sum.
    own_input : :class:`bool`
        It reads something else than the experts do.
    dtype : :class:`str`, optional
        What the original computes in.
    """

    flavour: str
    score: str
    renormalize: str = "none"
    epsilon: float | None = None
    scale: float | None = 1.0
    groups: int = 1
    keep_groups: int = 1
    group_score: str = "max"
    bias: bool = False
    selection_bias: str | None = None
    weight_on: str = "output"
    identity_experts: int = 0
    capacity: Capacity | None = None
    logits: str = "linear"
    hashed_layers: int = 0
    expert_scale: bool = False
    sinks: int = 0
    own_input: bool = False
    mixer: float | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        _among("router.flavour", self.flavour, FLAVOURS)
        for name, kind in (("score", choices.Score), ("renormalize", choices.Renormalize),
                           ("group_score", choices.GroupScore), ("weight_on", choices.WeightOn)):
            _among(f"router.{name}", getattr(self, name), [choice.key for choice in kind])
        _among("router.selection_bias", self.selection_bias, (None, "scores", "logits"))
        _among("router.logits", self.logits, _LOGITS)
        if (self.renormalize in ("sum_eps", "clamp")) != (self.epsilon is not None):
            raise ZooError(f"router.epsilon must be there for sum_eps and clamp only, not "
                           f"{self.epsilon!r} for {self.renormalize}")
        if not 1 <= self.keep_groups <= self.groups:
            raise ZooError(f"router.keep_groups must be from 1 to {self.groups} groups, not "
                           f"{self.keep_groups!r}")

    @property
    def text(self) -> str:
        """Flavour with its numbers, short: ``R5 4/8 x2.5``."""
        parts = [self.flavour]
        if self.groups > 1:
            parts.append(f"{self.keep_groups}/{self.groups}")
        if self.scale not in (None, 1.0):
            parts.append(f"x{self.scale:g}")
        return " ".join(parts)


@dataclass(frozen=True, kw_only=True)
class ExpertKind:
    """What a routed expert computes.

    Parameters
    ----------
    d_expert : :class:`int`, optional
        Width of h.
    d_in : :class:`int`, optional
        Width of its input where that is not d_model: a projection makes it.
    widths : tuple of (int, int)
        (d_in, d_expert) of each kind of layer, where they differ; the others are null then.
    form : :class:`str`
        One of :data:`FORMS`.
    activation : :class:`str`
        The device's name (:mod:`moeaccel.activations`); or ``silu_soft_capped`` (tanh soft caps of
        4 and 25 on gate and up), ``situ`` (gate soft-capped in front of its sigmoid, up
        soft-capped), ``silu_clamped_behind`` (silu of the gate is limited, and so is up).
    limit : :class:`float`, optional
        Gate is at most that before the activation, up at most that far from 0.
    bias : :class:`str`, optional
        ``both``; ``gate_up``: only in front of the activation.
    norm : :class:`bool`
        Its output is normalised (RMS) before it is weighted.
    """

    d_expert: int | None
    d_in: int | None = None
    widths: tuple[tuple[int, int], ...] = ()
    form: str = "glu"
    activation: str = "silu"
    limit: float | None = None
    bias: str | None = None
    norm: bool = False

    def __post_init__(self) -> None:
        _among("expert.form", self.form, FORMS)
        _among("expert.bias", self.bias, (None, "both", "gate_up"))
        object.__setattr__(self, "widths", tuple((i, o) for i, o in self.widths))

    @property
    def gated(self) -> bool:
        """Whether there are up rows beside the gate's."""
        return self.form in ("glu", "openmoe_glu")

    @property
    def second_up(self) -> bool:
        """Whether there are second up rows: a, where act(b) is of the gate."""
        return self.form == "openmoe_glu"

    @property
    def limit_behind(self) -> float | None:
        """Limit of the activation instead of the gate, and of up: the layer's own, 7 for all."""
        return 7.0 if self.activation == "silu_clamped_behind" else None

    @property
    def matrices(self) -> int:
        """Matrices of d_in by d_expert in an expert."""
        return FORMS[self.form][0]

    @property
    def text(self) -> str:
        """Activation, form, and what else it has, short: ``gpt_oss <=7, bias``."""
        of_form = "" if self.form == "glu" else f" {self.form}"
        limit = "" if self.limit is None else f" <={self.limit:g}"
        return (f"{self.activation}{of_form}{limit}" + (", bias" if self.bias else "")
                + (", norm" if self.norm else ""))


@dataclass(frozen=True, kw_only=True)
class Shared:
    """Experts that every token goes to.

    Parameters
    ----------
    count : :class:`int`
    width : :class:`int`, optional
        Of h, of all of them together.
    gate : :class:`str`, optional
        ``sigmoid``: their output is multiplied by the sigmoid of one more row times x.
    combined : :class:`str`
        ``sum``; ``average`` of routed and shared.
    place : :class:`str`
        ``parallel``; ``beside``: a norm of its own before it; ``behind``: it runs after the layer.
    """

    count: int
    width: int | None = None
    gate: str | None = None
    combined: str = "sum"
    place: str = "parallel"

    def __post_init__(self) -> None:
        _among("shared.gate", self.gate, (None, "sigmoid"))
        _among("shared.combined", self.combined, ("sum", "average"))
        _among("shared.place", self.place, ("parallel", "beside", "behind"))


@dataclass(frozen=True, kw_only=True)
class Model:
    """One published model.

    Parameters
    ----------
    name, hf_id : :class:`str`
        Common name; Hugging Face repository.
    aliases : tuple of :class:`str`
        Keys of other names that it goes by.
    layers, moe_layers : :class:`int`, optional
        All, and those with routed experts.
    d_model : :class:`int`, optional
        Width of the residual stream.
    n_experts, top_k : :class:`int`, optional
        Routed experts of a layer, identities not counted; experts of a token.
    router : :class:`RouterKind`
    expert : :class:`ExpertKind`
    survey : :class:`bool`
        Whether it is one of the 25 rows of the survey that the zoo began with.
    shared : :class:`Shared`, optional
        null: not published.
    dense : :class:`int`, optional
        Width of a dense MLP that runs beside the experts.
    native_dtype : :class:`str`
        Of the published experts.
    tf_class : :class:`str`, optional
        Of its experts in transformers.
    tf_pluggable : :class:`bool`, optional
        Whether transformers honours ``experts_implementation`` for it.
    confidence : :class:`str`
        One of :data:`ORIGINS`.
    """

    name: str
    hf_id: str | None
    layers: int | None
    moe_layers: int | None
    d_model: int | None
    n_experts: int | None
    top_k: int | None
    router: RouterKind
    expert: ExpertKind
    native_dtype: str
    confidence: str
    aliases: tuple[str, ...] = ()
    survey: bool = False
    shared: Shared | None = field(default=None)
    dense: int | None = None
    tf_class: str | None = None
    tf_pluggable: bool | None = None

    def __post_init__(self) -> None:
        _among("confidence", self.confidence, ORIGINS)
        object.__setattr__(self, "aliases", tuple(self.aliases))
        for alias in self.aliases:
            if key_of(alias) != alias or alias == self.key:
                raise ZooError(f"aliases must be keys, and others than {self.key!r}, not {alias!r}")
        for name in ("layers", "moe_layers", "d_model", "n_experts", "top_k", "dense"):
            value = getattr(self, name)
            if not (value is None or (isinstance(value, int) and value > 0)):
                raise ZooError(f"{name} must be a whole number from 1, or null, not {value!r}")
        if self.n_experts and self.n_experts % self.router.groups:
            raise ZooError(f"router.groups must divide {self.n_experts} experts, not "
                           f"{self.router.groups!r}")

    @property
    def key(self) -> str:
        """Name for the command line: lower case, words joined by dashes."""
        return key_of(self.name)

    @property
    def n_layers(self) -> Any:
        """All layers."""
        return self.layers

    @property
    def n_moe_layers(self) -> Any:
        """Layers with routed experts."""
        return self.moe_layers

    @property
    def n_shared(self) -> int | None:
        """Shared experts."""
        return None if self.shared is None else self.shared.count

    @property
    def d_expert(self) -> Any:
        """Width of h of a routed expert."""
        return self.expert.d_expert

    @property
    def router_flavour(self) -> str:
        """One of :data:`FLAVOURS`."""
        return self.router.flavour

    @property
    def act(self) -> str:
        """Activation with its constants, as one name: ``silu``, ``silu_clamped(10)``, ..."""
        activation, limit = self.expert.activation, self.expert.limit
        if activation in _ACTS:
            return _ACTS[activation]
        return activation if limit is None else f"{activation}_clamped({limit:g})"

    @property
    def ffn(self) -> str:
        """One of :data:`FORMS`."""
        return self.expert.form

    @property
    def expert_bias(self) -> bool:
        """Whether experts have biases."""
        return self.expert.bias is not None

    @property
    def expert_widths(self) -> tuple[tuple[int, int], ...]:
        """(d_in, d_expert) of every kind of routed expert; empty where they are not published."""
        if self.expert.widths:
            return self.expert.widths
        d_in, d_expert = self.expert.d_in or self.d_model, self.expert.d_expert
        return ((d_in, d_expert),) if d_in and d_expert else ()

    @property
    def expert_weights(self) -> int:
        """Weights of one routed expert, all its matrices."""
        return max(self.expert.matrices * d_in * d_expert for d_in, d_expert in self.expert_widths)

    def as_dict(self) -> dict[str, Any]:
        """Return everything for JSON: the fields, and beside them the names of flat ones."""
        flat = ("key", "n_layers", "n_moe_layers", "n_shared", "d_expert", "router_flavour", "act",
                "ffn", "expert_bias")
        return {name: getattr(self, name) for name in flat} | dataclasses.asdict(self)


def key_of(name: str) -> str:
    """Return a name as the command line has it."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


def _among(name: str, value: Any, allowed: Any) -> None:
    if value not in allowed:
        raise ZooError(f"{name} must be one of {', '.join(map(str, allowed))}, not {value!r}")


def parse(row: dict[str, Any]) -> Model:
    """Return the model of a row of ``models.json``.

    Raises
    ------
    ZooError
        Naming the model and the field.
    """
    name = row.get("name")
    try:
        values = dict(row)
        router = dict(values["router"])
        if router.get("capacity") is not None:
            router["capacity"] = Capacity(**router["capacity"])
        values["router"] = RouterKind(**router)
        values["expert"] = ExpertKind(**values["expert"])
        if values.get("shared") is not None:
            values["shared"] = Shared(**values["shared"])
        return Model(**values)
    except (TypeError, KeyError, ValueError) as error:
        raise ZooError(f"row of model {name!r} must be as moeaccel.zoo.schema says: {error}"
                       ) from error
