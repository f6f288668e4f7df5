"""What a whole MoE block of transformers computes, found out by values: which router, which shared
experts, what it returns.

A block is what has an experts module as a child. All its tensors but the experts' get drawn
values, its experts are replaced by drawn outputs, and it is run on drawn tokens, on the CPU in
float32: what goes into the experts says what the router is (:mod:`.routers`), what comes out says
what is added to theirs. So nothing is asked of names; where values are others than those of what
the device has, the block is none for the device, and :class:`UnsupportedExperts` says why. Layers
that are alike in all but their weights are looked at once.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils._python_dispatch import _disable_current_modes

from moeaccel.activations import hidden
from moeaccel.host.errors import UnsupportedExperts
from moeaccel.host.plugins.transformers.modules import Weights, look
from moeaccel.host.plugins.transformers.routers import Observed, Recognised, recognise

__all__ = ["Beside", "Block", "SharedExpert", "block_of", "experts_in"]

_PLAIN, _FAR, _ROWS = 256, 128, 2
"""Tokens with logits of a usual size, and with such that are further apart; rows of the batch."""
_FURTHER = 8.0
_RELATIVE = 1e-4
_SHARED_TOKENS = 8


class Beside(NamedTuple):
    """A shared expert as a block's own modules compute it, beside what the device does.

    Parameters
    ----------
    child : :class:`str`
        Of the block: called with x, or with its rows.
    gate : :class:`str`, optional
        Another one, whose sigmoid it is multiplied by.
    factor : :class:`float`
        And that.
    """

    child: str
    gate: str | None
    factor: float

    def of(self, block: torch.nn.Module, rows: torch.Tensor) -> torch.Tensor:
        """Return what it adds to y of rows, (T, H)."""
        y = getattr(block, self.child)(rows)
        if self.gate is not None:
            y = torch.sigmoid(getattr(block, self.gate)(rows)) * y
        return y if self.factor == 1.0 else y * self.factor


@dataclass(frozen=True)
class SharedExpert:
    """A shared expert, by the names of its tensors in the block.

    Parameters
    ----------
    gate_up : tuple of str
        Gate and up, or what has the rows of both.
    down : :class:`str`
    gate : :class:`str`, optional
        Whose sigmoid it is multiplied by.
    factor : :class:`float`
        And that.
    beside : :class:`Beside`, optional
        The same by the block's modules, where they are children of it.
    """

    gate_up: tuple[str, ...]
    down: str
    gate: str | None = None
    factor: float = 1.0
    beside: Beside | None = None


@dataclass(frozen=True)
class Block:
    """A block, by the names of its parts.

    Parameters
    ----------
    experts, router : :class:`str`
        Children.
    recognised : :class:`Recognised`
        The router; the scale is that of all that the block multiplies experts by.
    weight : :class:`str`
        Of the router.
    shared : :class:`SharedExpert`, optional
    returned : tuple of str, optional
        Of a block that returns a tuple, what is in it: ``y``, ``weights`` or ``ids``.
    asked : tuple of str
        What the router is called with: ``x`` as the block has it, ``rows`` (T, H), or the name of a
        tensor.
    beside : :class:`Beside`, optional
        What the block's own modules compute; then there is no ``shared``.
    """

    experts: str
    router: str
    recognised: Recognised
    weight: str
    shared: SharedExpert | None
    returned: tuple[str, ...] | None
    asked: tuple[str, ...]
    beside: Beside | None = None

    def apart(self) -> Block:
        """Return the block with its shared experts left to its own modules.

        Raises
        ------
        UnsupportedExperts
            If these are no children of the block.
        """
        if self.shared is None:
            return self
        if self.shared.beside is None:
            raise UnsupportedExperts(
                "shared experts must be a child of their block, called once, to be left to the "
                f"torch device, but {self.shared.down!r} is none's")
        return replace(self, shared=None, beside=self.shared.beside)

    @property
    def names(self) -> tuple[str, ...]:
        """Those of the tensors that are not the experts'."""
        shared = self.shared
        more = () if shared is None else (*shared.gate_up, shared.down, shared.gate)
        found = self.recognised
        return tuple(name for name in (self.weight, found.bias, found.selection_bias, *more)
                     if name is not None)


def experts_in(block: torch.nn.Module) -> str | None:
    """Return the name of the child that is an experts module, if there is one."""
    found = [name for name, child in block.named_children()
             if hasattr(child, "_is_expert_parallel")]
    return found[0] if len(found) == 1 else None


_known: dict[tuple[Any, ...], Block | str] = {}


