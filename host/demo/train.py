"""Train the demo model: ``python -m moeaccel.host.demo.train``.

Needs transformers and two processor cores; nothing of the accelerator.
"""

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from moeaccel.host.demo import CHECKPOINT
from moeaccel.host.demo.evaluate import accuracy
from moeaccel.host.demo.tasks import TASKS, Example, build_tokenizer, examples

__all__ = ["build_model", "train"]

IGNORED_LABEL = -100
TEST_PROMPTS_PER_TASK = 500
LOG_INTERVAL_STEPS = 100

console = Console()
app = typer.Typer(add_completion=False)


def build_model(tokenizer: PreTrainedTokenizerBase, *, seed: int) -> Qwen3MoeForCausalLM:
    """Build the untrained model.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
        Gives the size of the vocabulary and the special tokens.
    seed : int
        Seed of the initial weights.
    """
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "intermediate_size": 64,  # of layers without experts, of which there are none
        "norm_topk_prob": True,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        "initializer_range": 0.05,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**settings))


def _batch(
    tokenizer: PreTrainedTokenizerBase, batch: list[Example]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return token ids, attention mask and labels; only the answer and its end are labelled."""
    prompts = tokenizer([e.prompt for e in batch])["input_ids"]
    answers = tokenizer([e.answer for e in batch], add_special_tokens=False)["input_ids"]
    length = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True)) + 1
    ids = torch.zeros((len(batch), length), dtype=torch.long)  # padding is masked: any id will do
    labels = torch.full((len(batch), length), IGNORED_LABEL)
    mask = torch.zeros((len(batch), length), dtype=torch.long)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        end = len(prompt) + len(answer) + 1
        ids[row, :end] = torch.tensor([*prompt, *answer, tokenizer.eos_token_id])
        labels[row, len(prompt) : end] = ids[row, len(prompt) : end]
        mask[row, :end] = 1
    return ids, mask, labels


def _balance(
    router_logits: tuple[torch.Tensor, ...], mask: torch.Tensor, top_k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the load-balancing loss and the share of each expert, layer by layer.

    The loss of a layer is E * sum(share * mean probability), 1 when all experts are loaded
    equally. It is taken for each layer by itself: pooled over the layers, one layer's idle expert
    could hide behind another's busy one.
    """
    real = mask.reshape(-1).bool()
    losses, shares = [], []
    for logits in router_logits:
        probability = logits.reshape(-1, logits.shape[-1])[real].float().softmax(dim=-1)
        chosen = probability.topk(top_k, dim=-1).indices.reshape(-1)
        share = torch.bincount(chosen, minlength=logits.shape[-1]) / chosen.numel()
        losses.append(logits.shape[-1] * (share * probability.mean(dim=0)).sum())
        shares.append(share)
    return torch.stack(losses).mean(), torch.stack(shares)


def _learning_rate(step: int, *, steps: int, warmup: int, floor: float) -> float:
    """Return the factor on the peak rate: linear warm-up, then a half cosine down to the floor."""
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))


def _streams(seed: int) -> dict[str, Iterator[Example]]:
    """Open one endless stream of training examples for each task."""
    return {
        name: examples(task, split="train", rng=Random(f"{name}/train/{seed}"))
        for name, task in TASKS.items()
    }


