"""What of vLLM's plug-in does not need vLLM."""

import importlib.metadata
import tomllib
from pathlib import Path

import numpy as np
import torch

import moeaccel.host.transformers_plugin as plugin
from moeaccel.host import open_device
from moeaccel.host.plugins import vllm
from tests.support.device import draw_call, draw_weights

PROJECT = Path(__file__).parents[3] / "pyproject.toml"


def test_the_entry_point_names_what_there_is():
    points = tomllib.loads(PROJECT.read_text())["project"]["entry-points"]["vllm.general_plugins"]
    assert importlib.metadata.EntryPoint("moeaccel", points["moeaccel"], "").load() is vllm.register


def test_without_vllm_it_says_so(caplog):
    vllm.register()
    assert "must have the hooks" in caplog.text and "'moeaccel' is not there" in caplog.text


def test_a_layer_as_vllm_holds_it():
    rng = np.random.default_rng(0)
    gate_up, down = (torch.from_numpy(weights).bfloat16() for weights in draw_weights(rng))
    x, ids, weights = (torch.from_numpy(value) for value in draw_call(rng, 3))
    with open_device("golden", config="tiny", memory_bytes=1 << 22) as device:
        plugin.use_device(device)
        loaded = vllm.load(gate_up, down, layers=1)
        y = vllm.compute(loaded, x.bfloat16(), weights, ids.int())
        expected = device.load_experts(gate_up, down)(x.bfloat16(), ids, weights)
        plugin.use_device(None)
    assert y.dtype is torch.bfloat16 and torch.equal(y, expected)
