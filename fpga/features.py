"""What each feature of a configuration costs on an ECP5: the blocks that it changes.

``python -m moeaccel.fpga.features``

A plain ULX3S is the start: SiLU, the formats that nobody has to name, no biases, one bank of each
buffer, no router. Each feature is added alone, to it or to what it builds on. Blocks of
:mod:`moeaccel.fpga.synth` whose Verilog then differs are mapped by Yosys, not placed; the
difference of their cells is the feature's cost. Wires between blocks are not in it, and what two
features share is in both.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from moeaccel.config import AcceleratorConfig, preset
from moeaccel.errors import ConfigurationError
from moeaccel.fpga.flow import CELLS, Build
from moeaccel.fpga.synth import BLOCKS, CORE, FOLDER, REPORTS, block_build
from moeaccel.router.choices import MODES

__all__ = ["FEATURES", "PLAIN", "Cost", "costs"]

PLAIN = preset("ulx3s").replace(name="plain", activations=("silu",), bias=False)
"""To which features are added."""

_ROUTED = PLAIN.replace(name="routed", router=("softmax",), router_top_k=8)
_BANKED = PLAIN.replace(name="banked", y_banks=2)

_LEFT_OUT = ("axi_arbiter", "sdram_controller", "serial_link", "register_file", CORE)
"""Blocks that no feature changes (but for the number in a register that names a configuration), and
the one that is all of them."""


def _formats(*names: str) -> AcceleratorConfig:
    return PLAIN.replace(formats=(*PLAIN.formats, *names))


def _activation(name: str) -> AcceleratorConfig:
    return PLAIN.replace(activations=(*PLAIN.activations, name))


FEATURES: Mapping[str, tuple[AcceleratorConfig, AcceleratorConfig]] = {
    **{name: (PLAIN, _activation(name))
       for name in ("relu", "relu2", "gelu", "gelu_tanh", "gpt_oss")},
    "bias": (PLAIN, PLAIN.replace(bias=True)),
    "second_up": (PLAIN, PLAIN.replace(second_up=True)),
    "results_per_cycle=2": (PLAIN, PLAIN.replace(results_per_cycle=2)),
    "quantiser_lanes=4": (PLAIN, PLAIN.replace(quantiser_lanes=4)),
    "y_banks=2": (PLAIN, _BANKED),
    "hidden_banks=2": (_BANKED, _BANKED.replace(hidden_banks=2)),
    **{name: (PLAIN, _formats(name))
       for name in ("int4_g32_zp", "int4_g32_min", "int8_g32", "nvfp4", "int2_g32",
                    "ternary_g256", "mxint8+2:4", "int4_g32+2:4")},
    "int4_g32+2:4, +1:4": (PLAIN, _formats("int4_g32+2:4", "int4_g32+1:4")),
    "expert buffer, 2 x 16 KiB": (PLAIN, PLAIN.replace(buffer_slots=2, buffer_beats=2048)),
    "router (softmax, top-8)": (PLAIN, _ROUTED),
    **{f"router: {score}": (_ROUTED, _ROUTED.replace(router=("softmax", score)))
       for score in ("sigmoid", "sqrt_softplus")},
    "router: top-16": (_ROUTED, _ROUTED.replace(router_top_k=16)),
    **{f"router: {mode}": (_ROUTED, _ROUTED.replace(router_modes=(mode,))) for mode in MODES},
}
"""Configurations without a feature and with it."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Cells that a feature adds.

    Parameters
    ----------
    feature : str
    blocks : list of str
        That it changes.
    multipliers, lut4, carry, block_rams, lut_rams, flip_flops : int
        What they have more; carry: CCU2C, two bits each.
    tools : str
        Name and version of Yosys (and of nextpnr, which is not asked).
    """

    feature: str
    blocks: list[str]
    multipliers: int
    lut4: int
    carry: int
    block_rams: int
    lut_rams: int
    flip_flops: int
    tools: str


def _copies(block: str, config: AcceleratorConfig) -> int:
    """Return how often an accelerator of one channel has a block."""
    match block:
        case "route_unit":
            return int(bool(config.router))
        case "expert_buffer":
            return int(bool(config.buffer_slots))
        case "lane_buffer":
            return 2
        case "result_serialiser" | "activation_unit" | "row_sums":
            return config.results_per_cycle
    return 1


class _Blocks:
    """Blocks of configurations; each is written and mapped once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._builds: dict[tuple[str, AcceleratorConfig], Build] = {}

    def build(self, block: str, config: AcceleratorConfig) -> Build:
        if (block, config) not in self._builds:
            self._builds[block, config] = block_build(block, config, folder=self._folder)
        return self._builds[block, config]

    def cells(self, block: str, config: AcceleratorConfig) -> dict[str, int]:
        """Return the cells of all copies of a block, by the columns of `CELLS`."""
        copies = _copies(block, config)
        if not copies:
            return dict.fromkeys(CELLS, 0)
        build = self.build(block, config)
        build.synthesise()
        return {column: copies * count for column, count in build.cells("top.block").items()}

    def changed(self, before: AcceleratorConfig, after: AcceleratorConfig) -> Iterator[str]:
        """Yield the blocks that differ."""
        for block in BLOCKS:
            if block not in _LEFT_OUT and (
                    _copies(block, before) != _copies(block, after)
                    or self.build(block, before).digest != self.build(block, after).digest):
                yield block


