"""Estimate the slowest paths of a synthesised block, before it is placed and routed.

``python -m moeaccel.fpga.paths --block dispatcher``

Synthesis takes seconds to minutes where placement and routing take many more, and nextpnr reports
one path for each clock. This lists the slowest one for each pair of registers, from Yosys' netlist
for ECP5: delays of cells are those of speed grade 6, those of wires are guessed from their fan-out.
Compare the figures with each other: routed paths took about 1.2 times as long.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from moeaccel.config import preset
from moeaccel.fpga.synth import BLOCKS, FOLDER, block_build

__all__ = ["Netlist", "TimingPath", "slowest_paths"]

START_NS = {"TRELLIS_FF": 0.52, "DP16KD": 5.7, "MULT18X18D": 0.74}
"""From the clock to the output, of cells with registers."""

OUTPUT_REGISTER_NS = 0.9
"""The same for a block RAM with registers at its outputs."""

OTHER_START_NS = 0.3
SETUP_NS = 0.2

WIRE_NS, WIRE_FAN_OUT_NS, WIRE_FAR_NS = 0.75, 0.012, 0.25
"""A wire; for each reader, up to 60; with more than 8 readers."""

# Cell type -> output -> ((inputs, ns from there, whether a wire leads there), ...). The lists are
# those of combinational cells; carries and multiplexers of a slice are joined without wires.
_LUT = ((("A", "B", "C", "D"), 0.24, True),)
_CARRY0 = (("A0", "B0", "C0", "D0"), 0.45, True)
_CARRY1 = (("A1", "B1", "C1", "D1"), 0.45, True)
_MUX = ((("ALUT", "BLUT", "D0", "D1"), 0.2, False), (("C0", "SD"), 0.2, True))
ARCS: dict[str, dict[str, tuple[tuple[tuple[str, ...], float, bool], ...]]] = {
    "LUT4": {"Z": _LUT},
    "INV": {"Z": ((("A",), 0.24, True),)},
    "PFUMX": {"Z": _MUX},
    "L6MUX21": {"Z": _MUX},
    "CCU2C": {
        "S0": ((("CIN",), 0.45, False), _CARRY0),
        "S1": ((("CIN",), 0.45, False), _CARRY0, _CARRY1),
        "COUT": ((("CIN",), 0.06, False), _CARRY0, _CARRY1),
    },
    "TRELLIS_DPR16X4": {"DO": ((("RAD",), 0.24, True),)},
}
CLOCKS = ("CLK", "CLKA", "CLKB", "WCK")


@dataclass(frozen=True)
class TimingPath:
    """One path.

    Parameters
    ----------
    delay_ns : float
        From the clock of the first register to the setup of the last, estimated.
    end : str
        Cell and port where it ends.
    nets : list of str
        Nets along it, from the end to the start; those without a name in the source are left out.
    """

    delay_ns: float
    end: str
    nets: list[str] = field(default_factory=list)


class Netlist:
    """A flat module of Yosys' JSON, with what is needed to walk it.

    Parameters
    ----------
    module : dict
        Of ``modules`` in the JSON.
    """

    def __init__(self, module: dict[str, Any]) -> None:
        self.cells: dict[str, dict[str, Any]] = module["cells"]
        self.names: dict[int, str] = {}
        for name, net in module["netnames"].items():
            for i, bit in enumerate(net["bits"]):
                text = f"{name}[{i}]" if len(net["bits"]) > 1 else name
                known = self.names.get(bit)
                if known is None or (not net.get("hide_name") and len(text) < len(known)):
                    self.names[bit] = text
        self._readers: Counter[int] = Counter()
        self._driver: dict[int, tuple[str, str]] = {}
        for name, cell in self.cells.items():
            for port, bits in cell["connections"].items():
                reads = cell["port_directions"][port] == "input"
                for bit in bits:
                    if not isinstance(bit, int):  # a constant
                        continue
                    if reads:
                        self._readers[bit] += 1
                    else:
                        self._driver[bit] = name, port
        self._arrival: dict[int, tuple[float, int | None]] = {}

    def wire_ns(self, bit: int) -> float:
        """Return the guessed delay of a wire."""
        readers = self._readers[bit]
        far = WIRE_FAR_NS if readers > 8 else 0.0
        return WIRE_NS + WIRE_FAN_OUT_NS * min(readers, 60) + far

    def _sources(self, bit: int) -> list[tuple[int, float]]:
        """Return the nets that a net follows from, with the delays; none if it starts a path."""
        if bit not in self._driver:
            return []
        name, port = self._driver[bit]
        cell = self.cells[name]
        return [
            (source, ns + (self.wire_ns(source) if wired else 0.0))
            for inputs, ns, wired in ARCS.get(cell["type"], {}).get(port, ())
            for pin in inputs for source in cell["connections"].get(pin, ())
            if isinstance(source, int)
        ]

    def _start(self, bit: int) -> float:
        if bit not in self._driver:
            return 0.0
        cell, port = self._driver[bit]
        kind = self.cells[cell]["type"]
        if kind in ARCS:
            return 0.0
        if self.cells[cell].get("parameters", {}).get(f"REGMODE_{port[2:3]}") == "OUTREG":
            return OUTPUT_REGISTER_NS
        return START_NS.get(kind, OTHER_START_NS)

    def arrival(self, bit: int) -> float:
        """Return when a net is stable, ns after the clock."""
        todo = [bit]
        while todo:
            at = todo[-1]
            sources = self._sources(at)
            waiting = [s for s, _ in sources if s not in self._arrival]
            if at in self._arrival or not waiting:
                todo.pop()
                best = max(((self._arrival[s][0] + ns, s) for s, ns in sources),
                           default=(self._start(at), None))
                self._arrival.setdefault(at, best)
            else:
                todo.extend(waiting)
        return self._arrival[bit][0]

    def path(self, bit: int) -> list[int]:
        """Return the nets of the slowest path to a net, from there back."""
        self.arrival(bit)
        found: list[int] = []
        at: int | None = bit
        while at is not None:
            found.append(at)
            at = self._arrival[at][1]
        return found

    def ends(self) -> list[tuple[float, str, int]]:
        """Return (delay, cell and port, net) of every input of a cell with registers."""
        return [
            (self.arrival(bit) + self.wire_ns(bit) + SETUP_NS, f"{name}.{port}", bit)
            for name, cell in self.cells.items()
            for port, bits in cell["connections"].items()
            if cell["port_directions"][port] == "input" and port not in CLOCKS
            and (cell["type"] not in ARCS or (cell["type"] == "TRELLIS_DPR16X4" and port != "RAD"))
            for bit in bits if isinstance(bit, int)
        ]


def slowest_paths(netlist: Netlist, count: int) -> list[TimingPath]:
    """Return the slowest paths, one for each pair of a first net and a last cell, slowest first."""
    found: dict[tuple[str, str], TimingPath] = {}
    for delay, end, bit in sorted(netlist.ends(), key=lambda end: -end[0]):
        nets = netlist.path(bit)
        named = [netlist.names.get(net, "?") for net in nets]
        key = named[-1].split("[")[0], end.split("_TRELLIS")[0]
        if key not in found:
            found[key] = TimingPath(
                round(delay, 2), end, [n for n in named[:-1] if not n.startswith("$")] + named[-1:])
        if len(found) == count:
            break
    return list(found.values())


app = typer.Typer(add_completion=False)


@app.command()
def main(
    block: Annotated[str, typer.Option(help=f"Block: {', '.join(BLOCKS)}.")],
    config: Annotated[str, typer.Option(help="Name of a configuration.")] = "ulx3s",
    count: Annotated[int, typer.Option(help="Paths to list.")] = 20,
    folder: Annotated[Path, typer.Option(help="Where builds are kept.")] = FOLDER,
) -> None:
    """Synthesise a block and list its slowest paths, estimated."""
    if block not in BLOCKS:
        raise typer.BadParameter(f"must be one of {', '.join(BLOCKS)}, not {block!r}")
    build = block_build(block, preset(config), folder=folder)
    with Console(stderr=True).status(f"{block}: synthesis"):
        build.synthesise()
    text = (build.home / "top.json").read_text(encoding="utf-8")
    netlist = Netlist(json.loads(text)["modules"]["top.block"])
    table = Table("ns", "end", "path, from the end back", title=f"{block}, {config}: estimated")
    for path in slowest_paths(netlist, count):
        table.add_row(f"{path.delay_ns:.2f}", path.end, " < ".join(path.nets))
    Console().print(table)


if __name__ == "__main__":
    app()
