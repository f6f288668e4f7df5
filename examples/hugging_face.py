"""A transformers model whose experts run on the device, and then its routers, too.

    python examples/hugging_face.py

The model is a Mixtral of random weights, made here. With a checkpoint it is
``AutoModelForCausalLM.from_pretrained(path, experts_implementation="moeaccel")``.
"""

import sys

import torch
from transformers import AutoModelForCausalLM, MixtralConfig

import moeaccel.host.transformers_plugin as plugin  # registers "moeaccel"
from moeaccel.host import open_device


def main(spec: str = "golden") -> None:
    """Generate a few tokens, and say how far the logits are from float's."""
    torch.manual_seed(3)
    config = MixtralConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2)
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager").eval()
    prompt = torch.tensor([[1, 2, 3]])
    with open_device(spec, config="small") as device, torch.no_grad():
        exact = model(prompt).logits
        plugin.use_device(device, weight_format="mxint8")
        model.set_experts_implementation("moeaccel")
        layers = plugin.check_model(model)
        logits = model(prompt).logits
        tokens = model.generate(prompt, max_new_tokens=4, do_sample=False, pad_token_id=0)
        error = ((logits - exact).norm() / exact.norm()).item()
        print(f"{layers} layers on {spec}, logits off by {error:.2%}, tokens {tokens[0].tolist()}, "
              f"{device.counters()['commands']} commands")
        plugin.release(model)
        plugin.use_device(device, weight_format="mxint8", route=True)
        routed = [block.path for block in plugin.routing(model) if block.on_device]
        error = ((model(prompt).logits - logits).norm() / logits.norm()).item()
        print(f"routed on the device: {', '.join(routed)}; logits differ by {error:.4%}")
        plugin.release(model)
        plugin.use_device(None)


if __name__ == "__main__":
    main(*sys.argv[1:])
