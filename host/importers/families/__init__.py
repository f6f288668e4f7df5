"""The ways in which checkpoints store weights, one file each.

Every module of this folder that has a tuple ``FAMILIES`` adds its families to the registry; nothing
else needs to know of a new one.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from moeaccel.host.importers.base import Family

__all__ = ["families"]


@cache
def families() -> tuple[Family, ...]:
    """Return all families, those of the highest rank first."""
    found: list[Family] = []
    for module in pkgutil.iter_modules(__path__):
        found += getattr(importlib.import_module(f"{__name__}.{module.name}"), "FAMILIES", ())
    return tuple(sorted(found, key=lambda family: -family.rank))
