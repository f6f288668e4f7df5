"""Sizes of memory as people write them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from moeaccel.host.errors import InvalidOption

__all__ = ["Size", "size_of"]

_TEXT = re.compile(r"(\d+(?:\.\d+)?(?:e\d{1,2})?) *(%|[KMGT](?:i?B)?|B)?", re.IGNORECASE)
_PREFIXES = "KMGT"
_MOST = 1 << 62


@dataclass(frozen=True)
class Size:
    """Bytes, or a share of something.

    Parameters
    ----------
    given : :class:`int` or :class:`str`
        As it was written, for messages.
    number : :class:`float`
        Bytes, or percent.
    share : :class:`bool`
    """

    given: int | str
    number: float
    share: bool = False

    def of(self, everything: int) -> int:
        """Return it in bytes; a share is one of `everything`."""
        return int(everything * self.number / 100) if self.share else int(self.number)


def size_of(name: str, given: Any) -> Size:
    """Return what a number of bytes, or a text such as ``"8GiB"``, ``"500MB"`` or ``"25%"`` says.

    KB, MB, GB and TB are powers of 1,000; KiB and K and so on are powers of 1,024.

    Raises
    ------
    InvalidOption
        If it is something else, or out of range.
    """
    if isinstance(given, int) and not isinstance(given, bool) and 0 <= given < _MOST:
        return Size(given, given)
    found = _TEXT.fullmatch(given.strip()) if isinstance(given, str) else None
    if found is not None:
        number, unit = float(found[1]), (found[2] or "").upper()
        if unit == "%" and number <= 100:
            return Size(given, number, share=True)
        base = 1000 if unit.endswith("B") and "I" not in unit else 1024
        power = 1 + _PREFIXES.index(unit[0]) if unit[:1] and unit[0] in _PREFIXES else 0
        if unit != "%" and number * base**power < _MOST:
            # An integer is exact, however long; a fraction is of a unit.
            exact = int(found[1]) * base**power if found[1].isdecimal() else number * base**power
            return Size(given, exact)
    raise InvalidOption(f"{name} must be a number of bytes from 0 on, with a unit as 8GiB or 500MB "
                        f"or without one, or a share from 0% to 100%, not {given!r}")
