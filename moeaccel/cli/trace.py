"""``moeaccel trace``: routing traces, recorded, imported or generated."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeaccel.cli.output import Status, print_json
from moeaccel.errors import MoeAccelError

if TYPE_CHECKING:
    from moeaccel.host.traces import PopularityProfile, RoutingTrace

app = typer.Typer(no_args_is_help=True, help="Record, import, generate and measure routes.")

Out = Annotated[Path, typer.Option("--out", "-o", help="Trace file to write (.safetensors).")]
File = Annotated[Path, typer.Argument(help="Trace file, or profile.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Seed = Annotated[int, typer.Option(min=0, help="Of the text; another seed is another text.")]


class Kind(StrEnum):
    """What `import` reads."""

    VLLM = "vllm"
    TRTLLM = "trtllm"
    SGLANG = "sglang"
    MEGATRON = "megatron"
    IMATRIX = "imatrix"


class MissingOption(MoeAccelError, ValueError):
    """An option that this kind of file needs."""


@app.command()
def record(
    model: Annotated[str, typer.Argument(help="Folder or name of a transformers checkpoint.")],
    prompt: Annotated[list[str], typer.Option(help="Text to go on from, repeatable.")],
    out: Out,
    new_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens to generate for each prompt.")
    ] = 32,
    as_json: Json = False,
) -> None:
    """Run a transformers model on some prompts, one after the other, and write down its routes."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from moeaccel.host.traces.recorder import record as recording_of

    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
        network: Any = AutoModelForCausalLM.from_pretrained(model).eval()
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise MissingOption(f"model must be a checkpoint of transformers: {first}") from error
    with torch.no_grad(), recording_of(network) as recording:
        for text in prompt:
            tokens = tokenizer(text, return_tensors="pt")
            network.generate(**tokens, max_new_tokens=new_tokens, do_sample=False)
    _write(recording.trace(), out, as_json)


@app.command("import")
def import_(
    path: Annotated[Path, typer.Argument(help="File that an engine wrote.")],
    kind: Annotated[Kind, typer.Option("--format", help="Who wrote it.")],
    out: Out,
    model: Annotated[
        str, typer.Option(help="Model of the zoo, of whose sizes the routes must be where none is "
                          "given; or any name.")
    ] = "unknown",
    experts: Annotated[
        int, typer.Option(min=0, help="Routed experts of a layer; 0: from the zoo.")
    ] = 0,
    layers: Annotated[int, typer.Option(min=0, help="Layers of the model; 0: from the zoo.")] = 0,
    top_k: Annotated[int, typer.Option(min=0, help="Experts of a token; 0: from the zoo.")] = 0,
    as_json: Json = False,
) -> None:
    """Read what an engine wrote down: routed experts of vLLM, TensorRT-LLM (.npy, .npz), SGLang
    (.json, .jsonl) and Megatron-Core (.jsonl), or the counts of llama.cpp (imatrix .gguf), which
    make a popularity profile and no trace."""
    from moeaccel.host.traces import RoutingTrace, importers
    from moeaccel.zoo import models

    known = models().get(model)
    sizes = {"--experts": experts or (known.n_experts if known else 0),
             "--layers": layers or (known.n_layers if known else 0),
             "--top-k": top_k or (known.top_k if known else 0)}

    def size(name: str) -> int:
        if not sizes[name]:
            raise MissingOption(f"{kind} files need {name}, or --model with a name from `moeaccel "
                                f"models`, not {model!r}")
        return sizes[name]

    what: RoutingTrace | PopularityProfile
    match kind:
        case Kind.VLLM | Kind.TRTLLM:
            what = importers.import_routed_experts(path, n_experts=size("--experts"), model=model)
        case Kind.SGLANG:
            what = importers.import_sglang(path, n_experts=size("--experts"), model=model,
                                           n_layers=size("--layers"), top_k=size("--top-k"))
        case Kind.MEGATRON:
            what = importers.import_megatron(path, n_experts=size("--experts"), model=model)
        case Kind.IMATRIX:
            what = importers.import_imatrix(path, model=model)
    if (known and isinstance(what, RoutingTrace) and not (experts or layers or top_k)
            and known.moe_layers and known.n_experts and known.top_k):
        what.expect(n_layers=known.moe_layers, n_experts=known.n_experts, top_k=known.top_k)
    _write(what, out, as_json)


@app.command()
def generate(
    out: Out,
    model: Annotated[str, typer.Option(help="Preset; `moeaccel trace presets` lists them.")]
    = "deepseek-v2-lite",
    requests: Annotated[int, typer.Option(min=1, help="Requests.")] = 16,
    tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of each request, prompt included.")
    ] = 512,
    prompt: Annotated[
        int, typer.Option(min=0, help="Tokens of the prompt, computed in one step.")
    ] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 1,
    seed: Seed = 0,
    model_seed: Annotated[
        int, typer.Option(min=0, help="Of the stand-in for the model's weights.")
    ] = 0,
    as_json: Json = False,
) -> None:
    """Make routes with the locality of a published model."""
    from moeaccel.host.traces.presets import generate as make

    _write(make(model, requests=requests, tokens=tokens, prompt=prompt, batch=batch, seed=seed,
                model_seed=model_seed), out, as_json)


