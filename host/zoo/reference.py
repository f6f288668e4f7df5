"""Routers and experts of published models in float, as their authors define them.

One function a flavour, by its own formula: nothing here knows how the device computes it, so that
comparing the two says something. Ties go to the lowest index, as on the device; ids of dropped
pairs are -1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from moeaccel.host.errors import UnsupportedExperts
from moeaccel.zoo.schema import ExpertKind, RouterKind

__all__ = ["ExpertWeights", "RouterWeights", "Routes", "expert", "layer", "logits", "route"]


@dataclass(frozen=True)
class RouterWeights:
    """A router's tensors; rows of ``weight`` are those of experts, identities, sinks.

    Parameters
    ----------
    weight : float tensor, (N, H)
        (3, N, H) for ``attention``: query, key, value.
    bias, selection_bias, expert_scale : float tensor, (N,), optional
    """

    weight: Tensor
    bias: Tensor | None = None
    selection_bias: Tensor | None = None
    expert_scale: Tensor | None = None


@dataclass(frozen=True)
class Routes:
    """Where tokens go.

    Parameters
    ----------
    ids : int64 tensor, (T, K)
        -1: dropped.
    weights : float tensor, (T, K)
    compared : float tensor, (T, N)
        What the choice compared, groups that are out at -inf.
    """

    ids: Tensor
    weights: Tensor
    compared: Tensor


def logits(kind: RouterKind, x: Tensor, router: RouterWeights) -> Tensor:
    """Return the logits, (T, N), in the type of x.

    Raises
    ------
    UnsupportedExperts
        For a network whose arithmetic is not described.
    """
    if kind.logits == "attention":
        query, key, value = (x @ w.T for w in router.weight)
        attention = torch.softmax(query[:, :, None] * key[:, None, :], dim=-1)
        return (attention @ value[:, :, None]).squeeze(-1)
    if kind.logits not in ("linear", "over_deviation"):
        raise UnsupportedExperts(
            f"logits must come from a matrix or from attention for a float reference, not from "
            f"{kind.logits} (router {kind.flavour}); give logits")
    found = x @ router.weight.T
    if router.bias is not None:
        found = found + router.bias
    return found / found.std(dim=-1, keepdim=True) if kind.logits == "over_deviation" else found


def route(kind: RouterKind, top_k: int, s: Tensor, router: RouterWeights) -> Routes:
    """Return the routes of tokens with logits s, (T, N).

    With sinks, K is top_k and their number: they are the last columns.
    """
    if kind.flavour not in _ROUTERS:
        raise UnsupportedExperts(f"router must be one of {', '.join(_ROUTERS)} for a float "
                                 f"reference, not {kind.flavour}")
    ids, weights, compared = _ROUTERS[kind.flavour](kind, top_k, s, router)
    if kind.expert_scale:
        assert router.expert_scale is not None
        weights = weights * router.expert_scale[ids]
    return Routes(ids, weights, compared)


_Found = tuple[Tensor, Tensor, Tensor]
_Router = Callable[[RouterKind, int, Tensor, RouterWeights], _Found]


def _top(values: Tensor, k: int) -> Tensor:
    """Return the ids of the k largest, (T, k), the lowest id first where they are equal."""
    return torch.sort(values, dim=-1, descending=True, stable=True).indices[:, :k]


def _scale(kind: RouterKind) -> float:
    return 1.0 if kind.scale is None else kind.scale


def _kept_groups(kind: RouterKind, values: Tensor, score: Tensor) -> Tensor:
    """Return values with -inf where the group, of ``score`` (T, groups), is not among the best."""
    kept = torch.zeros_like(score).scatter_(1, _top(score, kind.keep_groups), 1.0)
    size = values.shape[1] // kind.groups
    return values.masked_fill(kept.repeat_interleave(size, dim=1) == 0, float("-inf"))


def _bias(router: RouterWeights) -> Tensor:
    """Return the selection bias of a router that has one."""
    assert router.selection_bias is not None
    return router.selection_bias


def _epsilon(kind: RouterKind) -> float:
    """Return the epsilon of a kind that has one."""
    assert kind.epsilon is not None
    return kind.epsilon


def _grouped(kind: RouterKind, values: Tensor) -> Tensor:
    return values.reshape(len(values), kind.groups, -1)


def _r1(kind: RouterKind, k: int, s: Tensor, router: RouterWeights) -> _Found:
    p = torch.softmax(s, dim=-1)
    ids = _top(p, k)
    w = p.gather(1, ids)
    return ids, w / w.sum(-1, keepdim=True) * _scale(kind), p


def _r1b(kind: RouterKind, k: int, s: Tensor, router: RouterWeights) -> _Found:
    p = torch.softmax(s, dim=-1)
    compared = p + _bias(router)
    ids = _top(compared, k)
    w = p.gather(1, ids)
    return ids, w / w.sum(-1, keepdim=True).clamp(min=_epsilon(kind)), compared


def _r1g(kind: RouterKind, k: int, s: Tensor, router: RouterWeights) -> _Found:
    p = torch.softmax(s, dim=-1)
    compared = _kept_groups(kind, p, _grouped(kind, p).topk(2, dim=-1).values.sum(-1))
    ids = _top(compared, k)
    w = p.gather(1, ids)
    return ids, w / (w.sum(-1, keepdim=True) + _epsilon(kind)) * _scale(kind), compared


def _r2(kind: RouterKind, k: int, s: Tensor, router: RouterWeights) -> _Found:
    p = torch.softmax(s, dim=-1)
    ids = _top(p, k)
    return ids, p.gather(1, ids), p


def _r3(kind: RouterKind, k: int, s: Tensor, router: RouterWeights) -> _Found:
    ids = _top(s, k)
    return ids, torch.softmax(s.gather(1, ids), dim=-1) * _scale(kind), s


def _r4(kind: RouterKind, k: int, s: Tensor, router: RouterWeights) -> _Found:
    p = torch.softmax(s, dim=-1)
    compared = _kept_groups(kind, p, _grouped(kind, p).amax(-1))
    ids = _top(compared, k)
    return ids, p.gather(1, ids) * _scale(kind), compared


def _r5(kind: RouterKind, k: int, s: Tensor, router: RouterWeights) -> _Found:
    q = torch.sigmoid(s)
    compared = q + _bias(router)
    if kind.groups > 1:
        score = _grouped(kind, compared).topk(2, dim=-1).values.sum(-1)
        compared = _kept_groups(kind, compared, score)
    ids = _top(compared, k)
    w = q.gather(1, ids)
    return ids, _scale(kind) * w / (w.sum(-1, keepdim=True) + (kind.epsilon or 0.0)), compared


def _r6(kind: RouterKind, k: int, s: Tensor, router: RouterWeights) -> _Found:
    q = torch.sigmoid(s)
    ids = _top(q, k)
    w = q.gather(1, ids)
    return ids, w / w.sum(-1, keepdim=True), q


def _r6l4(kind: RouterKind, k: int, s: Tensor, router: RouterWeights) -> _Found:
    ids = _top(s, k)
    return ids, torch.sigmoid(s.gather(1, ids)), s


def _r7(kind: RouterKind, k: int, s: Tensor, router: RouterWeights) -> _Found:
    q = functional.softplus(s).sqrt()
    compared = q + _bias(router)
    ids = _top(compared, k)
    w = q.gather(1, ids)
    return ids, _scale(kind) * w / (w.sum(-1, keepdim=True) + _epsilon(kind)), compared


def _r8(kind: RouterKind, k: int, s: Tensor, router: RouterWeights) -> _Found:
    p = torch.softmax(s, dim=-1)
    compared = p + _bias(router)
    ids = _top(compared, k)
    return ids, _scale(kind) * p.gather(1, ids), compared


def _r9(kind: RouterKind, k: int, s: Tensor, router: RouterWeights) -> _Found:
    """GRIN, 2409.12136: inference of sparsemixer with a jitter of 0.01."""
    ids, weights, left = [], [], s
    for _ in range(k):
        best = left.max(dim=-1, keepdim=True).values
        far = (best - s) / torch.maximum(s.abs(), best) > 0.02
        e = _top(left, 1)
        ids.append(e)
        near = left.masked_fill(far, float("-inf"))
        weights.append(torch.softmax(near, dim=-1).gather(1, e))
        left = left.scatter(1, e, float("-inf"))
    return torch.cat(ids, 1), torch.cat(weights, 1), s


def _with_capacity(kind: RouterKind, ids: Tensor, w: Tensor, experts: int) -> Tensor:
    """Return ids with -1 for pairs beyond their expert's capacity."""
    if kind.capacity is None:
        return ids
    tokens, k = ids.shape
    room = kind.capacity(tokens, experts, k)
    ids, taken = ids.clone(), [0] * experts
    for column in range(k):  # all first choices before any second one
        order = (torch.arange(tokens) if kind.capacity.order == "rank"
                 else torch.sort(w[:, 0], descending=True, stable=True).indices)
        for token in order.tolist():
            e = int(ids[token, column])
            taken[e] += 1
            if taken[e] > room:
                ids[token, column] = -1
    return ids


