"""What Verilator writes, made of random parts, does the same when what is idle is skipped."""

import ctypes
import os
import random
import re
import subprocess

import pytest

from moeaccel.sim.speedup.gating import below, gate
from moeaccel.toolchain import find_compiler

KINDS = {"CData": 8, "SData": 16, "IData": 32, "QData": 64}
STEPS = 60

RUN_TIME = "#include <cstdint>\n#include <cstring>\n" + "".join(
    f"using {kind} = uint{bits}_t;\n" for kind, bits in KINDS.items()) + """
#define VL_UNLIKELY(x) (x)
#define VL_IN8(name, msb, lsb) CData name
template <int words> struct VlWide {
    IData at[words];
    IData& operator[](int word) { return at[word]; }
};
template <class T, int size> struct VlUnpacked {
    T at[size];
    T& operator[](int word) { return at[word]; }
};
static int extensions;
static inline IData VL_EXTENDS_II(int, int bits, IData value) {
    ++extensions;
    return IData(int32_t(value << (32 - bits)) >> (32 - bits));
}
static inline void VL_ZERO_W(int, VlWide<3>& value) { value = {}; }
static inline void VL_ASSIGN_W(int, VlWide<3>& to, const VlWide<3>& from) { to = from; }
static IData said;
static inline void say(IData what) { said = said * 31 + what; }
"""

INPUTS = tuple(f"in{i}" for i in range(6))
WIDE, MEMORIES = ("wide0", "wide1"), ("memory0", "memory1")
FLAGS = ("flags0", "flags1")  # set by the functions, cleared outside


