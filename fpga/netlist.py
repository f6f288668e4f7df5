"""What Yosys leaves undone for an ECP5: changes of its netlist (JSON) before nextpnr gets it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

__all__ = ["absorb_output_registers", "place"]

Cell = dict[str, Any]

_ALWAYS = "1 "
"""How Yosys says that a register has no enable; the space keeps it from being a number."""


def absorb_output_registers(netlist: dict[str, Any]) -> int:
    """Move the registers behind block RAMs into them, in place; return how many were.

    A DP16KD takes 5.8 ns to answer, and a fraction of that through its own output register, which
    Yosys never uses. A port's is used when every output goes to one register and nowhere else, and
    all of these have the port's clock, one enable and no reset.
    """
    return sum(_absorb(module["cells"]) for module in netlist["modules"].values())


def place(netlist: dict[str, Any], sites: Mapping[str, str]) -> None:
    """Tell nextpnr where cells lie, in place.

    Parameters
    ----------
    netlist : dict
    sites : mapping of str to str
        Sites by the ends of the cells' names, whole parts of them (between dots).

    Raises
    ------
    KeyError
        If there is no cell of such a name.
    """
    left = dict(sites)
    lengths = {end.count(".") + 1 for end in sites}
    for module in netlist["modules"].values():
        for name, cell in module["cells"].items():
            parts = name.split(".")
            for end in (".".join(parts[-length:]) for length in lengths):
                if end in left:
                    cell["attributes"]["BEL"] = left.pop(end)
    if left:
        raise KeyError(f"The netlist has no cell named ...{next(iter(left))}")


def _absorb(cells: dict[str, Cell]) -> int:
    readers: dict[int, list[str]] = defaultdict(list)
    for name, cell in cells.items():
        for port, nets in cell["connections"].items():
            if cell["port_directions"][port] == "input":
                for net in nets:
                    readers[net].append(name)

    absorbed = 0
    for ram in [cell for cell in cells.values() if cell["type"] == "DP16KD"]:
        for side in "AB":
            outputs = [port for port, nets in ram["connections"].items()
                       if port.startswith(f"DO{side}") and readers.get(nets[0])]
            registers = [readers[ram["connections"][port][0]] for port in outputs]
            if not registers or any(len(names) != 1 for names in registers):
                continue
            names = [name for (name,) in registers]
            if not all(_is_plain(cells[name]) for name in names):
                continue
            controls = {_clock_and_enable(cells[name]) for name in names}
            if len(controls) != 1:
                continue
            ((clock, enable),) = controls
            if ram["connections"][f"CLK{side}"] != [clock] or \
                    ram["parameters"][f"CLK{side}MUX"] != f"CLK{side}":
                continue
            ram["parameters"][f"REGMODE_{side}"] = "OUTREG"
            ram["connections"][f"OCE{side}"] = [enable]
            for port, name in zip(outputs, names, strict=True):
                ram["connections"][port] = cells.pop(name)["connections"]["Q"]
            absorbed += len(names)
    return absorbed


def _is_plain(cell: Cell) -> bool:
    """Return whether it is a register that is clocked by a rising edge and never reset."""
    return (cell["type"] == "TRELLIS_FF" and cell["connections"]["LSR"] == ["0"]
            and "M" not in cell["connections"] and cell["parameters"]["CLKMUX"] == "CLK"
            and cell["parameters"]["CEMUX"] in ("CE", _ALWAYS))


def _clock_and_enable(cell: Cell) -> tuple[int, int | str]:
    always = cell["parameters"]["CEMUX"] == _ALWAYS
    return cell["connections"]["CLK"][0], "1" if always else cell["connections"]["CE"][0]
