"""Mark a model on the demo tasks."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moeaccel.host.demo.tasks import TASKS, held_out_examples

__all__ = ["accuracy", "answers"]

MAX_ANSWER_TOKENS = 12
"""Longer than any right answer with its end; a model that has not stopped by then is wrong."""


def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    batch_size: int = 128,
) -> list[str]:
    """Complete prompts greedily.

    Prompts of different lengths share a batch: they are padded on the left whatever the
    tokenizer's own setting is, and the attention mask keeps the padding out of attention and out
    of the positions.

    Parameters
    ----------
    model : PreTrainedModel
        A causal language model, on any device, with any experts implementation.
    tokenizer : PreTrainedTokenizerBase
        The demo tokenizer.
    prompts : Sequence[str]
        Prompts, each ending in ``=``.
    batch_size : int
        Prompts generated together.

    Returns
    -------
    list[str]
        The answers in the order of the prompts, without special tokens.
    """
    found: list[str] = []
    for start in range(0, len(prompts), batch_size):
        batch = tokenizer(
            list(prompts[start : start + batch_size]),
            return_tensors="pt",
            padding=True,
            padding_side="left",
            return_token_type_ids=False,
        ).to(model.device)
        with torch.inference_mode():
            tokens = cast(Any, model).generate(
                **batch,
                max_new_tokens=MAX_ANSWER_TOKENS,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        new = tokens[:, batch["input_ids"].shape[1] :]
        found += tokenizer.batch_decode(new, skip_special_tokens=True)
    return found


def accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompts_per_task: int,
    seed: int,
) -> dict[str, float]:
    """Mark the model on prompts that it was never trained on.

    Parameters
    ----------
    model : PreTrainedModel
        A causal language model, on any device, with any experts implementation.
    tokenizer : PreTrainedTokenizerBase
        The demo tokenizer.
    prompts_per_task : int
        Distinct test prompts for each task.
    seed : int
        Chooses the prompts; equal seeds give equal prompts.

    Returns
    -------
    dict[str, float]
        Share of the answers that are right to the last character, by the name of the task.
    """
    result: dict[str, float] = {}
    for name, task in TASKS.items():
        wanted = held_out_examples(task, count=prompts_per_task, seed=seed)
        given = answers(model, tokenizer, [example.prompt for example in wanted])
        right = sum(a == example.answer for a, example in zip(given, wanted, strict=True))
        result[name] = right / len(wanted)
    return result
