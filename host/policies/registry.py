"""Policies found by folder: every module's classes of a kind, by name."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from moeaccel.host.policies.errors import UnknownPolicy

__all__ = ["find", "lookup"]

_T = TypeVar("_T")


def find(package: str, path: Iterable[str], kind: type[_T]) -> dict[str, type[_T]]:
    """Return the classes of a kind that a package's modules define and name, sorted by name.

    A module's ``base`` is left out, and so are classes without a ``name`` of their own.

    Raises
    ------
    UnknownPolicy
        If two have the same name.
    """
    found: dict[str, type[_T]] = {}
    for info in pkgutil.iter_modules(list(path)):
        if info.name == "base":
            continue
        module = importlib.import_module(f"{package}.{info.name}")
        for value in vars(module).values():
            if (isinstance(value, type) and issubclass(value, kind)
                    and value.__module__ == module.__name__ and "name" in vars(value)):
                name: str = vars(value)["name"]
                if name in found:
                    raise UnknownPolicy(f"name of a policy must be its own, but {value} and "
                                        f"{found[name]} are both {name!r}")
                found[name] = value
    return dict(sorted(found.items()))


def lookup(what: str, known: Mapping[str, _T], name: Any) -> _T:
    """Return the entry of that name.

    Raises
    ------
    UnknownPolicy
        With the known names, and the nearest.
    """
    if isinstance(name, str) and name in known:
        return known[name]
    near = difflib.get_close_matches(str(name), known, 1, 0.4)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise UnknownPolicy(f"{what} must be one of {', '.join(known)}, not {name!r}{hint}")
