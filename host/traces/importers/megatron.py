"""Router traces of Megatron-Core."""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np

from moeaccel.host.traces.errors import ForeignTrace, InvalidTrace, TornTrace
from moeaccel.host.traces.files import read_text
from moeaccel.host.traces.trace import RoutingTrace

__all__ = ["import_megatron"]


def import_megatron(path: str | os.PathLike[str], *, n_experts: int,
                    model: str = "unknown") -> RoutingTrace:
    """Read the JSON lines of ``--moe-routing-trace-path``, of one rank or several joined.

    One record a step, block and layer: ``{"step": 0, "stage": "pre_dispatch", "block": "decoder",
    "layer": 3, "rank": 0, "num_tokens": 128, "topk": 22, "top_indices": [[12, 45, ...], ...]}``
    (https://docs.nvidia.com/megatron-core/developer-guide/nightly/apidocs/core/
    core.transformer.moe.router_trace.html, from which this was written). Records of other blocks
    than the decoder and of multi-token prediction (``mtp_idx``) are left out, and so are the
    sidecar files of logits.

    Records do not say which tokens belong to one request. So the tokens of a rank in a step become
    one request, all computed in that step: popularity, balance and the layers of a token are right,
    reuse from token to token is that of neighbours in the batch.

    Parameters
    ----------
    path : path
    n_experts : :class:`int`
        Routed experts of a layer.
    model : :class:`str`

    Raises
    ------
    TornTrace
        If a line is cut off, or a record of a layer is missing.
    ForeignTrace
        If records are something else.
    """
    batches: dict[tuple[int, int], dict[int, np.ndarray]] = {}
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise TornTrace(f"{where} must be whole JSON: {error}") from error
        if (isinstance(record, dict) and record.get("block", "decoder") == "decoder"
                and "mtp_idx" not in record):
            key, layer, ids = _routes(where, record)
            if layer in batches.setdefault(key, {}):
                raise ForeignTrace(f"{where} must be the only record of step {key[0]}, rank "
                                   f"{key[1]}, layer {layer}; keep one stage")
            batches[key][layer] = ids
    if not batches:
        raise ForeignTrace(f"{path} must hold records of block \"decoder\", but has none")
    layers = sorted(set().union(*batches.values()))
    parts = []
    for (step, rank), found in sorted(batches.items()):
        shapes = {ids.shape for ids in found.values()}
        if sorted(found) != layers or len(shapes) != 1:
            raise TornTrace(f"{path}: step {step} of rank {rank} must have layers {layers} with "
                            f"the same tokens and top-k, not {sorted(found)} of {sorted(shapes)}")
        parts.append(np.stack([found[layer] for layer in layers], axis=1))
    counts = [len(part) for part in parts]
    try:
        return RoutingTrace(
            ids=np.concatenate(parts), request=np.repeat(np.arange(len(parts)), counts),
            position=np.concatenate([np.arange(count) for count in counts]),
            step=np.repeat([step for step, _ in sorted(batches)], counts), n_experts=n_experts,
            layers=tuple(layers), model=model, source=f"Megatron-Core, {os.fspath(path)}")
    except (InvalidTrace, ValueError) as error:
        raise ForeignTrace(f"{path} must hold the routes of a model with {n_experts} experts, "
                           f"but: {error}") from error


def _routes(where: str, record: dict[str, Any]) -> tuple[tuple[int, int], int, np.ndarray]:
    try:
        key = int(record["step"]), int(record.get("rank", 0))
        ids = np.array(record["top_indices"], np.int64)
        expected = int(record["num_tokens"]), int(record["topk"])
        layer = int(record["layer"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ForeignTrace(f"{where} must have step, layer, num_tokens, topk and top_indices: "
                           f"{error!r}") from error
    if ids.shape != expected:
        raise TornTrace(f"{where}: top_indices must be {expected}, as num_tokens and topk say, not "
                        f"{ids.shape}")
    return key, layer, ids
