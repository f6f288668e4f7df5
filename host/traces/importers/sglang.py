"""Responses of SGLang with routed experts."""

from __future__ import annotations

import base64
import binascii
import json
import os
from typing import Any

import numpy as np

from moeaccel.host.traces.errors import ForeignTrace, TornTrace
from moeaccel.host.traces.files import read_text
from moeaccel.host.traces.importers.dense import trace_of
from moeaccel.host.traces.trace import RoutingTrace

__all__ = ["import_sglang"]


def import_sglang(path: str | os.PathLike[str], *, n_layers: int, n_experts: int, top_k: int,
                  model: str = "unknown") -> RoutingTrace:
    """Read saved responses, JSON (one or a list of them) or JSON lines.

    A server started with ``--enable-return-routed-experts`` answers requests that ask for
    ``return_routed_experts`` with base64 of little-endian int32: (tokens, layers, top_k) laid out
    flat, a row for each layer of the model, those without experts too (0 or -1 in all slots); the
    last token of the answer was never computed and has no row. It stands in
    ``meta_info["routed_experts"]`` of ``/generate``, beside ``prompt_tokens``, and in
    ``sglext["routed_experts"]`` of ``/chat/completions``, beside ``usage``. Written from SGLang's
    ``routed_experts.py`` and from the page of sgl-jax on this feature; not tried on a server.

    Parameters
    ----------
    path : path
    n_layers : :class:`int`
        Rows of a token: ``num_hidden_layers`` of the model.
    n_experts, top_k : :class:`int`
        Of a layer.
    model : :class:`str`

    Raises
    ------
    TornTrace
        If the file or a payload in it is damaged.
    ForeignTrace
        If it holds something else, or another model's routes.
    """
    requests, prompts = [], []
    for number, response in enumerate(_responses(path)):
        where = f"{path}: response {number}"
        if not isinstance(response, dict):
            raise ForeignTrace(f"{where} must be a JSON object, not {type(response).__name__}")
        inner = response.get("meta_info") or response.get("sglext") or {}
        payload = inner.get("routed_experts") if isinstance(inner, dict) else None
        if not isinstance(payload, str):
            raise ForeignTrace(f'{where} must have base64 in "meta_info" or "sglext", '
                               '"routed_experts"; ask for return_routed_experts')
        try:
            raw = base64.b64decode(payload, validate=True)
        except binascii.Error as error:
            raise TornTrace(f"{where}: routed_experts must be base64: {error}") from error
        row = 4 * n_layers * top_k
        if not raw or len(raw) % row:
            raise ForeignTrace(f"{where}: routed_experts must be tokens of {n_layers} layers x "
                               f"{top_k} int32, {row} bytes each, not {len(raw)} bytes")
        requests.append(np.frombuffer(raw, "<i4").reshape(-1, n_layers, top_k))
        prompt = inner.get("prompt_tokens") or (response.get("usage") or {}).get("prompt_tokens")
        prompts.append(prompt if isinstance(prompt, int) else 1)
    return trace_of(requests, prompts, n_experts=n_experts, model=model,
                    source=f"SGLang, {os.fspath(path)}")


def _responses(path: str | os.PathLike[str]) -> list[Any]:
    text = read_text(path)
    try:
        whole = json.loads(text)
        return whole if isinstance(whole, list) else [whole]
    except json.JSONDecodeError as whole_error:
        found = []
        for number, line in enumerate(text.splitlines(), 1):
            try:
                if line.strip():
                    found.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise TornTrace(f"{path} line {number} must be whole JSON: {error}") from error
        if not found:
            raise TornTrace(f"{path} must be JSON or JSON lines: {whole_error}") from whole_error
        return found
