"""Measure the accelerator on layers of real size: what ``moeaccel bench`` prints."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moeaccel.activations import ACTIVATIONS
from moeaccel.arithmetic import from_bfloat16, to_bfloat16
from moeaccel.config import AcceleratorConfig
from moeaccel.cycles import expert_cycles, linear_cycles
from moeaccel.errors import MoeAccelError
from moeaccel.formats import QUAD, weight_format, whole_blocks
from moeaccel.interface.commands import ElementType
from moeaccel.zoo import ExpertKind, Model

if TYPE_CHECKING:
    from moeaccel.host.device import Device
    from moeaccel.host.layers import Experts, Linear
    from moeaccel.image import Expert

Progress = Callable[[str], None]


class BenchmarkError(MoeAccelError, ValueError):
    """A benchmark that cannot be run as asked."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What is measured, and with what.

    Parameters
    ----------
    device : :class:`Device`
    device_name, memory : :class:`str`
        For the results: what the device is, and its memory.
    latency : :class:`int`
        Of the ideal memory for which the cycle model's figure is, whatever the device has.
    weight_format : :class:`str`
    activation_bits : :class:`int`
        8 or 16.
    io : :class:`ElementType`
        Of x and y.
    seed : :class:`int`
        Of weights, x and routing.
    progress : callable
        Told what is being done.
    """

    device: Device
    device_name: str
    memory: str
    latency: int
    weight_format: str
    activation_bits: int
    io: ElementType = ElementType.FLOAT32
    seed: int = 0
    progress: Progress = lambda _: None

    @property
    def planes(self) -> int:
        """Planes of the activations."""
        return self.activation_bits // 8

    def draw_x(self, rng: np.random.Generator, tokens: int, d_in: int) -> NDArray[np.float32]:
        """Return Gaussian x, (tokens, d_in), that :attr:`io` can hold."""
        x = rng.standard_normal((tokens, d_in)).astype(np.float32)
        return from_bfloat16(to_bfloat16(x)) if self.io is ElementType.BFLOAT16 else x


@dataclass(frozen=True)
class BenchmarkResult:
    """One measurement; cycles and bytes are exact, of the device's clock from fetching the command
    to its completion.

    Parameters
    ----------
    what, model, config, device, memory, weight_format, io : :class:`str`
    activation_bits, tokens, assignments, experts_used : :class:`int`
    cycles, cycle_model_cycles : :class:`int`
        Measured; predicted by :mod:`moeaccel.cycles`.
    stored_bytes : :class:`int`
        Weights, scales and tables of the experts used, without padding; see :mod:`moeaccel.image`.
    memory_share : :class:`float`
        stored_bytes / (channels x port bytes per cycle x cycles).
    mac_useful_share : :class:`float`
        Useful multiplier slots / (multipliers x cycles); a 4-bit format does two multiplications a
        slot.
    bound_share : :class:`float`
        The larger of the two: how near the machine is to its limit.
    bytes_read, bytes_written : :class:`int`
    wall_s, cycles_per_s : :class:`float`
        Time of the device or its simulation.
    matches_golden : :class:`bool`
        Every bit of y.
    rel_err_float : :class:`float`
        Relative Frobenius error against float64 with the weights before quantising, and pruning.
    counters : :class:`dict`
    """

    what: str
    model: str
    config: str
    device: str
    memory: str
    weight_format: str
    io: str
    activation_bits: int
    tokens: int
    assignments: int
    experts_used: int
    cycles: int
    cycle_model_cycles: int
    stored_bytes: int
    memory_share: float
    mac_useful_share: float
    bound_share: float
    bytes_read: int
    bytes_written: int
    wall_s: float
    cycles_per_s: float
    matches_golden: bool
    rel_err_float: float
    counters: dict[str, int]

    def as_dict(self) -> dict[str, Any]:
        """Return every figure for JSON."""
        return asdict(self)


def memory_share(config: AcceleratorConfig, stored_bytes: int, cycles: int) -> float:
    """Return how much of what all channels can bring was weights: see :class:`BenchmarkResult`."""
    return stored_bytes / (config.channels * config.port_bytes * cycles) if cycles else 0.0


def routing(tokens: int, experts: int, top_k: int, *, kind: str, seed: int) -> NDArray[np.int64]:
    """Draw ids, (tokens, top_k), distinct within a token.

    ``kind`` is ``uniform``, or ``zipf:S``: popularity of the i-th expert proportional to ``i**-S``
    (a random order of experts).
    """
    rng = np.random.default_rng(seed)
    if kind == "uniform":
        exponent = 0.0
    elif kind.startswith("zipf:"):
        try:
            exponent = float(kind[5:])
        except ValueError:
            exponent = -1.0
    else:
        exponent = -1.0
    if not 0 <= exponent <= 100:
        raise BenchmarkError(
            f"routing must be uniform or zipf:S with a number S from 0 to 100, not {kind!r}")
    popularity = rng.permutation(np.arange(1, experts + 1) ** -exponent)
    # The largest of log(p) + Gumbel noise: sampling without replacement (Efraimidis and Spirakis,
    # 2006).
    keys = np.log(popularity) + rng.gumbel(size=(tokens, experts))
    return np.argsort(-keys, axis=1)[:, :top_k].astype(np.int64)


@dataclass(frozen=True, kw_only=True)
class Run:
    """A call that was measured."""

    y: NDArray[np.float32]
    cycles: int
    counters: dict[str, int]
    wall_s: float


def _run(bench: Bench, loaded: Experts | Linear, x: NDArray[np.float32], *routed: NDArray[Any]
         ) -> Run:
    def call(sent: Any) -> tuple[Any, int]:
        handle = loaded.submit(sent, *routed)
        return loaded.sync(handle), handle.cycles

    return measured(bench, x, call)


def measured(bench: Bench, x: NDArray[np.float32], call: Callable[[Any], tuple[Any, int]]) -> Run:
    """Measure what returns y and cycles."""
    narrow = bench.io is ElementType.BFLOAT16
    sent: Any = x
    if narrow:
        import torch

        sent = torch.from_numpy(x).bfloat16()
    bench.progress("running")
    before = bench.device.counters()
    begin = time.perf_counter()
    y, cycles = call(sent)
    wall = time.perf_counter() - begin
    after = bench.device.counters()
    return Run(y=y.float().numpy() if narrow else y, cycles=cycles, wall_s=wall,
                counters={name: after[name] - before[name] for name in after})


def bench_experts(bench: Bench, model: Model, *, tokens: int, kind: str = "uniform",
                  what: str = "decode") -> BenchmarkResult:
    """Run one MoE layer of a model's size on random weights; every figure is of this run.

    Experts that no token is routed to are never read, and so are narrow ones, whatever the model's:
    memory need not hold what is not looked at.

    Parameters
    ----------
    bench : :class:`Bench`
    model : :class:`moeaccel.zoo.Model`
    tokens : :class:`int`
    kind : :class:`str`
        Of the routing: see :func:`routing`.
    what : :class:`str`
        For the result.

    Raises
    ------
    BenchmarkError
        If the model's experts are of a kind that is not measured, or there is no such routing.
    """
    d_model, _, experts, top_k = sizes_of(model)
    rng = np.random.default_rng(bench.seed)
    x = bench.draw_x(rng, tokens, d_model)
    ids = routing(tokens, experts, top_k, kind=kind, seed=bench.seed)
    weights = rng.random((tokens, top_k)).astype(np.float32)
    weights /= weights.sum(axis=1, keepdims=True)
    layer = draw_layer(bench, model, ids, rng)
    loaded = bench.device.load_quantised(layer.experts, activation_bits=bench.activation_bits)
    run = _run(bench, loaded, x, ids, weights)
    return BenchmarkResult(**layer.figures(
        run, what=what, x=x, ids=ids, weights=weights, grid_exponent=loaded.grid_exponent,
        predicted=expert_cycles(
            bench.device.config, loaded.shapes, ids, experts, planes=bench.planes,
            latency=bench.latency, io=bench.io)))


@dataclass(frozen=True, kw_only=True)
class DrawnLayer:
    """A layer of a benchmark: its experts, those that every token goes to as well, and the floats
    of those that are used, by number; shared ones are numbered behind the others."""

    bench: Bench
    model: Model
    experts: list[Expert]
    shared: list[Expert]
    floats: dict[int, list[NDArray[np.float32]]]

    def figures(self, run: Run, *, what: str, x: NDArray[np.float32], ids: NDArray[np.integer],
                weights: NDArray[np.float32], grid_exponent: int, predicted: int,
                stored_bytes: int = 0) -> dict[str, Any]:
        """Check a run and return the fields of its result.

        Parameters
        ----------
        ids, weights : arrays, (T, K)
            With those of shared experts.
        stored_bytes : :class:`int`
            Of what is beside the experts.
        """
        from moeaccel import golden
        from moeaccel.golden.reference import experts_float64

        bench, made = self.bench, self.model.expert
        config, every = bench.device.config, [*self.experts, *self.shared]
        d_model = x.shape[1]
        bench.progress("checking against the golden model")
        expected = golden.experts(
            filled(x), ids, weights, [expert.filled() for expert in every],
            planes=bench.planes, grid_exponent=grid_exponent, y_type=bench.io).y[:, :d_model]
        used, counts = np.unique(ids[ids >= 0], return_counts=True)
        floats = [self.floats[e] for e in used.tolist()]
        places = np.where(ids < 0, -1, np.searchsorted(used, ids))
        biases: dict[str, Any] = {
            name: [one[part] if part < len(one) else np.zeros(len(one[part - 2]), np.float32)
                   for one in floats]
            for part, name in ((2, "gate_up_bias"), (3, "down_bias"))
            if any(part < len(one) for one in floats)}
        exact = experts_float64(
            x, places, weights, [one[0] for one in floats],
            [one[1] for one in floats], made.activation, made.limit, **biases)
        shapes = [every[e].shape(config.row_multipliers, config.channels) for e in used.tolist()]
        return _figures(
            bench, run, what=what, model=self.model.name, tokens=len(x), assignments=ids.size,
            experts_used=len(used),
            stored_bytes=stored_bytes + sum(shape.stored_bytes for shape in shapes),
            useful=bench.planes * made.matrices * d_model * sum(
                int(count) * shape.d_expert for count, shape in zip(counts, shapes, strict=True)),
            predicted=predicted, expected=expected, exact=exact)


NARROW = 128
"""Hidden elements of an expert that nobody reads: whole groups of every format."""


def draw_layer(bench: Bench, model: Model, ids: NDArray[np.integer], rng: np.random.Generator, *,
               shared: Sequence[int] = ()) -> DrawnLayer:
    """Draw the experts that are used; the others are narrow ones.

    Parameters
    ----------
    ids : integer array
        Of the experts that are used.
    shared : sequence of :class:`int`
        Hidden elements of each shared expert.
    """
    d_model, d_expert, experts, _ = sizes_of(model)
    used = np.unique(ids[ids >= 0])
    bench.progress(f"drawing and quantising {len(used)} of {experts} experts")
    floats: dict[int, list[NDArray[np.float32]]] = {}
    made: dict[int, Expert] = {}
    for e in used.tolist():
        floats[e] = _draw(model.expert, d_model, d_expert, rng)
        made[e] = _quantised(bench, model.expert, floats[e])
    for s, width in enumerate(shared):
        floats[experts + s] = _draw(replace(model.expert, bias=None), d_model, width, rng)
    behind = [_quantised(bench, model.expert, floats[experts + s]) for s in range(len(shared))]
    unread = [] if len(made) == experts else [_quantised(bench, model.expert, _draw(
        model.expert, d_model, min(NARROW, d_expert), np.random.default_rng(bench.seed)))]
    bench.progress("loading the device")
    return DrawnLayer(
        bench=bench, model=model, floats=floats, shared=behind,
        experts=[made[e] if e in made else unread[0] for e in range(experts)])


def _draw(kind: ExpertKind, d_model: int, d_expert: int, rng: np.random.Generator
          ) -> list[NDArray[np.float32]]:
    """Return gate_up, down and, where there are some, the biases of each."""
    rows = (kind.matrices - 1) * d_expert
    found = [rng.standard_normal(shape, dtype=np.float32) / np.float32(np.sqrt(shape[1]))
             for shape in ((rows, d_model), (d_model, d_expert))]
    counts = {None: (), "gate_up": (rows,), "both": (rows, d_model)}[kind.bias]
    return found + [rng.standard_normal(count, dtype=np.float32) for count in counts]


def _quantised(bench: Bench, kind: ExpertKind, floats: Sequence[NDArray[np.float32]]) -> Expert:
    from moeaccel.image import Expert

    return Expert.quantise(
        floats[0], floats[1], weight_format(bench.weight_format), activation=kind.activation,
        limit=kind.limit, prune="magnitude", channels=bench.device.config.channels,
        **dict(zip(("gate_up_bias", "down_bias"), floats[2:], strict=False)))


def sizes_of(model: Model) -> tuple[int, int, int, int]:
    """Return d_in, d_expert, experts and top-k of a model whose experts the device has.

    Raises
    ------
    BenchmarkError
        If it has not, or one of them is not published.
    """
    kind = model.expert
    sizes = kind.d_in or model.d_model, kind.d_expert, model.n_experts, model.top_k
    if kind.form not in ("glu", "mlp") or kind.activation not in ACTIVATIONS or kind.norm:
        raise BenchmarkError(
            f"model must have experts of two or three matrices and one of the activations "
            f"{', '.join(ACTIVATIONS)}, not {model.name!r} ({kind.text})")
    found = [size for size in sizes if size is not None]
    if len(found) < len(sizes):
        raise BenchmarkError(f"model must have one size for all of its layers, not {model.name!r}")
    d_model, d_expert, experts, top_k = found
    return d_model, d_expert, experts, top_k


def bench_gemm(bench: Bench, *, m: int, k: int, n: int) -> BenchmarkResult:
    """Run ``y = x W^T`` with x (m, k) and W (n, k)."""
    from moeaccel import golden
    from moeaccel.formats import prune, quantise

    config, planes = bench.device.config, bench.planes
    rng = np.random.default_rng(bench.seed)
    fmt = weight_format(bench.weight_format)
    x = bench.draw_x(rng, m, k)
    w = rng.standard_normal((n, k), dtype=np.float32) / np.float32(np.sqrt(k))
    bench.progress("quantising and loading")
    matrix = quantise(prune(w, fmt, "magnitude", channels=config.channels), fmt)
    loaded = bench.device.load_linear(w, weight_format=fmt.name,
                                      prune="magnitude" if fmt.parts > 1 else None,
                                      activation_bits=bench.activation_bits)
    run = _run(bench, loaded, x)
    section = loaded.shape.section
    expected = golden.gemm(
        filled(x), matrix.filled(section.rows, section.k), planes=planes,
        grid_exponent=loaded.grid_exponent, y_type=bench.io).y[:, :n]
    return BenchmarkResult(**_figures(
        bench, run, what="gemm", model=f"{m}x{k}x{n}", tokens=m, assignments=m, experts_used=1,
        stored_bytes=loaded.shape.stored_bytes, useful=m * k * n * planes,
        predicted=linear_cycles(config, section, m, planes=planes, latency=bench.latency,
                                io=bench.io),
        expected=expected, exact=x.astype(np.float64) @ w.astype(np.float64).T))


def filled(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return x as device memory has it, with zeros up to whole blocks."""
    return np.pad(x, ((0, 0), (0, whole_blocks(x.shape[1]) - x.shape[1])))


