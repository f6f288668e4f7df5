"""What an expert buffer holds: the leading bytes of images, tagged by what they are of."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

__all__ = ["Counts", "ExpertBuffer"]

K = TypeVar("K", bound=Hashable)


@dataclass(kw_only=True)
class Counts:
    """What became of experts that were used, and of bytes that were fetched ahead.

    Parameters
    ----------
    hits, partial, misses : :class:`int`
        Uses of which the buffer had all that fits a slot, a part, nothing.
    hit_bytes : :class:`int`
        Bytes that uses took from the buffer and not from memory.
    fetched_bytes, wasted_bytes : :class:`int`
        Bytes that were fetched ahead; of these, those that left before anyone used them. What is
        neither used nor wasted is still there (:attr:`ExpertBuffer.waiting_bytes`).
    """

    hits: int = 0
    partial: int = 0
    misses: int = 0
    hit_bytes: int = 0
    fetched_bytes: int = 0
    wasted_bytes: int = 0

    @property
    def uses(self) -> int:
        """Experts that were used."""
        return self.hits + self.partial + self.misses


@dataclass
class _Slot:
    """The first ``valid`` bytes of an image; ``fresh`` of them were fetched and not used yet."""

    valid: int = 0
    fresh: int = 0


class ExpertBuffer(Generic[K]):
    """Slots of one size, each with the leading bytes of an expert's image.

    Images are read from the first byte to the last, so that the leading bytes are all that can be
    ahead: a use takes them from the slot and the rest from memory. A newcomer takes the slot that
    was filled or used longest ago. The device's keys are addresses of images, its unit is a beat.

    Parameters
    ----------
    slots, slot_bytes : :class:`int`
        0 slots: nothing is ever there.
    unit : :class:`int`
        Bytes that a fetch brings at once; it ends at a multiple of them.

    Attributes
    ----------
    counts : :class:`Counts`
    """

    def __init__(self, slots: int, slot_bytes: int, *, unit: int) -> None:
        self.slots, self.slot_bytes, self.unit = slots, slot_bytes // unit * unit, unit
        self.counts = Counts()
        self._held: dict[K, _Slot] = {}  # the one filled or used last comes last

    @property
    def held(self) -> dict[K, int]:
        """Bytes of each expert that is there."""
        return {key: slot.valid for key, slot in self._held.items()}

    @property
    def waiting_bytes(self) -> int:
        """Bytes that were fetched ahead and are there, and that no one has used."""
        return sum(slot.fresh for slot in self._held.values())

    def has(self, key: K, image_bytes: int) -> int:
        """Return the bytes of an image that a use would find."""
        slot = self._held.get(key)
        return 0 if slot is None else min(slot.valid, self._whole(image_bytes))

    def load(self, key: K, image_bytes: int, *, most: int | None = None) -> int:
        """Fetch what is missing of an expert's leading bytes, at most so many; return how many."""
        if not self.slots:
            return 0
        slot = self._place(key)
        moved = max(0, self._whole(image_bytes) - slot.valid)
        if most is not None:
            moved = min(moved, most // self.unit * self.unit)
        slot.valid += moved
        slot.fresh += moved
        self.counts.fetched_bytes += moved
        return moved

    def use(self, key: K, image_bytes: int) -> int:
        """Use an expert; return the bytes of its image that the buffer has."""
        counts, valid = self.counts, self.has(key, image_bytes)
        if valid and valid == self._whole(image_bytes):
            counts.hits += 1
        elif valid:
            counts.partial += 1
        else:
            counts.misses += 1
        counts.hit_bytes += valid
        if key in self._held:
            self._place(key).fresh = 0
        return valid

    def forget(self) -> None:
        """Empty it."""
        self.counts.wasted_bytes += self.waiting_bytes
        self._held.clear()

    def _whole(self, image_bytes: int) -> int:
        """Return how many bytes of an image a slot takes."""
        return min(self.slot_bytes, -(-image_bytes // self.unit) * self.unit)

    def _place(self, key: K) -> _Slot:
        """Return the slot of an expert, one that was taken from another if it has none."""
        slot = self._held.pop(key, None)
        if slot is None:
            if len(self._held) == self.slots:
                oldest = self._held.pop(next(iter(self._held)))
                self.counts.wasted_bytes += oldest.fresh
            slot = _Slot()
        self._held[key] = slot
        return slot
