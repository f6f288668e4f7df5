"""Measure variants of a model's experts on a text."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moeaccel.config import AcceleratorConfig, preset
from moeaccel.cycles import expert_cycles
from moeaccel.formats import weight_format
from moeaccel.host.calibration import Calibration
from moeaccel.host.compress.layer import FloatExpert
from moeaccel.host.compress.mc_moe import FORMATS, allocate, importance
from moeaccel.host.compress.method import with_formats
from moeaccel.host.compress.moe_pruner import input_norms, pruned
from moeaccel.host.errors import InvalidOption
from moeaccel.host.quality.experts import (
    FastExperts,
    Observed,
    experts_modules,
    float_experts,
    observe,
    use_layers,
)
from moeaccel.host.quality.measure import Predictions, compare, predictions
from moeaccel.host.quality.text import reference_text, reference_tokens, text_digest
from moeaccel.host.quality.variants import Variant
from moeaccel.image import Expert, interleave_gate_up

__all__ = ["QualityResult", "Study", "open_study"]

Progress = Callable[[str], None]

CYCLE_TOKENS = 8
"""Tokens whose routes decode cycles are averaged over, where experts differ."""


@dataclass(frozen=True)
class QualityResult:
    """What a variant costs, and what it gives.

    Parameters
    ----------
    variant, weight_format : :class:`str`
        As a table names it; ``float`` is the reference.
    activation_bits : :class:`int`
        32 of the reference.
    quantiser, criterion : :class:`str`, optional
    calibrated : :class:`bool`
    bits_per_weight : :class:`float`
    stored_bytes : :class:`int`
        Of all experts: weights, scales, row exponents; of the reference, of bfloat16.
    decode_cycles : :class:`int`, optional
        Of the experts of all layers for one token, by the cycle model; where a device does that.
    weight_error : :class:`float`
        Relative Frobenius error of all experts' weights.
    perplexity, perplexity_error, loss_difference, loss_difference_error, kl, kl_error, top1
        See :class:`moeaccel.host.quality.measure.Quality`.
    golden_tokens : :class:`int`
        Tokens that the golden model read, too.
    golden_perplexity, fast_perplexity : :class:`float`, optional
        On these, of the golden model and of the fast path that gave the other figures.
    """

    variant: str
    weight_format: str
    activation_bits: int
    quantiser: str | None
    criterion: str | None
    calibrated: bool
    bits_per_weight: float
    stored_bytes: int
    decode_cycles: int | None
    weight_error: float
    perplexity: float
    perplexity_error: float
    loss_difference: float
    loss_difference_error: float
    kl: float
    kl_error: float
    top1: float
    golden_tokens: int = 0
    golden_perplexity: float | None = None
    fast_perplexity: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return every figure for JSON."""
        return asdict(self)