class Program:
    """A class as Verilator writes it: registers, wires, memories, and two functions in a row."""

    def __init__(self, number):
        self._draw = draw = random.Random(number)
        self.name = f"Vtop_{number}"
        self._scalars = {f"r{i}": draw.choice(list(KINDS)) for i in range(400)}
        self._fresh = draw.sample(list(self._scalars)[2:], len(self._scalars) - 2)
        self._array = [f"lane{i}" for i in range(12)]
        self._locals = {f"t{i}": draw.choice(list(KINDS)) for i in range(8)}
        # A local variable is of one function, and written there before it is read, or zero.
        self._usable = []
        self._loops = 0
        self.bodies = []
        for half in (0, 1):
            self._usable = [name for i, name in enumerate(self._locals) if i % 2 == half]
            statements = [self._statement(1) for _ in range(100)]
            self.bodies.append("".join([f"    vlSelfRef.r{half} = {self._value()};\n",
                                        f"    vlSelfRef.flags{half}[1U] = 1U;\n", *statements]))

    def _operand(self):
        draw = self._draw
        index = f"[(3U & (IData)(vlSelfRef.{draw.choice(INPUTS)}))]"
        return draw.choice((
            f"vlSelfRef.{draw.choice(list(self._scalars))}",
            f"(IData)(vlSelfRef.{draw.choice(list(self._scalars))})",
            f"vlSelfRef.{draw.choice(INPUTS)}", draw.choice(self._usable),
            f"vlSelfRef.{draw.choice(self._array)}",
            f"vlSelfRef.{draw.choice(WIDE)}[{draw.randrange(3)}U]",
            f"vlSelfRef.{draw.choice(WIDE)}{index.replace('3U', '1U')}",
            f"vlSelfRef.{draw.choice(MEMORIES)}{index}"))

    def _value(self):
        a, b, c = (self._operand() for _ in range(3))
        return self._draw.choice((
            a, f"(0xffU & ({a} + {b}))", f"(({a} ^ {b}) & (- (IData)((1U & (IData)({c})))))",
            f"((1U & (IData)({a})) ? {b} : {c})", f"VL_EXTENDS_II(32,8, (0xffU & (IData)({a})))",
            f"(VL_UNLIKELY((0U == {a})) | {b})"))

    def _statement(self, depth):
        draw, pad = self._draw, "    " * depth
        kind = draw.random()
        if kind < 0.3 and depth < 4:
            then, other = ("".join(self._statement(depth + 1) for _ in range(draw.randint(1, 5)))
                           for _ in range(2))
            text = f"{pad}if ((1U & (IData)({self._value()}))) {{\n{then}{pad}}}"
            return text + (f" else {{\n{other}{pad}}}\n" if draw.random() < 0.5 else "\n")
        if kind < 0.36 and self._fresh:
            target = self._fresh.pop()
            return (f"{pad}if ((1U & (IData)({self._operand()}))) {{\n"
                    f"{pad}    vlSelfRef.{target} = 0U;\n{pad}}} else {{\n"
                    f"{pad}    vlSelfRef.{target} = {self._value()};\n{pad}}}\n")
        if kind < 0.365:  # the first of them changes the condition
            condition, target = self._operand(), draw.choice(list(self._scalars))
            return "".join(
                f"{pad}if ({condition}) {{\n{pad}    {one} = {self._value()};\n{pad}}}\n"
                for one in (condition, f"vlSelfRef.{target}") if one.startswith("vlSelfRef"))
        if kind < 0.38:
            return f"{pad}say({self._operand()});\n"
        if kind < 0.40:
            one, other = draw.sample(WIDE, 2)
            return f"{pad}VL_ASSIGN_W(96, vlSelfRef.{one}, vlSelfRef.{other});\n"
        if kind < 0.41:
            return self._loop(pad)
        if kind < 0.43:
            first = draw.randrange(3)
            return (f"{pad}for (int i = 0; i < 8; ++i) vlSelfRef.lanes0[{first} + 1 * i] = "
                    f"( vlSelfRef.lanes0[{draw.randrange(4)} + 1 * i] + {self._operand()} ) ;\n")
        if self._fresh and draw.random() < 0.95:
            target, value = f"vlSelfRef.{self._fresh.pop()}", self._value()
            return f"{pad}{target} = {value if draw.random() < 0.8 else f'({target} + {value})'};\n"
        target = draw.choice((
            f"vlSelfRef.{draw.choice(list(self._scalars))}", draw.choice(self._usable),
            f"vlSelfRef.{draw.choice(WIDE)}[{draw.randrange(3)}U]",
            f"vlSelfRef.{draw.choice(WIDE)}[(1U & (IData)({self._operand()}))]",
            f"vlSelfRef.{draw.choice(self._array)}",
            f"vlSelfRef.{draw.choice(MEMORIES)}[(3U & (IData)({self._operand()}))]"))
        return f"{pad}{target} = {self._value()};\n"

    def _loop(self, pad):
        """Return a loop over words as Verilator writes it."""
        index = f"__Vilp{self._loops}"
        self._loops += 1
        one, other = self._draw.sample(WIDE, 2)
        last, value = self._draw.choice((
            (2, f"vlSelfRef.{other}[{index}]"), (2, "0U"), (2, f"vlSelfRef.{one}[{index}]"),
            (1, f"vlSelfRef.{other}[({index}\n{pad}    + (IData)(1U))]"),
            (1, f"vlSelfRef.{one}[({index} + (IData)(1U))]")))
        return (f"{pad}{index} = {self._draw.randrange(2)}U;\n"
                f"{pad}while (({index} <= 0x0000000{last}U)) {{\n"
                f"{pad}    vlSelfRef.{one}[{index}] = {value};\n"
                f"{pad}    {index} = ((IData)(1U) + {index});\n{pad}}}\n")

    def write(self, folder):
        lanes = "; ".join(f"IData {name}" for name in self._array)
        members = [f"VL_IN8({name},7,0);" for name in INPUTS]
        members += [f"{kind}/*{KINDS[kind] - 1}:0*/ {name};"
                    for name, kind in self._scalars.items()]
        members += [f"VlWide<3>/*95:0*/ {name};" for name in WIDE]
        members += [f"VlUnpacked<SData/*15:0*/, 4> {name};" for name in MEMORIES + FLAGS]
        members += [f"union {{ IData lanes0[{len(self._array)}]; struct {{ {lanes}; }}; }};",
                    "VlUnpacked<QData/*63:0*/, 1> __VnbaTriggered;"]
        (folder / f"{self.name}.h").write_text("".join([
            f"class {self.name} {{\n  public:\n", *(f"    {line}\n" for line in members),
            "\n    // INTERNAL VARIABLES\n    int unused;\n};\n"]), encoding="utf-8")
        calls = []
        for half, body in enumerate(self.bodies):
            name = f"{self.name}___nba_sequent__TOP__{half}"
            calls.append(f"        {name}(vlSelf);\n"
                         f"        if ((1U & (IData)(vlSelfRef.r{half + 3}))) {{\n"
                         f"            vlSelfRef.memory{half}[(3U & (IData)(vlSelfRef.r4))]\n"
                         f"                = vlSelfRef.r5;\n        }}\n")
            mine = [(name, kind) for i, (name, kind) in enumerate(self._locals.items())
                    if i % 2 == half]
            local = "".join(f"    {kind}/*{KINDS[kind] - 1}:0*/ {name};\n    {name} = 0;\n"
                            for name, kind in mine)
            local += f"    VlWide<3>/*95:0*/ words{half};\n    VL_ZERO_W(96, words{half});\n"
            local += "".join(f"    IData/*31:0*/ __Vilp{i};\n" for i in range(self._loops)
                             if f"__Vilp{i} =" in body)
            (folder / f"{self.name}__{half}.cpp").write_text(
                f"void {name}({self.name}* vlSelf) {{\n    auto& vlSelfRef = *vlSelf;\n"
                f"    // Locals\n{local}    // Body\n{body}}}\n", encoding="utf-8")
        (folder / f"{self.name}__2.cpp").write_text(
            f"void {self.name}___eval_ico({self.name}* vlSelf) {{\n    auto& vlSelfRef = *vlSelf;\n"
            "    vlSelfRef.r0 = vlSelfRef.in0;\n}\n"
            f"void {self.name}___eval_nba({self.name}* vlSelf) {{\n    auto& vlSelfRef = *vlSelf;\n"
            "    // Body\n    if ((1ULL & vlSelfRef.__VnbaTriggered[0U])) {\n"
            f"{''.join(calls)}    }}\n}}\n", encoding="utf-8")
        (folder / "Vtop__Trace__0.cpp").write_text(
            f"static void trace({self.name}* self) {{\n    self->r1 = 0U;\n"
            "    self->flags0[1U] = 0U;\n    self->flags1[1U] = 0U;\n}\n", encoding="utf-8")

    def run(self, folder):
        """Return all members after each of some steps, and how often VL_EXTENDS_II was called.

        Inputs change now and then.
        """
        draw = random.Random(1)
        inputs = [[draw.randrange(256)] * len(INPUTS)]
        for _ in range(STEPS):
            inputs.append([draw.randrange(256) if draw.random() < 0.1 else value
                           for value in inputs[-1]])
        names = [*self._scalars, *self._array,
                 *(f"{name}[{word}]" for name in WIDE for word in range(3)),
                 *(f"{name}[{word}]" for name in MEMORIES + FLAGS for word in range(4))]
        ends = (".h", "__0.cpp", "__1.cpp", "__2.cpp")
        text = RUN_TIME + "".join(
            (folder / name).read_text(encoding="utf-8")
            for name in (*(f"{self.name}{end}" for end in ends), "Vtop__Trace__0.cpp"))
        values = ", ".join(f"{{{', '.join(map(str, step))}}}" for step in inputs)
        (folder / "all.cpp").write_text(
            f"{text}\nstatic const int inputs[][{len(INPUTS)}] = {{{values}}};\n"
            "extern \"C\" void run(uint64_t* out) {\n"
            f"    static {self.name} s;\n    s.__VnbaTriggered[0] = 1;\n"
            "    for (auto& step : inputs) {\n"
            + "".join(f"        s.{name} = step[{i}];\n" for i, name in enumerate(INPUTS))
            + f"        {self.name}___eval_ico(&s);\n        {self.name}___eval_nba(&s);\n"
            + "".join(f"        *out++ = s.{name};\n" for name in names)
            + "        *out++ = said;\n        trace(&s);\n    }\n}\n"
            "extern \"C\" int count() { return extensions; }\n", encoding="utf-8")
        made = folder / f"{len(list(folder.glob('*.so')))}.so"  # each is loaded for itself
        subprocess.run([find_compiler(), "-std=c++17", "-O0", "-shared", "-fPIC", "-w", "all.cpp",
                        "-o", made], cwd=folder, check=True)
        out = (ctypes.c_uint64 * (len(inputs) * (len(names) + 1)))()
        library = ctypes.CDLL(os.fspath(made))
        library.run(out)
        return list(out), library.count()


