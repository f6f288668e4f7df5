"""Ways to a device. A file that has a ``SCHEME`` is one: ``open_device("scheme:...")`` finds it by
the file's name, and nothing else needs to know of a new one.

Files are imported when they are asked for, so that a driver of hardware needs no torch and one of
the golden model no simulator.
"""

from __future__ import annotations

import importlib
import pkgutil

from moeaccel.host.errors import UnsupportedTransport
from moeaccel.host.transports.base import Scheme, Transport

__all__ = ["Transport", "names", "scheme"]


def _files() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def _scheme_of(name: str) -> Scheme | None:
    return getattr(importlib.import_module(f"{__name__}.{name}"), "SCHEME", None)


def names() -> dict[str, str]:
    """Return how devices of each scheme are named, such as ``serial:PORT``, by scheme."""
    found = {}
    for name in _files():
        try:
            if made := _scheme_of(name):
                found[name] = f"{name}:{made.argument}" if made.argument else name
        except ModuleNotFoundError:  # of what only that one needs
            found[name] = name
    return found


def scheme(spec: object) -> tuple[str, Scheme, str]:
    """Return the name of a device's scheme, the scheme, and what stands behind the colon.

    Raises
    ------
    UnsupportedTransport
        If there is no such scheme, or its argument is missing.
    """
    name, colon, argument = spec.partition(":") if isinstance(spec, str) else ("", "", "")
    found = _scheme_of(name) if name in _files() else None
    if found is None or bool(found.argument) != bool(argument) or bool(colon) != bool(argument):
        *known, last = (f"'{usage}'" for usage in names().values())
        raise UnsupportedTransport(f"device must be {', '.join(known)} or {last}, not {spec!r}")
    return name, found, argument
