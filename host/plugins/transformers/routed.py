"""Whole MoE blocks on the device, where it has their router: ``use_device(..., route=True)``.

A block that is an ``nn.Module`` gets a ``forward`` of its own, beside that of its class, when its
model is seen: by :func:`routing` and :func:`check_model`, or by a hook of PyTorch's for all
modules, which is there only while ``route=True`` is. Blocks are what they were when another device
is set. What a block computes, ``blocks`` finds out at its first call.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import types
import weakref
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils.hooks import RemovableHandle

from moeaccel.config import TOP_K_MAX
from moeaccel.errors import MoeAccelError
from moeaccel.host.cluster import Cluster, ClusterMoe
from moeaccel.host.errors import InvalidOption, UnsupportedExperts
from moeaccel.host.moe import Moe
from moeaccel.host.plugins.transformers.blocks import Beside, Block, block_of, experts_in
from moeaccel.host.plugins.transformers.choice import LayerDims
from moeaccel.host.plugins.transformers.modules import Weights, look, number_of
from moeaccel.host.plugins.transformers.operator import (
    NAME,
    refuse_capture,
    refuse_gradient,
    refuse_tangents,
    remember,
)
from moeaccel.host.plugins.transformers.probing import answered, probed
from moeaccel.host.plugins.transformers.session import (
    Session,
    check_limits,
    lock,
    open_session,
    option,
    session_for,
    whenever_set,
)
from moeaccel.host.plugins.transformers.split import run_block
from moeaccel.host.plugins.transformers.uploads import Wanted, layer_of, plain, stored
from moeaccel.host.routing import Router, check_router
from moeaccel.router.settings import RouterSettings

__all__ = ["RoutedBlock", "blocks_in", "needs", "wanted"]

logger = logging.getLogger(__name__)


class RoutedBlock(NamedTuple):
    """A MoE block of a model, and who routes it.

    Parameters
    ----------
    path, kind : :class:`str`
        In the model; its class.
    router : :class:`RouterSettings`, optional
        That of the device, if it routes.
    reason : :class:`str`, optional
        Why it does not.
    """

    path: str
    kind: str
    router: RouterSettings | None
    reason: str | None

    @property
    def on_device(self) -> bool:
        """Whether the device routes."""
        return self.reason is None


class _Decision(NamedTuple):
    """What a block is, or why the device has it not; and for what that holds."""

    session: Session
    found: Block | str
    numbers: tuple[tuple[str, Any], ...]


# -- which blocks ----------------------------------------------------------------------------------
_seen: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
_blocks: weakref.WeakValueDictionary[int, torch.nn.Module] = weakref.WeakValueDictionary()
_owners: weakref.WeakKeyDictionary[torch.nn.Module, int] = weakref.WeakKeyDictionary()
_decided: weakref.WeakKeyDictionary[torch.nn.Module, _Decision] = weakref.WeakKeyDictionary()
_hook: RemovableHandle | None = None
_said: set[str] = set()


def _set(route: bool) -> None:
    """Begin, or end, to look for blocks."""
    global _hook
    if _hook is not None:
        _hook.remove()
        _hook = None
    for block in list(_blocks.values()):
        if _is_ours(block):
            del block.forward
    for known in (_seen, _blocks, _owners, _decided, _said):
        known.clear()
    if route:
        _hook = register_module_forward_pre_hook(_before)


whenever_set.append(_set)


def _before(module: torch.nn.Module, _: Any) -> None:
    """Look at a model before its first call."""
    if not torch.compiler.is_compiling() and module not in _seen:
        _take(module)


def _is_ours(block: torch.nn.Module) -> bool:
    found = vars(block).get("forward")
    return isinstance(found, types.MethodType) and found.__func__ is forward


def _is_its_own(block: torch.nn.Module) -> bool:
    """Return whether a forward is that of the class, also where a pickle has made it an
    attribute."""
    found = vars(block).get("forward")
    return found is None or getattr(found, "__func__", None) is type(block).forward


def _take(model: torch.nn.Module) -> None:
    """Let blocks that the plug-in may compute ask for it."""
    with lock.held:
        for module in model.modules():
            if module in _seen:
                continue
            name = experts_in(module)
            if name is not None and not (_is_ours(module) or _is_its_own(module)):
                continue  # for now: it may be one that is being looked at
            _seen.add(module)
            if name is None:
                continue
            number = number_of(module)
            _blocks[number], _owners[getattr(module, name)] = module, number
            module.forward = types.MethodType(forward, module)


def _is_set(module: torch.nn.Module) -> bool:
    """Return whether the experts of a block are to use the device now."""
    config = getattr(getattr(module, experts_in(module) or ""), "config", None)
    return getattr(config, "_experts_implementation", None) == NAME


def blocks_in(model: torch.nn.Module) -> Iterator[RoutedBlock]:
    """Yield the blocks of a model; a device is opened if need be."""
    if option("route"):
        _take(model)
    for path, module in model.named_modules():
        if experts_in(module) is None:
            continue
        if not option("route"):
            found: Block | str = "use_device() must be called with route=True, but was not"
        elif not (_is_ours(module) and _is_set(module)):
            found = (f"{type(module).__name__} must be one of experts_implementation={NAME!r} with "
                     "a forward of its class, but has another setting, or was given another "
                     "forward (by accelerate's hooks, say)")
        else:
            found = _decision(module)
        kind = type(module).__name__
        yield (RoutedBlock(path, kind, None, found) if isinstance(found, str) else
               RoutedBlock(path, kind, _settings(found), None))


def needs(model: torch.nn.Module) -> list[LayerDims]:
    """Return what a model's layers take, by their shapes alone; no device is asked."""
    found = []
    owners = {getattr(block, name): block for block in model.modules()
              if option("route") and (name := experts_in(block)) is not None}
    for module in model.modules():
        weights = look(module)[0] if hasattr(module, "_is_expert_parallel") else None
        if weights is None:
            continue
        dims = (weights.dims,)
        if module in owners:
            with contextlib.suppress(UnsupportedExperts):
                dims = _dims(owners[module], _as_run(block_of(owners[module])), weights)
        found += dims
    return found


