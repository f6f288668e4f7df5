"""Which weights are in device memory, as experts or as whole layers that route by themselves:
uploaded when they are first used, and when they changed."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from moeaccel.host.cluster import Cluster, ClusterExperts, ClusterMoe
from moeaccel.host.errors import WeightsGivenUp
from moeaccel.host.layers import Experts
from moeaccel.host.moe import Moe
from moeaccel.host.plugins.transformers.choice import LayerDims
from moeaccel.host.plugins.transformers.given_up import GivenUp, is_given_up
from moeaccel.host.plugins.transformers.modules import Weights, forget_with
from moeaccel.host.plugins.transformers.session import (
    Session,
    lock,
    open_session,
    session_for,
)
from moeaccel.host.plugins.transformers.watch import PARTS, Watch, identity

__all__ = ["Wanted", "drop", "drop_all", "experts_of", "layer_of", "plain", "stored",
           "uploaded"]

logger = logging.getLogger(__name__)


Uploaded: TypeAlias = Experts | ClusterExperts | Moe | ClusterMoe
"""A layer in the memory of a device, or of several."""


@dataclass(frozen=True)
class Wanted:
    """A layer that is to be in device memory.

    Parameters
    ----------
    weights : :class:`Weights`
        Of its experts.
    load : callable
        Loads it for a session, with whose options it is stored.
    others : tuple of tensor
        What else it is made of.
    kind : hashable, optional
        What it is made into beside experts.
    dims : tuple of :class:`LayerDims`
        What it takes in memory.
    """

    weights: Weights
    load: Callable[[Session], Uploaded]
    others: tuple[torch.Tensor, ...] = ()
    kind: Hashable = None
    dims: tuple[LayerDims, ...] = ()

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All that it is made of."""
        return *self.weights.tensors, *self.others


def plain(weights: Weights) -> Wanted:
    """Return experts for which the host routes."""
    def load(session: Session) -> Experts | ClusterExperts:
        return session.device.load_experts(*weights.stacks, **stored(session, weights))

    return Wanted(weights, load, dims=(weights.dims,))


def stored(session: Session, weights: Weights) -> dict[str, Any]:
    """Return the options by which a session stores experts, and those that say what they are."""
    biases = weights.biases
    more: dict[str, Any] = {}
    if isinstance(session.device, Cluster):  # which loads again what a lost device had
        more["keep_host_weights"] = not weights.loaded_by
    return more | {
            "activation": weights.activation, "gated": weights.gated, "limit": weights.limit,
            "gate_up_bias": biases[0], "down_bias": biases[1],
            "weight_format": session.weight_format, "activation_bits": session.activation_bits,
            "grid_exponent": session.grid_exponent, "quantiser": session.quantiser}


@dataclass
class _Upload:
    """A layer in device memory, and what it was made from."""

    layer: Uploaded
    session: Session
    watches: list[Watch] | None
    """None where the host gave its copy up, and nothing can change."""
    given_up: GivenUp | None = None
    looks: int = 0

    @property
    def experts(self) -> Experts | ClusterExperts:
        """Its experts, those routed to first."""
        return self.layer.experts if isinstance(self.layer, Moe | ClusterMoe) else self.layer

    @property
    def usable(self) -> bool:
        """Whether it is where experts go, and stored as they are to be."""
        return self.session == open_session() and not self.experts.closed

    def restore(self) -> None:
        """Give weights back to the host that it gave up."""
        if self.given_up is not None and isinstance(self.experts, Experts):
            self.given_up.restore(self.experts)

    def holds(self, wanted: Wanted, *, everything: bool) -> bool:
        """Return whether it is what a layer would become."""
        if self.watches is None:
            return True
        parts = range(PARTS) if everything else (self.looks % PARTS,)
        self.looks += 1
        # What the host gave up is not among the watched.
        tensors = wanted.tensors[-len(self.watches):]
        return len(self.watches) == len(tensors) and all(
            (watch.holds if wanted.weights.loaded_by else watch.same)(tensor, parts)
            for watch, tensor in zip(self.watches, tensors, strict=True))


