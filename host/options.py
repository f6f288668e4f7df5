"""Arguments that users give, checked: of the right type, and in range."""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from moeaccel.host.errors import InvalidOption

__all__ = ["check_names", "flag", "seconds", "whole"]


def whole(name: str, value: Any, *, least: int, most: int | None = None, unit: str = "") -> int:
    """Return a whole number, of any integer type, within [least, most].

    Raises
    ------
    InvalidOption
        If it is none.
    """
    span = f"from {least:,} to {most:,}" if most is not None else f"at least {least:,}"
    try:
        number = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise InvalidOption(f"{name} must be a whole number, {span}{unit}, not {value!r}")
    if number < least or (most is not None and number > most):
        raise InvalidOption(f"{name} must be {span}{unit}, not {number}")
    return number


def seconds(name: str, value: Any) -> float:
    """Return a number of seconds: 0, which is not to wait, or more, also infinitely many.

    Raises
    ------
    InvalidOption
        If it is none.
    """
    try:
        number = math.nan if isinstance(value, str | bytes | bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not number >= 0:
        raise InvalidOption(f"{name} must be 0 seconds or more, not {value!r}")
    return number


def flag(name: str, value: Any) -> bool:
    """Return a truth value, True or False: ``"no"`` is neither.

    Raises
    ------
    InvalidOption
        If it is none.
    """
    if not isinstance(value, bool | np.bool_):
        raise InvalidOption(f"{name} must be True or False, not {value!r}")
    return bool(value)


def check_names(what: str, options: Mapping[str, Any], *functions: Callable[..., Any]) -> None:
    """Check that each option is a keyword argument of one of some functions.

    Raises
    ------
    InvalidOption
        If one is not.
    """
    known = list(dict.fromkeys(
        parameter.name for function in functions
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY))
    for name in options:
        if name not in known:
            raise InvalidOption(
                f"option of {what} must be one of {', '.join(known) or 'none'}, not {name!r}")
