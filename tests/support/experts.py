"""Experts modules of transformers, alone, set to use the device."""

import torch
import transformers
from transformers.integrations.finegrained_fp8 import FP8Experts, FP8ExpertsInterface
from transformers.integrations.moe import use_experts_implementation

CALL = torch.randn(6, 64, generator=torch.Generator().manual_seed(1)), torch.tensor(
    [[0, 1], [2, 3], [1, 1], [0, 3], [4, 9], [3, 2]]), torch.full((6, 2), 0.5)
"""x, ids and weights for :func:`toy`."""


def toy(transform=lambda module: None, **flags):
    """Return an experts module with the decorator's flags; its own code returns twice x."""
    @use_experts_implementation(**flags)
    class ToyExperts(torch.nn.Module):
        def __init__(self, config):
            super().__init__()
            generator = torch.Generator().manual_seed(0)
            self.num_experts = 4
            gate_up = torch.randn(4, 192, 64, generator=generator) / 8
            down = torch.randn(4, 64, 96, generator=generator) / 8
            self.act_fn = torch.nn.SiLU()
            gated = flags.get("has_gate", True)
            if not gated:
                gate_up = gate_up[:, :96]
            self.plain = gate_up, down
            if flags.get("has_bias"):
                self.biases = {"gate_up_bias": torch.randn(gate_up.shape[:2], generator=generator),
                               "down_bias": torch.randn(down.shape[:2], generator=generator)}
                bias = self.biases["gate_up_bias"]
                if gated and not flags.get("is_concatenated", True):
                    bias = bias.reshape(4, 2, 96).mT.reshape(4, 192)
                setattr(self, "gate_up_proj_bias" if gated else "up_proj_bias",
                        torch.nn.Parameter(bias.clone()))
                self.down_proj_bias = torch.nn.Parameter(self.biases["down_bias"].clone())
            if gated and not flags.get("is_concatenated", True):
                gate_up = gate_up.reshape(4, 2, 96, 64).transpose(1, 2).reshape(4, 192, 64)
            if flags.get("is_transposed"):
                gate_up, down = gate_up.mT.contiguous(), down.mT.contiguous()
            first = "gate_up_proj" if gated else "up_proj"
            setattr(self, first, torch.nn.Parameter(gate_up.clone()))
            self.down_proj = torch.nn.Parameter(down.clone())
            transform(self)

        def forward(self, hidden_states, top_k_index, top_k_weights):
            return 2 * hidden_states

    config = transformers.MixtralConfig()
    config._experts_implementation = "moeaccel"
    return ToyExperts(config).eval()


def limited(limit):
    """Return an experts module of the same weights with a clamped gate."""
    def apply_gate(self, rows):
        gate, up = rows.chunk(2, dim=-1)
        return self.act_fn(gate.clamp(max=self.limit)) * up.clamp(-self.limit, self.limit)

    module = toy(lambda m: setattr(type(m), "_apply_gate", apply_gate))
    module.limit = limit
    return module


def fp8(block=(128, 128), *, gated=True, **config):
    """Return an experts module with FP8 weights, 4 experts of 256 by 128."""
    full = transformers.Qwen3MoeConfig(
        hidden_size=256, moe_intermediate_size=128, num_experts=4, **config)
    full._experts_implementation = "moeaccel"
    module = use_experts_implementation(
        type("FP8Experts", (FP8Experts,), {}), experts_interface=FP8ExpertsInterface(),
        has_gate=gated)(full, block_size=block, has_gate=gated)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name in ("gate_up_proj" if gated else "up_proj", "down_proj"):
            weight, scale = getattr(module, name), getattr(module, f"{name}_scale_inv")
            weight.copy_((torch.randn(weight.shape, generator=generator) * 100).to(weight.dtype))
            scale.copy_(torch.rand(scale.shape, generator=generator) / 1000)
    return module.eval()


def relative(found, expected):
    """Return the relative error."""
    return float((found - expected).norm() / expected.norm())