# By the storage of gate_up, which is not kept alive, where in it, and by kind: whoever calls hands
# over tensors, and compiled code has no modules. An entry that is dropped is not closed: a call
# that is under way in another thread keeps it, and device memory comes back after the last.
_Key = tuple[Hashable, tuple[object, ...]]
_uploads: weakref.WeakKeyDictionary[torch.UntypedStorage, dict[_Key, _Upload]] = (
    weakref.WeakKeyDictionary())

# By their module where tensors come and go: they live as long as it does.
_loaded: dict[int, dict[_Key, _Upload]] = {}


def _key(weights: Weights) -> tuple[object, ...]:
    which = identity(weights.gate_up)
    return (*(which[1:] if weights.loaded_by else which), weights.transposed, weights.interleaved,
            tuple(weights.block or ()), weights.activation, weights.gated, weights.limit)


def _place(weights: Weights) -> dict[_Key, _Upload]:
    if weights.loaded_by:
        if weights.loaded_by not in _loaded:
            forget_with(weights.loaded_by, _loaded)
        return _loaded.setdefault(weights.loaded_by, {})
    return _uploads.setdefault(weights.gate_up.untyped_storage(), {})


def uploaded(wanted: Wanted) -> Uploaded | None:
    """Return a layer in the device memory of the session, whatever became of its weights since."""
    with lock.held:
        found = _place(wanted.weights).get((wanted.kind, _key(wanted.weights)))
        return found.layer if found is not None and found.usable else None


def drop(weights: Weights) -> None:
    """Forget what was uploaded of weights; a later call makes it anew. What the host gave up comes
    back before."""
    with lock.held:
        place, key = _place(weights), _key(weights)
        for one in [one for one in place if one[1] == key]:
            place.pop(one).restore()


def drop_all() -> None:
    """Forget every upload."""
    with lock.held:
        for found in [one for place in (*_uploads.values(), *_loaded.values())
                      for one in place.values()]:
            found.restore()
        _uploads.clear()
        _loaded.clear()


def experts_of(weights: Weights, *, everything: bool = False) -> Experts | ClusterExperts:
    """Return weights in device memory, as experts for which the host routes."""
    found = layer_of(plain(weights), everything=everything)
    assert not isinstance(found, Moe | ClusterMoe)
    return found


def layer_of(wanted: Wanted, *, everything: bool = False) -> Uploaded:
    """Return a layer in device memory, uploading it unless it is there as it is now.

    Parameters
    ----------
    wanted : :class:`Wanted`
    everything : :class:`bool`
        Compare all of its weights, not a part, with what was uploaded.
    """
    weights = wanted.weights
    with lock.held:
        place, key = _place(weights), (wanted.kind, _key(weights))
        found = place.get(key)
        if found is not None:
            whole = everything or found.session.verify == "full"
            if found.usable and found.holds(wanted, everything=whole):
                return found.layer
            if found.usable:
                logger.info("weights of a layer changed: they are uploaded again")
            if found.given_up is not None and found.usable:  # what changed was not given up
                found.restore()
            # Its memory is free for the new one, unless a call is under way.
            del place[key], found
        if is_given_up(weights):
            raise WeightsGivenUp(
                "weights of a layer must be on the host to be uploaded, but keep_host_weights=False"
                " gave them up when they went to a device, a format or a session that is gone; "
                "load the model again, or call release() before another device or format is set")
        session = session_for([*wanted.dims] * weights.layers, wanted.dims)
        # Watched first, read second: what changes in between is seen by the next call.
        watches = [Watch(tensor) for tensor in wanted.tensors]
        layer = wanted.load(session)
        # What accelerate loads for each call is whole again at the next: nothing to give up.
        if session.keep_host_weights or weights.loaded_by:
            place[key] = _Upload(layer, session, watches)
        else:
            given_up = GivenUp(weights)  # the key is that of what is left
            left = watches[len(weights.tensors):] or None
            _place(weights)[wanted.kind, _key(weights)] = _Upload(layer, session, left, given_up)
        return layer
