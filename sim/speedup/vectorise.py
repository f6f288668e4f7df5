"""Rewrite a model's C++ so that the compiler vectorises it.

Verilator writes the lanes of an array as scalars with a statement each, scattered over the model's
class. Here equal statements on different registers become a loop, and the registers become
elements of an array in the loop's order, which still go by their names::

    vlSelfRef.low_0 = (0x1ffU & (vlSelfRef.a_0 + vlSelfRef.a_1));
    vlSelfRef.low_1 = (0x1ffU & (vlSelfRef.a_2 + vlSelfRef.a_3));        // ..., low_15

    for (int i = 0; i < 16; ++i)
        vlSelfRef.lanes7[i] = (0x1ffU & (vlSelfRef.lanes3[2 * i] + vlSelfRef.lanes3[1 + 2 * i]));

The order of statements that depend on each other stays. Whatever is not recognised stays as it is,
so another version of Verilator costs speed and no more.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from moeaccel.sim.speedup.statements import class_headers, sources_of

LEAST = 4
"""Statements that are worth a loop."""

_STRIDES = (0, 1, 2)
_SELF = "vlSelfRef"
_SYMBOLS = "Vtop__Syms"
_MEMBER = re.compile(r"^ *(CData|SData|IData|QData)/\*\d+:0\*/ (\w+);$", re.MULTILINE)
_TOKEN = re.compile(
    r'(?P<comment>/\*.*?\*/|//[^\n]*)|"(?:\\.|[^"\\])*"|'
    r"(?P<literal>(?P<number>0x[0-9a-fA-F]+|\d+)U?L*\b)|(?P<name>[A-Za-z_]\w*)|"
    r"<<|>>|->|::|[=!<>]=|&&|\|\||\S", re.DOTALL)
# Functions of Verilator's run time that are of scalars and have no effect.
_PURE = re.compile(
    r"VL_(?:EXTENDS?_[IQ]{2}|(?:MULS?|SHIFT(?:L|R|RS)|(?:LT|GT|LTE|GTE)S)_[IQ]{3})")
# A table of 16 values of 4 bits as a number that is shifted: shifts of 32 bits vectorise better.
_NIBBLE = re.compile(r"(0x0*fU & \( IData \) \( \( )(0x[0-9a-f]+ULL)(?= >> \( 0x0*3cU & )")
_NIBBLES = """
struct Nibbles { QData all; };
static inline Nibbles NIBBLES(QData all) { return {all}; }
static inline IData operator>>(Nibbles table, IData shift) {
    return (shift & 32U ? IData(table.all >> 32) : IData(table.all)) >> (shift & 31U);
}
"""


@dataclass(eq=False)
class _Statement:
    """An assignment of one scalar member: ``vlSelfRef.target = pieces[0] operands[0] ...;``."""

    start: int
    end: int
    target: str
    pieces: list[str]  # text between operands, one more than these
    operands: list[str | int]  # scalar members, and the amounts of shifts
    reads: set[str]
    level: int = 0
    loop: str | None = field(default=None)  # the text of the first of a loop, "" of the others


class _Arrays:
    """Which members have become elements of which array."""

    def __init__(self, types: dict[str, str]) -> None:
        self.types = types
        self.members: list[list[str]] = []
        self._places: dict[str, tuple[int, int]] = {}

    def __contains__(self, member: str) -> bool:
        return member in self._places

    def claim(self, members: Iterable[str | int]) -> None:
        """Make arrays of the members that are in none, where enough follow on each other."""
        run: list[str] = []
        for member in [*dict.fromkeys(members), None]:
            if isinstance(member, str) and member not in self._places:
                run.append(member)
                continue
            if len(run) >= LEAST:
                for index, name in enumerate(run):
                    self._places[name] = len(self.members), index
                self.members.append(run)
            run = []

    def stride(self, one: str | int, other: str | int) -> int | None:
        """Return how far it is from one operand to another, None for no relation."""
        if isinstance(one, int) and isinstance(other, int):
            return other - one
        if one == other:
            return 0
        if one in self._places and other in self._places:
            (array, index), (other_array, other_index) = (
                self._places[str(one)], self._places[str(other)])
            if array == other_array and other_index - index in _STRIDES:
                return other_index - index
        return None

    def element(self, operand: str | int, stride: int) -> str:
        """Return the C++ for what is `stride` further in each turn of a loop."""
        if isinstance(operand, int):
            return f"{operand}U" if not stride else f"({operand}U + {stride} * i)"
        if not stride:
            return f"{_SELF}.{operand}"
        array, index = self._places[operand]
        return f"{_SELF}.lanes{array}[{index} + {stride} * i]"

    def declarations(self) -> Iterator[str]:
        """Yield the C++ of each array and its elements' names."""
        for number, members in enumerate(self.members):
            kind = self.types[members[0]]
            names = "; ".join(f"{kind} {name}" for name in members)
            yield f"    union {{ {kind} lanes{number}[{len(members)}]; struct {{ {names}; }}; }};"


