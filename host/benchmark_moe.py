"""Measure whole layers, from x to y: ``moeaccel bench decode --router`` and ``edge-moe``."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from moeaccel.config import AcceleratorConfig
from moeaccel.cycles.moe import predict_moe
from moeaccel.formats import whole_blocks
from moeaccel.host.benchmark import (
    Bench,
    BenchmarkError,
    BenchmarkResult,
    Run,
    bench_experts,
    draw_layer,
    filled,
    measured,
    sizes_of,
)
from moeaccel.interface.commands import MOE_PLANES
from moeaccel.router.settings import RouterSettings
from moeaccel.zoo import ExpertKind, Model, RouterKind
from moeaccel.zoo.routers import settings_of
from moeaccel.zoo.schema import ORIGINS

if TYPE_CHECKING:
    from moeaccel.host.layers import Linear
    from moeaccel.host.moe import Moe
    from moeaccel.host.routing import Router

__all__ = ["EDGE_MOE", "MoeBenchmarkResult", "bench_edge_moe", "bench_moe", "router_of",
           "shared_widths"]


@dataclass(frozen=True)
class MoeBenchmarkResult(BenchmarkResult):
    """One measurement of a layer with its router. The other figures are those of task 0's first
    call; stored bytes are also those of the router's planes and of the shared experts.

    Parameters
    ----------
    shared_experts : :class:`int`
        Experts that every token went to as well.
    task_cycles : list of list of :class:`int`
        Of each task, where there are several: cycles of a call behind one of the same task, and
        behind one of another.
    """

    shared_experts: int
    task_cycles: list[list[int]]


def shared_widths(model: Model) -> list[int]:
    """Return the hidden elements of each shared expert that is of the layer's one sum.

    One with a norm of its own before it, or behind the layer, is the host's.

    Raises
    ------
    BenchmarkError
        If they are not published.
    """
    shared = model.shared
    if shared is None or not shared.count or (shared.place, shared.combined) != ("parallel", "sum"):
        return []
    if shared.width is None:
        raise BenchmarkError(
            f"model must have shared experts of a known size, but that of {model.key} was not "
            "published; use another one of `moeaccel models`")
    return [shared.width // shared.count] * shared.count


def router_of(model: Model, *, experts: int, top_k: int, tokens: int) -> RouterSettings:
    """Return the settings of a model's router, with the gates of shared experts.

    Raises
    ------
    RouterError
        See :func:`moeaccel.zoo.routers.settings_of`.
    """
    settings = settings_of(model, experts=experts, top_k=top_k, tokens=tokens)
    widths = shared_widths(model)
    if widths and model.shared is not None and model.shared.gate == "sigmoid":
        return replace(settings, gates="sigmoid", shared=len(widths))
    return settings


@dataclass(frozen=True, kw_only=True)
class _Task:
    """A router, its matrix on the device, and where it sends the tokens."""

    router: Router
    plane: Linear
    ids: NDArray[np.int32]
    weights: NDArray[np.float32]

    @property
    def biased(self) -> bool:
        return self.router.selection_bias is not None and self.router.settings.biases_scores

    @property
    def tables(self) -> bool:
        return self.router.bias is not None or self.router.selection_bias is not None


def bench_moe(bench: Bench, model: Model, *, tokens: int, tasks: int = 1, what: str = "moe"
              ) -> MoeBenchmarkResult:
    """Run one MoE layer of a model's size with its router and its shared experts, in one command a
    call; see :func:`moeaccel.host.benchmark.bench_experts`.

    With several tasks there is a router for each, and calls alternate so that each task's comes
    once behind its own and once behind another's.

    Raises
    ------
    BenchmarkError
        As there, and if the size of shared experts was not published.
    """
    from moeaccel.host.moe import Moe

    d_model, _, experts, top_k = sizes_of(model)
    config, rng = bench.device.config, np.random.default_rng(bench.seed)
    x = bench.draw_x(rng, tokens, d_model)
    settings = router_of(model, experts=experts, top_k=top_k, tokens=tokens)
    widths = shared_widths(model)
    made = [_draw_task(bench, model, settings, x, shared=len(widths), rng=rng)
            for _ in range(tasks)]
    layer = draw_layer(bench, model, np.concatenate(
        [task.ids[:, : settings.top_k] for task in made]), rng, shared=widths)
    loaded = bench.device.load_quantised(
        layer.experts, shared=layer.shared, activation_bits=bench.activation_bits)
    sections = {e: shape.sections
                for e, shape in enumerate([*loaded.shapes, *loaded.shared_shapes])}
    with Moe(bench.device, [task.router for task in made], [task.plane for task in made], loaded
             ) as moe:
        # 0 0 1 1 2 2 0: the second of each is behind its own, the others are behind another.
        order = [task for task in range(tasks) for _ in range(2)] + [0] if tasks > 1 else [0]
        runs = [_call(bench, moe, x, task) for task in order]
        figures = []
        for index, task in enumerate(made):
            predicted = predict_moe(
                config, settings, task.plane.shape.section, sections, task.ids, len(sections),
                d_model=whole_blocks(d_model), planes=bench.planes, biased=task.biased,
                tables=task.tables, latency=bench.latency, io=bench.io).cycles
            figures.append(layer.figures(
                runs[2 * index], what=what, x=x, ids=task.ids, weights=task.weights,
                grid_exponent=loaded.grid_exponent, predicted=predicted,
                stored_bytes=MOE_PLANES * task.plane.shape.stored_bytes))
    return MoeBenchmarkResult(**figures[0] | {
        "matches_golden": all(one["matches_golden"] for one in figures),
        "shared_experts": len(widths),
        "task_cycles": [] if tasks == 1 else [
            [runs[2 * task + 1].cycles, runs[2 * task or 2 * tasks].cycles]
            for task in range(tasks)]})


def _draw_task(bench: Bench, model: Model, settings: RouterSettings, x: NDArray[np.float32], *,
               shared: int, rng: np.random.Generator) -> _Task:
    """Draw a router, load its matrix, and route x by it, as the device will."""
    from moeaccel import golden
    from moeaccel.golden.router import route
    from moeaccel.host.moe import LOGIT_GRID
    from moeaccel.host.routing import Router
    from moeaccel.host.weights import load_router_weight, router_planes

    d_model, outputs, tokens = x.shape[1], settings.outputs, len(x)
    weight = rng.standard_normal((outputs, d_model), dtype=np.float32) / np.float32(
        np.sqrt(d_model))
    kind = model.router
    selection_bias, bias = (rng.standard_normal(settings.experts) / 8 if there else None
                            for there in (kind.selection_bias, kind.bias))
    every = np.tile(np.arange(MOE_PLANES), (tokens, 1))
    logits = golden.experts(
        filled(x), every, np.ones(every.shape, np.float32),
        [part.filled(whole_blocks(outputs), whole_blocks(d_model))
         for part in router_planes(bench.device.config, weight)], grid_exponent=LOGIT_GRID)
    routed = route(logits.y[:, :outputs], settings, bias=bias, selection_bias=selection_bias)
    ids, weights = routed.ids, routed.weights
    behind = shared - settings.shared  # those without a gate
    if behind:
        ids = np.hstack([ids, np.tile(
            np.arange(settings.experts, settings.experts + behind, dtype=np.int32), (tokens, 1))])
        weights = np.hstack([weights, np.ones((tokens, behind), np.float32)])
    return _Task(
        router=Router(weight, bias=bias, selection_bias=selection_bias, **asdict(settings)),
        ids=ids, weights=weights,
        plane=load_router_weight(bench.device, weight, grid_exponent=LOGIT_GRID))


def _call(bench: Bench, moe: Moe, x: NDArray[np.float32], task: int) -> Run:
    return measured(
        bench, x, lambda sent: (moe(sent, task=task), bench.device.last_cycles))


EDGE_MOE = AcceleratorConfig(
    name="edge256", port_bytes=32, row_multipliers=4, token_lanes=2, token_groups=32, max_dim=512,
    max_experts=16, max_tokens=256, max_assignments=1024, read_ahead_beats=512, tile_words=256,
    quantiser_lanes=16, y_banks=2, results_per_cycle=2, hidden_banks=2)
"""256 multipliers of 8 bits behind 32 bytes a cycle, for small experts: a pass holds 64 tokens, so
that each weight is read once, and two results are rounded in a cycle."""


def bench_edge_moe(bench: Bench, *, tasks: int = 0) -> BenchmarkResult:
    """Run a layer of Edge-MoE's vision transformer.

    129 tokens of 192 elements, 16 experts with 384 hidden ones, two for each token, GELU, biases.

    Parameters
    ----------
    tasks : :class:`int`
        Routers, each for a task of M3ViT, with the same experts; 0: without a router.
    """
    model = Model(
        name="Edge-MoE", hf_id=None, layers=None, moe_layers=None, d_model=192, n_experts=16,
        top_k=2, native_dtype="float32", confidence=next(iter(ORIGINS)),
        router=RouterKind(flavour="R1", score="softmax", renormalize="sum"),
        expert=ExpertKind(d_expert=384, form="mlp", activation="gelu", bias="both"))
    if tasks:
        return bench_moe(bench, model, tokens=129, tasks=tasks, what="edge-moe")
    return bench_experts(bench, model, tokens=129, what="edge-moe")
