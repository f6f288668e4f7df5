"""Which weights are in device memory: uploaded when they are first used, and when they changed."""

from __future__ import annotations

import logging
import weakref
from dataclasses import dataclass

import torch

from moeaccel.host.errors import WeightsGivenUp
from moeaccel.host.layers import Experts
from moeaccel.host.plugins.transformers.given_up import GivenUp, is_given_up
from moeaccel.host.plugins.transformers.modules import Weights, forget_with
from moeaccel.host.plugins.transformers.session import (
    Session,
    lock,
    open_session,
    session_for,
)
from moeaccel.host.plugins.transformers.watch import PARTS, Watch, identity

__all__ = ["drop", "drop_all", "experts_of", "uploaded"]

logger = logging.getLogger(__name__)


@dataclass
class _Upload:
    """Weights in device memory, and what they were made from."""

    experts: Experts
    session: Session
    watches: list[Watch] | None
    """None where the host gave its copy up, and nothing can change."""
    given_up: GivenUp | None = None
    looks: int = 0

    @property
    def usable(self) -> bool:
        """Whether it is where experts go, and stored as they are to be."""
        return self.session == open_session() and not self.experts.closed

    def restore(self) -> None:
        """Give weights back to the host that it gave up."""
        if self.given_up is not None:
            self.given_up.restore(self.experts)

    def holds(self, weights: Weights, *, everything: bool) -> bool:
        """Return whether it is what these weights would become."""
        if self.watches is None:
            return True
        parts = range(PARTS) if everything else (self.looks % PARTS,)
        self.looks += 1
        return len(self.watches) == len(weights.tensors) and all(
            (watch.holds if weights.loaded_by else watch.same)(tensor, parts)
            for watch, tensor in zip(self.watches, weights.tensors, strict=True))


# By the storage of gate_up, which is not kept alive, and where in it: whoever calls hands over
# tensors, and compiled code has no modules. An entry that is dropped is not closed: a call that is
# under way in another thread keeps it, and device memory comes back after the last.
_Key = tuple[object, ...]
_uploads: weakref.WeakKeyDictionary[torch.UntypedStorage, dict[_Key, _Upload]] = (
    weakref.WeakKeyDictionary())

# By their module where tensors come and go: they live as long as it does.
_loaded: dict[int, dict[_Key, _Upload]] = {}


def _key(weights: Weights) -> _Key:
    which = identity(weights.gate_up)
    return (*(which[1:] if weights.loaded_by else which), weights.transposed, weights.interleaved,
            tuple(weights.block or ()), weights.activation, weights.gated, weights.limit)


def _place(weights: Weights) -> dict[_Key, _Upload]:
    if weights.loaded_by:
        if weights.loaded_by not in _loaded:
            forget_with(weights.loaded_by, _loaded)
        return _loaded.setdefault(weights.loaded_by, {})
    return _uploads.setdefault(weights.gate_up.untyped_storage(), {})


def uploaded(weights: Weights) -> Experts | None:
    """Return weights in the device memory of the session, whatever became of them since."""
    with lock.held:
        found = _place(weights).get(_key(weights))
        return found.experts if found is not None and found.usable else None


def drop(weights: Weights) -> None:
    """Forget an upload; a later call makes another. What the host gave up comes back before."""
    with lock.held:
        found = _place(weights).pop(_key(weights), None)
        if found is not None:
            found.restore()


def drop_all() -> None:
    """Forget every upload."""
    with lock.held:
        for found in [one for place in (*_uploads.values(), *_loaded.values())
                      for one in place.values()]:
            found.restore()
        _uploads.clear()
        _loaded.clear()


def experts_of(weights: Weights, *, everything: bool = False) -> Experts:
    """Return weights in device memory, uploading them unless they are there as they are now.

    Parameters
    ----------
    weights : :class:`Weights`
    everything : :class:`bool`
        Compare all of them, not a part, with what was uploaded.
    """
    with lock.held:
        place, key = _place(weights), _key(weights)
        found = place.get(key)
        if found is not None:
            whole = everything or found.session.verify == "full"
            if found.usable and found.holds(weights, everything=whole):
                return found.experts
            if found.usable:
                logger.info("weights of a layer changed: they are uploaded again")
            # Its memory is free for the new one, unless a call is under way.
            del place[key], found
        if is_given_up(weights):
            raise WeightsGivenUp(
                "weights of a layer must be on the host to be uploaded, but keep_host_weights=False"
                " gave them up when they went to a device, a format or a session that is gone; "
                "load the model again, or call release() before another device or format is set")
        session = session_for([weights.dims] * weights.layers, [weights.dims])
        # Watched first, read second: what changes in between is seen by the next call.
        watches = [Watch(tensor) for tensor in weights.tensors]
        biases = weights.biases
        experts = session.device.load_experts(
            *weights.stacks, activation=weights.activation, gated=weights.gated,
            limit=weights.limit, gate_up_bias=biases[0], down_bias=biases[1],
            weight_format=session.weight_format, activation_bits=session.activation_bits,
            grid_exponent=session.grid_exponent, quantiser=session.quantiser)
        # What accelerate loads for each call is whole again at the next: nothing to give up.
        if session.keep_host_weights or weights.loaded_by:
            place[key] = _Upload(experts, session, watches)
        else:
            given_up = GivenUp(weights)  # the key is that of what is left
            _place(weights)[_key(weights)] = _Upload(experts, session, None, given_up)
        return experts
