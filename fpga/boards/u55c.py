"""The accelerator on an Alveo U55C: sources, constraints and block design of a Vivado project.

::

    PCIe x16 -- XDMA --+-- M_AXI_LITE -- SmartConnect -- registers     usr_irq <-- irq
                       |
                       +-- M_AXI ------- SmartConnect -- HBM port 0
                                            |
                       axi_mem -------------+
                       axi_mem1, ... --- SmartConnect -- their HBM ports

SmartConnect joins the clocks (PCIe 250 MHz, core, HBM) and turns AXI4 of any width into the HBM
ports' AXI3 of 256 bits and 16 beats (AMD PG276). A channel's master sees its own part of the HBM;
the host sees all of it, at the device addresses that the driver uses: the channel's number above
the address in its memory.

Written after AMD's documents (PG195 XDMA, PG276 HBM, UG835 Tcl, UG994 block designs, UG1469 U55C).
**It has not been run**: there was no Vivado where it was written.
"""

from __future__ import annotations

from amaranth.hdl import Shape
from amaranth.lib.wiring import Out

from moeaccel.config import AcceleratorConfig
from moeaccel.errors import ConfigurationError
from moeaccel.fpga.boards.base import ProjectBoard
from moeaccel.hdl.memory.axi import AXI4Signature
from moeaccel.hdl.top import MODULE, members

__all__ = ["BOARD", "WRAPPER", "U55c"]

HBM_MHZ = 450
"""Clock of the HBM ports: 32 bytes a cycle are the 14.4 GB/s of a pseudo-channel."""

PSEUDO_CHANNEL_LOG2 = 29
"""log2 of a pseudo-channel's bytes: 16 GiB in 32 of them."""

STACK_PORTS = 16
WRAPPER = "moeaccel_u55c"

_NOT_RUN = ("Written after AMD's documentation and never run: there was no Vivado where it was "
            "written. Expect to correct it.")

_IDLE = {"lock": (1, 0), "cache": (4, 0b0011), "prot": (3, 0), "qos": (4, 0)}
"""Signals of AXI that our masters lack: name, (bits, value); cache: normal, bufferable."""


def _masters(config: AcceleratorConfig) -> list[str]:
    """Return the names of the accelerator's memory ports, in the order of channels."""
    return [name for name, member in members(config).items()
            if member.is_signature and isinstance(member.signature, AXI4Signature)]


def _layout(config: AcceleratorConfig) -> tuple[list[str], int]:
    """Return the memory ports and how many HBM stacks serve them."""
    names = _masters(config)
    if len(names) == 1:
        return names, 1
    most = PSEUDO_CHANNEL_LOG2 + (2 * STACK_PORTS).bit_length() - 1
    each = most - (len(names) - 1).bit_length()
    if config.address_bits != each:
        raise ConfigurationError(
            f"address_bits must be {each} for {len(names)} channels that divide the U55C's "
            f"{1 << most - 30} GiB among them, not {config.address_bits}")
    return names, 2


