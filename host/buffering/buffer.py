"""An expert buffer that is filled while there is time for it."""

from __future__ import annotations

from collections.abc import Iterable

from moeaccel.golden import expert_buffer
from moeaccel.golden.expert_buffer import Counts
from moeaccel.host.errors import InvalidOption

__all__ = ["Counts", "ExpertBuffer", "Key"]

Key = tuple[int, int]
"""Layer and expert."""


class ExpertBuffer(expert_buffer.ExpertBuffer[Key]):
    """Slots of one size, each with the leading bytes of an expert's image.

    What the device's does, and beside it what a time that is limited leaves undone: a fetch that is
    not finished when its expert is used, or another one is asked for, ends where it is.

    Parameters
    ----------
    slots, slot_bytes, unit : :class:`int`
        As of :class:`moeaccel.golden.expert_buffer.ExpertBuffer`.

    Raises
    ------
    InvalidOption
        If there are less than 0 slots, or a slot has no bytes.
    """

    def __init__(self, slots: int, slot_bytes: int, *, unit: int = 64) -> None:
        if slots < 0 or slot_bytes < unit or unit < 1:
            raise InvalidOption("an expert buffer must have 0 slots or more, of at least "
                                f"{max(unit, 1)} bytes each, not {slots} of {slot_bytes}")
        super().__init__(slots, slot_bytes, unit=unit)

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
        left = whole = budget // self.unit * self.unit
        for key in keys:
            if key in wanted:
                continue
            if not left or len(wanted) == self.slots:
                break
            wanted.add(key)  # filled last: the slots of those before it are the last to be taken
            left -= self.load(key, image_bytes, most=left)
        return whole - left

    def use(self, key: Key, image_bytes: int, *, keep: bool = False) -> int:
        """Use an expert; return the bytes of its image that the buffer has.

        Parameters
        ----------
        image_bytes : :class:`int`
            Of its image.
        keep : :class:`bool`
            What memory brings of a slot's bytes stays, which moves nothing more.
        """
        valid = super().use(key, image_bytes)
        if keep and self.slots:
            self._place(key).valid = self._whole(image_bytes)
        return valid
