"""What a compression pass is, and what is reported of one."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeaccel.config import AcceleratorConfig
from moeaccel.cycles import expert_cycles
from moeaccel.formats import ALL_FORMATS, QUAD
from moeaccel.host.compress.layer import FloatExpert, MoELayer
from moeaccel.host.compress.low_rank import decode_cycles, factors_of, triples
from moeaccel.host.errors import InvalidOption

__all__ = ["OPTIONS", "PATTERNS", "Method", "Report", "count_of", "method", "methods", "report",
           "stored", "with_formats"]

Tokens = NDArray[np.float32]
Apply = Callable[..., "list[MoELayer]"]

CYCLE_TOKENS = 8
"""Tokens whose decode cycles are averaged."""


PATTERNS = tuple(f"{fmt.nonzeros}:{QUAD}" for fmt in
                 {fmt.nonzeros: fmt for fmt in ALL_FORMATS.values() if fmt.parts > 1}.values())
"""N:M patterns that devices have."""

OPTIONS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "share": (lambda share: 0 < share <= 1, "a share of the experts above 0 and at most 1"),
    "rank": (lambda rank: 0 < rank <= 1, "a share of the full rank above 0 and at most 1"),
    "skipped": (lambda share: 0 <= share < 1, "a share from 0 to below 1"),
    "bits": (lambda bits: 1 <= bits <= 16, "stored bits a weight, from 1 to 16"),
    "generations": (lambda count: 1 <= count <= 1000, "from 1 to 1000"),
    "seed": (lambda seed: 0 <= seed < 1 << 32, "from 0 to 2**32 - 1"),
    "pattern": (lambda pattern: pattern in PATTERNS, f"one of {', '.join(PATTERNS)}")}
"""What each option of any pass may be."""


@dataclass(frozen=True)
class Method:
    """A compression pass.

    Parameters
    ----------
    name : :class:`str`
    source : :class:`str`
        The paper.
    text : :class:`str`
        What it does, in a line.
    apply : callable
        Of layers, calibration tokens of each, and options by name; returns the layers that the
        device is to run.
    options : dict of :class:`str` to a default
        What it can be told, of :data:`OPTIONS`, and what it does when it is not.
    """

    name: str
    source: str
    text: str
    apply: Apply
    options: dict[str, Any] = field(default_factory=dict)

    def __call__(self, layers: Sequence[MoELayer], x: Sequence[Tokens],
                 **options: Any) -> list[MoELayer]:
        """Return the compressed layers.

        Parameters
        ----------
        layers : sequence of :class:`MoELayer`
        x : sequence of float32 arrays, (T, H)
            What each layer met, for calibration.

        Raises
        ------
        InvalidOption
            For an option that there is not, or a value that makes no sense.
        """
        self.check(options)
        if len(layers) != len(x) or not layers or not all(len(tokens) for tokens in x):
            raise InvalidOption("calibration must be tokens for each layer, not "
                                f"{[len(tokens) for tokens in x]} for {len(layers)} layers")
        return self.apply(list(layers), list(x), **(self.options | options))

    def check(self, options: Mapping[str, Any]) -> None:
        """Refuse options that there are not, and values outside their range.

        Raises
        ------
        InvalidOption
            Naming the option.
        """
        if unknown := sorted(options.keys() - self.options.keys()):
            raise InvalidOption(
                f"{unknown[0]} must be one of the options of {self.name}, "
                f"{', '.join(self.options) or 'which has none'}, not an unknown one")
        for name, value in options.items():
            good, what = OPTIONS[name]
            if not (isinstance(value, type(self.options[name]) | int) and good(value)):
                raise InvalidOption(f"{name} of {self.name} must be {what}, not {value!r}")


def methods() -> dict[str, Method]:
    """Return the passes of all files of this folder by name."""
    import moeaccel.host.compress as folder

    found: dict[str, Method] = {}
    for module in sorted(m.name for m in pkgutil.iter_modules(folder.__path__)):
        for each in getattr(importlib.import_module(f"{folder.__name__}.{module}"), "METHODS", ()):
            found[each.name] = each
    return found


def method(name: str) -> Method:
    """Return a pass by its name.

    Raises
    ------
    InvalidOption
        If there is none.
    """
    known = methods()
    if name not in known:
        raise InvalidOption(f"method must be one of {', '.join(known)}, not {name!r}")
    return known[name]


def count_of(share: float, layer: MoELayer) -> int:
    """Return how many experts stay of a layer: a share, rounded, at least one.

    Raises
    ------
    InvalidOption
        If it is no share.
    """
    if not 0 < share <= 1:
        raise InvalidOption(f"share of the experts that stay must be above 0 and at most 1, not "
                            f"{share!r}")
    return max(1, round(share * len(layer.experts)))


def with_formats(config: AcceleratorConfig, names: Iterable[str]) -> AcceleratorConfig:
    """Return a configuration that reads these formats, too."""
    missing = sorted(set(names) - set(config.formats))
    if not missing:
        return config
    return config.replace(name=f"{config.name}, {', '.join(missing)}",
                          formats=(*config.formats, *missing))


@dataclass(frozen=True)
class Report:
    """What a pass changed in a layer, or in several.

    Parameters
    ----------
    experts, experts_before : :class:`int`
    stored_bytes, stored_bytes_before : :class:`int`
        Of the experts on the device.
    decode_cycles, decode_cycles_before : :class:`float`
        Of one token, by the cycle model; the mean of some.
    experts_per_token : :class:`float`
    output_error : :class:`float`
        Relative Frobenius error of the layer's outputs in float, on the calibration's tokens.
    device_error, device_error_before : :class:`float`
        The same with weights as the device stores them, and without the pass.
    """

    experts: int
    experts_before: int
    stored_bytes: int
    stored_bytes_before: int
    decode_cycles: float
    decode_cycles_before: float
    experts_per_token: float
    output_error: float
    device_error: float
    device_error_before: float

    def as_dict(self) -> dict[str, Any]:
        """Return every field for JSON."""
        return asdict(self)


def report(before: Sequence[MoELayer], after: Sequence[MoELayer], x: Sequence[Tokens],
           config: AcceleratorConfig) -> Report:
    """Return what a pass changed, of layers the sum; errors are of all outputs together.

    Parameters
    ----------
    before, after : sequence of :class:`MoELayer`
    x : sequence of float32 arrays, (T, H)
    config : :class:`AcceleratorConfig`
        Of the device whose bytes and cycles are stated.
    """
    costs = [[_costs(layer, tokens, config) for layer, tokens in zip(layers, x, strict=True)]
             for layers in (before, after)]
    sums = np.zeros(4)
    used = []
    for old, new, tokens in zip(before, after, x, strict=True):
        exact = old(tokens)
        for i, layer in enumerate((new, stored(new), stored(old))):
            sums[i] += np.square(layer(tokens) - exact).sum()
        sums[3] += np.square(exact).sum()
        used.append(new.route(tokens).used)
    errors = np.sqrt(sums[:3] / sums[3]) if sums[3] else np.zeros(3)
    return Report(
        sum(len(layer.experts) for layer in after), sum(len(layer.experts) for layer in before),
        sum(size for size, _ in costs[1]), sum(size for size, _ in costs[0]),
        sum(cycles for _, cycles in costs[1]), sum(cycles for _, cycles in costs[0]),
        float(np.mean(used)), *(float(error) for error in errors))


def stored(layer: MoELayer) -> MoELayer:
    """Return a layer with the weights that the device has, products multiplied out."""
    products = {e: expert for triple in triples(layer)
                for e, expert in zip(triple.experts, triple.floats(), strict=True)}
    found = []
    for e in range(len(layer.experts)):
        found.append(products[e] if e in products else FloatExpert.of(*layer.quantised([e])))
    return replace(layer, experts=tuple(found))


def _costs(layer: MoELayer, x: Tokens, config: AcceleratorConfig) -> tuple[int, float]:
    """Return stored bytes, and cycles of a token."""
    products = factors_of(layer)
    whole = [e for e in range(len(layer.experts)) if e not in products]
    shapes = [expert.shape(config.row_multipliers, config.channels)
              for expert in layer.quantised(whole)]
    config = with_formats(config, layer.weight_formats)
    place = np.full(len(layer.experts) + 1, -1)
    place[whole] = np.arange(len(whole))
    ranks = triples(layer)
    cycles = []
    for ids in layer.route(x[:: max(1, len(x) // CYCLE_TOKENS)][:CYCLE_TOKENS]).ids:
        used = place[ids][None]
        found = expert_cycles(config, shapes, used, len(shapes), planes=2) if (
            used >= 0).any() or not ranks else 0
        cycles.append(found + sum(decode_cycles(triple, ids, config) for triple in ranks))
    size = sum(shape.stored_bytes for shape in shapes) + sum(
        shape.stored_bytes for triple in ranks for part in triple.shapes(config) for shape in part)
    return size, float(np.mean(cycles))