def wanted(experts: torch.nn.Module, weights: Weights) -> Wanted:
    """Return what is to be in device memory for an experts module."""
    block = _blocks.get(_owners.get(experts, 0))
    found = "" if block is None or not _is_set(block) else _decision(block)
    return plain(weights) if block is None or isinstance(found, str) else _wanted(block, found)


def _settings(block: Block) -> RouterSettings:
    """Return the router's settings, with the gate of a shared expert."""
    settings = block.recognised.settings
    if block.shared is not None and block.shared.gate is not None:
        return replace(settings, gates="sigmoid", shared=1)
    return settings


def _decision(module: torch.nn.Module) -> Block | str:
    """Return what a block is, or why the device has it not; known until another device is set, or
    a number of the block or its router is."""
    with lock.held:
        known = _decided.get(module)
        if (known is not None and known.session is open_session()
                and known.numbers == _numbers(module, known.found)):
            return known.found
        session, found = _decide(module)
        _decided[module] = _Decision(session, found, _numbers(module, found))
        if isinstance(found, str) and found not in _said:
            _said.add(found)
            logger.warning("blocks are routed by the host: %s", found)
        return found


def _numbers(module: torch.nn.Module, found: Block | str) -> tuple[tuple[str, Any], ...]:
    parts = [module] if isinstance(found, str) else [module, getattr(module, found.router)]
    return tuple(one for part in parts for one in vars(part).items()
                 if isinstance(one[1], int | float) and one[0] != "training"
                 and not one[0].startswith("_"))


