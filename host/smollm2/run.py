"""Chat with SmolLM2, its FFNs on the accelerator, and hold every logit to the golden model."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch

from moeaccel.config import AcceleratorConfig, preset
from moeaccel.formats import weight_format as find_format
from moeaccel.host.smollm2 import checkpoint_folder
from moeaccel.image import ExpertShape

__all__ = ["ChatResult", "chat"]

MEMORY_BYTES = 1 << 28
"""Of a simulated device, which takes what it uses: 90 MB of experts in ``mxint8``."""


@dataclass(frozen=True)
class ChatResult:
    """What a prompt gave; cycles are the device's own.

    Parameters
    ----------
    prompt, answer : :class:`str`
    prompt_tokens, new_tokens : :class:`int`
    finished : :class:`bool`
        The answer ended by itself, not at the number of tokens.
    cycles : :class:`int`
        Of all commands.
    decode_cycles : :class:`int`
        Of the last token; 0 where there was only one.
    memory_share : :class:`float`
        Stored bytes of the weights of the last token's experts / (port bytes per cycle x its
        cycles).
    logits_equal : :class:`bool`, optional
        Every logit equals the golden model's, bit for bit; None where it was not compared.
    seconds : :class:`float`
        Wall time of generating, loading the weights included.
    device, config, weight_format : :class:`str`
    activation_bits : :class:`int`
    """

    prompt: str
    answer: str
    prompt_tokens: int
    new_tokens: int
    finished: bool
    cycles: int
    decode_cycles: int
    memory_share: float
    logits_equal: bool | None
    seconds: float
    device: str
    config: str
    weight_format: str
    activation_bits: int

    def as_dict(self) -> dict[str, Any]:
        """Return every field for JSON."""
        return asdict(self)


def chat(prompt: str, *, device: str = "rtl", config: str | AcceleratorConfig = "small",
         weight_format: str = "int4_g32", activation_bits: int = 16, new_tokens: int = 64,
         compare: bool = True, continued: bool = False, say: Callable[[str], None] = lambda _: None,
         progress: Callable[[str], None] = lambda _: None) -> ChatResult:
    """Answer a prompt with the likeliest tokens.

    Parameters
    ----------
    prompt : :class:`str`
    device : :class:`str`
        As for :func:`moeaccel.host.open_device`.
    config, weight_format, activation_bits
        See :func:`moeaccel.host.open_device` and :meth:`moeaccel.host.Device.load_experts`.
    new_tokens : :class:`int`
        At most so many; the answer's end token ends it, too.
    compare : :class:`bool`
        Answer on the golden model, too, and compare the logits.
    continued : :class:`bool`
        Go on with the prompt as it is, and do not take it for a question: a few tokens instead of
        some thirty.
    say : callable
        Given the answer's text as it comes.
    progress : callable
        Told what is being done.

    Raises
    ------
    ToolMissingError
        If the weights are not installed.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.generation.streamers import TextStreamer
    from transformers.utils import logging

    from moeaccel.host import open_device
    from moeaccel.host.transformers_plugin import check_model, release, use_device

    config = preset(config)
    fmt = find_format(weight_format)
    logging.disable_progress_bar()
    folder = checkpoint_folder(progress)
    progress("loading SmolLM2")
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="moeaccel")
    check_model(model)
    if continued:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    else:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt",
            return_dict=True)

    class Streamer(TextStreamer):
        """Says text as it comes, and reads the device's clock at every token."""

        def __init__(self, opened: Any, aloud: bool) -> None:
            super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
            self._opened, self._aloud = opened, aloud
            self.seen: list[tuple[int, int]] = []

        def put(self, value: torch.Tensor) -> None:
            self.seen.append((self._opened.total_cycles,
                              self._opened.counters()["expert_passes"]))
            super().put(value)

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if self._aloud and text:
                say(text)

    def generate(spec: str, aloud: bool) -> tuple[Any, Streamer, float]:
        progress(f"opening {spec}, config {config.name}")
        options: dict[str, Any] = {}
        if spec in ("rtl", "golden"):
            options["memory_bytes"] = MEMORY_BYTES
        if spec == "golden" and aloud:
            options["timing"] = True
        with open_device(spec, config=config, **options) as opened:
            use_device(opened, weight_format=weight_format, activation_bits=activation_bits)
            progress(f"generating on {spec}")
            streamer = Streamer(opened, aloud)
            begin = time.perf_counter()
            with torch.inference_mode():
                out = model.generate(
                    **inputs, max_new_tokens=new_tokens, do_sample=False, output_logits=True,
                    return_dict_in_generate=True, streamer=streamer)
            seconds = time.perf_counter() - begin
            release(model)
            use_device(None)
        return out, streamer, seconds

    out, streamer, seconds = generate(device, aloud=True)
    equal = None
    if compare and device != "golden":
        reference = generate("golden", aloud=False)[0]
        equal = torch.equal(out.sequences, reference.sequences) and all(
            torch.equal(a, b) for a, b in zip(out.logits, reference.logits, strict=True))
    new = out.sequences[0, inputs["input_ids"].shape[1]:]
    # What is between two calls of the streamer is a pass of the model, or nothing; the prompt's is
    # the first.
    steps = [(after[0] - before[0], after[1] - before[1])
             for before, after in pairwise(streamer.seen) if after[1] > before[1]]
    cycles, passes = steps[-1] if len(steps) > 1 else (0, 0)
    shape = ExpertShape(fmt, model.config.hidden_size, model.config.intermediate_size,
                        config.row_multipliers)
    return ChatResult(
        prompt=prompt, answer=tokenizer.decode(new, skip_special_tokens=True),
        prompt_tokens=inputs["input_ids"].shape[1], new_tokens=len(new),
        finished=int(new[-1]) == tokenizer.eos_token_id, cycles=streamer.seen[-1][0],
        decode_cycles=cycles,
        memory_share=passes * shape.stored_bytes / (config.port_bytes * cycles) if cycles else 0.0,
        logits_equal=equal, seconds=seconds, device=device, config=config.name,
        weight_format=weight_format, activation_bits=activation_bits)
