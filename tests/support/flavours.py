"""Every class of experts that transformers decorates, as small instances."""

import importlib
import inspect
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedConfig

from moeaccel.formats import quantise

_SMALL = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size"), 96),
    "hidden_size": 64, "moe_latent_size": None,
}


def modelling(name):
    """Return transformers' module of a model."""
    return importlib.import_module(f"transformers.models.{name}.modeling_{name}")


def decorated(module):
    """Return the classes of experts in a module of transformers."""
    return [value for value in vars(module).values()
            if inspect.isclass(value) and value.__module__ == module.__name__
            and "_apply_gate" in vars(value) and hasattr(value.forward, "__wrapped__")]


def every_class():
    """Return all of them; imports all of their models."""
    folder = Path(transformers.__file__).parent / "models"
    return [cls for path in sorted(folder.glob("*/modeling_*.py"))
            if "use_experts_implementation" in path.read_text(encoding="utf-8")
            for cls in decorated(modelling(path.parent.name))]


def small(cls, implementation="moeaccel"):
    """Return an experts module of a class: small, but for all else as its model has it by default.

    Its weights are random, and large enough for limits to be reached.
    """
    generator = torch.Generator().manual_seed(0)
    module = _built(cls, implementation)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module


def block_classes():
    """Return the classes of all modules that have such experts; imports all of their models."""
    found = []
    for module in dict.fromkeys(inspect.getmodule(cls) for cls in every_class()):
        names = [cls.__name__ for cls in decorated(module)]
        found += [cls for cls in vars(module).values()
                  if inspect.isclass(cls) and cls.__module__ == module.__name__
                  and issubclass(cls, torch.nn.Module) and "__init__" in vars(cls)
                  and any(f"= {name}(" in inspect.getsource(cls.__init__) for name in names)]
    return found


def small_block(cls):
    """Return such a module, of a first layer; what it has beside the experts is not drawn."""
    return _built(cls, "moeaccel", num_experts_per_tok=2, n_group=1, topk_group=1,
                  moe_shared_expert_intermediate_size=64, shared_intermediate_size=64)


def small_config(kind, implementation="moeaccel", **more):
    """Return a configuration of a small model."""
    config = kind()
    for name, value in (_SMALL | more).items():
        if hasattr(config, name) and not isinstance(getattr(config, name), list):
            setattr(config, name, value)
    config._experts_implementation = implementation
    return config


def _built(cls, implementation, **settings):
    given = {"intermediate_size": 96, "layer_idx": 0}
    more = {name: value for name, value in given.items()
            if name in inspect.signature(cls).parameters}
    for kind in _configs(cls):
        try:
            return cls(small_config(kind, implementation, **settings), **more).eval()
        except (AttributeError, RuntimeError, TypeError):  # of another part of the model
            continue
    raise LookupError(f"{cls.__name__} must take a configuration of its model")


def _configs(cls):
    """Return the configurations that a class may take; that of its signature first."""
    named = inspect.signature(cls).parameters["config"].annotation
    found = [value for value in vars(inspect.getmodule(cls)).values()
             if inspect.isclass(value) and issubclass(value, PreTrainedConfig)
             and value is not PreTrainedConfig]
    return [named] * (named in found) + found


@torch.no_grad()
def quantised(module, name="mxint8"):
    """Replace a module's weights and biases by what a format makes of them; return the module."""
    for parameter in module.parameters():
        if parameter.dim() == 2:  # biases
            parameter.copy_(parameter.bfloat16())
            continue
        for matrix in parameter:
            rows = matrix.T if module.is_transposed else matrix
            rows.copy_(torch.from_numpy(quantise(rows.numpy().copy(), name).dequantise()))
    return module