def _decide(module: torch.nn.Module) -> tuple[Session, Block | str]:
    if any(hasattr(part, "_hf_hook") for part in module.modules()):
        return session_for([]), (
            f"{type(module).__name__} must have parameters that stay where they are, but has hooks "
            "of accelerate")
    try:
        block = _as_run(block_of(module))
    except UnsupportedExperts as error:
        return session_for([]), str(error)
    weights, _ = look(getattr(module, block.experts))
    assert weights is not None
    dims = _dims(module, block, weights)
    try:
        session = session_for([*dims] * weights.layers)
    except MoeAccelError as error:  # of the experts, too: their own call says so
        return session_for([]), str(error)
    return session, _refusal(session, block, dims) or block


def _as_run(block: Block) -> Block:
    """Return a block as it is run: where routing is a call of its own, whose answer a policy or
    the devices of a cluster need, shared experts are the torch device's."""
    session = open_session()
    apart = option("hybrid") is not None or (
        session is not None and isinstance(session.device, Cluster))
    return block.apart() if apart else block


def _refusal(session: Session, block: Block, dims: tuple[LayerDims, ...]) -> str | None:
    """Return what of a block a device has not."""
    settings, device = _settings(block), session.device
    taken, experts = settings.top_k + len(dims) - 1, sum(one.experts for one in dims)
    if taken > TOP_K_MAX:
        return (f"top_k and shared experts must be at most {TOP_K_MAX} together, not {taken}")
    try:
        if isinstance(device, Cluster):
            device.check_router(settings)
        elif experts > (most := device.config.max_experts):
            return f"experts and shared experts must be at most {most} together, not {experts}"
        else:
            check_router(device.config, settings)
        for one in dims:
            check_limits(session, one)
    except MoeAccelError as error:
        return f"{error}"
    return None


# -- a block in device memory ----------------------------------------------------------------------
def _tensor(module: torch.nn.Module, name: str) -> torch.Tensor:
    return functools.reduce(getattr, name.split("."), module)  # type: ignore[arg-type, return-value]


def _dims(module: torch.nn.Module, block: Block, weights: Weights) -> tuple[LayerDims, ...]:
    """Return what a block takes, experts and shared ones, the first with the router."""
    settings = _settings(block)
    own = weights.dims._replace(router_modes=settings.modes, router_outputs=settings.outputs)
    if block.shared is None:
        return (own,)
    d_model, d_expert = _tensor(module, block.shared.down).shape
    return own, LayerDims.padded(1, d_model, d_expert, gated=own.gated,
                                 activation=own.activation)


def _wanted(module: torch.nn.Module, block: Block) -> Wanted:
    weights, _ = look(getattr(module, block.experts))
    assert weights is not None
    tensors = {name: _tensor(module, name) for name in block.names}

    def load(session: Session) -> Moe | ClusterMoe:
        def matrix(name: str) -> torch.Tensor:
            return tensors[name].detach().float().cpu()

        def table(name: str | None) -> torch.Tensor | None:
            return None if name is None else matrix(name).reshape(-1)

        shared: Any = None
        if (one := block.shared) is not None:
            gate_up, down = torch.cat([matrix(n) for n in one.gate_up]), matrix(one.down)
            gate = table(one.gate)
            shared = [(gate_up, down * one.factor, *([] if gate is None else [gate]))]
        found = block.recognised
        settings = asdict(found.settings)
        router = Router(matrix(block.weight), bias=table(found.bias),
                        selection_bias=table(found.selection_bias), **settings)
        more = {} if shared is None else {"shared": shared}
        return session.device.load_moe(
            router, *weights.stacks, **more, **stored(session, weights))

    return Wanted(weights, load, tuple(tensors.values()), block, _dims(module, block, weights))


# -- the call --------------------------------------------------------------------------------------
@torch.library.custom_op(
    "moeaccel::block", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,),
    schema="(Tensor x, Tensor[] tensors, int number, int top_k) -> (Tensor, Tensor, Tensor)")