class Study:
    """A model, a text, and what the experts of each layer meet in another part of the text.

    Parameters
    ----------
    model : transformers model
        With experts behind transformers' experts interface, on the host.
    tokens : int64 tensor, (W, T)
        What is read, each window by itself.
    calibration : int64 tensor, (V, C)
        What activations for quantisers, pruning and mixed bits are taken from.
    config : :class:`AcceleratorConfig`
        Of the device whose cycles are stated, and of the golden model.
    progress : callable
    """

    def __init__(self, model: Any, tokens: torch.Tensor, calibration: torch.Tensor, *,
                 config: AcceleratorConfig, progress: Progress = lambda _: None) -> None:
        self.model, self.tokens, self.calibration_tokens = model, tokens, calibration
        self.config = config
        self._progress = progress
        self.floats: list[list[FloatExpert]] = [
            float_experts(weights) for _, weights in experts_modules(model)]
        for name, part in (("tokens", tokens), ("calibration", calibration)):
            most = getattr(model.config, "max_position_embeddings", None) or part.shape[1]
            if not 2 <= part.shape[1] <= most:
                raise InvalidOption(f"{name} must be 2 to the {most} that the model has positions "
                                    f"for, not {part.shape[1]}")
        self._observed: list[Observed] | None = None
        self._reference: Predictions | None = None
        self._routes: list[NDArray[np.int64]] = []
        self._cycles: dict[Any, int] = {}

    # -- what is known of the float model ----------------------------------------------------------
    def _float_layers(self) -> list[FastExperts]:
        return [FastExperts(experts, 0) for experts in self.floats]

    @property
    def observed(self) -> list[Observed]:
        """What each layer was asked while the float model read the calibration text."""
        if self._observed is None:
            self._progress("reading the calibration text in float")
            self._observed = self._watch(self.calibration_tokens)[1]
        return self._observed

    @property
    def reference(self) -> Predictions:
        """The float model's predictions."""
        if self._reference is None:
            self._progress("reading the text in float")
            self._reference, seen = self._watch(self.tokens)
            step = max(1, self.tokens.numel() // CYCLE_TOKENS)
            self._routes = [layer.ids[::step][:CYCLE_TOKENS] for layer in seen]
        return self._reference

    def _watch(self, tokens: torch.Tensor) -> tuple[Predictions, list[Observed]]:
        layers, seen = observe(self._float_layers())
        found = self.read(layers, tokens)
        return found, [seen[index] for index in range(len(layers))]

    def read(self, layers: list[Any], tokens: torch.Tensor | None = None) -> Predictions:
        """Return the model's predictions with other experts."""
        tokens = self.tokens if tokens is None else tokens
        with torch.inference_mode(), use_layers(self.model, layers):
            return predictions(self.model(tokens, use_cache=False).logits, tokens)

    # -- what experts become -----------------------------------------------------------------------
    def quantised(self, variant: Variant) -> list[list[Expert]]:
        """Return the experts of each layer as a variant stores them."""
        layers = []
        for index, experts in enumerate(self.floats):
            self._progress(f"{variant.label}: quantising layer {index + 1} of {len(self.floats)}")
            needs = variant.calibrated or variant.criterion == "activation"
            seen = self.observed[index] if needs else None
            if variant.bits is None:
                layers.append([self._quantised(e, expert, variant, seen)
                               for e, expert in enumerate(experts)])
            else:
                layers.append(self._mixed(experts, variant, variant.bits, seen))
        return layers

    def _quantised(self, e: int, expert: FloatExpert, variant: Variant,
                   seen: Observed | None) -> Expert:
        gate_up, down = expert.gate_up, expert.down
        d_expert = down.shape[1]
        moments: tuple[Any, Any] = None, None
        if variant.calibrated and seen is not None:
            calibration = Calibration(seen.x, seen.ids, d_model=len(down),
                                      num_experts=int(seen.ids.max()) + 1 + e)
            moments = calibration.moments(
                e, gate_up, d_expert, expert.activation, expert.limit, None,
                second=variant.quantiser == "gptq")
        if variant.pattern is not None:
            norms: tuple[Any, Any] = None, None
            if variant.criterion == "activation" and seen is not None:
                norms = input_norms(seen.x, seen.ids, seen.weights, e, gate_up, d_expert,
                                    expert.activation, expert.limit)
            thin = pruned(expert, weight_format(variant.base), variant.pattern, norms,
                          channels=self.config.channels)
            gate_up, down = thin.gate_up, thin.down
        return Expert.quantise(
            gate_up, down, variant.stored, activation=expert.activation, limit=expert.limit,
            quantiser=variant.quantiser, moments=moments)

    def _mixed(self, experts: list[FloatExpert], variant: Variant, bits: float,
               seen: Observed | None) -> list[Expert]:
        """Return the experts of a layer, each in the format that MC-MoE's programme gives it."""
        choices = [[self._quantised(e, expert, Variant(name, 16, variant.quantiser, True), seen)
                    for name in FORMATS] for e, expert in enumerate(experts)]
        sizes = np.array([[self._bytes(choice) for choice in row] for row in choices])
        errors = np.array([[np.sqrt(_error(choice, expert)[0]) for choice in row]
                           for row, expert in zip(choices, experts, strict=True)])
        assert seen is not None
        costs = importance(seen.ids, seen.weights, len(experts))[:, None] * errors
        count = sum(expert.size for expert in experts)
        found = allocate(costs, sizes, int(bits * count / 8))
        return [row[choice] for row, choice in zip(choices, found, strict=True)]

    def _bytes(self, expert: Expert) -> int:
        return expert.shape(self.config.row_multipliers, self.config.channels).stored_bytes

    # -- what it costs, what it gives --------------------------------------------------------------
    def measure(self, variants: Iterable[Variant], *, golden_tokens: int = 0
                ) -> Iterator[QualityResult]:
        """Yield what each variant costs and gives, the reference first.

        Parameters
        ----------
        variants : iterable of :class:`Variant`
        golden_tokens : :class:`int`
            The golden model reads the first so many tokens of the first window, too.
        """
        reference = self.reference
        count = sum(e.size for layer in self.floats for e in layer)
        yield QualityResult(
            "float", "float", 32, None, None, False, 16.0, 2 * count, None, 0.0,
            **asdict(compare(reference, reference)))
        last: tuple[Variant, list[list[Expert]]] | None = None
        for variant in variants:
            if last is None or last[0] != variant.weights:
                last = variant.weights, self.quantised(variant)
            layers, planes = last[1], variant.planes
            self._progress(f"{variant.label}: reading the text")
            found = self.read([FastExperts(experts, planes) for experts in layers])
            golden = (self._golden(layers, variant, golden_tokens, found)
                      if golden_tokens and planes else {})
            size = sum(self._bytes(expert) for experts in layers for expert in experts)
            sums = np.sum([_error(expert, exact) for experts, floats
                           in zip(layers, self.floats, strict=True)
                           for expert, exact in zip(experts, floats, strict=True)], axis=0)
            yield QualityResult(
                variant.label, variant.weight_format, variant.activation_bits, variant.quantiser,
                variant.criterion, variant.calibrated, 8 * size / count, size,
                self._decode_cycles(layers, planes) if planes else None,
                float(np.sqrt(sums[0] / sums[1])),
                **asdict(compare(found, reference)), **golden)

    def _decode_cycles(self, layers: list[list[Expert]], planes: int) -> int:
        """Return the cycles of all layers' experts for one token: for the first, or the mean of
        some where experts differ."""
        total = 0.0
        config = with_formats(self.config, _names(layers))
        for experts, routes in zip(layers, self._routes, strict=True):
            shapes = [expert.shape(self.config.row_multipliers, self.config.channels)
                      for expert in experts]
            each = routes if len(set(shapes)) > 1 else routes[:1]
            cycles = []
            for ids in each:
                key = tuple(shapes), tuple(ids.tolist()), planes
                if key not in self._cycles:
                    self._cycles[key] = expert_cycles(
                        config, shapes, ids[None], len(experts), planes=planes)
                cycles.append(self._cycles[key])
            total += sum(cycles) / len(cycles)
        return round(total)

    def _golden(self, layers: list[list[Expert]], variant: Variant, count: int,
                fast: Predictions) -> dict[str, Any]:
        """Return the perplexities of golden model and fast path on the first tokens."""
        from moeaccel.host import open_device

        self._progress(f"{variant.label}: reading {count} tokens on the golden model")
        size = sum(expert.shape(self.config.row_multipliers, self.config.channels).memory_bytes
                   for experts in layers for expert in experts)
        memory = 1 << (2 * size + (1 << 27)).bit_length()
        config = with_formats(self.config, _names(layers))
        with open_device("golden", config=config, memory_bytes=memory) as device:
            loaded = [device.load_quantised(experts, activation_bits=variant.activation_bits)
                      for experts in layers]
            found = self.read(loaded, self.tokens[:1, :count])
        # The model is causal: what is behind the first tokens changes nothing of these.
        return {"golden_tokens": count,
                "golden_perplexity": float(found.loss.mean().exp()),
                "fast_perplexity": float(fast.loss[: count - 1].mean().exp())}


def _names(layers: list[list[Expert]]) -> set[str]:
    """Return the formats of all experts."""
    return {matrix.format.name for experts in layers for expert in experts
            for matrix in (expert.gate_up, expert.down)}


def _error(expert: Expert, exact: FloatExpert) -> tuple[float, float]:
    """Return the sums of squares of the error of the weights, and of the weights."""
    rows = interleave_gate_up(exact.gate_up) if expert.gated else exact.gate_up
    differences = expert.gate_up.dequantise() - rows, expert.down.dequantise() - exact.down
    return (sum(float(np.vdot(d, d)) for d in differences),
            float(np.vdot(rows, rows)) + float(np.vdot(exact.down, exact.down)))


def open_study(model: str | os.PathLike[str] = "smollm2", *, tokens: int = 1024,
               window: int = 512, calibration_tokens: int = 1024,
               config: str | AcceleratorConfig = "small",
               progress: Progress = lambda _: None) -> Study:
    """Return a study of a model on Python's reference manual.

    Parameters
    ----------
    model : :class:`str`
        ``smollm2``, or the folder of a checkpoint, with its tokenizer, that transformers loads.
    tokens, calibration_tokens : :class:`int`
        How many are read, from the beginning, and how many behind these are for calibration.
    window : :class:`int`
        Tokens that are read at a time, without what was before them.
    config : :class:`str` or :class:`AcceleratorConfig`
    progress : callable

    Raises
    ------
    ToolMissingError
        If SmolLM2 is not installed.
    InvalidOption
        If there is no such folder, or the text or the model's positions are too short.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    if str(model) == "smollm2":
        from moeaccel.host.smollm2 import checkpoint_folder

        folder = checkpoint_folder(progress)
    elif not (Path(model) / "config.json").is_file():
        raise InvalidOption(f"model must be smollm2, or the folder of a checkpoint with a "
                            f"config.json, not {str(model)!r}")
    else:
        folder = Path(model)
    logging.disable_progress_bar()
    progress("loading the model")
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for name, count in (("tokens", tokens), ("calibration_tokens", calibration_tokens)):
        if count < 2:
            raise InvalidOption(f"{name} must be at least 2, not {count}")
    return Study(loaded, reference_tokens(tokenizer, 0, tokens, window),
                 reference_tokens(tokenizer, tokens, calibration_tokens, window),
                 config=preset(config), progress=progress)


def source() -> str:
    """Return what the text is, for results."""
    return f"pydoc_data.topics, sha256 {text_digest(reference_text())}"
