"""Files that appear when they are whole."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from moeaccel.errors import OutputError

__all__ = ["whole_file"]


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a new name beside a path to write to; it takes the path's place when the block ends.

    When the block raises, what was at the path before is left as it was. No two blocks have the
    same name to write to, so that of two processes the last one's file is there, whole.

    Raises
    ------
    OutputError
        At once if the path is no file and no place for one: renaming would put a file in the
        place of a device such as ``/dev/null``.
    OSError
        Where the system refuses the renaming.
    """
    path = Path(path)
    if not path.name or (path.exists() and not path.is_file()):
        kind = "a folder" if path.is_dir() else "a device or a pipe"
        raise OutputError(f"output must be a file, or a place for one, not {str(path)!r}, which "
                          f"is {kind}; name a file")
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        with contextlib.suppress(OSError):
            part.unlink()