def vectorise(folder: Path) -> int:
    """Rewrite the classes that Verilator has written into a folder.

    Parameters
    ----------
    folder : pathlib.Path
        Verilator's ``--Mdir``, with prefix ``Vtop``.

    Returns
    -------
    int
        Statements that are in loops now.
    """
    return sum(_vectorise_class(header) for header in class_headers(folder))


def _vectorise_class(header: Path) -> int:
    declared = header.read_text(encoding="utf-8")
    types = {name: kind for kind, name in _MEMBER.findall(declared)}
    sources = sources_of(header)
    runs = {path: [run for run in _runs(text, header.stem, types) if len(run) >= LEAST]
            for path, text in sources.items()}
    groups = [group for found in runs.values() for run in found for group in _groups(run, types)]
    arrays = _Arrays(types)
    groups.sort(key=len, reverse=True)
    for group in groups:
        arrays.claim(statement.target for statement in group)
    for group in groups:
        for operands in zip(*(statement.operands for statement in group), strict=True):
            arrays.claim(operands)
    folded = sum(_fold(group, arrays) for group in groups)
    if not folded:
        return 0
    for path, text in sources.items():
        path.write_text(_rewritten(text, runs[path]), encoding="utf-8")
    declarations = iter(["\n".join(arrays.declarations())])  # in the place of the first element
    declared = _MEMBER.sub(
        lambda match: next(declarations, "") if match[2] in arrays else match[0], declared)
    header.write_text(declared.replace(f"\nclass {_SYMBOLS};", f"{_NIBBLES}\nclass {_SYMBOLS};", 1),
                      encoding="utf-8")
    return folded


# -- reading ---------------------------------------------------------------------------------------

def _runs(text: str, name: str, types: dict[str, str]) -> Iterator[list[_Statement]]:
    """Yield the assignments that follow on each other, of functions of a class."""
    functions = re.compile(
        rf"^(?:VL_INLINE_OPT )?void {name}___nba_\w+\({name}\* vlSelf\) {{$(?P<body>.*?)^}}$",
        re.MULTILINE | re.DOTALL)
    for function in functions.finditer(text):
        run: list[_Statement] = []
        tokens: list[re.Match[str]] = []
        depth = 0  # of parentheses
        for token in _TOKEN.finditer(text, *function.span("body")):
            if token["comment"]:
                continue
            depth += (token[0] == "(") - (token[0] == ")")
            tokens.append(token)
            if depth or token[0] not in ";{}":
                continue
            statement = _read(text, tokens, types)
            if statement is not None:
                run.append(statement)
            else:
                yield run
                run = []
            tokens = []
        yield run


