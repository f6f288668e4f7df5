"""What the number formats cost in answers: the demo model on the device, which is bit-equal to the
golden model (tests/system), against float."""

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from moeaccel.host import open_device
from moeaccel.host.demo import CHECKPOINT
from moeaccel.host.demo.evaluate import accuracy
from moeaccel.host.transformers_plugin import release, use_device

PROMPTS_PER_TASK = 250


def mean(result):
    return 100 * sum(result.values()) / len(result)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("weight_format", "points"), [("mxint8", 1.0), ("int4_g32", 3.0)])
def test_accuracy_on_the_device_is_near_float(weight_format, points):
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    plain = AutoModelForCausalLM.from_pretrained(CHECKPOINT)
    expected = accuracy(plain, tokenizer, prompts_per_task=PROMPTS_PER_TASK, seed=7)
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, experts_implementation="moeaccel")
    with open_device("golden", config="wide512") as device:
        use_device(device, weight_format=weight_format, activation_bits=16)
        try:
            found = accuracy(model, tokenizer, prompts_per_task=PROMPTS_PER_TASK, seed=7)
        finally:
            release(model)
            use_device(None)
    assert abs(mean(found) - mean(expected)) <= points, (found, expected)
    assert all(100 * abs(found[task] - expected[task]) <= points + 1 for task in expected)
