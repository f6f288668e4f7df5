"""Routes with the locality of a published model, without the model.

A token's router sees a hidden state that shares something with its request, something with the
tokens just before it, something with the layer below, and has something of its own. So the state of
token t is a sum of independent unit Gaussians in a space of few dimensions::

    w[t] = sqrt(request) R + sqrt(slow) S[t] + sqrt(fast) F[t] + sqrt(rest) N[t]
    S[t] = slow_memory S[t-1] + sqrt(1 - slow_memory^2) noise             (F likewise)
    h[t, 0] = w[t, 0];   h[t, l] = depth_memory h[t, l-1] + sqrt(1 - depth_memory^2) w[t, l]

with R drawn once for each request and N for each token, and the router of a layer ranks experts by
``<u[l, e], h[t, l]> + popularity p[l, e] + noise n[t, l, e]`` with unit directions u and standard
normal p and n. Top-k of one Gaussian field: reuse over tokens, skew within a request next to nearly
flat popularity over all, and prediction from layer to layer come out together, which independent
draws from a Zipf law do not give.

u and p are the *model* and come from `model_seed`; R, S, F, N and n are the *text* and come from
`seed`: two traces with different seeds are two texts read by the same model.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from moeaccel.host.traces.errors import InvalidTrace

__all__ = ["Locality", "generate_requests"]


@dataclass(frozen=True, kw_only=True)
class Locality:
    """How alike the routes of neighbouring tokens and layers are.

    Parameters
    ----------
    request, slow, fast : :class:`float`
        Shares of a token's state that all tokens of the request have, that changes slowly, and that
        changes fast; their sum is at most 1, the rest is the token's own.
    slow_memory, fast_memory : :class:`float`
        What the next token keeps of the slow and of the fast part, in [0, 1).
    depth_memory : :class:`float`
        What the next layer keeps of the state, in [0, 1).
    popularity : :class:`float`
        Spread of the experts' standing preferences, relative to what the state says.
    noise : :class:`float`
        Spread of what neither state nor preference explain.
    dimensions : :class:`int`
        Of the state: the fewer, the more do experts come in fixed company.
    gain : :class:`float`
        Of the logits in the softmax that gives the routing weights; ranks do not depend on it.
    """

    request: float
    slow: float
    fast: float
    slow_memory: float = 0.97
    fast_memory: float = 0.5
    depth_memory: float = 0.985
    popularity: float = 0.11
    noise: float = 0.12
    dimensions: int = 16
    gain: float = 2.5

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not np.isfinite(value) or value < 0:
                raise InvalidTrace(f"locality {field.name} must be finite and at least 0, "
                                   f"not {value!r}")
        if self.request + self.slow + self.fast > 1 + 1e-9:
            raise InvalidTrace("locality request + slow + fast must be at most 1, not "
                               f"{self.request + self.slow + self.fast:.3f}")
        for name in ("slow_memory", "fast_memory", "depth_memory"):
            if getattr(self, name) >= 1:
                raise InvalidTrace(f"locality {name} must be below 1, not {getattr(self, name)!r}")
        if self.dimensions < 1:
            raise InvalidTrace(f"locality dimensions must be at least 1, not {self.dimensions!r}")


def generate_requests(locality: Locality, *, n_layers: int, n_experts: int, top_k: int,
                      lengths: list[int], seed: int, model_seed: int = 0,
                      renormalize: bool = True) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the routes of each request.

    The same request comes out whatever other requests are asked for beside it.

    Parameters
    ----------
    locality : :class:`Locality`
    n_layers, n_experts, top_k : :class:`int`
    lengths : :class:`list` of :class:`int`
        Tokens of each request.
    seed, model_seed : :class:`int`
        Of the text and of the model.
    renormalize : :class:`bool`
        Whether the weights of a token sum to 1; else they are what the softmax gave.

    Returns
    -------
    :class:`list` of (ids, weights), int32 and float32 (tokens, layers, top_k), best first.

    Raises
    ------
    InvalidTrace
        If a number is out of range.
    """
    if not (n_layers >= 1 and 1 <= top_k <= n_experts):
        raise InvalidTrace("a model must have a layer and between 1 and all experts a token, not "
                           f"{n_layers} layers, {n_experts} experts, top-{top_k}")
    if min(lengths, default=1) < 1:
        raise InvalidTrace(f"every request must have a token, not {min(lengths)}")
    if seed < 0 or model_seed < 0:
        raise InvalidTrace(f"seeds must be at least 0, not {seed} and {model_seed}")
    model = np.random.default_rng([model_seed, n_layers, n_experts])
    directions = model.standard_normal((n_layers, n_experts, locality.dimensions), np.float32)
    directions /= np.linalg.norm(directions, axis=2, keepdims=True)
    preferences = model.standard_normal((n_layers, n_experts), np.float32) * locality.popularity
    return [_request(locality, directions, preferences, top_k, length, renormalize,
                     np.random.default_rng([seed, index]))
            for index, length in enumerate(lengths)]


def _request(p: Locality, directions: np.ndarray, preferences: np.ndarray, top_k: int, tokens: int,
             renormalize: bool, text: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    layers, experts, _ = directions.shape
    states = _states(p, layers, tokens, text)
    ids = np.empty((tokens, layers, top_k), np.int32)
    weights = np.empty((tokens, layers, top_k), np.float32)
    for l in range(layers):
        logits = text.standard_normal((tokens, experts), np.float32)
        logits *= p.noise
        # Not a BLAS product: for matrices this small its threads cost more than they save, and the
        # routes must not depend on how many there are.
        logits += np.einsum("td,ed->te", states[:, l], directions[l])
        logits += preferences[l]
        best = np.argpartition(logits, experts - top_k, axis=1)[:, experts - top_k:]
        values = np.take_along_axis(logits, best, 1)
        order = np.argsort(-values, axis=1, kind="stable")
        ids[:, l] = np.take_along_axis(best, order, 1)
        values = np.take_along_axis(values, order, 1)
        top = values[:, :1]
        weights[:, l] = np.exp(p.gain * (values - top))
        weights[:, l] /= (weights[:, l] if renormalize else np.exp(p.gain * (logits - top))
                          ).sum(1, keepdims=True)
    return ids, weights


def _states(p: Locality, layers: int, tokens: int, text: np.random.Generator) -> np.ndarray:
    """Return h, float32 (tokens, layers, dimensions)."""
    shape = (tokens, layers, p.dimensions)
    state = text.standard_normal(shape, np.float32)
    state *= np.sqrt(max(0.0, 1 - p.request - p.slow - p.fast))
    state += np.sqrt(p.request) * text.standard_normal(shape[1:], np.float32)
    for share, memory in ((p.slow, p.slow_memory), (p.fast, p.fast_memory)):
        part = text.standard_normal(shape, np.float32)
        part[1:] *= np.sqrt(1 - memory**2)
        for t in range(1, tokens):
            part[t] += memory * part[t - 1]
        part *= np.sqrt(share)
        state += part
    new = np.sqrt(1 - p.depth_memory**2)
    for l in range(1, layers):
        state[:, l] = p.depth_memory * state[:, l - 1] + new * state[:, l]
    return state