@app.command()
def presets(as_json: Json = False) -> None:
    """List the models whose routes can be generated, and what they were fitted to."""
    from rich.console import Console
    from rich.table import Table

    from moeaccel.host.traces.presets import presets as known

    rows = [{"key": p.key, "layers": len(p.layers), "experts": p.n_experts, "top_k": p.top_k,
             "basis": p.basis} for p in known().values()]
    if as_json:
        print_json(rows)
        return
    table = Table("preset", "layers", "experts", "top-k", "fitted to")
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console().print(table)


@app.command()
def stats(
    trace: Annotated[
        Path | None, typer.Argument(help="Trace file; when left out, routes are generated.")
    ] = None,
    model: Annotated[
        str, typer.Option(help="Preset to compare with; of a file: nothing, if left out.")
    ] = "",
    requests: Annotated[int, typer.Option(min=1, help="Requests to generate.")] = 64,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of each.")] = 512,
    seed: Seed = 1000,
    as_json: Json = False,
) -> None:
    """Measure every statistic, beside what was published for the model."""
    from moeaccel.host.traces import RoutingTrace
    from moeaccel.host.traces.presets import generate as make, preset
    from moeaccel.host.traces.statistics import compare

    if model:
        preset(model)  # a name that is misspelt is found out before anything is computed
    with Status(as_json, lines=True) as status:
        if trace is None:
            model = model or "deepseek-v2-lite"
            what = make(model, requests=requests, tokens=tokens, seed=seed,
                        progress=lambda done: status(
                            f"generating {requests} requests of {model}: {done} done")
                        if done % 8 == 0 else None)
        else:
            what = RoutingTrace.load(trace)
            if model:
                p = preset(model)
                what.expect(n_layers=len(p.layers), n_experts=p.n_experts, top_k=p.top_k)
        rows = compare(what, model, progress=lambda text: status(f"measuring {text}"))
    if as_json:
        print_json({
            **_describe(what), "compared_with": model or None,
            "statistics": [{"statistic": row.statistic, "real": row.real, "found": row.found,
                            "difference": row.difference, "source": row.source}
                           for row in rows]})
        return
    _print_comparison(rows, what, trace is None)


def _print_comparison(rows: list[Any], what: "RoutingTrace", generated: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for source in dict.fromkeys(row.source for row in rows):
        name = "generated" if generated else "trace"
        table = Table("statistic", *(("real", name, "difference") if source else (name,)),
                      title=source or "not published", title_justify="left")
        for row in rows:
            if row.source != source:
                continue
            cells = (row.real, row.found, row.difference) if source else (row.found,)
            table.add_row(row.statistic, *("-" if cell is None else f"{cell:.3f}"
                                           for cell in cells))
        console.print(table)
    console.print(f"{what.model}, {what.source}: {len(what.requests)} requests, {len(what):,} "
                  "tokens", highlight=False)


@app.command()
def plot(
    trace: File,
    out: Annotated[Path, typer.Option("--out", "-o", help="Picture: .png, .svg or .pdf.")],
    as_json: Json = False,
) -> None:
    """Draw popularity, one request, reuse over time and hit rates."""
    from moeaccel.host.traces import ForeignTrace, PopularityProfile, RoutingTrace
    from moeaccel.host.traces.plot import plot as draw

    what: RoutingTrace | PopularityProfile
    try:
        what = RoutingTrace.load(trace)
    except ForeignTrace as foreign:
        try:
            what = PopularityProfile.load(trace)
        except ForeignTrace:
            raise foreign from None
    draw(what, out)
    if as_json:
        print_json({"plot": str(out)})
    else:
        typer.echo(str(out))


def _describe(what: "RoutingTrace | PopularityProfile") -> dict[str, Any]:
    from moeaccel.host.traces import RoutingTrace

    found: dict[str, Any] = {"kind": "profile", "model": what.model, "source": what.source,
                             "layers": len(what.layers), "experts": what.n_experts}
    if isinstance(what, RoutingTrace):
        return found | {"kind": "trace", "top_k": what.top_k, "requests": len(what.requests),
                        "tokens": len(what), "steps": int(what.step[-1] - what.step[0] + 1)}
    return found | {"counts": int(what.counts.sum())}


def _write(what: "RoutingTrace | PopularityProfile", out: Path, as_json: bool) -> None:
    what.save(out)
    found = {"file": str(out), **_describe(what)}
    if as_json:
        print_json(found)
    else:
        typer.echo(", ".join(f"{name} {value}" for name, value in found.items()))
