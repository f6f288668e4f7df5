"""Text to read that every Python has: the reference manual behind ``help()``, ``pydoc_data``."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from moeaccel.host.errors import InvalidOption

__all__ = ["reference_text", "reference_tokens", "text_digest"]


def reference_text() -> str:
    """Return the topics of ``pydoc_data`` in the order of their names; another version of Python
    has slightly other ones."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name].strip() for name in sorted(topics))


def text_digest(text: str) -> str:
    """Return by what a text is known again."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def reference_tokens(tokenizer: Any, first: int, count: int) -> torch.Tensor:
    """Return some tokens of the text.

    Parameters
    ----------
    tokenizer : transformers tokenizer
    first, count : :class:`int`

    Returns
    -------
    int64 tensor, (1, count)

    Raises
    ------
    InvalidOption
        If the text is not that long.
    """
    # A token is at least a character: no more of the text than that is needed, but for the last
    # token of the piece, which the cut may change.
    text, need = reference_text(), first + count
    ids: list[int] = []
    for size in (16 * need, len(text)):
        ids = tokenizer(text[:size], add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) > need:
            break
    if len(ids) < need:
        raise InvalidOption(f"tokens must be at most the {len(ids)} of Python's reference manual, "
                            f"calibration included, not {need}")
    return torch.tensor([ids[first:need]])