def train(
    *,
    seed: int,
    steps: int,
    batch_size: int,
    learning_rate: float,
    weight_decay: float,
    balance: float,
) -> tuple[Qwen3MoeForCausalLM, PreTrainedTokenizerBase, torch.Tensor]:
    """Train the model from nothing and show the progress.

    Parameters
    ----------
    seed : int
        Seed of the weights and of the examples.
    steps : int
        Optimiser steps.
    batch_size : int
        Examples a step, shared equally by the tasks.
    learning_rate : float
        Peak rate of AdamW.
    weight_decay : float
        Weight decay of AdamW, on matrices only.
    balance : float
        Weight of the load-balancing loss.

    Returns
    -------
    tuple[Qwen3MoeForCausalLM, PreTrainedTokenizerBase, torch.Tensor]
        The model, its tokenizer, and the share of each expert by layer in the last steps.
    """
    if batch_size < len(TASKS) or batch_size % len(TASKS):
        raise ValueError(f"Batch size must be a multiple of {len(TASKS)}, not {batch_size!r}")
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, seed=seed)
    streams = _streams(seed)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    optimiser = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=learning_rate,
        betas=(0.9, 0.98),
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda step: _learning_rate(step, steps=steps, warmup=min(100, steps), floor=0.02),
    )
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    running = dict.fromkeys(TASKS, 0.0)
    shares = torch.zeros(model.config.num_hidden_layers, model.config.num_experts)
    model.train()
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=steps)
        for step in range(steps):
            batch = [next(s) for s in streams.values() for _ in range(batch_size // len(TASKS))]
            ids, mask, labels = _batch(tokenizer, batch)
            output = model(
                input_ids=ids, attention_mask=mask, use_cache=False, output_router_logits=True
            )
            wanted = labels[:, 1:]
            loss = functional.cross_entropy(
                output.logits[:, :-1].flatten(0, 1), wanted.flatten(), ignore_index=IGNORED_LABEL
            )
            balance_loss, share = _balance(
                output.router_logits, mask, model.config.num_experts_per_tok
            )
            optimiser.zero_grad(set_to_none=True)
            (loss + balance * balance_loss).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()

            right = (output.logits[:, :-1].argmax(-1) == wanted) | (wanted == IGNORED_LABEL)
            by_task = right.all(dim=1).float().reshape(len(TASKS), -1).mean(dim=1).tolist()
            for name, value in zip(TASKS, by_task, strict=True):
                running[name] += 0.05 * (value - running[name])
            shares += 0.05 * (share - shares)
            text = f"loss {loss.item():.4f}  " + "  ".join(
                f"{name} {value:.0%}" for name, value in running.items()
            )
            progress.update(bar, advance=1, description=text)
            if (step + 1) % LOG_INTERVAL_STEPS == 0:
                progress.console.print(
                    f"step {step + 1:5d}  {text}  balance {balance_loss.item():.2f}",
                    soft_wrap=True,
                )
    return model.eval(), tokenizer, shares


@app.command()
def main(
    output: Annotated[Path, typer.Option(help="Folder to write the checkpoint to.")] = CHECKPOINT,
    seed: Annotated[int, typer.Option(help="Seed of the weights and of the examples.")] = 1,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.")] = 3000,
    batch_size: Annotated[int, typer.Option(help="Examples a step, over all tasks.")] = 256,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate of AdamW.")] = 3e-3,
    weight_decay: Annotated[float, typer.Option(help="Weight decay of AdamW.")] = 0.05,
    balance: Annotated[float, typer.Option(help="Weight of the load-balancing loss.")] = 0.01,
    threads: Annotated[int, typer.Option(min=1, help="Processor threads.")] = 2,
) -> None:
    """Train the demo model, store it, and mark what was stored on unseen prompts."""
    torch.set_num_threads(threads)
    transformers.utils.logging.disable_progress_bar()
    start = time.monotonic()
    model, tokenizer, shares = train(
        seed=seed,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        balance=balance,
    )
    minutes = (time.monotonic() - start) / 60
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)

    stored = AutoModelForCausalLM.from_pretrained(output)
    marks = accuracy(
        stored,
        AutoTokenizer.from_pretrained(output),
        prompts_per_task=TEST_PROMPTS_PER_TASK,
        seed=seed,
    )
    options = {
        "seed": seed,
        "steps": steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "weight_decay": weight_decay,
        "balance": balance,
        "threads": threads,
    }
    command = "python -m moeaccel.host.demo.train " + " ".join(
        f"--{name.replace('_', '-')} {value}" for name, value in options.items()
    )
    record = {
        "command": command,
        **options,
        "minutes": round(minutes, 1),
        "parameters": stored.num_parameters(),
        "test_prompts_per_task": TEST_PROMPTS_PER_TASK,
        "accuracy": marks,
        "least_expert_share": [round(layer.min().item(), 3) for layer in shares],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    (output / "training.json").write_text(json.dumps(record, indent=2) + "\n")

    table = Table(title=f"{TEST_PROMPTS_PER_TASK} unseen prompts for each task")
    table.add_column("task")
    table.add_column("right", justify="right")
    for name, value in marks.items():
        table.add_row(name, f"{value:.1%}")
    console.print(table)
    console.print(f"{minutes:.1f} minutes; stored in {output}")


if __name__ == "__main__":
    app()
