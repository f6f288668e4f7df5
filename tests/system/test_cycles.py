"""The cycle model against the RTL behind an ideal memory: 1 % or 16 cycles."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from moeaccel import cycles
from moeaccel.config import PRESETS, AcceleratorConfig, preset
from moeaccel.cycles import Prediction, predict_experts, predict_linear, token_router
from moeaccel.cycles.activation_loader import PACE
from moeaccel.cycles.expert_table import ENTRIES
from moeaccel.formats import weight_format
from moeaccel.hdl.activations import activation_loader
from moeaccel.hdl.activations.activation_unit import ActivationUnit
from moeaccel.hdl.activations.block_quantiser import BlockQuantiser
from moeaccel.hdl.array.dot_array import DotArray
from moeaccel.hdl.array.float_adder import FloatAdder
from moeaccel.hdl.array.result_serialiser import ResultSerialiser
from moeaccel.hdl.combine.row_sums import RowSums
from moeaccel.hdl.combine.to_float32 import ToFloat32
from moeaccel.hdl.dispatch.expert_table import ExpertTable
from moeaccel.hdl.router.dropper import Dropper
from moeaccel.hdl.router.score_unit import ScoreMode, ScoreUnit
from moeaccel.hdl.router.token_router import DIVIDE_CYCLES, SETTLE_CYCLES
from moeaccel.hdl.router.top_selector import TopSelector
from moeaccel.hdl.router.weight_unit import WeightUnit
from moeaccel.hdl.weights.tile_buffer import TileBuffer
from moeaccel.hdl.weights.weight_streamer import WeightStreamer
from moeaccel.host.device import Device
from moeaccel.image import Expert, ExpertShape, Section
from moeaccel.interface.commands import ElementType
from moeaccel.router.choices import Score
from moeaccel.sim import MemoryModel

EXACT = ("busy", "bytes_read_weights", "bytes_read_other", "bytes_written")
"""Counters that the model must not estimate."""


@dataclass(frozen=True)
class Case:
    """One command; without ``ids`` a GEMM from ``d_in`` to ``d_other``.

    Experts of a ``mixed`` layer take turns in formats, activation and width, ``d_other`` the first.
    ``narrow``: x and y in bfloat16.
    """

    d_in: int
    d_other: int
    weight_format: str
    planes: int
    tokens: int
    experts: int = 1
    ids: tuple[tuple[int, ...], ...] = ()
    mixed: bool = False
    narrow: bool = False

    @classmethod
    def draw(cls, rng: np.random.Generator, config: AcceleratorConfig, most_steps: int) -> Case:
        """Draw sizes of every magnitude whose array steps are at most so many."""
        while True:
            blocks = min(config.max_steps, 32)
            d_in, d_other = (32 * np.exp2(rng.uniform(0, np.log2(blocks), 2)).round().astype(int))
            tokens = int(np.exp2(rng.uniform(0, 6)).round())
            planes = int(rng.integers(1, 3))
            name = str(rng.choice(config.formats))
            if rng.random() < 0.25:
                case = cls(int(d_in), int(d_other), name, planes, tokens)
            else:
                experts = int(rng.integers(1, min(config.max_experts, 24) + 1))
                top_k = int(rng.integers(1, min(experts, 8) + 1))
                ids = np.stack([rng.permutation(experts)[:top_k] for _ in range(tokens)])
                kind = rng.integers(4)
                if kind == 0:
                    ids[rng.random(ids.shape) < 0.3] = -1
                elif kind == 1:
                    ids[:] = np.sort(ids[0])
                case = cls(int(d_in), int(d_other), name, planes, tokens, experts,
                           tuple(map(tuple, ids.tolist())))
            if (tokens * case.top_k <= config.max_assignments
                    and case.predict(config, 40).cycles <= most_steps):
                return case

    @classmethod
    def draw_small(cls, rng: np.random.Generator, config: AcceleratorConfig) -> Case:
        """Draw what is over before a pipeline is full: there a cycle at the wrong place shows."""
        d_in, d_other = (32 * int(n) for n in np.exp2(rng.uniform(0, 3, 2)))
        tokens, planes = int(rng.integers(1, 6)), int(rng.integers(1, 3))
        name = str(rng.choice(config.formats))
        if rng.random() < 0.2:
            return cls(d_in, d_other, name, planes, tokens)
        experts = int(rng.integers(1, 5))
        top_k = int(rng.integers(1, experts + 1))
        ids = np.stack([rng.permutation(experts)[:top_k] for _ in range(tokens)])
        if rng.random() < 0.3:
            ids[:] = ids[0]
        elif rng.random() < 0.3:
            ids[rng.random(ids.shape) < 0.3] = -1
        return cls(d_in, d_other, name, planes, tokens, experts, tuple(map(tuple, ids.tolist())))

    @property
    def top_k(self) -> int:
        return len(self.ids[0]) if self.ids else 1

    def shapes(self, config: AcceleratorConfig) -> list[ExpertShape]:
        """Return the shape of each expert."""
        names = list(config.formats)
        begin, blocks = names.index(self.weight_format), config.max_dim // 32
        return [
            ExpertShape(
                weight_format(names[(begin + e * self.mixed) % len(names)]), self.d_in,
                32 * ((self.d_other // 32 - 1 + e * self.mixed) % blocks + 1),
                config.row_multipliers, config.channels,
                down_format=weight_format(names[(begin + 2 * e * self.mixed) % len(names)]),
                activation=("silu", "relu")[e * self.mixed % 2],
                gate_up_biased=bool(self.biases(e) & 1), down_biased=bool(self.biases(e) & 2))
            for e in range(self.experts)]

    def biases(self, expert: int) -> int:
        """Return which rows of an expert have biases: 1 gate and up, 2 down, 3 both."""
        return (self.d_in // 32 + self.tokens + expert * self.mixed) % 4

    def predict(self, config: AcceleratorConfig, latency: int) -> Prediction:
        """Return what the model says."""
        fmt, array = weight_format(self.weight_format), (config.row_multipliers, config.channels)
        options: dict[str, Any] = {"planes": self.planes, "latency": latency,
                                   "io": ElementType(self.narrow)}
        if not self.ids:
            section = Section(fmt, self.d_other, self.d_in, *array, bool(self.biases(0) & 1))
            return predict_linear(config, section, self.tokens, **options)
        return predict_experts(
            config, self.shapes(config), np.array(self.ids), self.experts, **options)

    def measure(self, device: Device) -> dict[str, int]:
        """Return the completion's cycles and what the counters counted. Values do not matter."""
        before = device.counters()
        x = torch.ones(self.tokens, self.d_in,
                       dtype=torch.bfloat16 if self.narrow else torch.float32)
        bits = 8 * self.planes
        if self.ids:
            ids = np.array(self.ids)
            made: dict[ExpertShape, Expert] = {}
            for shape in (shapes := self.shapes(device.config)):
                made[shape] = made.get(shape) or Expert.quantise(
                    np.ones((2 * shape.d_expert, shape.d_model), np.float32),
                    np.ones((shape.d_model, shape.d_expert), np.float32), shape.format,
                    prune="magnitude", down_format=shape.down.format, activation=shape.activation,
                    gate_up_bias=np.ones(2 * shape.d_expert) if shape.gate_up_biased else None,
                    down_bias=np.ones(shape.d_model) if shape.down_biased else None)
            with device.load_quantised([made[shape] for shape in shapes], activation_bits=bits,
                                       grid_exponent=0) as layer:
                handle = layer.submit(x, ids, np.ones(ids.shape, np.float32))
                layer.sync(handle)
        else:
            with device.load_linear(
                    np.ones((self.d_other, self.d_in), np.float32), activation_bits=bits,
                    weight_format=self.weight_format,
                    prune="magnitude" if "+" in self.weight_format else None,
                    bias=np.ones(self.d_other) if self.biases(0) & 1 else None) as layer:
                handle = layer.submit(x)
                layer.sync(handle)
        after = device.counters()
        return {"cycles": handle.cycles} | {name: after[name] - before[name] for name in after}


