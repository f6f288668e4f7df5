"""A layer of experts in the shape of kt-kernel's MoE wrapper, which SGLang and others call by
hooks.

An engine computes some experts itself and hands the rest to a wrapper: it loads the weights, from
tensors or from ``weight_path``, then for each layer calls ``submit_forward``, computes its own
part, and calls ``sync_forward``. Ids of -1, and those of experts that the engine has, are skipped.
Up to ``max_deferred_experts_per_token``
experts of a token, those of the smallest weights, may be computed while the engine is at the next
layer: their part is added to that layer's result. So results change (it is lossy), and the last
layer of a model defers none::

    device = open_device("golden")
    layers = [MoEWrapper(n, 64, 8, 2048, 1024, device=device) for n in range(16)]
    for layer, (gate, up, down) in zip(layers, weights):
        layer.load_weights_from_tensors(gate, up, down)

    def before(n, x, ids, scores):                 # the engine's hook before its own experts
        layers[n].submit_forward(x, ids, scores)

    def behind(n, x, y):                           # and the one behind them
        return y + layers[n].sync_forward(x)

Written after the interface of kt-kernel (kvcache-ai/ktransformers) and driven here by callbacks as
above; not run inside SGLang.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from moeaccel.host.device import Device
from moeaccel.host.errors import HandleConsumed, InvalidOption, InvalidTensor
from moeaccel.host.layers import Experts, Handle
from moeaccel.host.options import whole
from moeaccel.image import Expert

__all__ = ["MoEWrapper"]

_deferred: weakref.WeakKeyDictionary[Device, dict[int, tuple[Experts, Handle]]] = (
    weakref.WeakKeyDictionary())
"""Of each device: by layer, the part that the layer behind it will add."""


class MoEWrapper:
    """The experts of one layer that an engine does not compute.

    Parameters
    ----------
    layer_idx : :class:`int`
        What is deferred goes to the layer with the next number.
    num_experts, num_experts_per_tok, hidden_size, moe_intermediate_size : :class:`int`
    num_gpu_experts : :class:`int`
        The engine computes the first so many.
    max_deferred_experts_per_token : :class:`int`, optional
        0 when left out.
    gpu_experts_mask : bool, (num_experts,), optional
        Which the engine computes, instead of the first.
    device : :class:`Device`
    weight_path : path, optional
        Checkpoint, or file of ``moeaccel import``, that :meth:`load_weights` reads; layers are
        numbered as there.
    weight_format, activation_bits, activation, grid_exponent
        As in :meth:`Device.load_experts`.
    **engine
        What the wrapper of kt-kernel needs for threads and files; not used.

    Raises
    ------
    InvalidOption
        For sizes out of range.
    """

    def __init__(self, layer_idx: int, num_experts: int, num_experts_per_tok: int,
                 hidden_size: int, moe_intermediate_size: int, num_gpu_experts: int = 0, *,
                 device: Device, max_deferred_experts_per_token: int | None = None,
                 gpu_experts_mask: torch.Tensor | None = None,
                 weight_path: str | os.PathLike[str] | None = None, weight_format: str = "int4_g32",
                 activation_bits: int = 16, activation: str = "silu",
                 grid_exponent: int | None = None, **engine: Any) -> None:
        del engine
        for name, value in (("num_experts", num_experts), ("hidden_size", hidden_size),
                            ("num_experts_per_tok", num_experts_per_tok),
                            ("moe_intermediate_size", moe_intermediate_size)):
            whole(name, value, least=1)
        whole("num_gpu_experts", num_gpu_experts, least=0, most=num_experts)
        most = max_deferred_experts_per_token or 0
        self.max_deferred_experts_per_token = whole(
            "max_deferred_experts_per_token", most, least=0, most=num_experts_per_tok)
        self.layer_idx, self.num_experts = layer_idx, num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.hidden_size, self.moe_intermediate_size = hidden_size, moe_intermediate_size
        mask = (torch.arange(num_experts) < num_gpu_experts if gpu_experts_mask is None
                else gpu_experts_mask.bool().cpu())
        if mask.shape != (num_experts,):
            raise InvalidOption(f"gpu_experts_mask must have the shape ({num_experts},), not "
                                f"{tuple(mask.shape)}")
        self.gpu_experts_mask = mask
        self._device = device
        self._weight_path = weight_path
        self._options: dict[str, Any] = {
            "weight_format": weight_format, "activation_bits": activation_bits,
            "activation": activation, "grid_exponent": grid_exponent}
        self._experts: Experts | None = None
        self._map = torch.arange(num_experts)
        self._now: Handle | None = None

    def load_weights_from_tensors(self, gate_proj: torch.Tensor, up_proj: torch.Tensor,
                                  down_proj: torch.Tensor,
                                  physical_to_logical_map_cpu: torch.Tensor | None = None) -> None:
        """Quantise and upload the layer.

        Parameters
        ----------
        gate_proj, up_proj : (num_experts, moe_intermediate_size, hidden_size)
        down_proj : (num_experts, hidden_size, moe_intermediate_size)
        physical_to_logical_map_cpu : integer, (num_experts,), optional
            Entry p says which of these experts has the id p.

        Raises
        ------
        InvalidTensor
            For other shapes.
        """
        wide = self.num_experts, self.moe_intermediate_size, self.hidden_size
        shapes = {"gate_proj": (gate_proj, wide), "up_proj": (up_proj, wide),
                  "down_proj": (down_proj, (wide[0], wide[2], wide[1]))}
        for name, (tensor, shape) in shapes.items():
            if tuple(tensor.shape) != shape:
                raise InvalidTensor(f"{name} must have the shape {shape}, not "
                                    f"{tuple(tensor.shape)}")
        self._reorder(physical_to_logical_map_cpu)
        gate_up = [torch.cat((gate_proj[e], up_proj[e])) for e in range(self.num_experts)]
        self._experts = self._device.load_experts(gate_up, list(down_proj), **self._options)

    def load_weights(self, physical_to_logical_map_cpu: torch.Tensor | None = None) -> None:
        """Upload the layer from ``weight_path``, quantised unless it is a file of ``moeaccel
        import``; the map is that of :meth:`load_weights_from_tensors`.

        Raises
        ------
        InvalidOption, InvalidTensor
            Without a path, and for a layer that is not there or of other sizes.
        CheckpointError
            If the file is damaged or of another kind.
        """
        from moeaccel.host.importers import open_checkpoint, open_quantised
        from moeaccel.host.importers.quantised_file import is_quantised

        if not self._weight_path:
            raise InvalidOption("weight_path must be given for load_weights(); or call "
                                "load_weights_from_tensors()")
        self._reorder(physical_to_logical_map_cpu)
        options = {name: value for name, value in self._options.items() if name != "weight_format"}
        path = Path(self._weight_path)
        wanted = self.num_experts, self.hidden_size, self.moe_intermediate_size
        with contextlib.ExitStack() as stack:
            experts: Sequence[Expert]
            if path.is_file() and is_quantised(path):
                file = stack.enter_context(open_quantised(path))
                self._check_layer(path, {n: (len(layer), layer.summary.d_model,
                                             layer.summary.d_expert)
                                         for n, layer in file.layers.items()}, wanted)
                experts = file.layers[self.layer_idx]
            else:
                checkpoint = stack.enter_context(open_checkpoint(path))
                self._check_layer(path, {n: (layer.num_experts, layer.d_model, layer.d_expert)
                                         for n, layer in checkpoint.layers.items()}, wanted)
                experts = [expert for expert, _ in checkpoint.experts(
                    self.layer_idx, self._options["weight_format"])]
            self._experts = self._device.load_quantised(experts, **options)

    def _check_layer(self, path: Path, layers: dict[int, tuple[int, int, int]],
                     wanted: tuple[int, int, int]) -> None:
        found = layers.get(self.layer_idx)
        if found != wanted:
            raise InvalidTensor(
                f"layer {self.layer_idx} of {path} must have experts, hidden_size and "
                f"moe_intermediate_size {wanted}, not {found or 'be missing'}")

    def _reorder(self, physical_to_logical_map_cpu: torch.Tensor | None) -> None:
        """Take the map of ids to experts."""
        if physical_to_logical_map_cpu is not None:
            order = physical_to_logical_map_cpu.long()
            if order.shape != (self.num_experts,) or order.min() < 0 or (
                    order.max() >= self.num_experts):
                raise InvalidTensor(
                    f"physical_to_logical_map_cpu must be {self.num_experts} numbers below that, "
                    f"not {order.tolist()}")
            self._map = order

    def _loaded(self) -> Experts:
        if self._experts is None:
            raise InvalidOption(f"layer {self.layer_idx} must have weights before it is called; "
                                "call load_weights_from_tensors()")
        return self._experts

    def select_deferred_experts(self, expert_ids: torch.Tensor, expert_scores: torch.Tensor,
                                protected_k: int | None = None
                                ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the ids of now and those of later, -1 elsewhere; None if nothing is deferred.

        Of each token the ``protected_k`` experts of the largest weights are computed now, all but
        ``max_deferred_experts_per_token`` when left out; and so is for every token what is computed
        now for any, since its weights are read then.
        """
        if protected_k is None:
            if not self.max_deferred_experts_per_token:
                return expert_ids, None
            protected_k = self.num_experts_per_tok - self.max_deferred_experts_per_token
        kept = max(0, min(int(protected_k), expert_ids.shape[1]))
        first = expert_ids.gather(1, expert_scores.float().topk(kept, dim=1).indices)
        now = torch.isin(expert_ids, first)
        return torch.where(now, expert_ids, -1), torch.where(now, -1, expert_ids)

    def submit_forward(self, hidden_states: torch.Tensor, topk_ids: torch.Tensor,
                       topk_weights: torch.Tensor, cuda_stream: Any = None) -> None:
        """Begin a layer.

        Parameters
        ----------
        hidden_states : (..., hidden_size)
        topk_ids : integer, (T, K)
        topk_weights : float, (T, K)
        cuda_stream : optional
            On which x is made; waited for, since x is copied by this process.

        Raises
        ------
        HandleConsumed
            If a call of this layer was not taken yet.
        """
        experts = self._loaded()
        if self._now is not None:
            raise HandleConsumed(f"layer {self.layer_idx} must be taken by sync_forward() before "
                                 "it is called again")
        if cuda_stream is not None and torch.cuda.is_available():
            torch.cuda.ExternalStream(int(cuda_stream)).synchronize()
        x = hidden_states.reshape(-1, self.hidden_size)
        ids = topk_ids.long()
        skipped = (ids < 0) | (ids >= self.num_experts)
        skipped |= self.gpu_experts_mask.to(ids.device)[ids.clamp(0, self.num_experts - 1)]
        ids = torch.where(skipped, -1, self._map.to(ids.device)[ids.clamp(0, self.num_experts - 1)])
        now, later = self.select_deferred_experts(ids, topk_weights)
        waiting = _deferred.setdefault(self._device, {})
        waiting.pop(self.layer_idx, None)
        self._now = experts.submit(x, now, topk_weights)
        if later is not None:
            waiting[self.layer_idx] = experts, experts.submit(x, later, topk_weights)

    def sync_forward(self, hidden_states: torch.Tensor, cuda_stream: Any = None) -> torch.Tensor:
        """Return the layer's part, like ``hidden_states``, with what the layer before deferred.

        Raises
        ------
        HandleConsumed
            If nothing was submitted.
        """
        del cuda_stream
        experts, handle = self._loaded(), self._now
        if handle is None:
            raise HandleConsumed(f"layer {self.layer_idx} must be called by submit_forward() "
                                 "before sync_forward()")
        self._now = None
        y = experts.sync(handle)
        before = _deferred.get(self._device, {}).pop(self.layer_idx - 1, None)
        if before is not None:
            y = y + before[0].sync(before[1])
        return y.reshape(hidden_states.shape)

    def forward(self, hidden_states: torch.Tensor, topk_ids: torch.Tensor,
                topk_weights: torch.Tensor, cuda_stream: Any = None) -> torch.Tensor:
        """Return the layer's part; :meth:`submit_forward` and :meth:`sync_forward`."""
        self.submit_forward(hidden_states, topk_ids, topk_weights, cuda_stream)
        return self.sync_forward(hidden_states, cuda_stream)
