"""Typed errors: each names the thing, its value, what was expected and what to do."""

import contextlib
from collections.abc import Callable, Iterator


class MoeAccelError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigurationError(MoeAccelError, ValueError):
    """A configuration's field is out of range."""


class FormatError(MoeAccelError, ValueError):
    """Weights or dimensions that a weight format cannot hold."""


class ImageError(MoeAccelError, ValueError):
    """An expert image that is damaged or of another kind."""


class ToolMissingError(MoeAccelError):
    """A program that a job needs is not on this machine."""


class CacheError(MoeAccelError, OSError):
    """The folder of built models cannot be used; the message says how to choose another."""


class OutputError(MoeAccelError, OSError):
    """A file or folder that was to be written, and cannot be."""


class CommandError(MoeAccelError, ValueError):
    """A command's field does not fit."""


class ToolFailedError(MoeAccelError, RuntimeError):
    """A program that a job runs has failed; the message ends with the end of its log."""


class UnknownBoardError(MoeAccelError, ValueError):
    """A name that is not one of a board that bitstreams can be built for."""


class ClockRateError(MoeAccelError, ValueError):
    """A clock that a board cannot make, or that a design does not reach on it."""


@contextlib.contextmanager
def instead_of_os_error(error_for: Callable[[OSError], MoeAccelError]) -> Iterator[None]:
    """Raise a typed error in the place of an :class:`OSError` that is none yet."""
    try:
        yield
    except OSError as error:
        if isinstance(error, MoeAccelError):
            raise
        raise error_for(error) from error


@contextlib.contextmanager
def about(what: str, *kinds: type[MoeAccelError]) -> Iterator[None]:
    """Let errors of some kinds begin with what they are about."""
    try:
        yield
    except kinds as error:
        raise type(error)(f"{what}: {error}") from error
