"""The demo model: a small Mixture-of-Experts language model whose answers can be marked.

It is trained on a few tasks with one right answer for each prompt, so that the effect of a number
format on the *answers*, not only on the tensors, is a percentage anyone can read. The checkpoint
beside this file is an ordinary transformers checkpoint:
``AutoModelForCausalLM.from_pretrained(CHECKPOINT)`` loads it, with nothing of the accelerator
involved.
"""

from pathlib import Path

__all__ = ["CHECKPOINT"]

CHECKPOINT = Path(__file__).parent / "checkpoint"
"""Folder of the checkpoint: configuration, weights, tokenizer, and the record of its training."""
