"""``moeaccel bench expert-buffer``: what experts in on-chip memory would save."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeaccel.cli.output import Status, print_json

if TYPE_CHECKING:
    from moeaccel.config import AcceleratorConfig
    from moeaccel.host.buffering import Loads, Outcome, Prediction
    from moeaccel.host.traces import RoutingTrace

_WINDOWS = (1, 4, 16, 64)


class On(StrEnum):
    """Devices that count for themselves."""

    GOLDEN = "golden"
    RTL = "rtl"


def expert_buffer(
    model: Annotated[str, typer.Option(help="Model of the zoo, see `moeaccel models`.")]
    = "qwen3-30b-a3b",
    trace: Annotated[
        Path | None, typer.Option(help="Trace of the model; when left out, routes are generated.")
    ] = None,
    slots: Annotated[int, typer.Option(min=0, help="Experts that the buffer has room for.")] = 2,
    slot_bytes: Annotated[
        int, typer.Option(min=0, help="Leading bytes of an expert in a slot; 0: all of it.")] = 0,
    gap: Annotated[
        int, typer.Option(min=0, help="Cycles between two calls, in which memory is idle.")
    ] = 5000,
    prediction: Annotated[
        list[str] | None, typer.Option(help="Only this, repeatable: none, circular, "
                                            "transition-table, previous-token, popularity, oracle.")
    ] = None,
    config: Annotated[str, typer.Option(help="Preset of the accelerator.")] = "hbm32",
    weight_format: Annotated[str, typer.Option(help="Of the images.")] = "int4_g32",
    requests: Annotated[int, typer.Option(min=1, help="Requests to generate.")] = 4,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of each.")] = 256,
    prompt: Annotated[int, typer.Option(min=0, help="Of these, of the prompt.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Of routes.")] = 0,
    device: Annotated[On | None, typer.Option(
        help="Run the decode tokens on this device, too, through layers of small experts of the "
             "same number, and set its counters beside the model's.")] = None,
    device_config: Annotated[str | None, typer.Option(
        help="Preset of that device, if not that of the model.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Replay a trace through a model of an expert buffer: hits, misses, wasted bytes, cycles.

    The second table is of prompts: how often weights are loaded when tokens are computed in order,
    or in windows that are sorted by expert. With --device a third one is of a device with such a
    buffer, of as many slots, each large enough for an expert, and as much time between calls as it
    takes; it has no oracle, and keeps nothing that was not brought.
    """
    from moeaccel.config import preset
    from moeaccel.formats import weight_format as find_format
    from moeaccel.host.buffering import PREDICTIONS, Call, prediction as find, replay
    from moeaccel.host.errors import LimitExceeded
    from moeaccel.host.traces import ForeignTrace, RoutingTrace
    from moeaccel.host.traces.presets import generate, presets
    from moeaccel.image import ExpertShape
    from moeaccel.zoo import model as find_model

    found, machine = find_model(model), preset(config)
    if (found.d_model is None or found.d_expert is None or found.n_experts is None
            or found.top_k is None):
        raise ForeignTrace(f"a model must have experts of one width, all of them known, and "
                           f"{found.key} has not")
    if max(found.d_model, found.d_expert) > machine.max_dim:
        raise LimitExceeded(f"config must take experts of {found.d_model} x {found.d_expert}, and "
                            f"{config!r} takes {machine.max_dim} at most")
    names = prediction or ["none", *PREDICTIONS]
    chosen = [None if name == "none" else find(name) for name in names]
    shape = ExpertShape(find_format(weight_format), found.d_model, found.d_expert,
                        machine.row_multipliers, channels=machine.channels)
    with Status(as_json) as status:
        if trace is not None:
            routes = RoutingTrace.load(trace)
        else:
            if found.key not in presets():
                raise ForeignTrace(f"a trace must be given with --trace for {found.key}: routes "
                                   f"are generated for {', '.join(presets())} only")
            status(f"generating routes of {found.key}")
            routes = generate(found.key, requests=requests, tokens=tokens, prompt=prompt,
                              seed=seed)
        routes.expect(n_layers=found.n_moe_layers, n_experts=found.n_experts, top_k=found.top_k)
        call = Call(machine, shape, planes=2)
        rows = []
        for name, one in zip(names, chosen, strict=True):
            status(f"replaying {name}")
            rows.append(replay(routes, call, slots=slots, slot_bytes=slot_bytes or None, gap=gap,
                               prediction=one))
        status("counting loads of prompts")
        reordered = _reordered(routes, slots)
        counted = [] if device is None else [
            _on_device(device, routes, preset(device_config or config), slots, one, status)
            for name, one in zip(names, chosen, strict=True)
            if one is not None and name != "oracle"]
    if as_json:
        print_json({
            "model": found.key, "trace": routes.source, "config": machine.name, "slots": slots,
            "slot_bytes": slot_bytes or call.image_bytes, "image_bytes": call.image_bytes,
            "gap": gap, "weight_format": weight_format,
            "predictions": [row.as_dict() for row in rows],
            "prompts": [{"window": row.window, "pairs": row.pairs, "loads": row.loads,
                         "pairs_per_load": row.reuse} for row in reordered],
            **({"device": str(device), "on_device": counted} if device else {})})
        return
    _print(rows, reordered, f"{found.name} on {machine.name}, {slots} slots of "
           f"{(slot_bytes or call.image_bytes) / 1e6:.2f} MB, {gap:,} idle cycles between calls")
    if counted:
        _print_counted(counted, f"{device}, {slots} slots")


