"""Statements of the C++ that Verilator writes, and what each reads and writes.

What is read and written are *atoms*: a scalar or a memory by its name, a word of a wide variable as
``name[3]``, an element of an array of :mod:`moeaccel.sim.speedup.vectorise` by its own name.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

SCALARS = {"CData": 1, "SData": 2, "IData": 4, "QData": 8}
"""Bytes of each type of Verilator's."""

EFFECT = "effect"
"""An atom that statements write whose effects have to stay in order."""

VECTOR_BYTES = 16.0
"""Bytes of an array that are worked on at once."""

_TAKEN = 0.15  # share of the work of a conditional statement without alternative
_PORTS = {"8": "CData", "16": "SData", "": "IData", "64": "QData"}
_HARMLESS = {"if", "else", "for", "int", "i", "vlSymsp", "VL_LIKELY", "VL_UNLIKELY", "NIBBLES",
             *SCALARS}
# Functions of Verilator's run time that have no effect but their result; some put it into their
# first argument but numbers.
_PURE = re.compile(
    r"VL_(?:EXTENDS?|MULS?|SHIFT(?:L|R|RS)|(?:LT|GT|LTE|GTE)S|RED(?:XOR|AND|OR)|COUNTONES|ONEHOT0?|"
    r"ASSIGN|ZERO|ADD|SUB|AND|OR|XOR|NOT)_(?:(?P<wide>W)|[IQ]|\d)\w*")

_TOKEN = re.compile(
    r'(?P<comment>/\*.*?\*/|//[^\n]*)|"(?:\\.|[^"\\])*"|\'.\'|'
    r"(?P<number>0x[0-9a-fA-F]+|\d+)U?L*\b|(?P<name>[A-Za-z_]\w*)|"
    r"<<|>>|->|::|[=!<>]=|&&|\|\||\+\+|--|\S", re.DOTALL)
_INDEX = re.compile(r"(?P<first>(?:0x[0-9a-fA-F]+|\d+)U?L*)(?: \+ (?P<stride>\d+) \* i)?")
_MEMBER = re.compile(
    r"^ *(?:(?P<kind>[CSIQ]Data)/\*\d+:0\*/ (?P<name>\w+)"
    r"|VlWide<(?P<words>\d+)>/\*\d+:0\*/ (?P<wide>\w+)"
    r"|VlUnpacked<.*> (?P<memory>\w+)"
    r"|VL_(?:IN|OUT)(?P<size>8|16|64|)\((?P<port>\w+),\d+,\d+\)"
    r"|VL_(?:IN|OUT)W\((?P<wideport>\w+),\d+,\d+,(?P<portwords>\d+)\));$", re.MULTILINE)
_UNION = re.compile(r"^ *union \{ (\w+) (lanes\d+)\[\d+\]; struct \{ (.*?); \}; \};$", re.MULTILINE)
_EVENT = re.compile(r"^    if \(\(\w+ & vlSelfRef\.__VnbaTriggered\[0U\]\)\) {$\n(.+?)^    }$",
                    re.MULTILINE | re.DOTALL)
_CALL = re.compile(r"^ +(\w+)\(vlSelf\);\n", re.MULTILINE)
_NOT_CALLS = re.compile(r"^(?:(?! +\w+\(vlSelf\);$).*\n)+", re.MULTILINE)
_LOOP = re.compile(
    r"(__Vilp\d+) = (?P<first>\w+);\s*while \(\(\1 <= (?P<last>\w+)\)\) \{(?P<body>[^;{}]*;)"
    r"\s*\1 = \(\(IData\)\(1U\) \+ \1\);\s*\}")
_LOOP_INDEX = re.compile(r"\[\(?__Vilp\d+(?:\s+\+ \(IData\)\((?P<offset>\w+)\)\))?\]")
_LOCAL = re.compile(
    r"\s*(?:(?P<kind>[CSIQ]Data)|VlWide<(?P<words>\d+)>)/\*\d+:0\*/ (?P<name>\w+);"
    r"(?P<first>\s*(?P=name) = 0;|\s*VL_ZERO_W\(\d+, (?P=name)\);|)")


@dataclass(frozen=True)
class Variable:
    """A member of the class, or a local variable of its functions."""

    kind: str  # of a word; "" of a memory
    words: int = 0  # of a wide one
    first: str = ""  # the statement that sets a local one at first