def _r11s(kind: RouterKind, k: int, s: Tensor, router: RouterWeights) -> _Found:
    p = torch.softmax(s, dim=-1)
    ids = _top(p, k)
    w = p.gather(1, ids)
    return _with_capacity(kind, ids, w, s.shape[1]), w, p


def _r11n(kind: RouterKind, k: int, s: Tensor, router: RouterWeights) -> _Found:
    p = torch.softmax(s, dim=-1)
    ids = _top(p, k)
    w = p.gather(1, ids)
    return ids, w / w.sum(-1, keepdim=True).clamp(min=_epsilon(kind)) * _scale(kind), p


def _r12i(kind: RouterKind, k: int, s: Tensor, router: RouterWeights) -> _Found:
    experts = s.shape[1] - kind.sinks
    assert router.selection_bias is not None
    compared = torch.sigmoid(s[:, :experts]) + router.selection_bias[:experts]
    chosen = _top(compared, k)
    sinks = torch.arange(experts, s.shape[1]).expand(len(s), -1)
    ids = torch.cat([chosen, sinks], dim=1)
    w = torch.softmax(functional.logsigmoid(s.gather(1, ids)), dim=-1) * _scale(kind)
    return ids, w, compared


def _r12k(kind: RouterKind, k: int, s: Tensor, router: RouterWeights) -> _Found:
    compared = s + _bias(router)
    ids = _top(compared, k)
    return ids, torch.sigmoid(s.gather(1, ids)), compared


