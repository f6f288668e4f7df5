"""What Verilator writes, made of random parts, does the same when it is rewritten."""

import ctypes
import os
import random
import re
import subprocess

import pytest

from moeaccel.sim.speedup.vectorise import vectorise
from moeaccel.toolchain import find_compiler

BITS = {"CData": 8, "SData": 16, "IData": 32, "QData": 64}

RUN_TIME = "#include <cstdint>\n" + "".join(
    f"using {kind} = uint{bits}_t;\n" for kind, bits in BITS.items()) + """
static inline IData VL_EXTENDS_II(int, int bits, IData value) {
    return IData(int32_t(value << (32 - bits)) >> (32 - bits));
}
static inline IData pick(IData value) { return value * 3; }
"""

# Right sides: of the statement's number i, and of operands.
TEMPLATES = (
    "vlSelfRef.{a}",
    "(0x1fU & ((IData)(vlSelfRef.{a}) + (IData)(vlSelfRef.{b})))",
    "(0xffffU & (VL_EXTENDS_II(17,8, (IData)(vlSelfRef.{a})) - (IData)(vlSelfRef.{a})))",
    "((IData)(vlSelfRef.{own}) ^ ((IData)(vlSelfRef.{a}) << 3U))",
    "(1U & ((IData)(vlSelfRef.{a}) >> {i}U))",
    "((IData)(vlSelfRef.wide[{i}U]) | (IData)(vlSelfRef.{a}))",
    "(vlSelfRef.wide[2U] + (IData)(vlSelfRef.{a}))",
    "((1U & (IData)(vlSelfRef.{b})) ? (IData)(vlSelfRef.{a}) : (IData)(local))",
    "pick(vlSelfRef.{a})",
)
# Which members of a family of 40 the statement i reads.
PATTERNS = (lambda i, _: i, lambda i, _: 2 * i, lambda i, _: 2 * i + 1, lambda i, _: 7,
            lambda i, _: 15 - i, lambda _, draw: draw.randrange(40))


class Program:
    """A class as Verilator writes it, with one function."""

    def __init__(self, number):
        draw = random.Random(number)
        self.name = f"Vtop___p{number}"
        families = {f"r{f}": draw.choice(list(BITS)) for f in range(6)}
        self.members = [(f"{family}_{i}", kind) for family, kind in families.items()
                        for i in range(40)]
        draw.shuffle(self.members)
        body = ["    IData/*31:0*/ local;", "    local = vlSelfRef.wide[0U];"]
        for _ in range(4):
            body += self._run(draw, list(families))
            body.append(draw.choice((
                "    local = (IData)(vlSelfRef.r0_3);", "    // a comment; vlSelfRef.r0_0 = 1U;",
                "    vlSelfRef.wide[1U] = (local + (IData)(vlSelfRef.r1_2));",
                "    if (vlSelfRef.r0_1) {\n" + "\n".join(self._run(draw, list(families)))
                + "\n    }")))
        self.body = "\n".join(body)

    def _run(self, draw, families):
        """Return sets of like statements, now and then mixed with each other."""
        lines = []
        for _ in range(draw.randint(1, 3)):
            target, a, b = (draw.choice(families) for _ in range(3))
            template = draw.choice(TEMPLATES)
            of_a, of_b = draw.choice(PATTERNS), draw.choice(PATTERNS)
            step = draw.choice((1, 1, 2))
            for i in range(draw.randint(3, 16)):
                right = template.format(a=f"{a}_{of_a(i, draw)}", b=f"{b}_{of_b(i, draw)}", i=i,
                                        own=f"{target}_{step * i}")
                lines.append(f"    vlSelfRef.{target}_{step * i} = {right};")
        if draw.random() < 0.5:
            draw.shuffle(lines)
        return lines

    def write(self, folder):
        members = "\n".join(f"    {kind}/*{BITS[kind] - 1}:0*/ {member};"
                            for member, kind in self.members)
        (folder / f"{self.name}.h").write_text(
            f"struct {self.name} {{\n    uint32_t wide[16];\n{members}\n}};\n", encoding="utf-8")
        (folder / f"{self.name}__0.cpp").write_text(
            f"void {self.name}___nba_sequent__TOP__0({self.name}* vlSelf) {{\n"
            f"    auto& vlSelfRef = *vlSelf;\n{self.body}\n}}\n", encoding="utf-8")

    def call(self):
        """Return C++ that fills the members, runs the function and tells the members."""
        fill = "".join(f"s.{member} = draw();" for member, _ in self.members)
        tell = "".join(f"*out++ = s.{member};" for member, _ in self.members)
        return (f"{{ {self.name} s{{}}; for (auto& word : s.wide) word = draw(); {fill}"
                f"{self.name}___nba_sequent__TOP__0(&s); {tell} }}")


