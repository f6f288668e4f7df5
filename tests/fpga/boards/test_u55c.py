"""The Vivado project: the wrapper linted, the script run with commands that only record.

There is no Vivado here. What can be held without it: the script is Tcl, every command is one that
Vivado has, everything that it names was made before, and each sink is connected once.
"""

import re
from collections import Counter

import pytest

from moeaccel.config import PRESETS
from moeaccel.errors import ConfigurationError
from moeaccel.fpga.boards import u55c
from moeaccel.hdl.verilog.dsp_models import DSP_MODELS
from tests.support.emitted import emitted
from tests.support.verilated import lint

TINY = PRESETS["tiny"]


def project(config):
    return u55c.BOARD.project(config, name="moeaccel", core_mhz=200)


KNOWN = """add_files assign_bd_address connect_bd_intf_net connect_bd_net create_bd_cell
    create_bd_design create_bd_intf_port create_bd_port create_project exclude_bd_addr_seg
    get_bd_addr_segs get_bd_addr_spaces get_bd_intf_pins get_bd_pins get_bd_ports get_files
    get_filesets get_ipdefs get_property get_runs get_timing_paths current_fileset launch_runs
    make_wrapper open_run report_timing_summary report_utilization save_bd_design set_property
    update_compile_order validate_bd_design wait_on_run""".split()


def run_script(text):
    """Run the script in Tcl, where Vivado's commands only record, and return their calls."""
    tkinter = pytest.importorskip("tkinter", reason="needs Python's Tcl")
    tcl = tkinter.Tcl()
    calls = []

    def record(name):
        def call(*arguments):
            calls.append((name, *arguments))
            match name:
                case "get_ipdefs":
                    return f"{arguments[-1].rstrip('*')}1.0 {arguments[-1].rstrip('*')}2.0"
                case "get_bd_pins" | "get_bd_ports":
                    what = arguments[-1]
                    is_port = "/" not in what
                    return what if is_port == (name == "get_bd_ports") else ""
                case "get_bd_intf_pins" | "get_bd_addr_segs" | "get_bd_addr_spaces":
                    return arguments[-1]
                case "create_bd_intf_port" | "create_bd_cell":
                    return arguments[-1]
                case "get_property":
                    return "100%" if arguments[0] == "PROGRESS" else "0.1"
            return name
        return call

    for name in KNOWN:
        tcl.createcommand(name, record(name))
    tcl.createcommand("puts", lambda *_: "")
    # 'info script' is empty here; the file's own commands must need nothing else of it.
    tcl.eval(text)
    return calls


@pytest.mark.parametrize(("count", "address_bits"), [(1, 40), (2, 33), (32, 29)])
def test_the_script(count, address_bits):
    config = TINY.replace(channels=count, address_bits=address_bits)
    calls = run_script(project(config)["build_u55c.tcl"])
    cells = {call[-1]: call[call.index("-vlnv") + 1].split(":")[2] for call in calls
             if call[0] == "create_bd_cell" and "-vlnv" in call} | {"accelerator": "module"}
    assert Counter(cells.values())["smartconnect"] == 1 + count
    assert Counter(cells.values())["hbm"] == Counter(cells.values())["xdma"] == 1
    ports = {call[-1] for call in calls if call[0] in ("create_bd_port", "create_bd_intf_port")}
    assert ports == {"pcie_refclk", "sysclk", "pcie_mgt", "pcie_perst_n", "hbm_cattrip"}

    # Everything connected exists, and nothing is driven twice.
    sinks = Counter()
    for call in calls:
        if call[0] in ("connect_bd_net", "connect_bd_intf_net"):
            for end in call[1:]:
                assert end.split("/")[0] in cells if "/" in end else end in ports, call
            sinks[call[-1]] += 1
    assert set(sinks.values()) == {1}
    for cell, kind in cells.items():
        if kind == "smartconnect":
            needed = {f"{cell}/aclk", f"{cell}/aclk1", f"{cell}/aresetn"}
            needed |= {f"{cell}/aclk2", f"{cell}/S01_AXI"} if cell == "memory_00" else set()
            assert needed <= set(sinks)
        if kind == "proc_sys_reset":
            assert {f"{cell}/{pin}" for pin in
                    ("slowest_sync_clk", "ext_reset_in", "dcm_locked")} <= set(sinks)

    # HBM: a port for each channel, clocked, reset, fed; the channel sees its part, the host all.
    words = next(call[2].replace("{", "").replace("}", "").split() for call in calls
                 if call[0] == "set_property" and call[-1] == "hbm")
    properties = dict(zip(words[::2], words[1::2], strict=True))
    stacks = 1 if count == 1 else 2
    used = [f"{32 // count * c:02}" if count > 1 else "00" for c in range(count)]
    enabled = {key[-2:] for key, value in properties.items()
               if "USER_SAXI" in key and value == "true"} | {"00"}
    assert enabled == set(used)
    assert properties["CONFIG.USER_HBM_DENSITY"] == f"{8 * stacks}GB"
    for port in used:
        assert {f"hbm/AXI_{port}_ACLK", f"hbm/AXI_{port}_ARESET_N",
                f"hbm/SAXI_{port}"} <= set(sinks)
    seen = {}
    for call in calls:
        if call[0] == "assign_bd_address" and "hbm/" in call[-1]:
            space = call[call.index("-target_address_space") + 1]
            offset, size = (int(call[call.index(key) + 1]) for key in ("-offset", "-range"))
            assert offset == int(call[-1][-2:]) * size == int(call[-1][-2:]) << 29
            seen.setdefault(space, set()).add(offset)
    assert len(seen.pop("xdma/M_AXI")) == 16 * stacks
    each = 16 * stacks // count
    assert [sorted(seen[f"accelerator/m_axi_mem{c or ''}"]) for c in range(count)] == [
        [(c * each + i) << 29 for i in range(each)] for c in range(count)]