def _relative(y: NDArray[np.floating], exact: NDArray[np.float64]) -> float:
    size = np.linalg.norm(exact)
    return float(np.linalg.norm(y - exact) / size) if size else 0.0


def _figures(bench: Bench, run: Run, *, expected: NDArray[np.float32], exact: NDArray[np.float64],
            predicted: int, stored_bytes: int, useful: int, **workload: Any) -> dict[str, Any]:
    """Return the fields of a run's result; ``useful``: multiplications that its result needed."""
    config, cycles, counters = bench.device.config, run.cycles, run.counters
    fmt = weight_format(bench.weight_format)
    per_cycle = config.multipliers * (2 if fmt.packed else 1)
    of_memory = memory_share(config, stored_bytes, cycles)
    useful = useful * fmt.nonzeros // QUAD  # the others are not multiplied
    of_multipliers = useful / (per_cycle * cycles) if cycles else 0.0
    return dict(
        **workload,
        config=config.name,
        device=bench.device_name,
        memory=bench.memory,
        weight_format=fmt.name,
        io=bench.io.name.lower(),
        activation_bits=bench.activation_bits,
        cycles=cycles,
        cycle_model_cycles=predicted,
        stored_bytes=stored_bytes,
        memory_share=round(of_memory, 5),
        mac_useful_share=round(of_multipliers, 5),
        bound_share=round(max(of_memory, of_multipliers), 5),
        bytes_read=counters["bytes_read_weights"] + counters["bytes_read_other"],
        bytes_written=counters["bytes_written"],
        wall_s=round(run.wall_s, 3),
        cycles_per_s=round(cycles / run.wall_s, 1) if run.wall_s else 0.0,
        matches_golden=bool((run.y == expected).all()),
        rel_err_float=_relative(run.y, exact),
        counters=counters,
    )