def run(programs, folder):
    """Compile the programs of a folder and return all members after all functions."""
    text = RUN_TIME + "".join(
        (folder / f"{program.name}{end}").read_text(encoding="utf-8")
        for program in programs for end in (".h", "__0.cpp"))
    (folder / "all.cpp").write_text(
        f"{text}\nextern \"C\" void run(uint64_t* out) {{ uint64_t state = 1;\n"
        "auto draw = [&] { return (state = state * 6364136223846793005u + 1) >> 17; };\n"
        + "\n".join(program.call() for program in programs) + "\n}\n", encoding="utf-8")
    subprocess.run([find_compiler(), "-std=c++17", "-O1", "-ftree-vectorize", "-shared", "-fPIC",
                    "-w",
                    "all.cpp", "-o", "all.so"], cwd=folder, check=True)
    out = (ctypes.c_uint64 * sum(len(program.members) for program in programs))()
    ctypes.CDLL(os.fspath(folder / "all.so")).run(out)
    return list(out)


def test_programs_do_what_they_did(tmp_path):
    programs = [Program(number) for number in range(12)]
    before, after = tmp_path / "before", tmp_path / "after"
    for folder in (before, after):
        folder.mkdir()
        for program in programs:
            program.write(folder)
    folded = vectorise(after)
    assert folded > 100
    assert run(programs, before) == run(programs, after)


@pytest.fixture
def written(tmp_path):
    """Return a function that rewrites a class of bytes with this body, and returns both texts."""
    def write(members, body):
        (tmp_path / "Vtop___024root.h").write_text(
            "".join(f"    CData/*7:0*/ {name};\n" for name in members), encoding="utf-8")
        source = tmp_path / "Vtop___024root__0.cpp"
        source.write_text(
            "void Vtop___024root___nba_sequent__TOP__0(Vtop___024root* vlSelf) {\n"
            + "".join(f"    {line}\n" for line in body) + "}\n", encoding="utf-8")
        count = vectorise(tmp_path)
        return count, source.read_text(encoding="utf-8"), (
            tmp_path / "Vtop___024root.h").read_text(encoding="utf-8")
    return write


def test_lanes_become_a_loop_over_arrays(written):
    count, text, header = written(
        [f"{name}{i}" for i in range(12) for name in "ab"],
        [f"vlSelfRef.b{i} = (7U & (vlSelfRef.a{2 * i} + vlSelfRef.a{2 * i + 1}));"
         for i in (5, 0, 1, 4, 2, 3)])
    assert count == 6
    assert re.sub(r"\s", "", text).endswith(
        "{for(inti=0;i<6;++i)vlSelfRef.lanes0[0+1*i]="
        "(7U&(vlSelfRef.lanes1[0+1*i]+vlSelfRef.lanes2[0+1*i]));}")
    assert "CData lanes2[6]; struct { CData a1; CData a3; " in header
    assert "union { CData lanes0[6]; struct { CData b0; CData b1; " in header
    assert "CData/*7:0*/ b6;" in header


def test_a_shift_register_moves_by_one(written):
    body = [f"vlSelfRef.a{i + 1} = vlSelfRef.a{i};" for i in range(8)]
    count, text, _ = written([f"a{i}" for i in range(9)], body)
    assert count == 0
    assert all(line in text for line in body)


def test_what_comes_between_stays_between(written):
    first, second = ([f"vlSelfRef.{to}{i} = vlSelfRef.{of}{i};" for i in range(4)]
                     for to, of in ("ba", "ab"))
    _, text, _ = written([f"{name}{i}" for i in range(4) for name in "ab"],
                         [*first, "done(vlSelf);", *second])
    assert re.search(r"for .*\s*done\(vlSelf\);\s*for ", text)


def test_a_loop_writes_neighbours(written):
    count, text, _ = written(
        [f"{name}{i}" for i in range(8) for name in "ab"],
        [*(f"vlSelfRef.b{i} = vlSelfRef.a{i};" for i in range(8)), "done(vlSelf);",
         *(f"vlSelfRef.b{i} = (1U | vlSelfRef.a{i});" for i in (0, 2, 4, 6))])
    assert count == 8
    assert "vlSelfRef.b4 = (1U | vlSelfRef.a4);" in text