def compare(pair_of, config: str | AcceleratorConfig, latency: int, *, count: int, seed: int,
            most_cycles: int) -> None:
    """Draw cases, and hold the model to the RTL in each."""
    rng = np.random.default_rng(seed)
    hold(pair_of, config, latency, [Case.draw(rng, preset(config), most_cycles)
                                    for _ in range(count)])


def compare_small(pair_of, config: str | AcceleratorConfig, latency: int, *, count: int,
                  seed: int) -> None:
    """The same for small shapes."""
    rng = np.random.default_rng(seed)
    hold(pair_of, config, latency, [Case.draw_small(rng, preset(config)) for _ in range(count)])


def hold(pair_of, config: str | AcceleratorConfig, latency: int, cases: list[Case]) -> None:
    """Hold the model to the RTL in each case."""
    wrong = []
    with pair_of(config, memory=MemoryModel.ideal(latency, size=1 << 28),
                 timeout_s=300) as pair:
        for case in cases:
            measured = case.measure(pair.rtl)
            predicted = case.predict(preset(config), latency)
            off = predicted.cycles - measured["cycles"]
            exact = all(getattr(predicted, name) == measured[name] for name in EXACT)
            if abs(off) > max(16, measured["cycles"] // 100) or not exact:
                wrong.append((off, measured, predicted, case))
    assert not wrong


@pytest.mark.timeout(900)  # the first run builds the model
@pytest.mark.parametrize(("config", "latency", "count", "most_cycles"), [
    ("tiny", 1, 8, 40_000),
    ("tiny", 40, 16, 40_000),
    ("tiny", 300, 8, 40_000),
    ("small", 1, 6, 20_000),
    ("small", 40, 10, 20_000),
    ("small", 200, 6, 20_000),
])
def test_the_model_predicts_the_rtl(pair_of, config, latency, count, most_cycles):
    compare(pair_of, config, latency, count=count, seed=latency, most_cycles=most_cycles)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("config", "latency", "count"), [
    ("tiny", 1, 60), ("tiny", 40, 30), ("small", 1, 120), ("small", 40, 60)])
