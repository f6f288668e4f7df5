"""Exceptions at every moment of a call, as a signal's handler raises them (Ctrl-C, timers)."""

import dis
import functools
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
WATCHED = tuple(f"{ROOT / folder}/" for folder in ("host", "sim"))


class Alarm(BaseException):
    """What the handler raises."""


@functools.cache
def _ends_of_with(code):
    """Return the offsets at which with blocks are left without an exception.

    There, before it calls ``__exit__``, CPython looks for no signal: locks rely on it.
    """
    found, entered, line = set(), set(), 0
    for instruction in dis.get_instructions(code):
        if instruction.opname == "BEFORE_WITH":
            entered.add(line)
        if instruction.starts_line is not None:
            line = instruction.starts_line
            if line in entered and instruction.opname == "LOAD_CONST":
                found.add(instruction.offset)
    return found


class Interrupter:
    """Counts the lines that this project's code runs, and raises before one of them.

    Parameters
    ----------
    at : int, optional
        Number of the line, from 0 on; only counts when left out.
    """

    def __init__(self, at=None):
        self.at = at
        self.lines = 0
        self.where = None

    def _line(self, frame, event, _):
        if event == "line" and frame.f_lasti not in _ends_of_with(frame.f_code):
            if self.lines == self.at:
                self.where = f"{frame.f_code.co_filename}:{frame.f_lineno}"
                raise Alarm
            self.lines += 1
        return self._line

    def _call(self, frame, event, _):
        code = frame.f_code
        # What a finaliser raises goes nowhere.
        watched = code.co_filename.startswith(WATCHED) and code.co_name != "__del__"
        return self._line if watched else None

    def __enter__(self):
        self._before = sys.gettrace()
        sys.settrace(self._call)
        return self

    def __exit__(self, kind, *_):
        sys.settrace(self._before)
        return kind is Alarm


def lines_of(action):
    """Return how many lines an action takes."""
    with Interrupter() as counter:
        action()
    return counter.lines
