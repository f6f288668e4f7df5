"""What belongs to one process: devices, their layers and calls are neither copied nor inherited."""

from __future__ import annotations

import os
import threading
import weakref
from typing import Any, NoReturn

from moeaccel.host.errors import NotCopyable

__all__ = ["Bound", "Inherited", "Lock"]


class Bound:
    """Cannot be copied or pickled: it stands for something outside this process, or its memory."""

    def __reduce_ex__(self, protocol: Any) -> NoReturn:  # copy, deepcopy and pickle all ask it
        raise NotCopyable(
            f"{type(self).__name__} must not be copied or pickled: it belongs to a device that "
            "this process has opened; pass tensors, and open the device where they are used")


class Inherited:
    """Is told in the child when the process forks.

    A child has the parent's objects but not its threads (those of torch's operators, for one, for
    which it would wait for ever), and shares its card or line.
    """

    _all: weakref.WeakSet[Inherited] = weakref.WeakSet()

    def __init__(self) -> None:
        self._all.add(self)

    def _forked(self) -> None:
        """Become useless, in the child."""
        raise NotImplementedError


class Lock(Inherited):
    """A reentrant lock, ``with lock.held:``, that is free in a forked child: the thread of the
    parent that held it is not there to release it."""

    def __init__(self) -> None:
        super().__init__()
        self._forked()

    def _forked(self) -> None:
        self.held = threading.RLock()  # who forked while holding the old one releases the old one


def _tell() -> None:
    for one in list(Inherited._all):
        one._forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_tell)