def run_both(program, folder, busy=""):
    """Return how many groups may be skipped, and what a program gives without and with that."""
    program.write(folder)
    before = program.run(folder)
    groups = gate(folder, busy=busy)
    return groups, before, program.run(folder)


@pytest.mark.parametrize("busy", ["", "^r[0-9]*[05]"], ids=["none", "some"])
@pytest.mark.parametrize("number", range(6))
def test_programs_do_what_they_did(tmp_path, number, busy):
    groups, (before, _), (after, _) = run_both(Program(number), tmp_path, busy)
    assert groups > 9
    assert before == after


def test_a_local_word_that_is_not_written_is_zero(tmp_path):
    program = Program(0)
    program.bodies = [("    words0[(1U & (IData)(vlSelfRef.in1))] = vlSelfRef.in2;\n"
                       "    vlSelfRef.r2 = words0[1U];\n    say(words0[0U]);\n"), ""]
    groups, (before, _), (after, _) = run_both(program, tmp_path)
    assert groups
    assert before == after


def copies():
    """Return a program with eight statements, each of which can be counted."""
    program = Program(0)
    program.bodies = ["".join(
        f"    vlSelfRef.r{i} = VL_EXTENDS_II(32,8, (IData)(vlSelfRef.in1));\n"
        for i in range(2, 10)), ""]
    return program


