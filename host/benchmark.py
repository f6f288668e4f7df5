"""Measure the accelerator on layers of real size: what ``moeaccel bench`` prints."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moeaccel.config import AcceleratorConfig
from moeaccel.cycles import expert_cycles, linear_cycles
from moeaccel.errors import MoeAccelError
from moeaccel.formats import weight_format, whole_blocks
from moeaccel.zoo import Model

if TYPE_CHECKING:
    from moeaccel.host.device import Device

Progress = Callable[[str], None]


class BenchmarkError(MoeAccelError, ValueError):
    """A benchmark that cannot be run as asked."""


@dataclass(frozen=True)
class BenchmarkResult:
    """One measurement; cycles and bytes are exact, of the device's clock from fetching the command
    to its completion.

    Parameters
    ----------
    what, model, config, device, memory, weight_format : :class:`str`
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
        Relative Frobenius error against float64 with the unquantised weights.
    counters : :class:`dict`
    """

    what: str
    model: str
    config: str
    device: str
    memory: str
    weight_format: str
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


def bench_experts(
    device: Device,
    config: AcceleratorConfig,
    model: Model,
    *,
    tokens: int,
    weight_format_name: str,
    activation_bits: int,
    kind: str = "uniform",
    what: str = "decode",
    seed: int = 0,
    latency: int,
    memory: str,
    device_name: str,
    progress: Progress = lambda _: None,
) -> BenchmarkResult:
    """Run one MoE layer of a model's size on random weights; every other figure is derived from
    this run.

    The cycle model's figure is that of an ideal memory of the given latency, whatever the device
    has.

    Experts that no token is routed to hold the weights of expert 0: they are resident, and never
    read.
    """
    from moeaccel import golden
    from moeaccel.golden.reference import experts_float64
    from moeaccel.image import Expert

    if model.ffn != "glu" or model.act != "silu" or model.expert_bias:
        raise BenchmarkError(
            f"model must have SwiGLU experts without bias, not {model.name!r} "
            f"({model.act}, {model.ffn})"
        )
    rng = np.random.default_rng(seed)
    fmt = weight_format(weight_format_name)
    experts, d_model, d_expert = model.n_experts, model.d_model, model.d_expert
    x = rng.standard_normal((tokens, d_model)).astype(np.float32)
    ids = routing(tokens, experts, model.top_k, kind=kind, seed=seed)
    weights = rng.random((tokens, model.top_k)).astype(np.float32)
    weights /= weights.sum(axis=1, keepdims=True)
    used = np.unique(ids)

    progress(f"drawing and quantising {len(used)} of {experts} experts")
    floats: dict[int, tuple[NDArray[np.float32], NDArray[np.float32]]] = {}
    layer: dict[int, Expert] = {}
    for e in used.tolist():
        gate_up = rng.standard_normal((2 * d_expert, d_model), dtype=np.float32) / np.float32(
            np.sqrt(d_model)
        )
        down = rng.standard_normal((d_model, d_expert), dtype=np.float32) / np.float32(
            np.sqrt(d_expert)
        )
        floats[e], layer[e] = (gate_up, down), Expert.quantise(gate_up, down, fmt)
    filler = layer[int(used[0])]
    all_experts = [layer.get(e, filler) for e in range(experts)]
    progress("loading the device")
    loaded = device.load_quantised(all_experts, activation_bits=activation_bits)
    progress("running")
    before = device.counters()
    begin = time.perf_counter()
    handle = loaded.submit(x, ids, weights)
    y = loaded.sync(handle)
    wall = time.perf_counter() - begin
    counters = _difference(before, device.counters())
    progress("checking against the golden model")
    expected = golden.experts(
        _filled(x), ids, weights, [expert.filled() for expert in all_experts],
        planes=activation_bits // 8, grid_exponent=loaded.grid_exponent).y[:, :d_model]
    order = {e: i for i, e in enumerate(used.tolist())}
    exact = experts_float64(
        x,
        np.vectorize(order.get)(ids),
        weights,
        [floats[e][0] for e in order],
        [floats[e][1] for e in order],
    )
    shape = loaded.shape
    assignments = ids.size
    useful = assignments * 3 * d_model * d_expert * (activation_bits // 8)
    return _result(
        device,
        config,
        what,
        model.name,
        fmt.name,
        activation_bits,
        tokens,
        assignments,
        len(used),
        handle.cycles,
        expert_cycles(
            config, shape, ids, experts, planes=activation_bits // 8, latency=latency),
        len(used) * shape.stored_bytes,
        useful,
        counters,
        wall,
        bool((y == expected).all()),
        _relative(y, exact),
        memory,
        device_name,
    )


def bench_gemm(
    device: Device,
    config: AcceleratorConfig,
    *,
    m: int,
    k: int,
    n: int,
    weight_format_name: str,
    activation_bits: int,
    seed: int = 0,
    latency: int,
    memory: str,
    device_name: str,
    progress: Progress = lambda _: None,
) -> BenchmarkResult:
    """Run ``y = x W^T`` with x (m, k) and W (n, k); ``latency`` as in :func:`bench_experts`."""
    from moeaccel import golden
    from moeaccel.formats import quantise

    rng = np.random.default_rng(seed)
    fmt = weight_format(weight_format_name)
    x = rng.standard_normal((m, k)).astype(np.float32)
    w = rng.standard_normal((n, k), dtype=np.float32) / np.float32(np.sqrt(k))
    progress("quantising and loading")
    matrix = quantise(w, fmt)
    loaded = device.load_linear(w, weight_format=fmt.name, activation_bits=activation_bits)
    progress("running")
    before = device.counters()
    begin = time.perf_counter()
    handle = loaded.submit(x)
    y = loaded.sync(handle)
    wall = time.perf_counter() - begin
    counters = _difference(before, device.counters())
    section = loaded.shape.section
    expected = golden.gemm(
        _filled(x), matrix.filled(section.rows, section.k), planes=activation_bits // 8,
        grid_exponent=loaded.grid_exponent).y[:, :n]
    return _result(
        device,
        config,
        "gemm",
        f"{m}x{k}x{n}",
        fmt.name,
        activation_bits,
        m,
        m,
        1,
        handle.cycles,
        linear_cycles(config, section, m, planes=activation_bits // 8, latency=latency),
        loaded.shape.stored_bytes,
        m * k * n * (activation_bits // 8),
        counters,
        wall,
        bool((y == expected).all()),
        _relative(y, x.astype(np.float64) @ w.astype(np.float64).T),
        memory,
        device_name,
    )


def _filled(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return x as device memory has it, with zeros up to whole blocks."""
    return np.pad(x, ((0, 0), (0, whole_blocks(x.shape[1]) - x.shape[1])))


