"""What a command makes of its ids: which passes there are, what stays on the chip between them, and
what goes through memory.

The dispatcher plans so in hardware; golden device (counters, faults) and cycle model take it from
here, and the RTL is tested against it.

Experts come in the order in which ids name them first; of several tokens, those with several pairs
ahead of those with one. Each has its pairs in the order of their tokens, in passes of as many as
there are slots. So passes of one token alone follow each other, and often those of the same few
tokens. Consecutive passes over the very same tokens keep x and y on the chip; else
the tokens' sums leave after the pass: as rows of y when no later pass touches the token, as partial
sums to the workspace, from where the next pass with that token adds them, when one does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Pass", "Plan", "Row", "plan"]


@dataclass(frozen=True)
class Pass:
    """One expert over at most as many tokens as there are slots.

    Parameters
    ----------
    expert : :class:`int`
    pairs, tokens : tuple of int
        By slot: index of the pair, ``token * top_k + k``, and its token.
    same : :class:`bool`
        The tokens of the pass before, in the same slots.
    first, last : tuple of bool
        By slot: no partial sum of the token is in memory; none will be.
    """

    expert: int
    pairs: tuple[int, ...]
    tokens: tuple[int, ...]
    same: bool
    first: tuple[bool, ...]
    last: tuple[bool, ...]


class Row(NamedTuple):
    """A token's sums leaving the chip.

    Parameters
    ----------
    token : :class:`int`
    first : :class:`bool`
        Else a partial sum is read from the workspace and added.
    last : :class:`bool`
        To y; else to the workspace.
    """

    token: int
    first: bool
    last: bool


@dataclass(frozen=True)
class Plan:
    """What a command does.

    Parameters
    ----------
    tokens : :class:`int`
    experts : tuple of int
        Those with tokens, in their order: their entries of the expert table are read.
    passes : tuple of :class:`Pass`
    zeros : tuple of int
        Tokens without an expert: their rows of y are zeros, written before anything else.
    """

    tokens: int
    experts: tuple[int, ...]
    passes: tuple[Pass, ...]
    zeros: tuple[int, ...]

    @property
    def pairs(self) -> int:
        """Pairs in all passes."""
        return sum(len(now.pairs) for now in self.passes)

    @cached_property
    def loads(self) -> tuple[int, ...]:
        """Tokens whose x is read, in that order."""
        return tuple(token for now in self.passes if not now.same for token in now.tokens)

    def drains(self, index: int) -> bool:
        """Return whether sums leave the chip after pass ``index``."""
        return index + 1 == len(self.passes) or not self.passes[index + 1].same

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """Sums that leave the chip, in that order."""
        return tuple(self._rows())

    def _rows(self) -> Iterator[Row]:
        for index, now in enumerate(self.passes):
            if self.drains(index):
                yield from map(Row, now.tokens, now.first, now.last)

    def before(self, expert: int) -> Plan:
        """Return what is done when nothing starts from that expert on, which has tokens."""
        experts = self.experts[:self.experts.index(expert)]
        return replace(self, experts=experts,
                       passes=tuple(now for now in self.passes if now.expert in experts))


def plan(ids: NDArray[np.integer], num_experts: int, slots: int) -> Plan:
    """Plan a command.

    Parameters
    ----------
    ids : integer array, (T, K)
        Negative or ``>= num_experts``: skipped.
    num_experts : :class:`int`
        Of the layer.
    slots : :class:`int`
        Most tokens of a pass: ``AcceleratorConfig.max_slots`` in ``a8``, half of it in ``a16``.
    """
    tokens, top_k = ids.shape
    flat = ids.reshape(-1)
    pairs = np.flatnonzero((flat >= 0) & (flat < num_experts))
    _, named, number, count = np.unique(
        flat[pairs], return_index=True, return_inverse=True, return_counts=True)
    order = named + (tokens > 1) * (count == 1) * flat.size
    pairs = pairs[np.argsort(order[number], kind="stable")]
    token_of = pairs // top_k
    left = np.bincount(token_of, minlength=tokens).tolist()
    zeros = tuple(token for token, count in enumerate(left) if not count)
    expert_of, token_of, pairs = flat[pairs].tolist(), token_of.tolist(), pairs.tolist()
    done = [False] * tokens

    passes: list[Pass] = []
    resident: tuple[int, ...] = ()
    first: tuple[bool, ...] = ()
    begin = 0
    while begin < len(pairs):
        expert = expert_of[begin]
        end = begin + 1
        while end < len(pairs) and end < begin + slots and expert_of[end] == expert:
            end += 1
        now = tuple(token_of[begin:end])
        same = now == resident
        flags, last = [], []
        for token in now:
            flags.append(not done[token])
            done[token] = True
            left[token] -= 1
            last.append(not left[token])
        first = first if same else tuple(flags)
        passes.append(Pass(expert, tuple(pairs[begin:end]), now, same, first, tuple(last)))
        resident, begin = now, end
    return Plan(tokens, tuple(dict.fromkeys(expert_of)), tuple(passes), zeros)