class Node:
    """A statement, or some that run one after the other; what it reads from outside, and writes."""

    def __init__(self) -> None:
        self.reads: set[str] = set()
        self.writes: set[str] = set()
        self.sure: set[str] = set()  # what it writes in any case, as a whole
        self.compared: set[str] = set()  # of what it writes, what is compared with its old value
        self.names: set[str] = set()
        self.work = 0.0
        self.free = True  # it may be skipped
        self.known = True  # it has been understood

    def take(self, other: Node) -> None:
        """Run another node after this one."""
        self.reads |= other.reads - self.sure
        self.writes |= other.writes
        self.sure |= other.sure
        self.compared |= other.compared
        self.names |= other.names
        self.work += other.work
        self.free &= other.free
        self.known &= other.known


class Statement(Node):
    """A statement without parts, or a condition."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text


class Block(Node):
    """Nodes that run one after the other."""

    def __init__(self, nodes: Iterable[Node] = ()) -> None:
        super().__init__()
        self.nodes: list[Node] = []
        for node in nodes:
            self.append(node)

    def append(self, node: Node) -> None:
        """Run another node behind."""
        self.take(node)
        self.nodes += node.nodes if isinstance(node, Block) else [node]


class Conditional(Node):
    """A condition with what runs if it holds, and what runs if it does not."""

    def __init__(self, condition: Statement, then: Block, other: Block) -> None:
        super().__init__()
        self.condition, self.then, self.other = condition, then, other
        for node in (condition, then, other):
            self.take(node)
        self.reads = condition.reads | then.reads | other.reads
        self.sure = then.sure & other.sure
        self.compared &= self.sure
        self.work = condition.work + (
            (then.work + other.work) / 2 if other.nodes else _TAKEN * then.work)

    def split(self) -> list[Node]:
        """Return the same as several nodes, each for variables that have to do with each other."""
        if self.condition.reads & self.writes or not self.condition.free:
            return [self]
        parts = [(part, branch) for branch, block in enumerate((self.then, self.other))
                 for part in split(block.nodes)]
        owner: dict[str, int] = {}  # by variables that are written, as chains of parts
        leader = list(range(len(parts)))

        def find(index: int) -> int:
            while leader[index] != index:
                index = leader[index]
            return index

        for index, (part, _) in enumerate(parts):
            for atom in part.writes:
                leader[find(index)] = find(owner.setdefault(atom, index))
        for index, (part, _) in enumerate(parts):
            for atom in part.reads & owner.keys():
                leader[find(index)] = find(owner[atom])
        blocks: dict[int, tuple[Block, Block]] = defaultdict(lambda: (Block(), Block()))
        for index, (part, branch) in enumerate(parts):
            blocks[find(index)][branch].append(part)
        return [Conditional(self.condition, *branches) for branches in blocks.values()]


def split(nodes: Iterable[Node]) -> Iterator[Node]:
    """Yield the same in as many nodes as can be."""
    for node in nodes:
        yield from node.split() if isinstance(node, Conditional) else [node]


def text_of(nodes: Iterable[Node], mark: Callable[[set[str]], str]) -> str:
    """Return the C++ of nodes, what follows on each other under the same condition joined.

    Each block of it ends with what `mark` returns for the atoms that are written there.
    """
    joined: list[Node] = []
    for node in nodes:
        last = joined[-1] if joined else None
        if (isinstance(node, Conditional) and isinstance(last, Conditional)
                and node.condition.text == last.condition.text
                and not node.condition.reads & last.writes and node.condition.free):
            node = Conditional(node.condition, Block([last.then, node.then]),
                                Block([last.other, node.other]))
            joined.pop()
        joined.append(node)
    parts = []
    for node in joined:
        if isinstance(node, Conditional):
            parts.append(f"if ({node.condition.text}) {{\n{text_of(node.then.nodes, mark)}}}\n")
            if node.other.nodes:
                parts.append(f"else {{\n{text_of(node.other.nodes, mark)}}}\n")
        elif isinstance(node, Statement):
            parts.append(f"{node.text}\n")
    return "".join([*parts, mark({atom for node in joined if isinstance(node, Statement)
                                  for atom in node.writes})])


@dataclass(frozen=True)
class Function:
    """The parts of a function's text, and the file that it is in."""

    path: Path
    text: str
    head: str
    locals: str
    body: str


