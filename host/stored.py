"""Experts whose images are there already, and go into a device's memory as they are."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from moeaccel.config import AcceleratorConfig
from moeaccel.grid import Squares, squares
from moeaccel.host.transports.base import Bytes
from moeaccel.image import Expert, ExpertShape, build_image

logger = logging.getLogger(__name__)

__all__ = ["Measured", "Ready", "StoredExperts", "built", "measured"]

Measured = tuple[Expert, dict[str, Squares]]
"""An expert, and the sums of squares of its matrices by their kind."""


@dataclass(frozen=True)
class Ready:
    """An expert as memory takes it.

    Parameters
    ----------
    parts : list of uint8 array
        Its image, or each channel's part of it.
    squares : dict of :class:`Squares`
        Of ``gate_up`` and ``down``.
    groups, coarsened : :class:`int`
        Scales, and those that were coarsened.
    """

    parts: list[Bytes]
    squares: dict[str, Squares]
    groups: int
    coarsened: int


class StoredExperts(Sequence[Expert]):
    """A sequence of experts that has their images, too, for arrays of one kind.

    As a sequence it decodes them, expert by expert.
    """

    @abstractmethod
    def shape(self) -> ExpertShape:
        """Return the shape of every expert, with the row multipliers and channels of the images."""

    @abstractmethod
    def parts(self, index: int) -> list[Bytes]:
        """Return an expert's image, or each channel's part of it, checked.

        Raises
        ------
        MoeAccelError
            If it is damaged, naming what and where.
        """

    @abstractmethod
    def measured(self, index: int) -> tuple[dict[str, Squares], int]:
        """Return the sums of squares of an expert's ``gate_up`` and ``down``, and how many of its
        scales were coarsened."""

    @abstractmethod
    def made_for(self) -> str:
        """Return what the images are, and were made for, for messages."""

    def ready(self, config: AcceleratorConfig) -> Iterator[Ready]:
        """Yield the experts as a configuration's memory takes them: as they are, or, from images
        for other arrays, encoded again, with a warning."""
        shape = self.shape()
        fits = (shape.row_multipliers, shape.channels) == (config.row_multipliers, config.channels)
        if not fits:
            logger.warning("%s; they are encoded again for config %r, which has %d row multipliers "
                           "and %d channels", self.made_for(), config.name, config.row_multipliers,
                           config.channels)
        groups = sum(section.rows * -(-section.k // section.format.group)
                     for section in shape.sections)
        for index in range(len(self)):
            found, coarsened = self.measured(index)
            parts = self.parts(index) if fits else next(built(
                iter([(self[index], found)]), config)).parts
            yield Ready(parts, found, groups, coarsened)


def measured(experts: Sequence[Expert]) -> Iterator[Measured]:
    """Yield experts with the sums of squares of what they hold; many may be one object."""
    previous: Expert | None = None
    found: dict[str, Squares] = {}
    for expert in experts:
        if expert is not previous:
            found = {"gate_up": squares(expert.gate_up), "down": squares(expert.down)}
            previous = expert
        yield expert, found


def built(experts: Iterator[Measured], config: AcceleratorConfig) -> Iterator[Ready]:
    """Yield experts as a configuration's memory takes them."""
    previous: Expert | None = None
    parts: list[Bytes] = []
    for expert, found in experts:
        if expert is not previous:
            parts = [build_image(expert.gate_up, expert.down, config.row_multipliers,
                                 channel=channel, channels=config.channels)
                     for channel in range(config.channels)]
            previous = expert
        yield Ready(parts, found, expert.gate_up.shift.size + expert.down.shift.size,
                    expert.gate_up.coarsened + expert.down.coarsened)