def costs(names: Sequence[str] = tuple(FEATURES), *, folder: Path = FOLDER) -> Iterator[Cost]:
    """Yield what features cost, each as soon as it is known.

    Parameters
    ----------
    names : sequence of str
        Keys of `FEATURES`.
    folder : pathlib.Path
        Where results are kept: a second run maps what has changed.

    Raises
    ------
    ConfigurationError
        If there is no such feature.
    ToolMissingError, ToolFailedError
        As for :func:`moeaccel.fpga.synth.synthesise`.
    """
    for name in names:
        if name not in FEATURES:
            raise ConfigurationError(f"feature must be one of {', '.join(FEATURES)}, not {name!r}")
    blocks = _Blocks(folder)
    for name in names:
        before, after = FEATURES[name]
        changed = list(blocks.changed(before, after))
        cells = dict.fromkeys(CELLS, 0)
        for block in changed:
            old, new = blocks.cells(block, before), blocks.cells(block, after)
            for column in CELLS:
                cells[column] += new[column] - old[column]
        tools = blocks.build(changed[0], after).tools if changed else ""
        yield Cost(feature=name, blocks=changed, tools=tools, **cells)


_COLUMNS = ("MULT18", "LUT4", "carry", "BRAM", "LUTRAM", "FF")


def _row(cost: Cost) -> list[str]:
    return [cost.feature, *(f"{getattr(cost, column):+,}" for column in CELLS),
            ", ".join(cost.blocks)]


def _save(found: Sequence[Cost], folder: Path = REPORTS) -> None:
    """Write the table."""
    lines = [
        "# What features cost on an LFE5U-85F", "",
        f"Written by `make synth-blocks` (`fpga/features.py`) with {found[0].tools.split(',')[0]}:",
        "blocks that a feature changes, mapped with and without it, not placed.",
        "The device has 83,640 LUT4, 156 MULT18 and 208 BRAM.", "",
        f"| feature | {' | '.join(_COLUMNS)} | blocks |",
        f"|---|{'--:|' * len(_COLUMNS)}---|",
        *(f"| {' | '.join(_row(cost))} |" for cost in found),
    ]
    (folder / "features.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


app = typer.Typer(add_completion=False)


@app.command()
def main(
    feature: Annotated[list[str] | None, typer.Option(
        help=f"Feature, repeatable: {', '.join(FEATURES)}. All when left out.")] = None,
    folder: Annotated[Path, typer.Option(help="Where results are kept.")] = FOLDER,
    save: Annotated[bool, typer.Option(
        "--save", help="Also write fpga/reports/features.md.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Print what features cost in cells of an ECP5: minutes for each that is new."""
    names = list(feature or FEATURES)
    unknown = [name for name in names if name not in FEATURES]
    if unknown:
        raise typer.BadParameter(f"must be one of {', '.join(FEATURES)}, not {unknown[0]!r}")
    console = Console(stderr=True)
    found = []
    with console.status("blocks are written and mapped") as status:
        for cost in costs(names, folder=folder):
            found.append(cost)
            status.update(f"{len(found)} of {len(names)}: {cost.feature} is known")
    if save:
        _save(found)
    if as_json:
        print(json.dumps([asdict(cost) for cost in found], indent=1))
        return
    table = Table("feature", *_COLUMNS, "blocks", title="Cells more on an ECP5", title_style="")
    for cost in found:
        table.add_row(*_row(cost))
    Console().print(table)


if __name__ == "__main__":
    app()
