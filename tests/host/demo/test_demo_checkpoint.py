"""The demo checkpoint: small, an ordinary transformers checkpoint, and right on unseen prompts."""

import json

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3MoeForCausalLM,
)

from moeaccel.host.demo import CHECKPOINT
from moeaccel.host.demo.evaluate import accuracy, answers
from moeaccel.host.demo.tasks import TASKS, split_of

FIXED = {
    "128+99=": "227",
    "750+512=": "1262",
    "999+512=": "1511",
    "sort router=": "eorrtu",
    "sort combine=": "bceimno",
    "sort doorbell=": "bdelloor",
    "reverse mxfp4=": "4pfxm",
    "reverse memory=": "yromem",
    "close [[]]{(=": ")}",
    "close {{}([[{}][]=": "])}",
}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(CHECKPOINT, local_files_only=True)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(CHECKPOINT, local_files_only=True)


def test_is_at_most_4_megabytes() -> None:
    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) <= 4_000_000


def test_is_a_mixture_of_experts(model: PreTrainedModel) -> None:
    assert type(model) is Qwen3MoeForCausalLM
    assert model.dtype == torch.float32
    assert model.config.num_experts >= 8
    assert model.config.num_experts_per_tok >= 2
    assert model.config.tie_word_embeddings
    assert model.config.hidden_size % 32 == 0
    assert model.config.moe_intermediate_size % 32 == 0
    assert all(hasattr(layer.mlp, "experts") for layer in model.model.layers)


def test_answers_fixed_prompts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    assert all(split_of(prompt) == "test" for prompt in FIXED)
    given = answers(model, tokenizer, list(FIXED))
    right = sum(a == b for a, b in zip(given, FIXED.values(), strict=True))
    assert right >= 9, dict(zip(FIXED, given, strict=True))


def test_padding_does_not_change_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    together = answers(model, tokenizer, list(FIXED))
    assert together == answers(model, tokenizer, list(FIXED), batch_size=1)
    assert together == answers(model, tokenizer, list(FIXED), batch_size=3)


def test_accuracy_on_unseen_prompts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    marks = accuracy(model, tokenizer, prompts_per_task=64, seed=2)
    assert list(marks) == list(TASKS)
    assert min(marks.values()) >= 0.9, marks


def test_every_expert_is_used(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    batch = tokenizer(list(FIXED), return_tensors="pt", padding=True, return_token_type_ids=False)
    real = batch["attention_mask"].reshape(-1).bool()
    with torch.inference_mode():
        logits = model(**batch, output_router_logits=True).router_logits
    for layer in logits:
        chosen = layer[real].topk(model.config.num_experts_per_tok).indices.unique()
        assert len(chosen) == model.config.num_experts


def test_record_of_the_training(model: PreTrainedModel) -> None:
    record = json.loads((CHECKPOINT / "training.json").read_text())
    assert record["parameters"] == model.num_parameters()
    assert record["test_prompts_per_task"] == 500
    assert record["minutes"] < 30
    assert list(record["accuracy"]) == list(TASKS)
    assert min(record["accuracy"].values()) >= 0.95
    assert min(record["least_expert_share"]) >= 0.02
