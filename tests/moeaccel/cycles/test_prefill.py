"""What prefill costs, by the cycle model: where array or rounding of results is the limit."""

import numpy as np
import pytest

from moeaccel.config import PRESETS
from moeaccel.cycles import expert_cycles, linear_cycles
from moeaccel.formats import FORMATS
from moeaccel.host.benchmark import routing
from moeaccel.host.benchmark_moe import EDGE_MOE
from moeaccel.image import ExpertShape, Section
from moeaccel.interface.commands import ElementType

INT8 = FORMATS["mxint8"]


@pytest.mark.parametrize(("tokens", "most"), [
    (1, 137_000), (16, 145_900), (64, 545_000), (256, 256 * 2048 * 1024 // 256 / 0.98)])
def test_a_product_runs_at_the_arrays_rate(tokens, most):
    """K 2048, N 1024 in mxint8 and a8, x and y in bfloat16, behind a latency of 100 cycles."""
    config = PRESETS["peer256"]
    section = Section(INT8, 1024, 2048, config.row_multipliers, config.channels)
    cycles = linear_cycles(
        config, section, tokens, planes=1, latency=100, io=ElementType.BFLOAT16)
    assert 2048 * 1024 * max(1 / 16, tokens / 256) < cycles <= most


@pytest.mark.parametrize(("results", "most"), [(1, 185_000), (2, 161_500)])
def test_small_experts_are_bound_by_results(results, most):
    """Edge-MoE's layer: 258 pairs of 576 cycles each, and 8 results in 6 cycles of gate rows."""
    config = EDGE_MOE.replace(results_per_cycle=results)
    shape = ExpertShape(
        INT8, 192, 384, config.row_multipliers, config.channels, activation="gelu", gated=False)
    ids = routing(129, 16, 2, kind="uniform", seed=0)
    lanes = sum(-(-count // config.token_lanes) * config.token_lanes
                for count in np.bincount(ids.ravel(), minlength=16).tolist())
    cycles = expert_cycles(
        config, shape, ids, 16, planes=1, latency=100, io=ElementType.BFLOAT16)
    assert 576 * lanes < cycles <= most
    slower = config.replace(hidden_banks=1, y_banks=1)
    assert cycles < 0.97 * expert_cycles(
        slower, shape, ids, 16, planes=1, latency=100, io=ElementType.BFLOAT16)