def test_the_model_predicts_small_shapes(pair_of, config, latency, count):
    compare_small(pair_of, config, latency, count=count, seed=latency)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("config", "latency"), [("tiny", 1), ("small", 40)])
def test_the_model_predicts_bfloat16(pair_of, config, latency):
    rng = np.random.default_rng(3000 + latency)
    hold(pair_of, config, latency,
         [replace(Case.draw_small(rng, preset(config)), narrow=True) for _ in range(30)])


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("config", "latency"), [("tiny", 1), ("tiny", 40), ("small", 40)])
def test_the_model_predicts_mixed_layers(pair_of, config, latency):
    rng = np.random.default_rng(2000 + latency)
    cases = [replace(Case.draw_small(rng, preset(config)), mixed=True) for _ in range(30)]
    # Many experts of one token each: little hides how their entries come.
    spread = tuple((expert,) for expert in range(16))
    cases += [Case(64, 32, "mxfp4", 2, 16, 16, spread, mixed=True),
              Case(32, 32, "mxint8", 1, 1, 16, ((15,),), mixed=True)]
    hold(pair_of, config, latency, cases)


def test_the_second_row_of_x_and_the_second_image(pair_of):
    """They are asked for in the same cycle: the row comes first, and does not wait for a burst."""
    both = (0, 1), (0, 1)
    hold(pair_of, "small", 1, [Case(32, 32, "mxint8", 2, 2, 2, both),
                               Case(32, 96, "int4_g32", 1, 2, 2, both),
                               Case(32, 192, "mxfp4", 1, 2, 2, both)])