def _wrapper(config: AcceleratorConfig) -> str:
    """Return Verilog that gives the accelerator Xilinx' names, reset, base addresses and irq."""
    names, _ = _layout(config)
    channel_bits = (len(names) - 1).bit_length()
    total = config.address_bits + channel_bits
    inner = members(config)
    buses = ":".join(["s_axil", *(f"m_{name}" for name in names)])

    def info(what: str, more: str = "") -> str:
        parameter = f' (* X_INTERFACE_PARAMETER = "{more}" *)' if more else ""
        return f'  (* X_INTERFACE_INFO = "{what}" *){parameter}\n'

    ports = [
        info("xilinx.com:signal:clock:1.0 aclk CLK",
             f"XIL_INTERFACENAME aclk, ASSOCIATED_BUSIF {buses}, "
             "ASSOCIATED_RESET aresetn:mem_aresetn"),
        "  input aclk,\n",
        info("xilinx.com:signal:reset:1.0 aresetn RST",
             "XIL_INTERFACENAME aresetn, POLARITY ACTIVE_LOW"),
        "  input aresetn,\n",
        info("xilinx.com:signal:reset:1.0 mem_aresetn RST",
             "XIL_INTERFACENAME mem_aresetn, POLARITY ACTIVE_LOW"),
        "  input mem_aresetn,\n",
        info("xilinx.com:signal:clock:1.0 irq_clk CLK", "XIL_INTERFACENAME irq_clk"),
        "  input irq_clk,\n",
        "  output irq",
    ]
    ports = ["".join(ports)]
    connections = [".clk(aclk)", ".rst(reset)", ".mem_rst(mem_reset)", ".irq(level)"]
    connections += [f".{name}()" for name, member in inner.items()
                    if member.is_port and name not in ("irq", "mem_rst")]
    lines = []
    outside = {"axil": ("s_axil", "AXI4LITE, ADDR_WIDTH 12, DATA_WIDTH 32")}
    protocol = ", ".join([
        "AXI4", f"ADDR_WIDTH {total}", f"DATA_WIDTH {8 * config.port_bytes}",
        f"MAX_BURST_LENGTH {config.max_burst_beats}", "SUPPORTS_NARROW_BURST 0",
        "NUM_READ_OUTSTANDING 32", "NUM_WRITE_OUTSTANDING 32"])
    outside |= {name: (f"m_{name}", protocol) for name in names}
    for inside, (bus, protocol) in outside.items():
        master = inside in names
        for i, (name, member) in enumerate(inner[inside].signature.members.items()):
            width = Shape.cast(member.shape).width
            address = name in ("araddr", "awaddr") and master
            shown = total if address else width
            bits = "" if shown == 1 else f"[{shown - 1}:0] "
            ports.append(info(
                f"xilinx.com:interface:aximm:1.0 {bus} {name.upper()}",
                "" if i else f"XIL_INTERFACENAME {bus}, PROTOCOL {protocol}")
                + f"  {'output' if member.flow == Out else 'input'} {bits}{bus}_{name}")
            if address:
                wire = f"{inside}_{name}"
                lines.append(f"  wire [{width - 1}:0] {wire};")
                lines.append(f"  assign {bus}_{name} = " + (
                    f"{{{channel_bits}'d{names.index(inside)}, {wire}}};" if channel_bits
                    else f"{wire};"))
                connections.append(f".{inside}__{name}({wire})")
            else:
                connections.append(f".{inside}__{name}({bus}_{name})")
        if master:
            for channel in ("aw", "ar"):
                for name, (width, value) in _IDLE.items():
                    bits = "" if width == 1 else f"[{width - 1}:0] "
                    signal = f"{channel}{name}"
                    ports.append(info(f"xilinx.com:interface:aximm:1.0 {bus} {signal.upper()}")
                                 + f"  output {bits}{bus}_{signal}")
                    lines.append(f"  assign {bus}_{signal} = {width}'d{value};")
    return "\n".join([
        f"// moeaccel, configuration {config.name}, for an Alveo U55C: made by 'moeaccel verilog'.",
        f"// {_NOT_RUN}",
        "",
        f"module {WRAPPER} (",
        ",\n".join(ports),
        ");",
        "  // The accelerator's resets are synchronous and high; mem_reset: the memory's, too.",
        "  reg reset = 1'b1, mem_reset = 1'b1;",
        "  always @(posedge aclk) reset <= ~aresetn;",
        "  always @(posedge aclk) mem_reset <= ~mem_aresetn;",
        "  // The interrupt is a level; XDMA wants it in its own clock.",
        "  wire level;",
        "  (* ASYNC_REG = \"TRUE\" *) reg [1:0] irq_sync = 2'b00;",
        "  always @(posedge irq_clk) irq_sync <= {irq_sync[0], level};",
        "  assign irq = irq_sync[1];",
        "  // A channel's memory lies at its number's place.",
        *lines,
        f"  {MODULE} accelerator (",
        ",\n".join(f"    {connection}" for connection in connections),
        "  );",
        "endmodule",
        "",
    ])