def _read(text: str, tokens: list[re.Match[str]], types: dict[str, str]) -> _Statement | None:
    """Return the statement of these tokens, None if it is not an assignment of one scalar."""
    words = [token[0] for token in tokens]
    if words[:2] != [_SELF, "."] or words[3] != "=" or words[2] not in types or words[-1] != ";":
        return None
    operands: list[str | int] = []
    pieces, reads = [""], set()
    at = 4
    while at < len(words) - 1:
        word = words[at]
        if word == _SELF and words[at + 1] == ".":
            member = words[at + 2]
            reads.add(member)
            at += 3
            if member in types:
                operands.append(member)
                pieces.append("")
                continue
            word = f"{_SELF}.{member}"  # wide, or a memory
        elif tokens[at]["literal"] and words[at - 1] in ("<<", ">>"):
            operands.append(int(tokens[at]["number"], 0))
            pieces.append("")
            at += 1
            continue
        else:
            called = tokens[at]["name"] and words[at + 1] == "("
            if word in ("=", "->", "::") or (called and not _PURE.fullmatch(word)):
                return None
            at += 1
        pieces[-1] += f"{word} "
    return _Statement(tokens[0].start(), tokens[-1].end(), words[2], pieces, operands, reads)


# -- grouping --------------------------------------------------------------------------------------

def _groups(run: list[_Statement], types: dict[str, str]) -> Iterator[list[_Statement]]:
    """Yield statements of a run that are equal but for members, and may change places."""
    written: dict[str, int] = defaultdict(int)  # the first level behind a member's last writer
    read: dict[str, int] = defaultdict(int)
    found: dict[tuple[object, ...], list[_Statement]] = defaultdict(list)
    for statement in run:
        level = max(read[statement.target], written[statement.target],
                    *(written[member] for member in statement.reads), 0)
        for member in statement.reads:
            read[member] = max(read[member], level + 1)
        written[statement.target] = level + 1
        statement.level = level
        kinds = (types[one] if isinstance(one, str) else "" for one in statement.operands)
        found[level, types[statement.target], *kinds, *statement.pieces].append(statement)
    for group in found.values():
        if len(group) >= LEAST:
            yield sorted(group, key=lambda statement: _natural(statement.target))


def _natural(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts numbers within names by their value."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _fold(group: list[_Statement], arrays: _Arrays) -> int:
    """Put loops in the place of statements whose members follow on each other; count these."""
    folded, first = 0, 0
    while first < len(group):
        strides: list[int | None] | None = None
        last = first
        while last + 1 < len(group):
            one, other = group[last], group[last + 1]
            step = [arrays.stride(one.target, other.target),
                    *(arrays.stride(*pair) for pair in zip(one.operands, other.operands,
                                                           strict=True))]
            if None in step or step[0] != 1 or strides not in (None, step):
                break
            strides = step
            last += 1
        count = last - first + 1
        if strides is not None and count >= LEAST:
            _write_loop(group[first:last + 1], [stride or 0 for stride in strides], arrays)
            folded += count
        first = last + 1
    return folded


def _write_loop(statements: list[_Statement], strides: list[int], arrays: _Arrays) -> None:
    lead = statements[0]
    value = lead.pieces[0] + "".join(
        arrays.element(operand, stride) + piece
        for operand, stride, piece in zip(lead.operands, strides[1:], lead.pieces[1:], strict=True))
    value = _NIBBLE.sub(r"\1NIBBLES(\2)", value)
    for statement in statements:
        statement.loop = ""
    lead.loop = (f"for (int i = 0; i < {len(statements)}; ++i) "
                 f"{arrays.element(lead.target, 1)} = {value};")


# -- writing ---------------------------------------------------------------------------------------

def _rewritten(text: str, runs: list[list[_Statement]]) -> str:
    parts, at = [], 0
    for run in runs:
        if all(statement.loop is None for statement in run):
            continue
        parts.append(text[at:run[0].start])
        parts += [text[one.start:one.end] + "\n" if one.loop is None else one.loop + "\n"
                  for one in sorted(run, key=lambda one: one.level) if one.loop != ""]
        at = run[-1].end
    return "".join([*parts, text[at:]])