class Variables:
    """The variables of a class and its functions, by their names."""

    def __init__(self, declared: str) -> None:
        self._found: dict[str, Variable] = {}
        self.inputs: set[str] = set()
        self.arrays: dict[str, list[str]] = {}
        for match in _MEMBER.finditer(declared):
            if match["kind"]:
                self._found[match["name"]] = Variable(match["kind"])
            elif match["port"]:
                self._found[match["port"]] = Variable(_PORTS[match["size"]])
            elif match["memory"]:
                self._found[match["memory"]] = Variable("")
            else:
                self._found[match["wide"] or match["wideport"]] = Variable(
                    "IData", int(match["words"] or match["portwords"]))
            if "VL_IN" in match[0]:
                self.inputs.add(match["port"] or match["wideport"])
        self._places: dict[str, tuple[str, int]] = {}
        for kind, array, elements in _UNION.findall(declared):
            self.arrays[array] = [element.split()[1] for element in elements.split("; ")]
            for index, name in enumerate(self.arrays[array]):
                self._found[name] = Variable(kind)
                self._places[name] = array, index

    def __contains__(self, name: str) -> bool:
        return name in self._found

    def __getitem__(self, name: str) -> Variable:
        return self._found[name]

    def update(self, local: dict[str, Variable]) -> None:
        """Take in the variables of functions."""
        self._found.update(local)

    def of(self, atom: str) -> Variable:
        """Return the variable of an atom."""
        return self._found[name_of(atom)]

    def place(self, atom: str) -> tuple[str, int]:
        """Return the array or variable of which an atom is part, and its index there."""
        name, _, index = atom.partition("[")
        return self._places.get(name) or (name, int(index.rstrip("]") or 0))

    def is_element(self, atom: str) -> bool:
        """Return whether an atom is an element of an array."""
        return atom in self._places

    def is_memory(self, atom: str) -> bool:
        """Return whether an atom is a memory."""
        return atom != EFFECT and not self.of(atom).kind


def name_of(atom: str) -> str:
    """Return the name of an atom's variable."""
    return atom.partition("[")[0]


def declaration(variable: Variable, name: str) -> str:
    """Return the C++ that declares a variable."""
    return f"VlWide<{variable.words}> {name}" if variable.words else f"{variable.kind} {name}"


def sequences(text: str, name: str) -> list[list[str]]:
    """Return the functions that run one after the other at the same event, for each event."""
    count = Counter(re.findall(r"\b(\w+)\(vlSelf\)", text))
    return [calls for block in _EVENT.findall(_dispatch(text, name))
            if (calls := _CALL.findall(block)) and len(calls) == block.count(";")
            and all(count[call] == 1 for call in calls)]


def outlined(text: str, name: str) -> str:
    """Return a text in which everything that runs at an event is in functions."""
    dispatch = _dispatch(text, name)
    if not dispatch or "// Locals" in dispatch:
        return text
    functions: list[str] = []

    def call(statements: re.Match[str]) -> str:
        function = f"{name}___nba_outlined__{len(functions)}"
        functions.append(f"void {function}({name}* vlSelf) {{\n"
                         "    auto& vlSelfRef = *vlSelf;\n"
                         f"    // Body\n{statements[0]}}}\n\n")
        return f"        {function}(vlSelf);\n"

    changed = _EVENT.sub(
        lambda event: event[0].replace(event[1], _NOT_CALLS.sub(call, event[1])), dispatch)
    return text.replace(dispatch, "".join(functions) + changed)


def _dispatch(text: str, name: str) -> str:
    """Return the function that calls what runs at each event."""
    found = re.search(rf"^void {name}___eval_nba\({name}\* vlSelf\) {{$.*?^}}$", text,
                      re.MULTILINE | re.DOTALL)
    return found[0] if found else ""


def class_headers(folder: Path) -> list[Path]:
    """Return the headers of the classes that Verilator has written into a folder."""
    return [header for header in sorted(folder.glob("Vtop_*.h"))
            if header.stem not in ("Vtop__Syms", "Vtop__pch")]