_XDC = f"""\
# Alveo U55C: made by 'moeaccel verilog'.
# {_NOT_RUN}
# Pins of the PCIe lanes and of the HBM follow from the IP's own constraints.

set_property PACKAGE_PIN AR15 [get_ports pcie_refclk_clk_p]
set_property PACKAGE_PIN AR14 [get_ports pcie_refclk_clk_n]
create_clock -period 10.000 -name pcie_refclk [get_ports pcie_refclk_clk_p]

set_property -dict {{PACKAGE_PIN BF41 IOSTANDARD LVCMOS18}} [get_ports pcie_perst_n]
set_false_path -from [get_ports pcie_perst_n]

# SYSCLK3, 100 MHz, in the region of the HBM.
set_property -dict {{PACKAGE_PIN BK43 IOSTANDARD LVDS}} [get_ports sysclk_clk_p]
set_property -dict {{PACKAGE_PIN BK44 IOSTANDARD LVDS}} [get_ports sysclk_clk_n]
create_clock -period 10.000 -name sysclk [get_ports sysclk_clk_p]

# High tells the satellite controller to switch the card off: the HBM is too hot.
set_property -dict {{PACKAGE_PIN BE45 IOSTANDARD LVCMOS18 PULLDOWN TRUE}} [get_ports hbm_cattrip]
set_false_path -to [get_ports hbm_cattrip]

# First register of the synchroniser of {WRAPPER}.
set_false_path -to [get_pins -hier -filter {{NAME =~ *irq_sync_reg[0]/D}}]

set_property CFGBVS GND [current_design]
set_property CONFIG_VOLTAGE 1.8 [current_design]
set_property CONFIG_MODE SPIx4 [current_design]
set_property BITSTREAM.CONFIG.SPI_BUSWIDTH 4 [current_design]
set_property BITSTREAM.CONFIG.SPI_32BIT_ADDR YES [current_design]
set_property BITSTREAM.CONFIG.SPI_FALL_EDGE YES [current_design]
set_property BITSTREAM.CONFIG.CONFIGRATE 85.0 [current_design]
set_property BITSTREAM.CONFIG.EXTMASTERCCLK_EN DISABLE [current_design]
set_property BITSTREAM.CONFIG.UNUSEDPIN PULLUP [current_design]
set_property BITSTREAM.GENERAL.COMPRESS TRUE [current_design]
"""

