"""Run one of YoWASP's tools with its memory in huge pages: ``python -m moeaccel.fpga.yowasp NAME``.

WebAssembly's memory is one piece. Yosys and nextpnr jump about in a gigabyte of it, and with pages
of 4 KiB a fifth of their time goes into finding these. Linux gives larger ones where it is asked.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import mmap
import sys
import threading
import time
from pathlib import Path

__all__ = ["main"]

_RESERVED_BYTES = 1 << 31
"""Less than wasmtime reserves for a memory, all at once, and more than anything else is."""


def main() -> None:
    """Run the console script named by the first argument with the others."""
    _, name, *arguments = sys.argv
    (script,) = importlib.metadata.entry_points(group="console_scripts", name=name)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        threading.Thread(target=_use_huge_pages, daemon=True).start()
    sys.argv = [name, *arguments]
    sys.exit(script.load()())


def _use_huge_pages() -> None:
    """Wait for the reservation and ask for huge pages in all of it; what grows inherits that."""
    while True:
        for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
            addresses, _, _, _, inode, *_ = line.split()
            begin, end = (int(address, 16) for address in addresses.split("-"))
            if inode == "0" and end - begin >= _RESERVED_BYTES:
                ctypes.CDLL(None).madvise(
                    ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_HUGEPAGE)
                return
        time.sleep(0.05)


if __name__ == "__main__":
    main()
