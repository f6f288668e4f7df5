"""What compression passes do to the demo model's answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from random import Random
from typing import Any

import numpy as np
import torch

from moeaccel.config import AcceleratorConfig, preset
from moeaccel.host.compress.method import Report, method, report
from moeaccel.host.compress.models import RoutedExperts, layers_of
from moeaccel.host.demo import CHECKPOINT
from moeaccel.host.demo.evaluate import accuracy
from moeaccel.host.demo.tasks import TASKS, examples
from moeaccel.host.quality.experts import use_layers

__all__ = ["Compressed", "compress_demo"]


@dataclass(frozen=True)
class Compressed:
    """A pass, and what it did to the demo model.

    Parameters
    ----------
    method : :class:`str`
        ``none``: no pass, weights as the device stores them.
    options : dict
    weight_format : :class:`str`
    report : :class:`Report`
    accuracy : dict of :class:`str` to :class:`float`
        Share of right answers, by task.
    mean_accuracy : :class:`float`
    """

    method: str
    options: dict[str, Any]
    weight_format: str
    report: Report
    accuracy: dict[str, float]
    mean_accuracy: float

    def as_dict(self) -> dict[str, Any]:
        """Return every figure for JSON."""
        return asdict(self)


def compress_demo(runs: Sequence[tuple[str, dict[str, Any]]], *, weight_format: str = "int4_g32",
                  prompts_per_task: int = 64, calibration_texts: int = 64,
                  config: str | AcceleratorConfig = "small", seed: int = 0,
                  progress: Callable[[str], None] = lambda _: None) -> list[Compressed]:
    """Apply passes to all layers of the demo model, one pass at a time, and mark it on its tasks.

    Parameters
    ----------
    runs : sequence of (method, options)
        See :func:`moeaccel.host.compress.method.methods`.
    weight_format : :class:`str`
        Of all experts, but where a pass chooses others.
    prompts_per_task : :class:`int`
        Of the test set.
    calibration_texts : :class:`int`
        Prompts with their answers, of the training set, all tasks together.
    config, seed, progress

    Returns
    -------
    list of :class:`Compressed`: without a pass first, then in the order of the runs.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = preset(config)
    tokenizer: Any = AutoTokenizer.from_pretrained(CHECKPOINT)
    model: Any = AutoModelForCausalLM.from_pretrained(CHECKPOINT).eval()
    rng = Random(seed)
    texts = [example.prompt + example.answer
             for task in TASKS.values()
             for example, _ in zip(examples(task, split="train", rng=rng),
                                   range(-(-calibration_texts // len(TASKS))), strict=False)]
    progress("reading calibration texts")
    before, x = layers_of(model, [
        torch.tensor(tokenizer(text, return_token_type_ids=False)["input_ids"])[None]
        for text in texts], weight_format=weight_format)
    found = []
    for name, options in [("none", {}), *runs]:
        progress(f"{name}: compressing")
        after = before if name == "none" else method(name)(before, x, **options)
        progress(f"{name}: answering")
        with use_layers(model, [RoutedExperts(layer) for layer in after]):
            right = accuracy(model, tokenizer, prompts_per_task=prompts_per_task, seed=seed)
        known = {} if name == "none" else method(name).options
        found.append(Compressed(name, known | options, weight_format,
                                report(before, after, x, config), right,
                                float(np.mean(list(right.values())))))
    return found
