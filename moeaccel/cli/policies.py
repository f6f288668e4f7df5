"""``moeaccel policies`` and ``moeaccel bench policies``: which expert is where, compared."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moeaccel.cli.output import Status, print_json

if TYPE_CHECKING:
    from moeaccel.host.policies.compare import Comparison

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def command(as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list.")] = False
            ) -> None:
    """List offloading systems and the parts that they are made of here."""
    from moeaccel.host.policies.systems import SYSTEMS

    if as_json:
        print_json([{
            "policy": s.name, "title": s.title, "source": s.source, "lossless": s.lossless,
            **{kind: None if part is None else {"name": part.name, "options": part.options}
               for kind, part in (("placement", s.placement), ("residency", s.residency),
                                  ("prefetch", s.prefetch), ("routing", s.routing))},
            "note": s.note} for s in SYSTEMS.values()])
        return
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Column, Table

    parts = ("placement", "residency", "prefetch", "routing")
    table = Table(Column("policy", no_wrap=True),
                  *(Column(part, overflow="fold") for part in parts),
                  Column("routes", no_wrap=True), box=SIMPLE, padding=(0, 1, 0, 0))
    for s in SYSTEMS.values():
        table.add_row(s.name, *("-" if part is None else str(part) for part in (
            s.placement, s.residency, s.prefetch, s.routing)),
            "lossless" if s.lossless else "lossy")
    console = Console()
    console.print(table)
    for s in SYSTEMS.values():
        text = ", ".join(filter(None, (s.title, s.source)))
        console.print(f"{s.name}: {text}{s.note and f'; {s.note}'}", highlight=False)


def compare(
    model: Annotated[str, typer.Option(help="Model of the zoo, see `moeaccel models`.")],
    trace: Annotated[
        Path | None, typer.Option(help="Trace of the model; when left out, routes are generated.")
    ] = None,
    gpu_bytes: Annotated[
        str, typer.Option(help="Memory of the torch device for experts: bytes, as 8GiB, or as 25%.")
    ] = "25%",
    policy: Annotated[
        list[str] | None, typer.Option(help="Only this, repeatable; see `moeaccel policies`.")
    ] = None,
    torch: Annotated[str, typer.Option(help="Torch device: h100, rtx4090 or cpu.")] = "h100",
    cards: Annotated[str, typer.Option(help="Accelerator cards, as many as hold the model.")]
    = "u55c",
    weight_format: Annotated[str, typer.Option(help="Of the images.")] = "int4_g32",
    single_copy: Annotated[
        bool, typer.Option("--single-copy", help="Images are on the cards alone, and move from "
                                                 "there; else the host has a copy.")
    ] = False,
    fused: Annotated[
        bool, typer.Option("--fused", help="The torch device multiplies images as they are, and "
                                           "residents are images; else both are bf16.")
    ] = False,
    profile: Annotated[
        Path | None, typer.Option(help="Trace or profile for policies that pin experts; when left "
                                       "out, the trace itself.")
    ] = None,
    requests: Annotated[int, typer.Option(min=1, help="Requests to generate.")] = 4,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of each.")] = 256,
    prompt: Annotated[int, typer.Option(min=0, help="Of these, of the prompt.")] = 64,
    batch: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 1,
    plot: Annotated[
        Path | None, typer.Option(help="Picture to draw: .png, .svg or .pdf.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of routes and of stand-ins.")] = 0,
    time: Annotated[
        bool, typer.Option("--time", help="Print the processor time of each replay, too.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Replay a trace under every policy: hits, bytes over the link, predicted time, distance to the
    bounds."""
    from moeaccel.host.policies.compare import against_monde, compare as run, device_alone
    from moeaccel.host.policies.costs import TORCH, machine
    from moeaccel.host.policies.systems import SYSTEMS, system
    from moeaccel.host.sizes import size_of
    from moeaccel.host.traces import ForeignTrace, PopularityProfile, RoutingTrace
    from moeaccel.host.traces.presets import generate, presets
    from moeaccel.zoo import model as find_model

    found = find_model(model)
    chosen = [system(name) for name in policy] if policy else list(SYSTEMS.values())
    host = machine(torch, cards).holding(found, weight_format)
    costs = host.layer(found, weight_format_name=weight_format, single_copy=single_copy,
                       fused=fused)
    assert found.n_experts is not None and found.top_k is not None
    everything = found.n_moe_layers * found.n_experts * costs.resident_bytes
    size = size_of("gpu_bytes", gpu_bytes).of(everything)
    with Status(as_json) as status:
        if trace is not None:
            routes = RoutingTrace.load(trace)
        else:
            if found.key not in presets():
                raise ForeignTrace(f"a trace must be given with --trace for {found.key}: routes "
                                   f"are generated for {', '.join(presets())} only")
            status(f"generating routes of {found.key}")
            routes = generate(found.key, requests=requests, tokens=tokens, prompt=prompt,
                              batch=batch, seed=seed)
        routes.expect(n_layers=found.n_moe_layers, n_experts=found.n_experts, top_k=found.top_k)
        counts = None
        if profile is not None:
            try:
                counts = RoutingTrace.load(profile).popularity().counts
            except ForeignTrace:
                counts = PopularityProfile.load(profile).counts
            if counts.shape != (found.n_moe_layers, found.n_experts):
                raise ForeignTrace(f"{profile} must have {found.n_moe_layers} layers of "
                                   f"{found.n_experts} experts, not {counts.shape}")
        rows = run(routes, costs, gpu_bytes=size, systems=chosen, profile=counts, seed=seed,
                   progress=lambda name: status(f"replaying {name}"))
        alone, gains = {}, {}
        slots = size * found.n_experts // max(1, everything)
        for name in TORCH:
            status(f"sampling calls on {name}")
            here = machine(name, cards).holding(found, weight_format).layer(
                found, weight_format_name=weight_format, single_copy=single_copy, fused=fused)
            alone[name] = device_alone(routes, here)
            gains[name] = against_monde(routes, here, min(slots, found.n_experts))
    title = (f"{found.name} on {host.name}, {size / 1e9:.2f} GB for experts, "
             f"{len(routes):,} tokens, {weight_format}")
    if plot is not None:
        from moeaccel.host.policies.plot import plot as draw

        draw(rows, plot, title=title)
    if as_json:
        print_json({"model": found.key, "machine": host.name, "gpu_bytes": size,
                    "weight_format": weight_format, "single_copy": single_copy, "fused": fused,
                    "tokens": len(routes), "trace": routes.source,
                    "device_alone_is_best": alone, "over_monde": gains,
                    "policies": [row.as_dict() for row in rows]})
        return
    _print(rows, title)
    if time:
        calls = routes.n_layers * int(routes.step[-1] + 1)
        took = ", ".join(f"{row.outcome.system.name} {row.replay_seconds:.2f}"
                         for row in sorted(rows, key=lambda row: row.replay_seconds))
        typer.echo(f"processor seconds of a replay of {calls:,} calls: {took}")
    for name, found_alone in alone.items():
        shares = ", ".join(
            f"{share:.0%} of calls of {tokens}" for tokens, share in found_alone.items())
        over = ", ".join(f"{gain:.2f} ({how})" for how, gain in gains[name].items())
        typer.echo(f"{name}: without residents all on the device is already best: {shares} tokens; "
                   f"MoNDE's split takes {over} times as long as moeaccel's, geometric mean")


def _print(rows: "list[Comparison]", title: str) -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Column, Table

    numbers = ("weight", "hits", "to Belady", "MB", "ms", "experts", "to optimum")
    table = Table(Column("policy", no_wrap=True),
                  *(Column(name, justify="right", overflow="fold") for name in numbers),
                  title=title, box=SIMPLE, padding=(0, 1, 0, 0))
    for row in rows:
        found = row.outcome
        table.add_row(
            found.system.name,
            "all" if found.system.lossless else f"{found.mass:.0%}",
            f"{found.hit_rate:.3f}", f"{row.to_belady:.3f}",
            f"{found.link_bytes_per_token / 1e6:,.2f}", f"{found.seconds_per_token * 1e3:,.3f}",
            f"{found.moe_seconds_per_token * 1e3:,.3f}", f"{found.to_optimum:+.1%}")
    console = Console()
    console.print(table)
    console.print("predicted for a token: MB over the link, ms, ms in experts; weight: the share "
                  "of the routers' weight that is computed, all where the policy is lossless; to "
                  "optimum: over the best split of the same residents", highlight=False)

