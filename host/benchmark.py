"""Measure the accelerator on layers of real size: what ``moeaccel bench`` prints."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moeaccel.activations import ACTIVATIONS
from moeaccel.arithmetic import from_bfloat16, to_bfloat16
from moeaccel.config import AcceleratorConfig
from moeaccel.cycles import expert_cycles, linear_cycles
from moeaccel.cycles.moe import predict_moe
from moeaccel.errors import MoeAccelError
from moeaccel.formats import QUAD, weight_format, whole_blocks
from moeaccel.interface.commands import ElementType
from moeaccel.zoo import ExpertKind, Model, RouterKind
from moeaccel.zoo.schema import ORIGINS

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
class _Run:
    """A call that was measured."""

    y: NDArray[np.float32]
    cycles: int
    counters: dict[str, int]
    wall_s: float


def _run(bench: Bench, loaded: Experts | Linear, x: NDArray[np.float32], *routed: NDArray[Any]
         ) -> _Run:
    def call(sent: Any) -> tuple[Any, int]:
        handle = loaded.submit(sent, *routed)
        return loaded.sync(handle), handle.cycles

    return _measured(bench, x, call)


def _measured(bench: Bench, x: NDArray[np.float32], call: Callable[[Any], tuple[Any, int]]) -> _Run:
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
    return _Run(y=y.float().numpy() if narrow else y, cycles=cycles, wall_s=wall,
                counters={name: after[name] - before[name] for name in after})


def bench_experts(bench: Bench, model: Model, *, tokens: int, kind: str = "uniform",
                  what: str = "decode") -> BenchmarkResult:
    """Run one MoE layer of a model's size on random weights; every figure is of this run.

    Experts that no token is routed to hold the weights of expert 0: they are resident, and never
    read.

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
    d_model, _, experts, top_k = _sizes_of(model)
    rng = np.random.default_rng(bench.seed)
    x = bench.draw_x(rng, tokens, d_model)
    ids = routing(tokens, experts, top_k, kind=kind, seed=bench.seed)
    weights = rng.random((tokens, top_k)).astype(np.float32)
    weights /= weights.sum(axis=1, keepdims=True)
    layer = _draw_layer(bench, model, ids, rng)
    loaded = bench.device.load_quantised(layer.experts, activation_bits=bench.activation_bits)
    run = _run(bench, loaded, x, ids, weights)
    return layer.result(
        run, what=what, x=x, ids=ids, weights=weights, loaded=loaded,
        predicted=expert_cycles(
            bench.device.config, loaded.shape, ids, experts, planes=bench.planes,
            latency=bench.latency, io=bench.io))


def bench_moe(bench: Bench, model: Model, *, tokens: int) -> BenchmarkResult:
    """Run one MoE layer of a model's size with its router, in one command a call; see
    :func:`bench_experts`. Bytes are those of the router's planes, too.

    Raises
    ------
    BenchmarkError
        As there.
    """
    from moeaccel import golden
    from moeaccel.golden.router import route
    from moeaccel.host.moe import LOGIT_GRID, Moe
    from moeaccel.host.routing import Router
    from moeaccel.host.weights import load_router_weight, router_planes
    from moeaccel.interface.commands import MOE_PLANES
    from moeaccel.zoo.routers import settings_of

    d_model, _, experts, top_k = _sizes_of(model)
    config, rng = bench.device.config, np.random.default_rng(bench.seed)
    x = bench.draw_x(rng, tokens, d_model)
    weight = rng.standard_normal((experts, d_model), dtype=np.float32) / np.float32(
        np.sqrt(d_model))
    biased = rng.standard_normal(experts) / 8 if model.router.selection_bias else None
    settings = settings_of(model, experts=experts, top_k=top_k, tokens=tokens)
    router = Router(weight, selection_bias=biased, **asdict(settings))
    every = np.tile(np.arange(MOE_PLANES), (tokens, 1))
    logits = golden.experts(
        _filled(x), every, np.ones(every.shape, np.float32),
        [part.filled(whole_blocks(experts), whole_blocks(d_model))
         for part in router_planes(config, weight)], grid_exponent=LOGIT_GRID)
    routed = route(logits.y[:, :experts], settings, selection_bias=biased)
    layer = _draw_layer(bench, model, routed.ids, rng)
    loaded = bench.device.load_quantised(layer.experts, activation_bits=bench.activation_bits)
    plane = load_router_weight(bench.device, weight, grid_exponent=LOGIT_GRID)
    with Moe(bench.device, router, plane, loaded, 0) as moe:
        run = _measured(bench, x, lambda sent: (moe(sent), bench.device.last_cycles))
        predicted = predict_moe(
            config, settings, plane.shape.section,
            dict.fromkeys(range(experts), loaded.shape.sections), routed.ids, experts,
            d_model=whole_blocks(d_model), planes=bench.planes, biased=biased is not None,
            tables=biased is not None, latency=bench.latency, io=bench.io).cycles
        return layer.result(
            run, what="moe", x=x, ids=routed.ids, weights=routed.weights, loaded=loaded,
            predicted=predicted, stored_bytes=MOE_PLANES * plane.shape.stored_bytes)


