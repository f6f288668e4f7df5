"""Arrays of routed experts, as vLLM and TensorRT-LLM return them."""

from __future__ import annotations

import os
import zipfile

import numpy as np

from moeaccel.host.traces.errors import ForeignTrace, TornTrace
from moeaccel.host.traces.importers.dense import trace_of
from moeaccel.host.traces.trace import RoutingTrace

__all__ = ["import_routed_experts"]


def import_routed_experts(path: str | os.PathLike[str], *, n_experts: int,
                          model: str = "unknown") -> RoutingTrace:
    """Read a ``.npy`` or ``.npz`` of routed experts.

    vLLM with ``--enable-return-routed-experts`` gives ``routed_experts``, int16
    (tokens, layers, top_k), and, since 0.21, ``prompt_routed_experts`` of the same shape beside it
    (https://docs.vllm.ai/en/v0.21.0/training/routed_experts_replay/). Both have no file format:
    save them with :func:`numpy.save` or :func:`numpy.savez`.

    An array of three dimensions is a request, one of four is a batch of requests, and tokens that
    are -1 throughout are padding. In a ``.npz`` these two names are prompt and answer of one
    request, and every other array is a request or a batch by itself. The -1 padding of TensorRT-LLM
    is read as a batch; this was written from its description, not tried on an array that it made.

    Parameters
    ----------
    path : path
    n_experts : :class:`int`
        Routed experts of a layer, which the arrays do not tell.
    model : :class:`str`

    Raises
    ------
    TornTrace
        If the file cannot be read as arrays without objects.
    ForeignTrace
        If its arrays are something else.
    """
    try:
        with open(path, "rb") as file:
            found = np.load(file, allow_pickle=False)
            arrays = ({"routed_experts": found} if isinstance(found, np.ndarray)
                      else {name: found[name] for name in found.files})
    except OSError as error:
        raise TornTrace(f"{path} must be a file that can be read: {error}") from error
    except (ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        # Of what is no array NumPy says how it would be unpickled.
        raise TornTrace(f"{path} must be a whole .npy or .npz without objects, but it is cut off, "
                        "damaged or of another kind") from error
    for name, array in arrays.items():
        if array.ndim not in (3, 4) or array.dtype.kind not in "iu":
            raise ForeignTrace(f"{path}: array {name!r} must be integers (tokens, layers, top_k), "
                               f"or with requests in front, not {array.dtype.name} {array.shape}")
    prompt, answer = arrays.pop("prompt_routed_experts", None), arrays.get("routed_experts")
    prompts: list[int] = []
    requests: list[np.ndarray] = []
    if prompt is not None and answer is not None:
        if prompt.ndim != 3 or answer.ndim != 3 or prompt.shape[1:] != answer.shape[1:]:
            raise ForeignTrace(f"{path}: prompt_routed_experts and routed_experts must both be "
                               "(tokens, layers, top_k) of one model, not "
                               f"{prompt.shape} and {answer.shape}")
        requests.append(np.concatenate([prompt, answer]))
        prompts.append(len(prompt))
        del arrays["routed_experts"]
    elif prompt is not None:
        arrays["prompt_routed_experts"] = prompt
    for array in arrays.values():
        requests.extend(array[None] if array.ndim == 3 else array)
    prompts += [1] * (len(requests) - len(prompts))
    return trace_of([ids.astype(np.int64) for ids in requests], prompts, n_experts=n_experts,
                    model=model, source=f"routed experts, {os.fspath(path)}")