_TCL = """\
# moeaccel, configuration @CONFIG@, on an Alveo U55C: made by 'moeaccel verilog'.
# @NOT_RUN@
#
#   vivado -mode batch -source build_u55c.tcl
#
# Sources are beside this file; the project, bitstream and reports go to ./vivado_u55c.

set here [file dirname [file normalize [info script]]]
set core_mhz @CORE_MHZ@
set hbm_mhz @HBM_MHZ@
set jobs 8

create_project -force moeaccel [file join $here vivado_u55c] -part @PART@
add_files -norecurse [list [file join $here @NAME@.v] [file join $here @WRAPPER@.v]]
set_property verilog_define {SYNTHESIS} [get_filesets sources_1]
add_files -fileset constrs_1 -norecurse [file join $here u55c.xdc]
update_compile_order -fileset sources_1

# -- block design --------------------------------------------------------------------------------

# Create an IP of the catalogue's newest version, with properties as a flat list.
proc ip {name cell {properties {}}} {
  set found [lsort -dictionary [get_ipdefs -all xilinx.com:ip:$name:*]]
  if {[llength $found] == 0} { error "Vivado's catalogue has no IP $name" }
  set made [create_bd_cell -type ip -vlnv [lindex $found end] $cell]
  if {[llength $properties]} { set_property -dict $properties $made }
  return $made
}

# Connect a pin, the first, to others.
proc net {source args} {
  set from [get_bd_pins -quiet $source]
  if {$from eq ""} { set from [get_bd_ports $source] }
  foreach pin $args { connect_bd_net $from [get_bd_pins $pin] }
}

proc bus {source sink} {
  connect_bd_intf_net [get_bd_intf_pins $source] [get_bd_intf_pins $sink]
}

create_bd_design system

proc outside {name mode kind} {
  return [create_bd_intf_port -mode $mode -vlnv xilinx.com:interface:${kind}_rtl:1.0 $name]
}
set pcie_mgt [outside pcie_mgt Master pcie_7x_mgt]
set pcie_refclk [outside pcie_refclk Slave diff_clock]
set sysclk [outside sysclk Slave diff_clock]
set_property CONFIG.FREQ_HZ 100000000 $pcie_refclk
set_property CONFIG.FREQ_HZ 100000000 $sysclk
create_bd_port -dir I -type rst pcie_perst_n
set_property CONFIG.POLARITY ACTIVE_LOW [get_bd_ports pcie_perst_n]
create_bd_port -dir O hbm_cattrip

# PCIe: DMA channel 0 both ways, registers behind BAR 0, one user interrupt; a processing
# accelerator (class 0x12; a serial driver claims the default, 0x07).
ip util_ds_buf pcie_clock {CONFIG.C_BUF_TYPE IBUFDSGTE}
ip xdma xdma {
  CONFIG.mode_selection Advanced
  CONFIG.pcie_blk_locn PCIE4C_X1Y0
  CONFIG.en_gt_selection true
  CONFIG.select_quad GTY_Quad_227
  CONFIG.pl_link_cap_max_link_width X16
  CONFIG.pl_link_cap_max_link_speed 8.0_GT/s
  CONFIG.axi_data_width 512_bit
  CONFIG.axisten_freq 250
  CONFIG.axilite_master_en true
  CONFIG.axilite_master_scale Kilobytes
  CONFIG.axilite_master_size 64
  CONFIG.xdma_rnum_chnl 1
  CONFIG.xdma_wnum_chnl 1
  CONFIG.xdma_num_usr_irq 1
  CONFIG.pf0_Use_Class_Code_Lookup_Assistant false
  CONFIG.pf0_class_code_base 12
  CONFIG.pf0_class_code_sub 00
  CONFIG.pf0_class_code_interface 00
  CONFIG.cfg_mgmt_if false
}
connect_bd_intf_net $pcie_refclk [get_bd_intf_pins pcie_clock/CLK_IN_D]
connect_bd_intf_net $pcie_mgt [get_bd_intf_pins xdma/pcie_mgt]
net pcie_clock/IBUF_OUT xdma/sys_clk_gt
net pcie_clock/IBUF_DS_ODIV2 xdma/sys_clk
net pcie_perst_n xdma/sys_rst_n

# Clocks: 100 MHz for the HBM's PLL and its APB; core and HBM ports from it.
ip util_ds_buf sysclk_in {CONFIG.C_BUF_TYPE IBUFDS}
ip util_ds_buf sysclk_global {CONFIG.C_BUF_TYPE BUFG}
ip clk_wiz clocks [list \\
  CONFIG.PRIM_SOURCE No_buffer CONFIG.PRIM_IN_FREQ 100.000 \\
  CONFIG.CLKOUT1_REQUESTED_OUT_FREQ $core_mhz \\
  CONFIG.CLKOUT2_USED true CONFIG.CLKOUT2_REQUESTED_OUT_FREQ $hbm_mhz \\
  CONFIG.USE_RESET false CONFIG.USE_LOCKED true]
connect_bd_intf_net $sysclk [get_bd_intf_pins sysclk_in/CLK_IN_D]
net sysclk_in/IBUF_OUT sysclk_global/BUFG_I
net sysclk_global/BUFG_O clocks/clk_in1

# Resets. Those of the HBM, and of the ways from the accelerator to it, come at power-on only
# (PG276: not once traffic has begun). The accelerator's comes with the PCIe link's as well: it
# completes its bursts and swallows late answers, so the HBM need not know.
foreach {cell clock} {
  core_reset clocks/clk_out1 memory_reset clocks/clk_out1
  hbm_reset clocks/clk_out2 apb_reset sysclk_global/BUFG_O
} {
  ip proc_sys_reset $cell {CONFIG.C_EXT_RESET_HIGH 0}
  net $clock $cell/slowest_sync_clk
  net clocks/locked $cell/dcm_locked
}
net xdma/axi_aresetn core_reset/ext_reset_in
net clocks/locked memory_reset/ext_reset_in hbm_reset/ext_reset_in apb_reset/ext_reset_in

# HBM: @STACKS@ of 2 stacks; one port for each channel.
set hbm_properties [list \\
  CONFIG.USER_HBM_DENSITY @DENSITY@ CONFIG.USER_HBM_STACK @STACKS@ \\
  CONFIG.USER_APB_EN false CONFIG.USER_XSDB_INTF_EN false \\
@SWITCHES@
  CONFIG.USER_AXI_INPUT_CLK_FREQ $hbm_mhz]
set hbm_ports {@PORTS@}
for {set port 1} {$port < @ALL_PORTS@} {incr port} {  ;# port 0 is always there
  set number [format %02d $port]
  lappend hbm_properties CONFIG.USER_SAXI_$number [expr {$number in $hbm_ports ? "true" : "false"}]
}
ip hbm hbm $hbm_properties
foreach stack {@STACK_LIST@} {
  net sysclk_global/BUFG_O hbm/HBM_REF_CLK_$stack hbm/APB_${stack}_PCLK
  net apb_reset/peripheral_aresetn hbm/APB_${stack}_PRESET_N
}
foreach number $hbm_ports {
  net clocks/clk_out2 hbm/AXI_${number}_ACLK
  net hbm_reset/peripheral_aresetn hbm/AXI_${number}_ARESET_N
}
@CATTRIP@

# The accelerator, its registers and its interrupt.
create_bd_cell -type module -reference @WRAPPER@ accelerator
net clocks/clk_out1 accelerator/aclk
net core_reset/peripheral_aresetn accelerator/aresetn
net memory_reset/peripheral_aresetn accelerator/mem_aresetn
net xdma/axi_aclk accelerator/irq_clk
net accelerator/irq xdma/usr_irq_req
ip smartconnect registers {CONFIG.NUM_SI 1 CONFIG.NUM_MI 1 CONFIG.NUM_CLKS 2}
net xdma/axi_aclk registers/aclk
net clocks/clk_out1 registers/aclk1
net xdma/axi_aresetn registers/aresetn
bus xdma/M_AXI_LITE registers/S00_AXI
bus registers/M00_AXI accelerator/s_axil

# Memory channels; the host comes in at the first one's.
set masters {@MASTERS@}
foreach master $masters number $hbm_ports {
  set cell memory_$number
  set host [expr {$master eq [lindex $masters 0]}]
  ip smartconnect $cell [list CONFIG.NUM_SI [expr {1 + $host}] CONFIG.NUM_MI 1 \\
    CONFIG.NUM_CLKS [expr {2 + $host}]]
  net clocks/clk_out1 $cell/aclk
  net clocks/clk_out2 $cell/aclk1
  net memory_reset/interconnect_aresetn $cell/aresetn
  bus accelerator/m_$master $cell/S00_AXI
  bus $cell/M00_AXI hbm/SAXI_$number
  if {$host} {
    net xdma/axi_aclk $cell/aclk2
    bus xdma/M_AXI $cell/S01_AXI
  }
}

# Addresses: registers at 0 of BAR 0; the HBM where it is, all of it for the host, a channel's part
# for its master.
assign_bd_address -offset 0 -range 4K -target_address_space \\
  [get_bd_addr_spaces xdma/M_AXI_LITE] [get_bd_addr_segs accelerator/s_axil/*]
proc place {space port segment wanted} {
  set bytes [expr {1 << @SEGMENT_LOG2@}]
  set where [list -target_address_space [get_bd_addr_spaces $space] \\
    [get_bd_addr_segs hbm/SAXI_$port/HBM_MEM[format %02d $segment]]]
  if {$wanted} {
    assign_bd_address -offset [expr {$segment * $bytes}] -range $bytes {*}$where
  } else {
    exclude_bd_addr_seg {*}$where
  }
}
set channel 0
foreach master $masters number $hbm_ports {
  for {set segment 0} {$segment < @ALL_PORTS@} {incr segment} {
    set wanted [expr {$segment / @SEGMENTS_EACH@ == $channel}]
    place accelerator/m_$master $number $segment $wanted
    if {$channel == 0} { place xdma/M_AXI $number $segment 1 }
  }
  incr channel
}

validate_bd_design
save_bd_design

# -- bitstream -----------------------------------------------------------------------------------

set wrapper [make_wrapper -files [get_files system.bd] -top]
add_files -norecurse $wrapper
set_property top system_wrapper [current_fileset]
update_compile_order -fileset sources_1
set_property strategy Performance_Explore [get_runs impl_1]
launch_runs impl_1 -to_step write_bitstream -jobs $jobs
wait_on_run impl_1
if {[get_property PROGRESS [get_runs impl_1]] ne "100%"} { error "implementation failed" }

open_run impl_1
report_timing_summary -file [file join $here vivado_u55c timing.rpt]
report_utilization -hierarchical -file [file join $here vivado_u55c utilization.rpt]
set slack [get_property SLACK [get_timing_paths -max_paths 1 -nworst 1 -setup]]
puts "core clock $core_mhz MHz, worst setup slack $slack ns"
if {$slack < 0} { error "timing is not met: lower core_mhz" }
"""