def test_resets_and_class():
    """Only power-on resets what lies between accelerator and HBM; no other driver claims it."""
    calls = run_script(project(TINY)["build_u55c.tcl"])
    driver = {call[2]: call[1] for call in calls if call[0] == "connect_bd_net"}
    resets = {pin: source.split("/")[0] for pin, source in driver.items() if "reset" in pin.lower()}
    power_on = {cell for cell in ("memory_reset", "hbm_reset", "apb_reset")
                if driver[f"{cell}/ext_reset_in"] == "clocks/locked"}
    assert len(power_on) == 3
    assert driver["core_reset/ext_reset_in"] == "xdma/axi_aresetn"
    assert resets["accelerator/aresetn"] == "core_reset"
    for pin in ("accelerator/mem_aresetn", "memory_00/aresetn", "hbm/AXI_00_ARESET_N",
                "hbm/APB_0_PRESET_N"):
        assert resets[pin] in power_on, pin
    words = next(call[2].replace("{", "").replace("}", "").split() for call in calls
                 if call[0] == "set_property" and call[-1] == "xdma")
    properties = dict(zip(words[::2], words[1::2], strict=True))
    assert [properties[f"CONFIG.pf0_class_code_{part}"] for part in ("base", "sub", "interface")] \
        == ["12", "00", "00"]


def test_the_wrapper_and_the_accelerator_lint(tmp_path):
    files = emitted("xilinx")
    text = project(TINY)[f"{u55c.WRAPPER}.v"]
    lint(text + files["core.v"] + DSP_MODELS["xilinx"], tmp_path, top=u55c.WRAPPER)


def test_a_channel_has_its_number_above_its_addresses():
    text = project(PRESETS["hbm32"])[f"{u55c.WRAPPER}.v"]
    for channel in range(32):
        name = f"axi_mem{channel or ''}"
        assert f"assign m_{name}_araddr = {{5'd{channel}, {name}_araddr}};" in text
        assert f"  output [33:0] m_{name}_araddr" in text
    declared = re.findall(r"^  (?:input|output) (?:\[\d+:0\] )?(\w+)", text, re.MULTILINE)
    assert len(declared) == len(set(declared))


def test_every_port_of_the_script_has_a_pin():
    xdc = project(TINY)["u55c.xdc"]
    pins = dict(re.findall(r"PACKAGE_PIN (\w+).*?\[get_ports (\w+)\]", xdc))
    assert set(pins.values()) == {"pcie_refclk_clk_p", "pcie_refclk_clk_n", "pcie_perst_n",
                                  "sysclk_clk_p", "sysclk_clk_n", "hbm_cattrip"}
    assert len(pins) == 6


def test_every_file_says_that_it_was_not_run():
    for name, text in project(TINY).items():
        assert "never run" in "\n".join(text.splitlines()[:3]), name


def test_two_calls_are_equal():
    assert project(TINY) == project(TINY)


def test_channels_must_divide_the_memory():
    with pytest.raises(ConfigurationError, match="address_bits must be 29 for 32 channels"):
        project(TINY.replace(channels=32))
