"""Small transformers models of every class with experts that the plug-in supports."""

import torch
import transformers
from transformers import AutoModelForCausalLM

BASE = {
    "vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "intermediate_size": 96,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}
FOUR = {"num_local_experts": 4, "num_experts_per_tok": 2}
EIGHT = {"num_experts": 8, "num_experts_per_tok": 2}
ROUTED = {
    "moe_intermediate_size": 32, "n_routed_experts": 8, "num_experts_per_tok": 2,
    "n_shared_experts": 1, "first_k_dense_replace": 1, "topk_group": 1,
}
LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16, "v_head_dim": 16,
}

MODELS = {  # name -> layers with experts, configuration
    "Olmoe": (2, EIGHT),
    "Mixtral": (2, FOUR),
    "Qwen3Moe": (2, EIGHT | {"moe_intermediate_size": 96, "head_dim": 16}),
    "DeepseekV3": (1, ROUTED | LATENT | {"n_group": 2}),
    "Phimoe": (2, FOUR),
    "GraniteMoe": (2, FOUR),
    "Glm4Moe": (1, ROUTED | {"n_group": 1, "head_dim": 16}),
}

NARROW = EIGHT | {"moe_intermediate_size": 32, "head_dim": 16}

BLOCKS = {  # more models whose whole blocks the device has
    "Qwen2Moe": (2, NARROW | {"shared_expert_intermediate_size": 64}),
    "DeepseekV2": (1, ROUTED | LATENT | {
        "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3,
        "topk_method": "group_limited_greedy", "routed_scaling_factor": 1.5}),
    "GptOss": (2, FOUR | {"head_dim": 16}),
    "Ernie4_5_Moe": (1, {"moe_num_experts": 8, "moe_k": 2, "moe_intermediate_size": 32,
                         "moe_num_shared_experts": 1, "head_dim": 16}),
}


def config_of(name, **more):
    text = "Text" if name == "Llama4" else ""
    return getattr(transformers, f"{name}{text}Config")(**(BASE | more))


def make(config, implementation="eager"):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, experts_implementation=implementation).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.1)
    return model