@dataclass(frozen=True, kw_only=True)
class _Layer:
    """A layer of a benchmark: its experts, and the floats of those that are used."""

    bench: Bench
    model: Model
    experts: list[Expert]
    floats: dict[int, list[NDArray[np.float32]]]

    def result(self, run: _Run, *, what: str, x: NDArray[np.float32], ids: NDArray[np.integer],
               weights: NDArray[np.float32], loaded: Experts, predicted: int,
               stored_bytes: int = 0) -> BenchmarkResult:
        """Check a run and return its figures; ``stored_bytes``: of what is beside the experts."""
        from moeaccel import golden
        from moeaccel.golden.reference import experts_float64

        bench, made, floats = self.bench, self.model.expert, self.floats
        d_model, d_expert, _, _ = _sizes_of(self.model)
        bench.progress("checking against the golden model")
        expected = golden.experts(
            _filled(x), ids, weights, [expert.filled() for expert in self.experts],
            planes=bench.planes, grid_exponent=loaded.grid_exponent, y_type=bench.io).y[:, :d_model]
        order = {e: i for i, e in enumerate(floats)}
        biases: dict[str, Any] = {name: [one[part] for one in floats.values()]
                  for part, name in ((2, "gate_up_bias"), (3, "down_bias"))
                  if part < len(next(iter(floats.values())))}
        exact = experts_float64(
            x, np.vectorize(order.get)(ids), weights, [one[0] for one in floats.values()],
            [one[1] for one in floats.values()], made.activation, made.limit, **biases)
        return _result(
            bench, run, what=what, model=self.model.name, tokens=len(x), assignments=ids.size,
            experts_used=len(order),
            stored_bytes=stored_bytes + len(order) * loaded.shape.stored_bytes,
            useful=ids.size * made.matrices * d_model * d_expert * bench.planes,
            predicted=predicted, expected=expected, exact=exact)


def _draw_layer(bench: Bench, model: Model, ids: NDArray[np.integer], rng: np.random.Generator
                ) -> _Layer:
    """Draw the experts that are used; the others are the first of them."""
    from moeaccel.image import Expert

    d_model, d_expert, experts, _ = _sizes_of(model)
    made, config = model.expert, bench.device.config
    fmt = weight_format(bench.weight_format)
    used = np.unique(ids)

    bench.progress(f"drawing and quantising {len(used)} of {experts} experts")
    floats: dict[int, list[NDArray[np.float32]]] = {}
    layer: dict[int, Expert] = {}
    for e in used.tolist():
        rows = (made.matrices - 1) * d_expert
        gate_up = rng.standard_normal((rows, d_model), dtype=np.float32) / np.float32(
            np.sqrt(d_model)
        )
        down = rng.standard_normal((d_model, d_expert), dtype=np.float32) / np.float32(
            np.sqrt(d_expert)
        )
        floats[e] = [gate_up, down]
        counts = {None: (), "gate_up": (rows,), "both": (rows, d_model)}[made.bias]
        floats[e] += [rng.standard_normal(count, dtype=np.float32) for count in counts]
        layer[e] = Expert.quantise(
            gate_up, down, fmt, activation=made.activation, limit=made.limit, prune="magnitude",
            channels=config.channels,
            **dict(zip(("gate_up_bias", "down_bias"), floats[e][2:], strict=False)))
    bench.progress("loading the device")
    return _Layer(bench=bench, model=model, floats=floats, experts=[
        layer.get(e, layer[int(used[0])]) for e in range(experts)])


