"""The files that a larger system needs: Verilog, register map, C header, models for simulators."""

from __future__ import annotations

import json
import re

from moeaccel.config import AcceleratorConfig
from moeaccel.hdl.top import description, generate_verilog
from moeaccel.hdl.verilog.dsp_models import DSP_MODELS
from moeaccel.interface.c_header import c_header

__all__ = ["emit"]

_ASSERT = """\
`ifdef SYNTHESIS
`define MOEACCEL_ASSERT(what)
`else
`define MOEACCEL_ASSERT(what) assert (what )
`endif

"""


def emit(config: AcceleratorConfig, *, family: str = "generic",
         name: str = "moeaccel") -> dict[str, str]:
    """Return the text of each file by the file's name; the same for every call.

    Parameters
    ----------
    config : AcceleratorConfig
    family : str
        FPGA family of the multipliers.
    name : str
        What the files are called.

    Returns
    -------
    dict
        ``<name>.v``, module ``top``; where ``SYNTHESIS`` is defined, which Yosys does by itself,
        it is plain Verilog 2005, elsewhere its assertions need SystemVerilog. ``<name>.json``:
        ports, configuration, registers. ``<name>.h``. For vendors' multipliers
        ``<name>_models.v``, which stands for them in simulators.
    """
    text = re.sub(r"^(\s*)assert \((.*)\);$", r"\1`MOEACCEL_ASSERT(\2);",
                  generate_verilog(config, family=family), flags=re.MULTILINE)
    files = {
        f"{name}.v": _ASSERT + text,
        f"{name}.json": json.dumps({"family": family} | description(config), indent=2) + "\n",
        f"{name}.h": c_header(config),
    }
    if DSP_MODELS[family]:
        files[f"{name}_models.v"] = DSP_MODELS[family]
    return files
