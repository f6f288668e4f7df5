"""What an expert buffer holds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from moeaccel.host.errors import InvalidOption

__all__ = ["Counts", "ExpertBuffer", "Key"]

Key = tuple[int, int]
"""Layer and expert."""


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

    key: Key
    valid: int
    fresh: int
    stamp: int


class ExpertBuffer:
    """Slots of one size, each with the leading bytes of an expert's image.

    Images are read from the first byte to the last, so that the leading bytes are all that can be
    ahead: a use takes them from the slot and the rest from memory. A fetch that is not finished
    when its expert is used, or another one is asked for, ends where it is. A newcomer takes the
    slot that was filled or used longest ago.

    Parameters
    ----------
    slots, slot_bytes : :class:`int`
        0 slots: nothing is ever there.
    unit : :class:`int`
        Bytes that a fetch brings at once; it ends at a multiple of them.

    Attributes
    ----------
    counts : :class:`Counts`

    Raises
    ------
    InvalidOption
        If there are less than 0 slots, or a slot has no bytes.
    """

    def __init__(self, slots: int, slot_bytes: int, *, unit: int = 64) -> None:
        if slots < 0 or slot_bytes < unit or unit < 1:
            raise InvalidOption("an expert buffer must have 0 slots or more, of at least "
                                f"{max(unit, 1)} bytes each, not {slots} of {slot_bytes}")
        self.slots, self.slot_bytes, self.unit = slots, slot_bytes // unit * unit, unit
        self.counts = Counts()
        self._held: dict[Key, _Slot] = {}
        self._now = 0

    @property
    def held(self) -> dict[Key, int]:
        """Bytes of each expert that is there."""
        return {key: slot.valid for key, slot in self._held.items()}

    @property
    def waiting_bytes(self) -> int:
        """Bytes that were fetched ahead and are there, and that no one has used."""
        return sum(slot.fresh for slot in self._held.values())

    def fetch(self, keys: Iterable[Key], image_bytes: int, budget: int) -> int:
        """Fetch experts ahead, one after the other, until the time is up.

        Parameters
        ----------
        keys : iterable of (:class:`int`, :class:`int`)
            The likeliest first. None takes the slot of one before it; when all slots are theirs,
            the rest are left out.
        image_bytes : :class:`int`
            Of one image.
        budget : :class:`int`
            Bytes that memory can bring meanwhile.

        Returns
        -------
        :class:`int`
            Bytes that it brought.
        """
        wanted: set[Key] = set()
        left = budget // self.unit * self.unit
        for key in keys:
            if key in wanted:
                continue
            if not left or len(wanted) == self.slots:
                break
            wanted.add(key)
            slot = self._place(key, wanted)
            moved = min(left, self._whole(image_bytes) - slot.valid)
            slot.valid += moved
            slot.fresh += moved
            left -= moved
            self.counts.fetched_bytes += moved
        return budget // self.unit * self.unit - left

    def use(self, key: Key, image_bytes: int, *, keep: bool = False) -> int:
        """Use an expert; return the bytes of its image that the buffer has.

        Parameters
        ----------
        image_bytes : :class:`int`
            Of its image.
        keep : :class:`bool`
            What memory brings of a slot's bytes stays, which moves nothing more.
        """
        counts, slot = self.counts, self._held.get(key)
        valid = slot.valid if slot else 0
        if valid and valid == self._whole(image_bytes):
            counts.hits += 1
        elif valid:
            counts.partial += 1
        else:
            counts.misses += 1
        counts.hit_bytes += valid
        if slot is None and keep and self.slots:
            slot = self._place(key, {key})
        if slot is not None:
            slot.fresh, slot.stamp = 0, self._tick()
            if keep:
                slot.valid = self._whole(image_bytes)
        return valid

    def _whole(self, image_bytes: int) -> int:
        """Return how many bytes of an image a slot takes."""
        return min(self.slot_bytes, -(-image_bytes // self.unit) * self.unit)

    def _tick(self) -> int:
        self._now += 1
        return self._now

    def _place(self, key: Key, spared: set[Key]) -> _Slot:
        """Return the slot of an expert, one that was taken from another if it has none."""
        slot = self._held.get(key)
        if slot is None:
            if len(self._held) == self.slots:
                oldest = min((s for s in self._held.values() if s.key not in spared),
                             key=lambda s: s.stamp)
                self.counts.wasted_bytes += oldest.fresh
                del self._held[oldest.key]
            slot = self._held[key] = _Slot(key, 0, 0, 0)
        slot.stamp = self._tick()
        return slot