@pytest.mark.timeout(900)
@pytest.mark.parametrize("latency", [1, 40])
def test_a_decode_is_predicted_exactly(pair_of, latency):
    """Where nothing but the memory is waited for, every counter is."""
    config = preset("small")
    names = ("cycles", "busy", "starved_weights", "starved_activations", "stalled_output")
    with pair_of(config, memory=MemoryModel.ideal(latency, size=1 << 28), timeout_s=300) as pair:
        for d, experts in ((32, 1), (64, 6), (256, 3)):
            case = Case(d, d, "mxfp4", 1, 1, experts, (tuple(range(experts)),))
            measured, predicted = case.measure(pair.rtl), case.predict(config, latency)
            assert {name: getattr(predicted, name) for name in names} == {
                name: measured[name] for name in names}
            # Idle cycles before the command are counted, too.
            assert predicted.idle <= measured["idle"]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("latency", [1, 7, 40, 100, 300])
@pytest.mark.parametrize(("config", "count", "most_cycles"), [
    ("tiny", 40, 200_000),
    ("small", 30, 100_000),
    ("peer256", 15, 50_000),
    ("wide512", 15, 50_000),
])
def test_the_model_predicts_the_rtl_in_many_cases(pair_of, config, latency, count, most_cycles):
    compare(pair_of, config, latency, count=count, seed=1000 + latency, most_cycles=most_cycles)
    compare_small(pair_of, config, latency, count=150, seed=1000 + latency)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("latency", [1, 40, 100])
@pytest.mark.parametrize("changes", [
    {"y_banks": 2}, {"y_banks": 2, "hidden_banks": 2, "results_per_cycle": 2}],
    ids=["two banks of y", "passes overlap"])
def test_the_model_predicts_passes_side_by_side(pair_of, changes, latency):
    config = preset("tiny").replace(**changes)
    compare(pair_of, config, latency, count=12, seed=latency, most_cycles=40_000)
    compare_small(pair_of, config, latency, count=40, seed=latency)


@pytest.mark.parametrize("config", PRESETS.values(), ids=list(PRESETS))
def test_constants_are_the_blocks_own(config):
    assert cycles.ARRAY_CYCLES == DotArray.LATENCY_CYCLES
    assert cycles.element_cycles(config) == ResultSerialiser(config).latency_cycles
    assert cycles.ADDER_CYCLES == FloatAdder.LATENCY_CYCLES
    assert cycles.ACTIVATION_CYCLES == ActivationUnit.LATENCY_CYCLES
    assert cycles.QUANTISER_CYCLES == BlockQuantiser.LATENCY_CYCLES
    assert cycles.COMBINER_CYCLES == RowSums.LATENCY_CYCLES
    assert cycles.SUMS_READ_CYCLES == RowSums.READ_LATENCY_CYCLES
    assert cycles.FLOAT_CYCLES == ToFloat32.LATENCY_CYCLES
    assert cycles.ROW_EXPONENTS == TileBuffer(config).row_exponent_depth - TileBuffer.ROWS_MARGIN
    assert cycles.GRANT_CYCLES == WeightStreamer.BURST_CYCLES
    assert ENTRIES == ExpertTable.ENTRIES
    assert activation_loader.PACE == PACE


def test_constants_of_the_router_are_the_blocks_own():
    unit = ScoreUnit(preset("small").router_scores, tag_bits=1)
    assert unit.latency_cycles(ScoreMode.EXPONENTIAL) == token_router.EXPONENTIAL_CYCLES
    assert {score: unit.latency_cycles(mode) for score, mode in (
        (Score.SOFTMAX, ScoreMode.QUOTIENT), (Score.SIGMOID, ScoreMode.SIGMOID),
        (Score.SQRT_SOFTPLUS, ScoreMode.SQRT_SOFTPLUS),
    )} | {Score.IDENTITY: 0} == token_router.SCORE_CYCLES
    assert WeightUnit.LATENCY_CYCLES == token_router.WEIGHT_CYCLES
    assert TopSelector.LATENCY_CYCLES == token_router.SELECT_CYCLES
    assert Dropper.LATENCY_CYCLES == token_router.DROP_CYCLES
    assert SETTLE_CYCLES == token_router.SETTLE_CYCLES
    assert DIVIDE_CYCLES == token_router.DIVIDE_CYCLES