def block_of(block: torch.nn.Module) -> Block:
    """Return what a block computes.

    Raises
    ------
    UnsupportedExperts
        If the device has not all of it, or nobody can say.
    """
    experts = experts_in(block)
    assert experts is not None
    facts = _facts(block, getattr(block, experts))
    if facts not in _known:
        try:
            _known[facts] = _look(block, experts)
        except UnsupportedExperts as error:
            _known[facts] = f"{type(block).__name__} must have {error}"
    found = _known[facts]
    if isinstance(found, str):
        raise UnsupportedExperts(found)
    return found


def _facts(block: torch.nn.Module, experts: Any) -> tuple[Any, ...]:
    """Return what decides what a block computes, but for the values of its tensors."""
    return (experts.config.to_json_string(use_diff=False), *((name, type(part), tuple(sorted(
        (key, value) for key, value in vars(part).items()
        if isinstance(value, int | float | str) and key != "training")))
        for name, part in block.named_modules()),
        *((name, tuple(tensor.shape)) for name, tensor in _tensors(block).items()))


def _tensors(block: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(block.named_parameters()), **dict(block.named_buffers())}


# -- a run -----------------------------------------------------------------------------------------
@dataclass
class _Run:
    """What went into a block's experts, what its children were asked and answered, and what came
    out."""

    given: tuple[Any, Any, Any]
    calls: dict[str, tuple[tuple[Any, ...], Any]]
    output: Any