def sources_of(header: Path) -> dict[Path, str]:
    """Return the texts of a class that run more than once."""
    return {path: path.read_text(encoding="utf-8")
            for path in sorted(header.parent.glob(f"{header.stem}__*.cpp"))
            if "Slow" not in path.stem}


def functions_of(sources: dict[Path, str], name: str, wanted: list[str]) -> list[Function]:
    """Return functions by their names, none if one of them is not found."""
    pattern = re.compile(
        rf"^(?P<head>void (?P<name>{name}___nba_\w+)\({name}\* vlSelf\) {{$(?:(?!^}}$).)*?)"
        r"(?:^    // Locals$(?P<locals>(?:(?!^}$).)*?))?^    // Body$(?P<body>.*?)^}$",
        re.MULTILINE | re.DOTALL)
    found = {match["name"]: Function(path, match[0], match["head"], match["locals"] or "",
                                      _LOOP.sub(_counted, match["body"]))
             for path, text in sources.items() for match in pattern.finditer(text)}
    return [found[name] for name in wanted] if found.keys() >= set(wanted) else []


def _counted(loop: re.Match[str]) -> str:
    """Return Verilator's loop over words as `vectorise` writes loops, or as it is."""
    first = _number(loop["first"])
    body = _LOOP_INDEX.sub(lambda index: f"[{first + _number(index['offset'] or '0')} + 1 * i]",
                           loop["body"].strip())
    if "__Vilp" in body:
        return loop[0]
    return f"for (int i = 0; i < {_number(loop['last']) - first + 1}; ++i) {body}"


def _number(literal: str) -> int:
    return int(literal.rstrip("UL"), 0)


def with_unique_locals(functions: list[Function]) -> list[Function]:
    """Return functions in which no two have a variable of the same name."""
    result: list[Function] = []
    seen: set[str] = set()
    for number, function in enumerate(functions):
        names = {match["name"] for match in _LOCAL.finditer(function.locals)}
        for name in names & seen:
            function = dataclasses.replace(function, **{
                part: re.sub(rf"\b{name}\b", f"{name}_{number}", getattr(function, part))
                for part in ("locals", "body")})
        seen |= names
        result.append(function)
    return result


def local_variables(functions: Iterable[Function]) -> dict[str, Variable] | None:
    """Return the functions' variables, None if there are some that are not understood."""
    if any(_LOCAL.sub("", function.locals).strip() for function in functions):
        return None
    return {match["name"]: Variable(match["kind"] or "IData", int(match["words"] or 0),
                                     match["first"].strip())
            for function in functions for match in _LOCAL.finditer(function.locals)}


def written(text: str, variables: Variables) -> set[str]:
    """Return the names of the members to which a text assigns."""
    found = re.findall(r"[.>](\w+)(?:\s*\[[^;=]*\])?\s*=[^=]", text)
    found += re.findall(r"VL_\w+_W\w*\([\d, ]*\w+(?:\.|->)(\w+)", text)
    return {member for name in found for member in variables.arrays.get(name, [name])}


