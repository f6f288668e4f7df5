"""What moves over the link in the background: guesses and promotions, behind all that is waited
for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

__all__ = ["Background", "Move"]

CHUNKS = 16
"""Of an image: what a demand move waits for at most, and what a cancelled guess has cost at
least."""


@dataclass(slots=True)
class Move:
    """An image on its way.

    Parameters
    ----------
    layer, expert : :class:`int`
    guess : :class:`bool`
        Whether it is dropped when the route of its layer does not hold it.
    left : :class:`float`
        Share of the image that has not been moved.
    """

    layer: int
    expert: int
    guess: bool
    left: float = field(default=1.0)


class Background:
    """The queue of one link: guesses in the order in which they were made, then promotions.

    Attributes
    ----------
    moved, wasted : :class:`float`
        Images that were moved; those of them, or parts, that were dropped on their way.
    """

    def __init__(self) -> None:
        self.guesses: list[Move] = []
        self.promotions: list[Move] = []
        self.moved = self.wasted = 0.0

    def __len__(self) -> int:
        """Images that have not arrived."""
        return len(self.guesses) + len(self.promotions)

    def advance(self, images: float, wanted: Callable[[Move], bool]) -> list[Move]:
        """Move some images, and return those that have arrived.

        Parameters
        ----------
        images : :class:`float`
            How many the link has time for.
        wanted : callable
            Whether a move still has a place to go to; else it is dropped.
        """
        arrived: list[Move] = []
        for queue in (self.guesses, self.promotions):
            done = 0
            while done < len(queue) and images > 0:
                move = queue[done]
                if not wanted(move):
                    self.wasted += 1 - move.left
                elif move.left <= images:
                    images -= move.left
                    self.moved += move.left
                    arrived.append(move)
                else:
                    move.left -= images
                    self.moved += images
                    images = 0.0
                    break
                done += 1
            del queue[:done]
        return arrived

    def take(self, layer: int, needed: Callable[[int], bool]) -> list[Move]:
        """Take the guesses for a layer out of the queue, when its route is known: what is on its
        way and not needed is cancelled, and what is needed is returned."""
        found: list[Move] = []
        others: list[Move] = []
        for move in self.guesses:
            if move.layer != layer:
                others.append(move)
            elif needed(move.expert):
                found.append(move)
            else:
                self.wasted += 1 - move.left
        self.guesses = others
        return found
