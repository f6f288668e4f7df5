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

    return "\n".join(topics[name] for name in sorted(topics))


def text_digest(text: str) -> str:
    """Return by what a text is known again."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def reference_tokens(tokenizer: Any, first: int, count: int, window: int) -> torch.Tensor:
    """Return some tokens of the text, cut into windows that are read each by itself.

    Parameters
    ----------
    tokenizer : transformers tokenizer
    first, count : :class:`int`
    window : :class:`int`
        Tokens of each; all are of one length.

    Returns
    -------
    int64 tensor, (count / window, window); of fewer tokens than a window, (1, count)

    Raises
    ------
    InvalidOption
        If the text is not that long, or count is no multiple of the window.
    """
    window = min(window, count)
    if window < 2 or count % window:
        raise InvalidOption(f"tokens must be a multiple of the window, of at least 2, not {count} "
                            f"of {window}")
    # A token is at least a character: no more of the text than that is needed, but for the last
    # token of the piece, which the cut may change.
    text, need = reference_text(), first + count
    ids: list[int] = []
    for size in (16 * need, len(text)):
        try:
            ids = tokenizer(text[:size], add_special_tokens=False, verbose=False)["input_ids"]
        except Exception as error:  # the package tokenizers raises nothing narrower
            raise InvalidOption(f"model must have a tokenizer that knows English text, but: {error}"
                                ) from error
        if len(ids) > need:
            break
    if len(ids) < need:
        raise InvalidOption(f"tokens must be at most the {len(ids)} of Python's reference manual, "
                            f"calibration included, not {need}")
    return torch.tensor(ids[first:need]).reshape(-1, window)
