"""A trained model whose tokens the device routes."""

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import moeaccel.host.transformers_plugin as plugin
from moeaccel.config import preset
from moeaccel.host import open_device
from moeaccel.host.demo import CHECKPOINT
from moeaccel.host.demo.routing import run_routed
from moeaccel.host.demo.run import demo_prompts, generate
from moeaccel.host.errors import InvalidOption, LimitExceeded

CONFIG = preset("tiny").replace(name="tiny with a router", router=("softmax",))


def test_routes_of_the_device_are_those_of_the_host():
    prompts, _ = demo_prompts(4)
    result = run_routed(prompts, device="golden", config=CONFIG)
    assert result.device_answers == result.host_answers
    assert all(result.host_answers) and len(result.host_answers) == len(prompts)
    assert result.tokens > 3 * len(prompts)  # of three layers, each token of prompts and answers
    assert result.differences == 0
    assert 0 < result.weight_error < 2.0**-15


def test_whole_blocks_of_the_device_answer_as_by_the_routes_of_the_host():
    prompts, right = demo_prompts(2)
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, experts_implementation="moeaccel")
    found = {}
    with open_device("golden", config=CONFIG) as device:
        for route in (False, True):
            plugin.use_device(device, weight_format="mxint8", route=route)
            assert [block.on_device for block in plugin.routing(model)] == [route] * 3
            found[route] = generate(model, tokenizer, prompts)
        plugin.release()
        plugin.use_device(None)
    assert found[True][0] == found[False][0] == right
    error = (found[True][1] - found[False][1]).norm() / found[False][1].norm()
    assert 0 < error < 1e-4  # the weights are the device's


def test_routes_matter(monkeypatch):
    """Other weights than the host's are seen, in the figures and in the text."""
    from moeaccel.host.routing import Router

    right = Router.__init__
    monkeypatch.setattr(Router, "__init__", lambda self, **given: right(
        self, **given | {"renormalize": "none", "scale": 0.25}))
    prompts, _ = demo_prompts(4)
    result = run_routed(prompts, device="golden", config=CONFIG)
    assert result.weight_error > 0.5 and result.device_answers != result.host_answers


def test_what_is_refused():
    with pytest.raises(LimitExceeded, match="there is no router in config 'tiny'"):
        run_routed(["27+85="], device="golden", config="tiny")
    with pytest.raises(InvalidOption, match="prompt must be made of digits"):
        run_routed(["What?"], device="golden", config=CONFIG)
