"""Tasks with one right answer for each prompt, their train/test split, and their tokenizer.

A prompt ends in ``=``; the answer follows it and ends with the end-of-sequence token:

    458+67=             525
    sort kbzab=         abbkz
    reverse h3k9=       9k3h
    close ([]{=         })

A prompt belongs to the test set or to the training set by its own hash, so the split needs no
files, does not depend on seeds, and no test prompt can slip into the training.
"""

import hashlib
import re
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Literal

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from moeaccel.host.errors import InvalidOption

__all__ = [
    "TASKS",
    "Example",
    "Split",
    "Task",
    "build_tokenizer",
    "check_prompt",
    "examples",
    "split_of",
    "held_out_examples",
]

Split = Literal["train", "test"]

TEST_SHARE_256THS = 32
"""Share of all prompts held out for tests, in 256ths."""

BRACKETS = {"(": ")", "[": "]", "{": "}"}
DEEPEST = 6
KEYWORDS = ("sort ", "reverse ", "close ")
CHARACTERS = string.digits + string.ascii_lowercase + "+=" + "()[]{}"
BOS_TOKEN, EOS_TOKEN, PAD_TOKEN = "<s>", "</s>", "<pad>"


@dataclass(frozen=True)
class Example:
    """A prompt and its one right answer."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Task:
    """A kind of question.

    Attributes
    ----------
    name : str
        Short name, the key in :data:`TASKS`.
    draw : Callable[[Random], Example]
        Draws one example; equal states of the generator give equal examples.
    """

    name: str
    draw: Callable[[Random], Example]


def _draw_add(rng: Random) -> Example:
    """Draw the sum of two numbers of two or three digits."""
    a, b = (rng.randrange(10, 10 ** rng.randint(2, 3)) for _ in range(2))
    return Example(f"{a}+{b}=", str(a + b))


def _draw_sort(rng: Random) -> Example:
    """Draw three to nine letters to be put into alphabetical order."""
    letters = rng.choices(string.ascii_lowercase, k=rng.randint(3, 9))
    return Example(f"sort {''.join(letters)}=", "".join(sorted(letters)))


def _draw_reverse(rng: Random) -> Example:
    """Draw three to ten letters and digits to be written backwards."""
    text = "".join(rng.choices(string.ascii_lowercase + string.digits, k=rng.randint(3, 10)))
    return Example(f"reverse {text}=", text[::-1])


def _draw_close(rng: Random) -> Example:
    """Draw four to fourteen brackets of three kinds; those still open are to be closed."""
    while True:
        opened: list[str] = []
        text = ""
        for _ in range(rng.randint(4, 14)):
            if opened and (len(opened) == DEEPEST or rng.random() < 0.45):
                text += BRACKETS[opened.pop()]
            else:
                opened.append(rng.choice(tuple(BRACKETS)))
                text += opened[-1]
        if opened:
            return Example(f"close {text}=", "".join(BRACKETS[b] for b in reversed(opened)))


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("add", _draw_add),
        Task("sort", _draw_sort),
        Task("reverse", _draw_reverse),
        Task("close", _draw_close),
    )
}
"""The tasks by name, in the order in which they are reported."""


def split_of(prompt: str) -> Split:
    """Tell which set a prompt belongs to; a function of its characters alone."""
    return "test" if hashlib.sha256(prompt.encode()).digest()[0] < TEST_SHARE_256THS else "train"


def examples(task: Task, *, split: Split, rng: Random) -> Iterator[Example]:
    """Yield examples of one task and one set without end.

    Parameters
    ----------
    task : Task
        The kind of question.
    split : {"train", "test"}
        The set that every prompt belongs to.
    rng : Random
        Source of randomness; equal states give equal examples.
    """
    while True:
        example = task.draw(rng)
        if split_of(example.prompt) == split:
            yield example


def held_out_examples(task: Task, *, count: int, seed: int) -> list[Example]:
    """Draw distinct examples of the test set.

    Parameters
    ----------
    task : Task
        The kind of question.
    count : int
        Number of examples, at most the few hundred that every task can give; no prompt comes twice.
    seed : int
        Equal seeds give equal lists, and a longer list starts with the shorter one.
    """
    if count < 1:
        raise ValueError(f"Count must be at least 1, not {count!r}")
    found: dict[str, Example] = {}
    for example in examples(task, split="test", rng=Random(f"{task.name}/{seed}")):
        found.setdefault(example.prompt, example)
        if len(found) >= count:
            break
    return list(found.values())


def check_prompt(prompt: str) -> None:
    """Check that the demo model knows every character of a prompt.

    Raises
    ------
    InvalidOption
        If it does not.
    """
    unknown = sorted(set(re.sub("|".join(KEYWORDS), "", prompt)) - set(CHARACTERS))
    if unknown:
        raise InvalidOption(
            f"prompt must be made of digits, small letters, the signs +=()[]{{}} and the words "
            f"{', '.join(map(repr, KEYWORDS))}, with one space behind, not {prompt!r}, which has "
            f"{', '.join(map(repr, unknown))}")


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer: a token for each character, and for each keyword with its space.

    The beginning-of-sequence token is added to every text, the end-of-sequence token to none: a
    text is a prompt. Padding goes to the left, as generation needs it.
    """
    tokens = [PAD_TOKEN, BOS_TOKEN, EOS_TOKEN, *KEYWORDS, *CHARACTERS]
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}))
    backend.pre_tokenizer = pre_tokenizers.Split(
        Regex("|".join((*KEYWORDS, "."))), behavior="isolated"
    )
    backend.decoder = decoders.Fuse()
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS_TOKEN} $A", special_tokens=[(BOS_TOKEN, tokens.index(BOS_TOKEN))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS_TOKEN,
        eos_token=EOS_TOKEN,
        pad_token=PAD_TOKEN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
