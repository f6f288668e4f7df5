"""The generated parts of the pages in docs/: ``python -m moeaccel.docs`` makes them anew.

A part is what stands in a page between two markers, the first of which names it::

    <!-- BEGIN GENERATED registers: python -m moeaccel.docs -->
    <!-- END GENERATED -->

Text around them stays. A part is a function without arguments that returns Markdown lines; `PARTS`
lists all of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from moeaccel.docs.blocks import blocks
from moeaccel.docs.boards import boards
from moeaccel.docs.formats import activations, configurations, formats, section_words
from moeaccel.docs.interface import (
    codes,
    completion,
    expert_table,
    registers,
    router_descriptor,
    submission,
)
from moeaccel.docs.models import zoo, zoo_forms, zoo_routers
from moeaccel.docs.routing import flavours, router_choices
from moeaccel.errors import MoeAccelError

__all__ = ["PARTS", "generated", "updated"]

PARTS: dict[str, Callable[[], list[str]]] = {
    "activations": activations,
    "blocks": blocks,
    "boards": boards,
    "codes": codes,
    "completion": completion,
    "configurations": configurations,
    "expert-table": expert_table,
    "flavours": flavours,
    "formats": formats,
    "registers": registers,
    "router": router_descriptor,
    "router-choices": router_choices,
    "section-words": section_words,
    "submission": submission,
    "zoo": zoo,
    "zoo-forms": zoo_forms,
    "zoo-routers": zoo_routers,
}
"""Every part by name."""

_COMMAND = "python -m moeaccel.docs"
_END = "<!-- END GENERATED -->"
_BEGIN = re.compile(r"^<!-- BEGIN GENERATED (.*)-->$", re.MULTILINE)


def generated(name: str) -> str:
    """Return a part, markers included.

    Raises
    ------
    MoeAccelError
        If there is none of that name.
    """
    if name not in PARTS:
        raise MoeAccelError(
            f"generated part must be one of {', '.join(PARTS)}, not {name!r}; write its marker as "
            f"'<!-- BEGIN GENERATED {next(iter(PARTS))}: {_COMMAND} -->'")
    return "\n".join([f"<!-- BEGIN GENERATED {name}: {_COMMAND} -->", "", *PARTS[name](), _END])


def updated(page: str) -> str:
    """Return a page with its generated parts made anew.

    Raises
    ------
    MoeAccelError
        If a marker names no part, or a part does not end.
    """
    out, position = [], 0
    for begin in _BEGIN.finditer(page):
        name = begin[1].partition(":")[0]
        end = page.find(_END, begin.end())
        if end < 0 or _BEGIN.search(page, begin.end(), end):
            raise MoeAccelError(f"generated part {name!r} must end with the line {_END!r}; add it "
                                "behind the part's marker")
        out += [page[position:begin.start()], generated(name)]
        position = end + len(_END)
    return "".join([*out, page[position:]])