class _Probe:
    """A block with drawn values, ready to run."""

    def __init__(self, block: torch.nn.Module, experts: str) -> None:
        self.block, self.experts = block, experts
        module = getattr(block, experts)
        weights, reason = look(module)
        if weights is None:
            raise UnsupportedExperts(f"experts that the device has: {reason}")
        self.weights: Weights = weights
        self.kind = type(module).__name__
        self.count, self.d_model = weights.down.shape[0], weights.down.shape[
            2 if weights.transposed else 1]
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")

        self.values: dict[str, torch.Tensor] = {}
        for name, tensor in _tensors(block).items():
            if name.startswith(f"{experts}.") or not tensor.is_floating_point():
                continue
            values = draw(*tensor.shape)
            if tensor.ndim == 2 and tensor.shape[0] > 1:
                values *= (1.5 if len(tensor) == self.count else 4.0) / tensor.shape[1] ** 0.5
            else:
                values *= 0.05 if tensor.numel() == self.count else tensor.shape[-1] ** -0.5
            self.values[name] = values
        self.x = draw(_ROWS, (_PLAIN + _FAR) // _ROWS, self.d_model)
        self.rows = self.x.view(-1, self.d_model)
        self.rows[_PLAIN:] *= _FURTHER
        self.answer = draw(len(self.rows), self.d_model)

    def run(self, *, answer: bool) -> _Run:
        """Run the block, its experts giving what was drawn for them, or 0."""
        given: list[tuple[Any, Any, Any]] = []
        calls: dict[str, tuple[tuple[Any, ...], Any]] = {}
        experts = getattr(self.block, self.experts)

        def asked(*args: Any, **kwargs: Any) -> torch.Tensor:
            names = ("hidden_states", "top_k_index", "top_k_weights")
            found = dict(zip(names, args, strict=False)) | kwargs
            x, ids, weights = (found[name].clone() for name in names)
            given.append((x, ids, weights))
            return self.answer if answer else torch.zeros_like(self.answer)

        with contextlib.ExitStack() as stack:
            for name, child in self.block.named_children():
                if name != self.experts:
                    stack.callback(child.register_forward_hook(
                        _noting(name, calls), with_kwargs=True).remove)
            stack.enter_context(_instead(experts, asked))
            stack.enter_context(_instead(
                self.block, functools.partial(type(self.block).forward, self.block)))
            stack.enter_context(_evaluating(self.block))
            stack.enter_context(torch.no_grad())
            stack.enter_context(_disable_current_modes())
            try:
                output = torch.func.functional_call(
                    self.block, self.values, (self.x.clone(),), _optional(self.block))
            except (ArithmeticError, AssertionError, AttributeError, IndexError, KeyError,
                    RuntimeError, TypeError, ValueError) as error:
                raise UnsupportedExperts(
                    "a forward pass that needs hidden states alone, but with these it ended in "
                    f"{type(error).__name__}: {str(error).splitlines()[0]}") from error
        if len(given) != 1:
            raise UnsupportedExperts(f"experts that are called once, but they are {len(given)} "
                                     "times")
        return _Run(given[0], calls, output)


@contextlib.contextmanager
def _instead(module: torch.nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """Let a function stand in the place of a module's forward; for this thread: others may be
    calling it."""
    own, thread = vars(module).get("forward"), threading.get_ident()
    before: Callable[..., Any] = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        chosen = function if threading.get_ident() == thread else before
        return chosen(*args, **kwargs)

    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def _noting(name: str, calls: dict[str, tuple[tuple[Any, ...], Any]]) -> Any:
    thread = threading.get_ident()

    def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if threading.get_ident() == thread:
            calls[name] = (*args, *kwargs.values()), output

    return hook


def _optional(block: torch.nn.Module) -> dict[str, Any]:
    """Return numbers for what else a block may be given, such as the tokens' ids: a block that
    looks at them is found out by its values."""
    parameters = list(inspect.signature(type(block).forward).parameters.values())[2:]
    generator = torch.Generator().manual_seed(1)
    shape = (_ROWS, (_PLAIN + _FAR) // _ROWS)
    return {one.name: torch.randint(0, 2, shape, generator=generator, device="cpu")
            for one in parameters if one.default is None and one.kind is not one.VAR_KEYWORD}


@contextlib.contextmanager
def _evaluating(block: torch.nn.Module) -> Iterator[None]:
    training = [module for module in block.modules() if module.training]
    block.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


# -- what it computes ------------------------------------------------------------------------------
def _look(block: torch.nn.Module, experts: str) -> Block:
    probe = _Probe(block, experts)
    silent, run = probe.run(answer=False), probe.run(answer=True)
    x, ids, weights = run.given
    if x.shape[-1] != probe.d_model or not torch.equal(x.reshape(-1, probe.d_model), probe.rows):
        raise UnsupportedExperts("experts whose x is that of the block, but it is another one")
    router = _router_of(run)
    recognised, weight = _recognised(probe, router, ids, weights)
    places, scale, rest = _answers(probe, silent, run)
    total = float(f"{recognised.settings.scale * scale:.6g}")
    recognised = replace(
        recognised, settings=replace(recognised.settings, scale=total))
    others = [name for name in run.calls if name != router]
    shared = _shared(probe, others, rest)
    if shared is not None:
        shared = replace(shared, beside=_beside(shared, run, rest))
    found = Block(experts, router, recognised, weight, shared, places,
                  _asked(probe, run.calls[router][0]))
    if left := sorted(probe.values.keys() - set(found.names)):
        raise UnsupportedExperts("no tensors but those of a router and of shared experts, but there"
                                 f" {'is' if len(left) == 1 else 'are'} {', '.join(left)}")
    return found


def _router_of(run: _Run) -> str:
    """Return the name of the child that chooses."""
    _, ids, _ = run.given
    for name, (_, output) in run.calls.items():
        if isinstance(output, tuple) and any(
                isinstance(part, torch.Tensor) and part.shape == ids.shape
                and not part.is_floating_point() and torch.equal(part, ids) for part in output):
            return name
    raise UnsupportedExperts("a router that is a part of it, but none of its parts gives the ids")


def _recognised(probe: _Probe, router: str, ids: torch.Tensor, weights: torch.Tensor
                ) -> tuple[Recognised, str]:
    """Return the router, and the name of its weight."""
    own = [name for name in probe.values if name.startswith(f"{router}.")]
    matrices = [name for name in own if tuple(probe.values[name].shape) == (
        probe.count, probe.d_model)]
    if len(matrices) != 1:
        raise UnsupportedExperts(f"a router with one weight ({probe.count}, {probe.d_model}), but "
                                 f"there are {len(matrices)}")
    tables = {name: probe.values[name].double().reshape(-1) for name in probe.values
              if (name in own or "." not in name) and probe.values[name].numel() == probe.count
              and name not in matrices}
    seen = Observed(probe.rows.double() @ probe.values[matrices[0]].double().T, ids.long(),
                    weights.double(), tables, _PLAIN)
    return recognise(seen, probe.kind), matrices[0]


def _answers(probe: _Probe, silent: _Run, run: _Run
             ) -> tuple[tuple[str, ...] | None, float, torch.Tensor]:
    """Return what is in a block's output, what it multiplies its experts' by, and what it adds to
    it, (T, H)."""
    several = isinstance(run.output, tuple)
    pairs = list(zip(silent.output, run.output, strict=True)) if several else [
        (silent.output, run.output)]
    other = {"weights": run.given[2], "ids": run.given[1]}
    places: list[str] = []
    rest, scale = torch.zeros_like(probe.rows), 1.0
    for before, after in pairs:
        name = next((name for name, values in other.items() if _alike(after, values)), None)
        if name is None:
            if not isinstance(after, torch.Tensor) or after.shape != probe.x.shape:
                raise UnsupportedExperts("outputs that are y, ids or weights, but there is "
                                         f"{_shown(after)}")
            rest = before.reshape(probe.rows.shape)
            added = after.reshape(probe.rows.shape) - rest
            scale = float((added * probe.answer).sum() / probe.answer.square().sum())
            if scale <= 0 or not _near(added, scale * probe.answer):
                raise UnsupportedExperts("y that is its experts' times a number, and what shared "
                                         "experts add, but it is something else")
        places.append(name or "y")
    if places.count("y") != 1:
        raise UnsupportedExperts(f"one y among its outputs, but there are {places.count('y')}")
    return (tuple(places) if several else None), scale, rest


def _alike(found: Any, values: torch.Tensor) -> bool:
    return (isinstance(found, torch.Tensor) and found.shape == values.shape
            and found.is_floating_point() == values.is_floating_point()
            and _near(found.double(), values.double()))


def _near(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found - expected).norm() <= _RELATIVE * expected.norm())


def _shown(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)} for x {(_ROWS, '...', 'H')}"
    return f"a {type(value).__name__}"


def _shared(probe: _Probe, others: list[str], rest: torch.Tensor) -> SharedExpert | None:
    """Return the shared expert that adds what a block adds."""
    matrices = {name: values for name, values in probe.values.items()
                if name.split(".")[0] in others}
    biases = [name for name, values in matrices.items() if values.ndim != 2]
    if biases:
        raise UnsupportedExperts(f"shared experts of matrices alone, but there is {biases[0]}")
    gates = [name for name, values in matrices.items() if len(values) == 1]
    if not matrices:
        if rest.any():
            raise UnsupportedExperts("y that is its experts' alone, but something is added to it")
        return None
    parts = [name for name in matrices if name not in gates]
    rows = probe.rows[:_SHARED_TOKENS].double()
    target = rest[:_SHARED_TOKENS].double()
    for order in itertools.permutations(parts):
        for gate in (*gates, None):
            found = _fitted(probe, SharedExpert(order[:-1], order[-1], gate), rows, target)
            if found is not None:
                return found
    raise UnsupportedExperts("shared experts with the activation and limit of its experts, and a "
                             f"sigmoid in front of them at most, but {', '.join(others)} "
                             f"{'computes' if len(others) == 1 else 'compute'} something else")


def _fitted(probe: _Probe, expert: SharedExpert, rows: torch.Tensor, target: torch.Tensor
            ) -> SharedExpert | None:
    """Return a shared expert with its factor, if it gives what is wanted."""
    weights = probe.weights
    down = probe.values[expert.down].double()
    first = [probe.values[name].double() for name in expert.gate_up]
    wide = down.shape[1] * (2 if weights.gated else 1)
    if (len(down) != probe.d_model or any(part.shape[1] != probe.d_model for part in first)
            or sum(map(len, first)) != wide):
        return None
    products = torch.cat([rows @ part.T for part in first], dim=1).numpy()
    h = hidden(np.asarray(products), down.shape[1], weights.activation, weights.limit)
    y = torch.from_numpy(h) @ down.T
    if expert.gate is not None:
        y = y * torch.sigmoid(rows @ probe.values[expert.gate].double().T)
    factor = float((target * y).sum() / y.square().sum())
    if not factor or not _near(target, factor * y):
        return None
    return replace(expert, factor=float(f"{factor:.6g}"))


def _beside(expert: SharedExpert, run: _Run, rest: torch.Tensor) -> Beside | None:
    """Return a shared expert as children of the block compute it, if they do."""
    child = expert.down.split(".")[0]
    gate = None if expert.gate is None else expert.gate.split(".")[0]
    y = _rows_of(run, child, rest)
    if y is None:
        return None
    if gate is not None and gate != child:
        scores = _rows_of(run, gate, rest[:, :1])
        if scores is None:
            return None
        y = torch.sigmoid(scores) * y
    factor = float((rest * y).sum() / y.square().sum())
    if not factor or not _near(rest, factor * y):
        return None
    return Beside(child, gate if gate != child else None, float(f"{factor:.6g}"))


def _rows_of(run: _Run, child: str, like: torch.Tensor) -> torch.Tensor | None:
    """Return what a child answered, as rows, if it was asked for x alone and gave as much."""
    args, found = run.calls.get(child, ((), None))
    if len(args) != 1 or not isinstance(found, torch.Tensor) or found.numel() != like.numel():
        return None
    return found.reshape(like.shape)


def _asked(probe: _Probe, args: tuple[Any, ...]) -> tuple[str, ...]:
    """Return what a router was called with."""
    found = []
    for value in args:
        name = next((name for name, values in probe.values.items() if values is value), None)
        if name is None and isinstance(value, torch.Tensor) and value.numel() == probe.x.numel():
            name = "x" if value.ndim == probe.x.ndim else "rows"
        if name is None:
            raise UnsupportedExperts("a router that is asked by x and tensors of the block, but it "
                                     f"is given {_shown(value)}")
        found.append(name)
    return tuple(found)
