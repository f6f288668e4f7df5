"""How memories become Verilog: one small module, instead of initial values bit by bit."""

from amaranth import *
from amaranth.lib.memory import Memory

__all__ = ["RAM_VERILOG", "VerilogTarget"]

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
"""Verilog of the modules that :class:`VerilogTarget` instantiates."""


class VerilogTarget:
    """An elaboration target that turns memories into instances of ``moeaccel_ram``.

    That is done for memories of zeros with one write and one synchronous read port that gives the
    old data on a collision; all others become what Amaranth makes of them. Amaranth writes initial
    values bit by bit, which for megabytes of buffers takes minutes, here and in the tools behind.
    """

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