def test_what_is_busy_always_runs(tmp_path):
    groups, (_, before), (_, after) = run_both(copies(), tmp_path, "r[2-5]")
    assert groups
    assert before == 8 * (STEPS + 1)
    assert before / 2 < after < before * 2 / 3


def test_what_reads_nothing_new_does_not_run(tmp_path):
    groups, (_, before), (_, after) = run_both(copies(), tmp_path)
    assert groups == 1
    assert before == 8 * (STEPS + 1)
    assert 8 <= after < before / 3  # the input changes in a tenth of the steps


@pytest.mark.parametrize("statement", [
    "while (vlSelfRef.r1) { vlSelfRef.r1 = 0U; }", "vlSymsp->TOP__other.r1 = 1U;",
    "unknown = vlSelfRef.r1;", "vlSelfRef.unknown = vlSelfRef.r1;",
    """__Vilp1 = 0U; while ((__Vilp1 <= 1U)) {
        vlSelfRef.wide0[__Vilp1] = vlSelfRef.wide1[(2U - __Vilp1)];
        __Vilp1 = ((IData)(1U) + __Vilp1); }""",
    "if (vlSelfRef.r1) { vlSelfRef.r1 = 0U;", "vlSelfRef.r1 = (vlSelfRef.r2;"])
def test_a_function_that_is_not_understood_stays(tmp_path, statement):
    program = Program(0)
    program.bodies[1] += f"    {statement}\n"
    program.write(tmp_path)
    texts = {path: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()}
    assert gate(tmp_path) == 0
    assert texts == {path: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()}


def test_what_is_below_a_numbered_module():
    pattern = below("core", ["array", "i_"])
    for name in ("top__DOT__core0__DOT__array__DOT__sum", "top__DOT__core12__DOT__i_take"):
        assert re.search(pattern, name)
    for name in ("top__DOT__core__DOT__array", "top__DOT__core0__DOT__sums", "core0__DOT__array",
                 "top__DOT__core0__DOT__sums__DOT__array"):
        assert not re.search(pattern, name)
