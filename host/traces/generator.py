"""Routes with the locality of a published model, without the model.

A token's router sees a hidden state that shares something with its request, something with the
passage that the token is in, something with the phrase, something with the layer below, and has
something of its own. So the state of token t is a sum of independent unit Gaussians in a space of
few dimensions::

    w[t, l] = sqrt(request) R[l] + sqrt(passage) P[t, l] + sqrt(phrase) F[t, l] + sqrt(rest) N[t, l]
    P[t] = P[t-1] with probability passage_memory, else new                            (F likewise)
    h[t, 0] = w[t, 0];   h[t, l] = depth_memory h[t, l-1] + sqrt(1 - depth_memory^2) w[t, l]
    s[t, l] = sqrt(k[l]) h[t, l] + sqrt(1 - k[l]) M[t]

with R drawn once for each request, N and M for each token, and k going from first_layer up to 1 and
down to last_layer. The router of a layer ranks experts by ``<u[l, e], s[t, l]> + popularity p[l, e]
+ noise n[t, l, e]`` with unit directions u, standard normal n, and p exponential, so that a few
experts of a layer stand out.

From one Gaussian field come reuse over tokens, skew within a request next to nearly flat popularity
over all, and prediction from layer to layer; independent draws from a Zipf law give none of them.

A passage or phrase ends in all layers at once. That keeps the overlap of neighbouring tokens as
uneven as it is: many tokens have nothing of the token before, some nearly everything.

u and p are the *model* and come from `model_seed`; R, P, F, N, M and n are the *text* and come from
`seed`: two traces with different seeds are two texts read by the same model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np

from moeaccel.host.traces.errors import InvalidTrace

__all__ = ["Locality", "generate_requests"]

_DEEPEST = 0.3  # where in the depth of DeepSeek-V2-Lite neighbouring tokens share most


@dataclass(frozen=True, kw_only=True)
class Locality:
    """How alike the routes of neighbouring tokens and layers are.

    Parameters
    ----------
    request, passage, phrase : :class:`float`
        Shares of a token's state that all tokens of the request, of the passage and of the phrase
        have; their sum is at most 1, the rest is the token's own.
    passage_memory, phrase_memory : :class:`float`
        Chance that the next token is in the same passage, in the same phrase, in [0, 1).
    depth_memory : :class:`float`
        What the next layer keeps of the state, in [0, 1).
    first_layer, last_layer : :class:`float`
        What the first and the last layer see of the state, in [0, 1]; the layer at three tenths of
        the depth sees all.
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
    passage: float
    phrase: float
    passage_memory: float = 0.97
    phrase_memory: float = 0.5
    depth_memory: float = 0.985
    first_layer: float = 1.0
    last_layer: float = 1.0
    popularity: float = 0.11
    noise: float = 0.12
    dimensions: int = 16
    gain: float = 1.72

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not np.isfinite(value) or value < 0:
                raise InvalidTrace(f"locality {field.name} must be finite and at least 0, "
                                   f"not {value!r}")
        if self.request + self.passage + self.phrase > 1 + 1e-9:
            raise InvalidTrace("locality request + passage + phrase must be at most 1, not "
                               f"{self.request + self.passage + self.phrase:.3f}")
        for name in ("passage_memory", "phrase_memory", "depth_memory"):
            if getattr(self, name) >= 1:
                raise InvalidTrace(f"locality {name} must be below 1, not {getattr(self, name)!r}")
        for name in ("first_layer", "last_layer"):
            if getattr(self, name) > 1:
                raise InvalidTrace(f"locality {name} must be at most 1, not "
                                   f"{getattr(self, name)!r}")
        if self.dimensions < 1:
            raise InvalidTrace(f"locality dimensions must be at least 1, not {self.dimensions!r}")


def generate_requests(locality: Locality, *, n_layers: int, n_experts: int, top_k: int,
                      lengths: list[int], seed: int, model_seed: int = 0,
                      renormalize: bool = True,
                      progress: Callable[[int], None] | None = None
                      ) -> list[tuple[np.ndarray, np.ndarray]]:
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
    progress : callable, optional
        Gets the number of each request, before it is made.

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
    preferences = model.standard_exponential((n_layers, n_experts), np.float32) - 1
    preferences *= locality.popularity
    found = []
    for index, length in enumerate(lengths):
        if progress is not None:
            progress(index)
        found.append(_request(locality, directions, preferences, top_k, length, renormalize,
                              np.random.default_rng([seed, index])))
    return found


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
    """Return s, float32 (tokens, layers, dimensions)."""
    shape = (tokens, layers, p.dimensions)
    state = text.standard_normal(shape, np.float32)
    state *= np.sqrt(max(0.0, 1 - p.request - p.passage - p.phrase))
    state += np.sqrt(p.request) * text.standard_normal(shape[1:], np.float32)
    for share, memory in ((p.passage, p.passage_memory), (p.phrase, p.phrase_memory)):
        new = text.random(tokens) >= memory
        new[0] = True
        part = text.standard_normal((np.count_nonzero(new), *shape[1:]), np.float32)
        part *= np.sqrt(share)
        state += part[np.cumsum(new) - 1]
    fresh = np.sqrt(1 - p.depth_memory**2)
    for l in range(1, layers):
        state[:, l] = p.depth_memory * state[:, l - 1] + fresh * state[:, l]
    depth = np.arange(layers) / max(layers - 1, 1)
    keep = np.interp(depth, [0, _DEEPEST, 1], [p.first_layer, 1, p.last_layer])[:, None]
    if (keep < 1).any():
        state *= np.sqrt(keep)
        state += np.sqrt(1 - keep) * text.standard_normal((tokens, 1, p.dimensions), np.float32)
    return state