def _compute(x: torch.Tensor, tensors: list[torch.Tensor], number: int, top_k: int
             ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    refuse_capture()
    module = _blocks.get(number)
    found = "it is gone" if module is None else _decision(module)
    if module is None or isinstance(found, str):
        raise UnsupportedExperts(
            "blocks of compiled code must be what they were when it was compiled, but another "
            f"device was set since, or {found}; compile again")
    wanted = _wanted(module, found)
    moe = layer_of(wanted)
    assert isinstance(moe, Moe | ClusterMoe)
    return run_block(moe, wanted.weights, x, beside=found.beside is not None)


@_compute.register_fake
def _(x: torch.Tensor, tensors: list[torch.Tensor], number: int, top_k: int) -> Any:
    chosen = x.shape[0], top_k
    return (x.new_empty(x.shape), x.new_empty(chosen, dtype=torch.int64),
            x.new_empty(chosen, dtype=torch.float32))


_compute.register_autograd(refuse_gradient, setup_context=remember)


class _Plan(NamedTuple):
    """What compiled code knows of a block."""

    number: int
    top_k: int
    experts: str
    router: str
    names: tuple[str, ...]
    returned: tuple[str, ...] | None
    asked: tuple[str, ...]
    beside: Beside | None
    first: str
    """What its class calls hidden states."""

    def hidden_states(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        """Return those of the arguments of a call.

        Raises
        ------
        InvalidOption
            If they are not among them, or are twice.
        """
        if bool(args) == (self.first in kwargs):
            given = ", ".join(kwargs) or "no argument"
            raise InvalidOption(f"{self.first} must be given to a MoE block, once, by place or by "
                                f"name, but there is {'one by place and ' * bool(args)}{given}")
        return args[0] if args else kwargs[self.first]


@torch.compiler.assume_constant_result
def _plan(module: torch.nn.Module) -> _Plan | None:
    # A copy may be older than the option; and models change their setting.
    found = _decision(module) if option("route") and _is_set(module) else ""
    if isinstance(found, str):
        return None
    return _Plan(number_of(module), found.recognised.settings.top_k, found.experts, found.router,
                 found.names, found.returned, found.asked, found.beside,
                 list(inspect.signature(type(module).forward).parameters)[1])


def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Compute a block on the device: in the place of its class's own, which runs in training mode
    and for what the device has not."""
    probing = not torch.compiler.is_compiling() and probed.get() is not None
    plan = None if self.training or probing else _plan(self)
    if plan is None:
        return type(self).forward(self, *args, **kwargs)
    x = plan.hidden_states(args, kwargs)
    refuse_tangents(x)
    rows = x.reshape(-1, x.shape[-1])
    experts, router = getattr(self, plan.experts), getattr(self, plan.router)
    weights, reason = look(experts)
    if weights is None:
        raise UnsupportedExperts(reason)
    tensors = [*weights.tensors, *(_tensor(self, name) for name in plan.names)]
    y, ids, scores = torch.ops.moeaccel.block(rows, tensors, plan.number, plan.top_k)
    scores = scores.to(x.dtype)
    # Who looks at the router (output_router_logits) sees what it computes; who looks at the
    # experts (a recorder of routes) what the device has chosen.
    if router._forward_hooks or router._forward_pre_hooks:
        own = {"x": x, "rows": rows}
        router(*(own[name] if name in own else _tensor(self, name) for name in plan.asked))
    if not torch.compiler.is_compiling() and (
            experts._forward_hooks or experts._forward_pre_hooks):
        token = answered.set(y)
        try:
            y = experts(rows, ids, scores)
        finally:
            answered.reset(token)
    if plan.beside is not None:
        y = y + plan.beside.of(self, rows)
    y = y.reshape(x.shape)
    if plan.returned is None:
        return y
    found = {"y": y, "ids": ids, "weights": scores}
    return tuple(found[name] for name in plan.returned)