EDGE_MOE = AcceleratorConfig(
    name="edge256", port_bytes=32, row_multipliers=4, token_lanes=2, token_groups=32, max_dim=512,
    max_experts=16, max_tokens=256, max_assignments=1024, read_ahead_beats=512, tile_words=256,
    quantiser_lanes=16, y_banks=2, results_per_cycle=2, hidden_banks=2)
"""256 multipliers of 8 bits behind 32 bytes a cycle, for small experts: a pass holds 64 tokens, so
that each weight is read once, and two results are rounded in a cycle."""


def bench_edge_moe(bench: Bench) -> BenchmarkResult:
    """Run a layer of Edge-MoE's vision transformer without its router.

    129 tokens of 192 elements, 16 experts with 384 hidden ones, two for each token, GELU, biases.
    """
    model = Model(
        name="Edge-MoE", hf_id=None, layers=None, moe_layers=None, d_model=192, n_experts=16,
        top_k=2, native_dtype="float32", confidence=next(iter(ORIGINS)),
        router=RouterKind(flavour="R1", score="softmax"),
        expert=ExpertKind(d_expert=384, form="mlp", activation="gelu", bias="both"))
    return bench_experts(bench, model, tokens=129, what="edge-moe")


def _sizes_of(model: Model) -> tuple[int, int, int, int]:
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
    loaded = bench.device.load_linear(w, weight_format=fmt.name, prune="magnitude",
                                      activation_bits=bench.activation_bits)
    run = _run(bench, loaded, x)
    section = loaded.shape.section
    expected = golden.gemm(
        _filled(x), matrix.filled(section.rows, section.k), planes=planes,
        grid_exponent=loaded.grid_exponent, y_type=bench.io).y[:, :n]
    return _result(
        bench, run, what="gemm", model=f"{m}x{k}x{n}", tokens=m, assignments=m, experts_used=1,
        stored_bytes=loaded.shape.stored_bytes, useful=m * k * n * planes,
        predicted=linear_cycles(config, section, m, planes=planes, latency=bench.latency,
                                io=bench.io),
        expected=expected, exact=x.astype(np.float64) @ w.astype(np.float64).T)


def _filled(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return x as device memory has it, with zeros up to whole blocks."""
    return np.pad(x, ((0, 0), (0, whole_blocks(x.shape[1]) - x.shape[1])))


def _relative(y: NDArray[np.floating], exact: NDArray[np.float64]) -> float:
    size = np.linalg.norm(exact)
    return float(np.linalg.norm(y - exact) / size) if size else 0.0


def _result(bench: Bench, run: _Run, *, expected: NDArray[np.float32], exact: NDArray[np.float64],
            predicted: int, stored_bytes: int, useful: int, **workload: Any) -> BenchmarkResult:
    """Return the figures of a run; ``useful``: multiplications that its result needed."""
    config, cycles, counters = bench.device.config, run.cycles, run.counters
    fmt = weight_format(bench.weight_format)
    per_cycle = config.multipliers * (2 if fmt.packed else 1)
    of_memory = memory_share(config, stored_bytes, cycles)
    useful = useful * fmt.nonzeros // QUAD  # the others are not multiplied
    of_multipliers = useful / (per_cycle * cycles) if cycles else 0.0
    return BenchmarkResult(
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
