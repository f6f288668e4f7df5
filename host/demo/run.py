"""Generate text with the demo model through the accelerator, and hold it to the golden model.

The same prompts are answered three times: by transformers alone in float, with every expert on the
golden model, and with every expert on the device. Logits of the last two must be equal to the bit.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch

from moeaccel.config import AcceleratorConfig, preset
from moeaccel.host.benchmark import memory_share
from moeaccel.host.demo import CHECKPOINT
from moeaccel.host.demo.evaluate import MAX_ANSWER_TOKENS
from moeaccel.host.demo.tasks import TASKS, check_prompt, held_out_examples
from moeaccel.host.errors import InvalidOption, UnsupportedExperts
from moeaccel.image import ExpertShape

__all__ = ["DemoResult", "demo_prompts", "generate", "run"]


@dataclass(frozen=True)
class DemoResult:
    """What the prompts gave; cycles and bytes are the device's own counts.

    Parameters
    ----------
    prompts, float_answers, device_answers : list[str]
    right_answers : list[str] or None
        Where the prompts are tasks with a known answer.
    logits_equal : bool
        Every logit of the device equals the golden model's, bit for bit.
    logits_compared : int
    cycles : int
        Device clock cycles of all commands.
    commands, tokens, expert_passes : int
        EXPERTS commands; tokens through a layer; passes over an expert's weights.
    bytes_read, bytes_written : int
    memory_share : float
        Stored bytes of the weights of all passes / (channels x port bytes per cycle x cycles). Tiny
        experts are far below what the machine reaches on real ones: see ``moeaccel bench decode``.
    seconds : float
        Wall time of generating on the device.
    device, config, weight_format : str
    activation_bits : int
    routed : int
        Layers whose router is the device's.
    """

    prompts: list[str]
    float_answers: list[str]
    device_answers: list[str]
    right_answers: list[str] | None
    logits_equal: bool
    logits_compared: int
    cycles: int
    commands: int
    tokens: int
    expert_passes: int
    bytes_read: int
    bytes_written: int
    memory_share: float
    seconds: float
    device: str
    config: str
    weight_format: str
    activation_bits: int
    routed: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Return every field for JSON."""
        return asdict(self)


def demo_prompts(per_task: int, seed: int = 0) -> tuple[list[str], list[str]]:
    """Return prompts that the model never saw in training, and their right answers."""
    examples = [e for task in TASKS.values()
                for e in held_out_examples(task, count=per_task, seed=seed)]
    return [e.prompt for e in examples], [e.answer for e in examples]


def generate(model: Any, tokenizer: Any, prompts: Sequence[str]) -> tuple[list[str], torch.Tensor]:
    """Return the model's answers, and all their logits."""
    batch = tokenizer(list(prompts), return_tensors="pt", padding=True, padding_side="left",
                      return_token_type_ids=False)
    with torch.inference_mode():
        out = model.generate(
            **batch, max_new_tokens=MAX_ANSWER_TOKENS, do_sample=False, output_logits=True,
            return_dict_in_generate=True, pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id)
    new = out.sequences[:, batch["input_ids"].shape[1]:]
    return tokenizer.batch_decode(new, skip_special_tokens=True), torch.stack(out.logits)


def _hide_progress_bars() -> None:
    """Loading takes a moment, and transformers' bars go to standard error whatever that is."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def run(prompts: Sequence[str], *, right_answers: Sequence[str] | None = None, device: str = "rtl",
        config: str | AcceleratorConfig = "small", weight_format: str = "int4_g32",
        activation_bits: int = 16, routes: str | os.PathLike[str] | None = None,
        route: bool = False, progress: Callable[[str], None] = lambda _: None) -> DemoResult:
    """Answer prompts in float, on the golden model and on the device.

    Parameters
    ----------
    prompts : sequence of str
        Prompts of the demo's tasks, each ending in ``=``.
    right_answers : sequence of str, optional
    device : str
        As for :func:`moeaccel.host.open_device`.
    config, weight_format, activation_bits
        See :func:`moeaccel.host.open_device` and :meth:`moeaccel.host.Device.load_experts`.
    routes : path, optional
        Trace whose routes golden model and device take instead of the model's own.
    route : bool
        Golden model and device route, too: whole MoE blocks are theirs.
    progress : callable
        Told what is being done; nothing else shows it.

    Raises
    ------
    InvalidOption
        If the model does not know a prompt's characters, or there are several with ``routes``.
    TraceError
        If the trace is none, or of another model, or of fewer tokens.
    UnsupportedExperts
        If the device is to route, and has no such router.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from moeaccel.host import open_device
    from moeaccel.host.transformers_plugin import check_model, release, routing, use_device

    config = preset(config)
    if routes is not None and len(prompts) != 1:
        raise InvalidOption(f"prompts must be one with routes, which have no padding, not "
                            f"{len(prompts)}")
    for prompt in prompts:
        check_prompt(prompt)
    _hide_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    progress("answering in float, without the accelerator")
    model: Any = AutoModelForCausalLM.from_pretrained(CHECKPOINT)
    float_answers, _ = generate(model, tokenizer, prompts)

    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, experts_implementation="moeaccel")
    check_model(model)
    outcome: dict[str, tuple[list[str], torch.Tensor]] = {}
    counters: dict[str, int] = {}
    seconds, cycles, routed = 0.0, 0, 0
    # The golden device states cycles when asked: where they are what is shown.
    timed: dict[str, Any] = {"timing": True} if device == "golden" else {}
    for spec, options in (("golden", {}), (device, timed)):
        what = "the golden model" if spec == "golden" else f"{spec} (config {config.name})"
        progress(f"opening {what}; a first build of the RTL takes a minute or two"
                 if spec == "rtl" else f"opening {what}")
        with open_device(spec, config=config, **options) as opened:
            use_device(opened, weight_format=weight_format, activation_bits=activation_bits,
                       routes=routes, route=route)
            if route:
                blocks = routing(model)
                routed = len(blocks)
                if reason := next((block.reason for block in blocks if block.reason), None):
                    use_device(None)
                    raise UnsupportedExperts(f"the device must have the model's router: {reason}")
            progress(f"generating on {what}")
            before = opened.counters()
            begin = time.perf_counter()
            outcome[spec] = generate(model, tokenizer, prompts)
            seconds = time.perf_counter() - begin
            after = opened.counters()
            counters = {name: after[name] - before[name] for name in after}
            cycles = opened.total_cycles
            release(model)
            use_device(None)
    golden, device_out = outcome["golden"], outcome[device]
    equal = golden[1].shape == device_out[1].shape and torch.equal(golden[1], device_out[1])

    settings = cast(Any, model.config)
    shape = ExpertShape(_format(weight_format), settings.hidden_size,
                        settings.moe_intermediate_size, config.row_multipliers, config.channels)
    return DemoResult(
        prompts=list(prompts), float_answers=float_answers, device_answers=device_out[0],
        right_answers=list(right_answers) if right_answers is not None else None,
        logits_equal=equal, logits_compared=device_out[1].numel(), cycles=cycles,
        commands=counters["commands"], tokens=counters["tokens"],
        expert_passes=counters["expert_passes"],
        bytes_read=counters["bytes_read_weights"] + counters["bytes_read_other"],
        bytes_written=counters["bytes_written"],
        memory_share=memory_share(config, counters["expert_passes"] * shape.stored_bytes, cycles),
        seconds=seconds, device=device, config=config.name, weight_format=weight_format,
        activation_bits=activation_bits, routed=routed)


def _format(name: str) -> Any:
    from moeaccel.formats import weight_format

    return weight_format(name)