def _difference(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    return {name: after[name] - before[name] for name in after}


def _relative(y: NDArray[np.floating], exact: NDArray[np.float64]) -> float:
    size = np.linalg.norm(exact)
    return float(np.linalg.norm(y - exact) / size) if size else 0.0


def _result(
    device: Device,
    config: AcceleratorConfig,
    what: str,
    model: str,
    fmt: str,
    activation_bits: int,
    tokens: int,
    assignments: int,
    experts_used: int,
    cycles: int,
    predicted: int,
    stored_bytes: int,
    useful: int,
    counters: dict[str, int],
    wall: float,
    matches: bool,
    error: float,
    memory: str,
    device_name: str,
) -> BenchmarkResult:
    per_cycle = config.multipliers * (2 if weight_format(fmt).packed else 1)
    width = config.channels * config.port_bytes
    memory_share = stored_bytes / (width * cycles) if cycles else 0.0
    useful_share = useful / (per_cycle * cycles) if cycles else 0.0
    return BenchmarkResult(
        what=what,
        model=model,
        config=config.name,
        device=device_name,
        memory=memory,
        weight_format=fmt,
        activation_bits=activation_bits,
        tokens=tokens,
        assignments=assignments,
        experts_used=experts_used,
        cycles=cycles,
        cycle_model_cycles=predicted,
        stored_bytes=stored_bytes,
        memory_share=round(memory_share, 5),
        mac_useful_share=round(useful_share, 5),
        bound_share=round(max(memory_share, useful_share), 5),
        bytes_read=counters["bytes_read_weights"] + counters["bytes_read_other"],
        bytes_written=counters["bytes_written"],
        wall_s=round(wall, 3),
        cycles_per_s=round(cycles / wall, 1) if wall else 0.0,
        matches_golden=matches,
        rel_err_float=error,
        counters=counters,
    )