class Reader:
    """Finds the statements of a text, and what each reads and writes."""

    def __init__(self, variables: Variables) -> None:
        self._variables = variables

    def statements(self, text: str) -> list[Node]:
        """Return a node for each statement."""
        tokens = [token for token in _TOKEN.finditer(text) if not token["comment"]]
        words = [token[0] for token in tokens]
        nodes: list[Node] = []
        at = 0
        try:
            while at < len(words):
                node, at = self._statement(text, tokens, words, at)
                nodes.append(node)
        except IndexError:  # it ends in the midst of a statement
            nodes.append(Statement(text))
            nodes[-1].known = False
        return nodes

    def _statement(self, text: str, tokens: list[re.Match[str]], words: list[str],
                   at: int) -> tuple[Node, int]:
        if words[at] == "if":
            end = _closing(words, at + 1)
            condition = self._simple(text, tokens[at + 2:end], words[at + 2:end])
            then, at = self._block(text, tokens, words, end + 1)
            other = Block()
            if words[at:at + 1] == ["else"]:
                other, at = self._block(text, tokens, words, at + 1)
            return Conditional(condition, then, other), at
        end = at
        while end < len(words) and words[end] != ";":
            end = _closing(words, end) + 1 if words[end] in "({[" else end + 1
        return self._simple(text, tokens[at:end + 1], words[at:end + 1]), end + 1

    def _block(self, text: str, tokens: list[re.Match[str]], words: list[str],
               at: int) -> tuple[Block, int]:
        if words[at] != "{":
            node, at = self._statement(text, tokens, words, at)
            return Block([node]), at
        end = _closing(words, at)
        block = Block()
        at += 1
        while at < end:
            node, at = self._statement(text, tokens, words, at)
            block.append(node)
        return block, end + 1

    def _simple(self, text: str, tokens: list[re.Match[str]], words: list[str]) -> Statement:
        """Return an assignment, a loop of one, a call of a function, or an expression."""
        node = Statement(text[tokens[0].start():tokens[-1].end()])
        turns, share, at = 1, 1.0, 0
        if words[0] == "for":
            at = words.index(")") + 1
            target = words[at + 2] if words[at] == "vlSelfRef" else words[at]
            element = self._variables.arrays.get(target, [target])[0]
            if words[:9] != "for ( int i = 0 ; i <".split() or element not in self._variables:
                node.known = False
                return node
            turns = int(words[9])
            kind = self._variables[element].kind or "IData"
            share = max(1.0, turns * SCALARS[kind] / VECTOR_BYTES)
        argument = False  # the next variable is written
        unknown = False  # by a function that may do anything to its arguments
        while at < len(words):
            word, token, after = words[at], tokens[at], words[at + 1:at + 2]
            at += 1
            if word == "->":
                node.known &= not after[0].startswith("TOP")
                at += 1
            elif word == "vlSelfRef" or word in self._variables:
                if word == "vlSelfRef":
                    word, at = words[at + 1], at + 2
                atoms, whole, at = self._atoms(word, words, at, turns)
                assigned = _assigned(words, at)
                if not atoms:
                    node.known = False
                    return node
                node.names.add(word)
                node.work += share
                if argument or unknown or assigned:
                    node.writes |= atoms
                    node.sure |= atoms if whole and not unknown else set()
                    if word not in self._variables.arrays and words[0] != "for" and (
                            self._variables[word].kind):
                        node.compared |= atoms
                if not assigned and not argument:
                    node.reads |= atoms
                argument = False
            elif token["name"] and after == ["("] and word not in _HARMLESS:
                called = _PURE.fullmatch(word)
                if called:
                    argument = called["wide"] is not None
                else:
                    unknown = True
                    node.free = False
                    node.writes.add(EFFECT)
            elif token["name"]:
                node.known &= word in _HARMLESS or word.startswith("Vtop__ConstPool__")
            elif word in ("++", "--", "::", "{") or (word == "=" and words[at - 2] in "+-*/%|&^"):
                node.known = False
            elif word not in "();,?:[].}":
                node.work += share
        return node

    def _atoms(self, name: str, words: list[str], at: int,
               turns: int) -> tuple[set[str], bool, int]:
        """Return what of a variable is meant, whether as a whole, and where its name ends."""
        elements = self._variables.arrays.get(name)
        if elements is None:
            if name not in self._variables:
                return set(), False, at
            variable = self._variables[name]
            if not variable.words:
                return {name}, variable.kind != "", at
            elements = [f"{name}[{word}]" for word in range(variable.words)]
        if words[at:at + 1] != ["["]:
            return set(elements), True, at
        end = _closing(words, at)
        index = _INDEX.fullmatch(" ".join(words[at + 1:end]))
        if not index:
            return set(elements), False, at
        first, stride = _number(index["first"]), int(index["stride"] or 0)
        return {elements[first + stride * turn] for turn in range(turns)}, True, end + 1


def _closing(words: list[str], at: int) -> int:
    """Return where the parenthesis, bracket or brace that opens here is closed."""
    depth = 0
    while True:
        depth += (words[at] in "([{") - (words[at] in ")]}")
        if not depth:
            return at
        at += 1


def _assigned(words: list[str], at: int) -> bool:
    """Return whether a value is assigned to what ends here, or to an element of it."""
    while words[at:at + 1] == ["["]:
        at = _closing(words, at) + 1
    return words[at:at + 1] == ["="]