def _tcl(config: AcceleratorConfig, name: str, core_mhz: float) -> str:
    names, stacks = _layout(config)
    all_ports = STACK_PORTS * stacks
    spread = all_ports // len(names)
    ports = [f"{channel * spread:02}" for channel in range(len(names))]
    switches = [f"CONFIG.USER_SWITCH_ENABLE_{stack:02} true" for stack in range(stacks)]
    first = [ports[0], *[p for p in ports if int(p) >= STACK_PORTS][:1]]
    switches += [f"CONFIG.USER_CLK_SEL_LIST{stack} AXI_{port}_ACLK"
                 for stack, port in enumerate(first)]
    if stacks == 2:
        switches.append("CONFIG.USER_AXI_INPUT_CLK1_FREQ $hbm_mhz")
        cattrip = "\n".join([
            "ip util_vector_logic cattrip {CONFIG.C_OPERATION or CONFIG.C_SIZE 1}",
            "net hbm/DRAM_0_STAT_CATTRIP cattrip/Op1", "net hbm/DRAM_1_STAT_CATTRIP cattrip/Op2",
            "connect_bd_net [get_bd_pins cattrip/Res] [get_bd_ports hbm_cattrip]"])
    else:
        cattrip = "connect_bd_net [get_bd_pins hbm/DRAM_0_STAT_CATTRIP] [get_bd_ports hbm_cattrip]"
    values = {
        "CONFIG": config.name, "NOT_RUN": _NOT_RUN, "NAME": name, "WRAPPER": WRAPPER,
        "PART": U55c.part,
        "CORE_MHZ": f"{core_mhz:g}", "HBM_MHZ": f"{HBM_MHZ}", "STACKS": str(stacks),
        "DENSITY": f"{8 * stacks}GB", "SWITCHES": "\n".join(f"  {s} \\" for s in switches),
        "PORTS": " ".join(ports), "ALL_PORTS": str(all_ports), "CATTRIP": cattrip,
        "STACK_LIST": " ".join(str(stack) for stack in range(stacks)),
        "MASTERS": " ".join(names), "SEGMENT_LOG2": str(PSEUDO_CHANNEL_LOG2),
        "SEGMENTS_EACH": str(spread),
    }
    text = _TCL
    for key, value in values.items():
        text = text.replace(f"@{key}@", value)
    return text


class U55c(ProjectBoard):
    """AMD's Alveo U55C: 16 GiB of HBM behind 32 pseudo-channels, PCIe.

    Nobody has closed timing with its clock yet.
    """

    name = "u55c"
    title = "Alveo U55C"
    part = "xcu55c-fsvh2892-2L-e"
    family = "xilinx"
    memory = "16 GiB of HBM"
    # AMD DS978; block RAMs of 36 kbit.
    resources = {"lut": 1_303_680, "flip_flop": 2_607_360, "dsp": 9_024, "block_ram": 2_016,
                 "ultra_ram": 960}
    config = "hbm32"
    clock_hz = 200_000_000
    transport = "xdma:N"

    def project(self, config: AcceleratorConfig, *, name: str, core_mhz: float) -> dict[str, str]:
        if not 10 <= core_mhz <= 500:
            raise ConfigurationError(f"core_mhz must be from 10 to 500, not {core_mhz!r}")
        return {
            f"{WRAPPER}.v": _wrapper(config),
            "u55c.xdc": _XDC,
            "build_u55c.tcl": _tcl(config, name, core_mhz),
        }


BOARD = U55c()
