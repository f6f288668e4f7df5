"""The demo tasks: right answers, a disjoint split, and a tokenizer that keeps every character."""

import itertools
from random import Random

import pytest
from transformers import AutoTokenizer

from moeaccel.host.demo.tasks import (
    TASKS,
    Example,
    Split,
    build_tokenizer,
    examples,
    held_out_examples,
    split_of,
)


def _draw(name: str, count: int, *, split: Split = "train", seed: int = 7) -> list[Example]:
    return list(itertools.islice(examples(TASKS[name], split=split, rng=Random(seed)), count))


def _without_pairs(text: str) -> str:
    """Delete matching pairs of brackets until none is left."""
    while True:
        shorter = text.replace("()", "").replace("[]", "").replace("{}", "")
        if shorter == text:
            return text
        text = shorter


def test_add() -> None:
    for example in _draw("add", 300):
        a, b = example.prompt.removesuffix("=").split("+")
        assert {len(a), len(b)} <= {2, 3}
        assert int(example.answer) - int(a) == int(b)
        assert example.answer[0] != "0"


def test_sort() -> None:
    for example in _draw("sort", 300):
        text = example.prompt.removeprefix("sort ").removesuffix("=")
        assert all(x <= y for x, y in itertools.pairwise(example.answer))
        assert {c: text.count(c) for c in text} == {
            c: example.answer.count(c) for c in example.answer
        }


def test_reverse() -> None:
    for example in _draw("reverse", 300):
        text = example.prompt.removeprefix("reverse ").removesuffix("=")
        assert len(text) == len(example.answer)
        assert all(example.answer[i] == text[len(text) - 1 - i] for i in range(len(text)))


def test_close() -> None:
    for example in _draw("close", 300):
        text = example.prompt.removeprefix("close ").removesuffix("=")
        left_open = _without_pairs(text)
        assert set(left_open) <= set("([{"), "a closing bracket without an opening one"
        assert _without_pairs(text + example.answer) == ""
        assert len(example.answer) == len(left_open) > 0


@pytest.mark.parametrize("name", TASKS)
def test_draws_repeat_with_the_seed(name: str) -> None:
    assert _draw(name, 50) == _draw(name, 50)
    assert _draw(name, 50) != _draw(name, 50, seed=8)


@pytest.mark.parametrize("name", TASKS)
def test_split_is_disjoint(name: str) -> None:
    train = {e.prompt for e in _draw(name, 2000)}
    test = {e.prompt for e in _draw(name, 2000, split="test")}
    assert not train & test
    assert {split_of(p) for p in train} == {"train"}
    assert {split_of(p) for p in test} == {"test"}


def test_split_holds_out_one_prompt_in_eight() -> None:
    prompts = [f"{a}+{b}=" for a in range(10, 100) for b in range(10, 100)]
    share = sum(split_of(p) == "test" for p in prompts) / len(prompts)
    assert share == pytest.approx(1 / 8, abs=0.015)


@pytest.mark.parametrize("name", TASKS)
def test_held_out_examples_are_distinct_and_stable(name: str) -> None:
    found = held_out_examples(TASKS[name], count=500, seed=3)
    assert len({e.prompt for e in found}) == 500
    assert all(split_of(e.prompt) == "test" for e in found)
    assert found[:20] == held_out_examples(TASKS[name], count=20, seed=3)
    assert found[:20] != held_out_examples(TASKS[name], count=20, seed=4)


def test_held_out_examples_refuse_a_count_below_one() -> None:
    with pytest.raises(ValueError, match="Count must be at least 1, not 0"):
        held_out_examples(TASKS["add"], count=0, seed=1)


@pytest.mark.parametrize("name", TASKS)
def test_tokenizer_round_trip(name: str) -> None:
    tokenizer = build_tokenizer()
    for example in _draw(name, 100):
        text = example.prompt + example.answer
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert None not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_tokenizer_is_one_token_per_character_after_the_keyword() -> None:
    tokenizer = build_tokenizer()
    assert tokenizer.tokenize("sort sort=") == ["sort ", "s", "o", "r", "t", "="]
    assert tokenizer.tokenize("46+87=") == list("46+87=")


def test_tokenizer_survives_storage(tmp_path) -> None:
    build_tokenizer().save_pretrained(tmp_path)
    stored = AutoTokenizer.from_pretrained(tmp_path)
    texts = ["1+2=", "sort bca="]
    batch = stored(texts, padding=True)
    assert batch["input_ids"] == build_tokenizer()(texts, padding=True)["input_ids"]
    assert batch["attention_mask"] == [[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]
    assert stored.padding_side == "left"
    assert (stored.bos_token, stored.eos_token, stored.pad_token) == ("<s>", "</s>", "<pad>")
