"""Let a model's C++ skip what cannot change.

Verilator evaluates the whole design in every cycle, though most of a machine is idle most of the
time. Here statements that read much the same variables become a group. A group has a bit, and runs
only if it is set; whoever changes a variable sets the bits of the groups that read it::

    if (now & 0x20ULL) {
        const CData old0 = vlSelfRef.ready;
        vlSelfRef.ready = vlSelfRef.start & ~vlSelfRef.busy;        // and some more
        if (vlSelfRef.start) {
            vlSelfRef.left = vlSelfRef.length;
            now |= 0x100ULL;                                        // group 8 reads `left`
        }
        if (old0 != vlSelfRef.ready) { now |= 0x300ULL; }           // 8 and 9 read `ready`
    }

That is exact: what a group writes nobody else writes, and it is a function of what it reads.
Variables that are written outside (inputs, above all) are compared with what they were before.
Skipping by groups is the method of Beamer and Donofrio, "Efficiently Exploiting Low Activity
Factors to Accelerate RTL Simulation" (DAC 2020). Groups grow here one after the other, in an order
in which their statements may run.

A test and copies of old values are wasted on what changes in most cycles. Which variables are those
is known to the design, whose blocks name them: they are handed in, and what writes them always
runs. Wrong names would cost speed and no more.

Whatever is not recognised stays as it is, so another version of Verilator costs speed and no more.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from moeaccel.sim.speedup.statements import (
    EFFECT,
    SCALARS,
    VECTOR_BYTES,
    Block,
    Function,
    Node,
    Reader,
    Statement,
    Variable,
    Variables,
    class_headers,
    declaration,
    functions_of,
    local_variables,
    name_of,
    outlined,
    sequences,
    sources_of,
    split,
    text_of,
    with_unique_locals,
    written,
)

# What a group costs in a cycle decides what it takes in. Work is counted in operands and operators.
_CHANGE = 0.1  # probability of a variable to change
_TEST = 3.0  # work of finding that a group need not run
_MARK = 3.0  # work of finding out whether a variable has changed

_BITS = 64


def below(module: str, names: Iterable[str]) -> str:
    """Return the `busy` of :func:`gate` for parts of all submodules of a name and a number.

    Parameters
    ----------
    module : str
        What the submodules' names have before their numbers.
    names : iterable of str
        What the names of those parts, submodules or ports, begin with.
    """
    return rf"__DOT__{module}\d+__DOT__({'|'.join(names)})"


def gate(folder: Path, *, busy: str = "") -> int:
    """Rewrite the classes that Verilator has written into a folder.

    Parameters
    ----------
    folder : pathlib.Path
        Verilator's ``--Mdir``, with prefix ``Vtop``.
    busy : str
        A regular expression, "" for none: statements of which most write variables in whose names
        it is found always run.

    Returns
    -------
    int
        Groups that may be skipped now.
    """
    pattern = re.compile(busy or "(?!)")
    return sum(_gate_class(header, pattern) for header in class_headers(folder))


def _gate_class(header: Path, busy: re.Pattern[str]) -> int:
    declared = header.read_text(encoding="utf-8")
    sources = {path: outlined(text, header.stem) for path, text in sources_of(header).items()}
    constants = "".join(sorted(set(re.findall(r"^extern const .*;\n", "".join(sources.values()),
                                              re.MULTILINE))))
    groups = 0
    members: list[str] = []
    elsewhere = "".join(path.read_text(encoding="utf-8") for path in sorted(
        header.parent.glob("Vtop*.cpp")) if "Slow" not in path.stem and path not in sources)
    for number, names in enumerate(sequences("".join(sources.values()), header.stem)):
        functions = with_unique_locals(functions_of(sources, header.stem, names))
        local = local_variables(functions)
        if local is None:
            continue
        variables = Variables(declared)
        variables.update(local)
        others = "".join(sources.values())
        for function in functions:
            others = others.replace(function.text, "")
        foreign = written(others + elsewhere, variables) | variables.inputs
        nodes = list(split(node for function in functions
                           for node in Reader(variables).statements(function.body)))
        if not all(node.known for node in nodes):
            continue
        nodes, behind = _bundled(_with_first_values(nodes, local))
        _bind(nodes, variables, foreign)
        writer = _Writer(f"gate{number}_", variables, foreign, local,
                         _Grouping(variables, nodes, behind, busy).groups())
        for function, text in zip(functions, writer.functions(functions), strict=True):
            sources[function.path] = sources[function.path].replace(
                function.text, f"{constants}{text}")
        members += writer.members
        groups += writer.count
    if groups:
        for path, text in sources.items():
            path.write_text(text, encoding="utf-8")
        place = declared.index("    // INTERNAL VARIABLES")
        header.write_text("\n".join([declared[:place], *members, "", declared[place:]]),
                          encoding="utf-8")
    return groups


# -- what may run when -----------------------------------------------------------------------------

def _with_first_values(nodes: list[Node], local: dict[str, Variable]) -> list[Node]:
    """Return nodes, before them those that set local variables that are read before they are."""
    users: dict[str, list[Node]] = defaultdict(list)
    for node in nodes:
        for name in node.names & local.keys():
            users[name].append(node)
    firsts: list[Node] = []
    for name, found in users.items():
        variable = local[name]
        atoms = ({f"{name}[{word}]" for word in range(variable.words)} if variable.words
                 else {name})
        early, given = False, set[str]()
        for node in found:
            early |= not node.reads & atoms <= given or not node.writes & atoms <= node.sure | given
            given |= node.sure
        if not variable.first or len(found) == 1 or not early:
            continue
        node = Statement(variable.first)
        node.writes, node.sure, node.names = set(atoms), set(atoms), {name}
        firsts.append(node)
    return firsts + nodes


def _edges(nodes: list[Node]) -> list[set[int]]:
    """Return the nodes that have to stay behind each."""
    behind: list[set[int]] = [set() for _ in nodes]
    writer: dict[str, int] = {}
    readers: dict[str, list[int]] = defaultdict(list)
    for index, node in enumerate(nodes):
        for atom in node.reads | node.writes:
            if atom in writer:
                behind[writer[atom]].add(index)
        for atom in node.writes:
            for reader in readers.pop(atom, ()):
                behind[reader].add(index)
            writer[atom] = index
        for atom in node.reads - node.writes:
            readers[atom].append(index)
    return behind


def _bundled(nodes: list[Node]) -> tuple[list[Node], list[set[int]]]:
    """Join what writes the same, unless something has to run between; return what follows each."""
    behind = _edges(nodes)
    writers: dict[str, list[int]] = defaultdict(list)
    for index, node in enumerate(nodes):
        for atom in node.writes - {EFFECT}:
            writers[atom].append(index)
    bundle = list(range(len(nodes)))  # the first of each one's bundle
    content = [[index] for index in bundle]
    for found in writers.values():
        firsts = {bundle[index] for index in found}
        joined = sorted(index for first in firsts for index in content[first])
        if len(firsts) == 1 or _lead_outside(joined, behind, bundle, content):
            continue
        content[joined[0]] = joined
        for index in joined:
            bundle[index] = joined[0]
    made, numbers = [], {first: number for number, first in enumerate(dict.fromkeys(bundle))}
    edges = []
    for first in numbers:
        made.append(Block(nodes[index] for index in content[first]))
        edges.append({numbers[bundle[following]] for index in content[first]
                      for following in behind[index]} - {numbers[first]})
    return made, edges


def _lead_outside(joined: list[int], behind: list[set[int]], bundle: list[int],
                  content: list[list[int]]) -> bool:
    """Return whether something else has to run between these."""
    inside, seen = set(joined), set[int]()
    todo = [following for index in joined for following in behind[index] - inside]
    while todo:
        index = todo.pop()
        if index in inside:
            return True
        together = content[bundle[index]]
        if index not in seen and together[0] < joined[-1]:
            seen.update(together)
            todo += [following for one in together for following in behind[one]]
    return False


def _bind(nodes: list[Node], variables: Variables, foreign: set[str]) -> None:
    """Note which nodes cannot be skipped."""
    writers: dict[str, list[Node]] = defaultdict(list)
    for node in nodes:
        for atom in node.writes:
            writers[atom].append(node)
    for node in nodes:
        outside = {name_of(atom) for atom in node.writes} | {
            atom for atom in node.reads if variables.is_memory(atom)}  # too large to be compared
        node.free &= (not outside & foreign
                      and all(len(writers[atom]) == 1 for atom in node.writes))


# -- grouping --------------------------------------------------------------------------------------

class _Grouping:
    """Makes groups of nodes, in an order in which they may run."""

    def __init__(self, variables: Variables, nodes: list[Node], behind: list[set[int]],
                 busy: re.Pattern[str]) -> None:
        self._nodes = nodes
        self._busy = {index for index, node in enumerate(nodes)
                      if node.free and 2 * sum(bool(busy.search(atom)) for atom in node.writes)
                      > len(node.writes)}
        self._behind = behind
        atoms = {atom for node in nodes for atom in node.reads | node.writes}
        self._sources = {atom: variables.place(atom)[0] for atom in atoms}
        self._weights = {atom: _weight(atom, variables) for atom in atoms}
        self._waits = [0] * len(nodes)  # for how many others each one has to wait
        for following in (index for edges in behind for index in edges):
            self._waits[following] += 1
        self._ready = {index for index, count in enumerate(self._waits) if not count}
        self._alone = [self._cost(node) for node in nodes]

    def groups(self) -> list[Block]:
        """Return the groups."""
        groups = []
        while self._ready:
            busy = self._ready & self._busy
            groups.append(self._together(busy) if busy else self._grown(min(self._ready)))
        return groups

    def _together(self, busy: set[int]) -> Block:
        """Return a group that always runs, of these and the busy nodes that they let run."""
        group = Block()
        while busy:
            for index in sorted(busy):
                group.append(self._nodes[index])
                self._run(index)
            busy = self._ready & self._busy
        group.free = False
        return group

    def _grown(self, seed: int) -> Block:
        """Return a group that begins with a node, and whatever is better run with it."""
        group, cost = Block([self._nodes[seed]]), self._alone[seed]
        self._run(seed)
        while group.free:
            touched = group.reads | group.writes
            best, least = None, 0.0
            for index in self._ready - self._busy:
                node = self._nodes[index]
                if node.free and not node.reads.isdisjoint(touched):
                    more = self._cost(group, node) - cost - self._alone[index]
                    if more < least:
                        best, least = index, more
            if best is None:
                break
            group.append(self._nodes[best])
            cost = self._cost(group)
            self._run(best)
        return group

    def _run(self, index: int) -> None:
        self._ready.remove(index)
        for following in self._behind[index]:
            self._waits[following] -= 1
            if not self._waits[following]:
                self._ready.add(following)

    def _cost(self, *nodes: Node) -> float:
        """Return what nodes cost in a cycle, as one group."""
        both = Node()
        for node in nodes:
            both.take(node)
        sources = {self._sources[atom] for atom in both.reads}
        marks = _MARK * sum(self._weights[atom] for atom in both.writes)
        return _TEST + (1 - (1 - _CHANGE) ** len(sources)) * (both.work + marks)


def _weight(atom: str, variables: Variables) -> float:
    """Return how much of an atom can be marked at once."""
    if "[" in atom or variables.is_element(atom):
        return SCALARS[variables.of(atom).kind] / VECTOR_BYTES
    return 1.0


# -- writing ---------------------------------------------------------------------------------------

class _Writer:
    """Writes groups as C++."""

    def __init__(self, prefix: str, variables: Variables, foreign: set[str],
                 local: dict[str, Variable], groups: list[Block]) -> None:
        self.count = sum(group.free for group in groups)
        self._prefix = f"vlSelfRef.{prefix}"
        self._variables = variables
        self._foreign = foreign
        self._local = local
        users: dict[str, int] = defaultdict(int)
        for name in (name for group in groups for name in group.names & local.keys()):
            users[name] += 1
        self._shared = {name for name, count in users.items() if count > 1}
        self.members = [f"    {declaration(local[name], prefix + name)};"
                        for name in sorted(self._shared)]
        self._chunks = list(self._chunked(groups))
        masks = []
        self._readers: dict[str, dict[int, int]] = defaultdict(lambda: defaultdict(int))
        for chunk in self._chunks:
            if chunk[0].free:
                for bit, group in enumerate(chunk):
                    for atom in group.reads:
                        self._readers[atom][len(masks)] |= 1 << bit
                masks.append(f"{(1 << len(chunk)) - 1:#x}ULL")
        self.members.append(f"    QData {prefix}due[{len(masks)}] = {{{', '.join(masks)}}};")
        self._kept: dict[str, str] = {}  # declarations of what keeps old values of foreign ones
        self._here = -1, 0  # word and bit of the group that is being written

    def _chunked(self, groups: list[Block]) -> Iterator[list[Block]]:
        """Yield groups whose bits are in one word, and those that always run."""
        chunk: list[Block] = []
        for group in groups:
            own = group.names & self._local.keys() - self._shared
            group.reads = {atom for atom in group.reads if name_of(atom) not in own}
            group.compared = {atom for atom in group.compared if name_of(atom) not in own}
            # Of what others write too, the last value that is known is kept.
            group.compared |= {atom for atom in group.writes if name_of(atom) in self._foreign}
            if chunk and (not group.free or not chunk[-1].free or len(chunk) == _BITS):
                yield chunk
                chunk = []
            chunk.append(group)
        if chunk:
            yield chunk

    def functions(self, functions: list[Function]) -> list[str]:
        """Return other texts for functions that run one after the other."""
        inputs = {atom for atom in self._readers if name_of(atom) in self._foreign}
        texts, names = [self._with_marks("", inputs)], [set[str]()]
        word = 0
        for chunk in self._chunks:
            self._here = word, 0
            texts.append(self._chunk(chunk))
            names.append({name for group in chunk for name in group.names & self._shared})
            word += chunk[0].free
        self.members += self._kept.values()
        total = sum(map(len, texts))
        result = []
        first, length = 0, 0
        for number, function in enumerate(functions, 1):
            last = first
            while last < len(texts) and length < total * number / len(functions):
                length += len(texts[last])
                last += 1
            aliases = [f"    auto& {name} = {self._prefix}{name};\n"
                       for name in sorted(set[str]().union(*names[first:last]))]
            result.append("".join([function.head, "    // Body\n", *aliases,
                                   *texts[first:last], "}"]))
            first = last
        return result

    def _chunk(self, chunk: list[Block]) -> str:
        word = self._here[0]
        if not chunk[0].free:
            self._here = -1, 0
            return f"{{\n{self._group(chunk[0])}}}\n"
        parts = []
        for bit, group in enumerate(chunk):
            self._here = word, bit
            # Unlikely: what runs is kept apart from the tests, which are many.
            parts.append(f"if (VL_UNLIKELY(now & {1 << bit:#x}ULL)) {{\n{self._group(group)}}}\n")
        due = f"{self._prefix}due[{word}]"
        return (f"if (VL_UNLIKELY({due})) {{\nQData now = {due}, again = 0;\n{''.join(parts)}"
                f"{due} = again;\n}}\n")

    def _group(self, group: Block) -> str:
        own = sorted(group.names & self._local.keys() - self._shared)
        declared = "".join(f"{declaration(self._local[name], name)}; {self._local[name].first}\n"
                           for name in own)
        text = text_of(group.nodes, lambda atoms: self._mark(atoms - group.compared))
        return self._with_marks(declared + text, group.compared)

    def _with_marks(self, text: str, compared: set[str]) -> str:
        """Return a text with marks behind it for what it has changed."""
        before, behind = [], []
        tests: dict[str, list[str]] = defaultdict(list)  # by what is to be done
        watched = {atom for atom in compared if atom in self._readers}
        for number, atoms in enumerate(self._ranges(watched)):
            kind, count = self._variables.of(atoms[0]).kind, len(atoms)
            size = SCALARS[kind] * count
            now = atoms[0] if name_of(atoms[0]) in self._local else f"vlSelfRef.{atoms[0]}"
            extent = f"[{count}]" if count > 1 else ""
            if name_of(atoms[0]) in self._foreign:
                name = f"old_{re.sub(r'[^0-9a-zA-Z]', '_', atoms[0])}_{count}"
                old = f"{self._prefix}{name}"
                self._kept[old] = f"    {kind} {old.removeprefix('vlSelfRef.')}{extent};"
            else:
                old = f"old{number}"
                before.append(f"{kind} {old}{extent};\n")
            copy = f"std::memcpy({old}, &{now}, {size});\n" if extent else f"{old} = {now};\n"
            (behind if name_of(atoms[0]) in self._foreign else before).append(copy)
            tests[self._mark(atoms)].append(
                f"(std::memcmp({old}, &{now}, {size}) != 0)" if extent else f"({old} != {now})")
        marks = [f"if ({' | '.join(found)}) {{\n{mark}}}\n" for mark, found in tests.items()]
        return "".join([*before, text, *marks, *behind])

    def _mark(self, atoms: Iterable[str]) -> str:
        """Return the C++ that sets the bits of the groups that read some of these."""
        due: dict[int, int] = defaultdict(int)
        for atom in atoms:
            for word, mask in self._readers.get(atom, {}).items():
                due[word] |= mask
        lines = []
        for word, mask in sorted(due.items()):
            if word == self._here[0]:
                past = (2 << self._here[1]) - 1
                lines += [f"{name} |= {part:#x}ULL;\n" for name, part in
                          (("now", mask & ~past), ("again", mask & past)) if part]
            else:
                lines.append(f"{self._prefix}due[{word}] |= {mask:#x}ULL;\n")
        return "".join(lines)

    def _ranges(self, atoms: Iterable[str]) -> Iterator[list[str]]:
        """Yield what lies one behind the other in memory."""
        run: list[str] = []
        for atom in sorted(atoms, key=self._variables.place):
            if run:
                (name, index), (last_name, last) = map(self._variables.place, (atom, run[-1]))
                if name != last_name or index != last + 1:
                    yield run
                    run = []
            run.append(atom)
        if run:
            yield run