_ROUTERS: dict[str, _Router] = {
    "R1": _r1, "R1b": _r1b, "R1g": _r1g, "R2": _r2, "R3": _r3, "R4": _r4, "R5": _r5, "R5s": _r5,
    "R6": _r6, "R6L4": _r6l4, "R7": _r7, "R8": _r8, "R9": _r9, "R10": _r1, "R11s": _r11s,
    "R11n": _r11n, "R11o": _r11s, "R12i": _r12i, "R12k": _r12k, "R12z": _r2}


# -- experts ---------------------------------------------------------------------------------------
@dataclass(frozen=True)
class ExpertWeights:
    """One expert's tensors.

    Parameters
    ----------
    gate_up : float tensor, (2 I, H) or (I, H)
        Gate rows, then up rows; (3 I, H) of an OpenMoE expert: b, a, up.
    down : float tensor, (H, I)
    gate_up_bias, down_bias : float tensor, optional
    """

    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None


def _silu(g: Tensor, u: Tensor) -> Tensor:
    return g * torch.sigmoid(g) * u


def _gpt_oss(g: Tensor, u: Tensor) -> Tensor:
    return (u + 1) * g * torch.sigmoid(1.702 * g)


def _soft_capped(g: Tensor, u: Tensor) -> Tensor:
    return _silu(4 * torch.tanh(g / 4), 25 * torch.tanh(u / 25))


_GATED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": _silu,
    "gelu": lambda g, u: functional.gelu(g) * u,
    "gelu_tanh": lambda g, u: functional.gelu(g, approximate="tanh") * u,
    "gpt_oss": _gpt_oss,
    "silu_soft_capped": _soft_capped,
}
_PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "relu2": lambda g: torch.relu(g) ** 2,
    "gelu": functional.gelu,
}


def expert(kind: ExpertKind, x: Tensor, weights: ExpertWeights) -> Tensor:
    """Return an expert's output, (T, H), in the type of x.

    Raises
    ------
    UnsupportedExperts
        For an activation whose constants are not published, or depend on the layer.
    """
    rows = x @ weights.gate_up.T
    if weights.gate_up_bias is not None:
        rows = rows + weights.gate_up_bias
    if kind.second_up:
        gate, up, second = rows.chunk(3, dim=-1)
        h = _silu(gate, up) * second
    elif kind.form == "mlp" and kind.activation in _PLAIN:
        h = _PLAIN[kind.activation](rows)
    elif kind.form == "glu" and kind.activation in _GATED:
        gate, up = rows.chunk(2, dim=-1)
        if kind.limit is not None:
            gate, up = gate.clamp(max=kind.limit), up.clamp(-kind.limit, kind.limit)
        h = _GATED[kind.activation](gate, up)
    elif (limit := kind.limit_behind) is not None:
        gate, up = rows.chunk(2, dim=-1)
        h = functional.silu(gate).clamp(max=limit) * up.clamp(-limit, limit)
    else:
        raise UnsupportedExperts(
            f"expert must be one with a float reference, not {kind.text}: its constants are not "
            "published, or depend on the layer")
    y = h @ weights.down.T
    if weights.down_bias is not None:
        y = y + weights.down_bias
    return y * torch.rsqrt((y * y).mean(-1, keepdim=True) + 1e-6) if kind.norm else y


def layer(kind: ExpertKind, x: Tensor, routes: Routes, experts: list[ExpertWeights], *,
          weight_on: str = "output") -> Tensor:
    """Return the sum over each token's experts, (T, H), in the type of x.

    Ids from ``len(experts)`` on are identities, those below 0 nothing.
    """
    y = torch.zeros_like(x)
    weights = routes.weights.to(x.dtype)
    for e in routes.ids.unique().tolist():
        if e < 0:
            continue
        token, column = (routes.ids == e).nonzero(as_tuple=True)
        w = weights[token, column][:, None]
        given = x[token] * w if weight_on == "input" else x[token]
        out = given if e >= len(experts) else expert(kind, given, experts[e])
        y.index_add_(0, token, out if weight_on == "input" else out * w)
    return y
