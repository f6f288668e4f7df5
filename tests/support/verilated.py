"""A Verilated block without buses: arrays of inputs in, arrays of outputs out."""

import ctypes
from pathlib import Path

import numpy as np
from amaranth.back import verilog
from amaranth.hdl import Shape

from moeaccel.sim.cosim import verilator
from moeaccel.toolchain import cache_folder, find_compiler

_HARNESS = """
#include <cstdint>
#include "Vtop.h"
static uint64_t stops;
int moeaccel_model_printf(const char*, ...) {{ return 0; }}
void vl_finish(const char*, int, const char*) VL_MT_UNSAFE {{ ++stops; }}
void vl_stop(const char*, int, const char*) VL_MT_UNSAFE {{ ++stops; }}
void vl_fatal(const char*, int, const char*, const char*) VL_MT_UNSAFE {{ ++stops; }}
double sc_time_stamp() {{ return 0; }}
extern "C" __attribute__((visibility("default")))
uint64_t steps(uint64_t cycles, const uint64_t* in, uint64_t* out) {{
    static VerilatedContext context;
    static Vtop top{{&context}};
    stops = 0;
    for (uint64_t i = 0; i < cycles; ++i, in += {inputs}, out += {outputs}) {{
        {before}
        top.clk = 0;
        top.eval();
        {after}
        top.clk = 1;
        top.eval();
    }}
    return stops;
}}
"""


def translate(text, folder, *flags, top="top"):
    """Let Verilator translate a module in an empty folder, and return the build.

    Warnings are those of models that users build, and as fatal.
    """
    translator, root = verilator._verilator()
    build = verilator._Build(
        work=folder, runtime=cache_folder() / "runtime", root=root,
        compiler=find_compiler(), flags=("-O1",), waves=False)
    build.translate(translator, (*flags, *verilator._translate_flags(
        top=top, threads=1, waves=False, assertions=True)), text)
    return build


def lint(text, folder, *, top="top"):
    """Let Verilator check a module, and no more."""
    translate(text, folder, "--lint-only", top=top)


class Verilated:
    """A component whose ports are integers of at most 63 bits.

    Parameters
    ----------
    component : amaranth.lib.wiring.Component
    folder : pathlib.Path
        Where it is built, empty.
    models : str
        Verilog of what it instantiates.
    """

    def __init__(self, component, folder, *, models=""):
        shapes = {name: Shape.cast(member.shape)
                  for name, member in component.signature.members.items()}
        flows = {name: member.flow.name for name, member in component.signature.members.items()}
        self._inputs = {name: shape for name, shape in shapes.items() if flows[name] == "In"}
        self._outputs = {name: shape for name, shape in shapes.items() if flows[name] == "Out"}
        text = verilog.convert(component, name="top", emit_src=False) + models
        build = translate(text, folder)
        harness = folder / "steps.cpp"
        harness.write_text(_HARNESS.format(
            inputs=len(self._inputs), outputs=len(self._outputs),
            before=" ".join(f"top.{name} = in[{i}];" for i, name in enumerate(self._inputs)),
            after=" ".join(f"out[{i}] = top.{name};" for i, name in enumerate(self._outputs))))
        build.compile(harness)
        self._steps = ctypes.CDLL(str(Path(folder) / verilator.LIBRARY_NAME)).steps
        self._steps.restype = ctypes.c_uint64

    def run(self, **inputs):
        """Return each output, int64 (cycles,), as it shows while the cycle's inputs are held."""
        assert inputs.keys() == self._inputs.keys()
        given = np.stack([np.asarray(inputs[name]).astype(np.int64) & ((1 << shape.width) - 1)
                          for name, shape in self._inputs.items()], axis=1).astype(np.uint64)
        found = np.zeros((len(given), len(self._outputs)), np.uint64)
        pointer = ctypes.POINTER(ctypes.c_uint64)
        stops = self._steps(ctypes.c_uint64(len(given)), given.ctypes.data_as(pointer),
                            found.ctypes.data_as(pointer))
        assert stops == 0, "an assertion of the RTL failed"
        return {name: _value(found[:, i].astype(np.int64), shape)
                for i, (name, shape) in enumerate(self._outputs.items())}


def _value(raw, shape):
    """Return integers of a shape from their bits."""
    return raw - ((raw >> shape.width - 1 & 1) << shape.width) if shape.signed else raw