def _on_device(kind: On, routes: "RoutingTrace", machine: "AcceleratorConfig", slots: int,
               one: "type[Prediction]", status: Status) -> dict[str, Any]:
    """Return what a device counts, and the model, of the same layers."""
    from dataclasses import asdict

    from moeaccel.host import open_device
    from moeaccel.host.buffering import replay
    from moeaccel.host.buffering.device import replay_on, with_buffer

    config, call = with_buffer(machine, slots)
    model = asdict(replay(routes, call, slots=slots, gap=None, prediction=one).counts)
    with open_device(str(kind), config=config) as opened:
        found = asdict(replay_on(opened, routes, one, progress=lambda text: status(
            f"{one.name} on {kind}: {text}")))
    return {"prediction": one.name, "device": found, "model": model, "equal": found == model}


def _print_counted(counted: list[dict[str, Any]], title: str) -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Column, Table

    names = ("hits", "misses", "hit_bytes", "fetched_bytes", "wasted_bytes")
    table = Table("prediction", *(Column(name, justify="right") for name in names), "the model's",
                  title=title, box=SIMPLE, padding=(0, 1, 0, 0))
    for row in counted:
        table.add_row(row["prediction"], *(f"{row['device'][name]:,}" for name in names),
                      "equal" if row["equal"] else f"NOT: {row['model']}")
    Console().print(table)


def _reordered(routes: Any, slots: int) -> "list[Loads]":
    """Return the loads of all layers of all prompts, for windows of some sizes and of all."""
    from moeaccel.host.buffering import Loads, loads

    steps = [step.ids for step in routes.steps("prefill")]
    if not steps:
        return []
    found = []
    longest = max(len(ids) for ids in steps)
    for window in (*(w for w in _WINDOWS if w < longest), longest):
        parts = [loads(ids[:, layer], window=window, slots=max(slots, 1))
                 for ids in steps for layer in range(routes.n_layers)]
        found.append(Loads(window, sum(p.pairs for p in parts), sum(p.loads for p in parts)))
    return found


def _print(rows: "list[Outcome]", reordered: "list[Loads]", title: str) -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Column, Table

    numbers = ("right", "hits", "parts", "misses", "MB", "wasted", "cycles", "speed")
    table = Table(Column("prediction", no_wrap=True),
                  *(Column(name, justify="right", no_wrap=True) for name in numbers),
                  title=title, box=SIMPLE, padding=(0, 1, 0, 0))
    for row in rows:
        c = row.counts
        table.add_row(
            row.name, f"{row.accuracy:.3f}", *(
                f"{n / c.uses:.3f}" for n in (c.hits, c.partial, c.misses)),
            f"{c.fetched_bytes / 1e6:,.0f}",
            f"{c.wasted_bytes / c.fetched_bytes if c.fetched_bytes else 0:.0%}",
            f"{(row.cycles - row.saved) / row.calls:,.0f}", f"{row.speedup:.3f}")
    console = Console()
    console.print(table)
    console.print("right: of the experts that were predicted; hits, parts, misses: of those that "
                  "were used; MB: fetched ahead; cycles: of a call", highlight=False)
    if reordered:
        prompts = Table("window, tokens", Column("loads", justify="right"),
                        Column("pairs a load", justify="right"), title="prompts", box=SIMPLE)
        for loads in reordered:
            prompts.add_row(f"{loads.window:,}", f"{loads.loads:,}", f"{loads.reuse:.2f}")
        console.print(prompts)
