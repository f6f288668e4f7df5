"""Verdicts on the golden device; tests/system has the RTL."""

from dataclasses import replace

import numpy as np
import pytest

from moeaccel.config import PRESETS, preset
from moeaccel.host import Router, open_device
from moeaccel.host.moe import Moe
from moeaccel.host.zoo import verify as verifying
from moeaccel.host.zoo.support import Supports, equipped, largest
from moeaccel.host.zoo.true_size import TrueSizes
from moeaccel.host.zoo.verify import MEMORY_BYTES, verify
from moeaccel.zoo import model, models
from moeaccel.zoo.schema import ExpertKind


@pytest.fixture(scope="module")
def golden():
    with open_device("golden", config=equipped("small"), memory_bytes=MEMORY_BYTES) as device:
        yield device


@pytest.mark.parametrize("key", [
    "deepseek-v2", "phi-3.5-moe", "longcat-flash", "llama-4-scout", "gemma-4-26b-a4b",
    "switch-base-128", "nemotron-3-nano-30b-a3b", "glm-5.3-flash", "kolibri-1", "gpt-oss-20b",
    "nllb-moe-54b", "minimax-m3", "swin-moe-s-32e"])
def test_models_of_every_kind(golden, key):
    verdict = verify(model(key), golden, golden)
    assert verdict.selection_differences == 0
    assert 0 < verdict.relative_error < 1e-4
    assert verdict.reason == ""
    assert verdict.ok


def test_a_router_without_modes():
    config = equipped("small").replace(router_modes=())
    with open_device("golden", config=config, memory_bytes=MEMORY_BYTES) as golden:
        for key, mode in (("phi-3.5-moe", "mixer"), ("switch-base-128", "capacity")):
            verdict = verify(model(key), golden, golden)
            assert f"{mode} must be None without {mode!r} in router_modes" in verdict.reason
            assert verdict.selection_differences == 0 and not verdict.ok


def test_a_device_without_a_router():
    config = preset("small").replace(router=())
    with open_device("golden", config=config, memory_bytes=MEMORY_BYTES) as golden:
        verdict = verify(model("mixtral-8x7b"), golden, golden)
    assert verdict.reason.startswith("router: R1: there is no router in config 'small'")
    assert verdict.selection_differences == 0 and not verdict.ok


def test_other_routes_of_a_device_are_seen(golden, monkeypatch):
    right = type(golden).route

    def route(device, router, logits):
        ids, weights = right(device, router, logits)
        weights[2, 0] = np.nextafter(weights[2, 0], np.float32(1))
        return ids, weights

    monkeypatch.setattr(type(golden), "route", route)
    assert "router: the RTL routes 1 of 16 tokens otherwise than the golden model" in verify(
        model("yuan2-m32"), golden, golden).reason  # whose logits are the host's


def test_what_an_expert_lacks_is_named(golden):
    verdict = verify(model("muse-spark-816b-a42b"), golden, golden)
    assert not verdict.ok and verdict.relative_error is None
    assert "experts: silu, norm: experts must be what load_experts has arguments for" in (
        verdict.reason)
    assert verify(model("inkling"), golden, golden).ok  # with the gates of its sinks
    doge = verify(model("doge"), golden, golden).reason
    assert "R12d looks experts up by product keys" in doge
    assert "experts: silu embedding: activation must be one of" in doge


def with_expert(m, **changes):
    return replace(m, expert=replace(m.expert, **changes))


@pytest.mark.parametrize(("key", "changes"), [
    ("gemma-4-26b-a4b", {"activation": "gelu"}), ("glm-5.3-flash", {"limit": None}),
    ("mixtral-8x7b", {"activation": "gelu_tanh"})])
def test_any_other_expert_is_seen(golden, monkeypatch, key, changes):
    """A device that computes something near what it should."""
    right = verifying.expert_options
    monkeypatch.setattr(verifying, "expert_options",
                        lambda kind: right(replace(kind, **changes)))
    verdict = verify(model(key), golden, golden)
    assert verdict.relative_error > 1e-4
    assert "layer: relative error must be at most 0.0001" in verdict.reason


def test_any_other_router_is_seen(golden, monkeypatch):
    monkeypatch.setattr(verifying, "Router", lambda **given: Router(
        **given | {"keep_groups": 4}))
    verdict = verify(model("deepseek-v2"), golden, golden)
    assert verdict.selection_differences > 0
    assert "tokens are routed otherwise than by the float router, and not for a tie" in (
        verdict.reason)


def test_other_bits_are_seen(golden, monkeypatch):
    right, calls = Moe.__call__, []

    def run(moe, x):
        y = right(moe, x)
        calls.append(y)
        y[3, 5] = np.nextafter(y[3, 5], np.float32(np.inf)) if len(calls) == 2 else y[3, 5]
        return y

    monkeypatch.setattr(Moe, "__call__", run)
    assert verify(model("mixtral-8x7b"), golden, golden).reason == (
        "layer: 1 elements of y differ between golden model and RTL")


def test_support_is_asked_of_the_driver():
    with Supports() as supports:
        found = {m.key: supports(m) for m in models().values()}
        own = replace(model("mixtral-8x7b"), expert=ExpertKind(d_expert=1, activation="swish"))
        assert "experts: swish: activation must be one of silu" in supports(own).experts
        wide = with_expert(model("mixtral-8x7b"), d_expert=1 << 20)
        assert supports(wide).experts == "experts: dimensions must be at most 32768, not 1048576"
    assert found["olmoe-1b-7b"].experts == "" and found["grok-1"].experts == ""
    assert found["muse-spark-816b-a42b"].runs == "no"
    assert found["olmoe-1b-7b"].runs == found["deepseek-v3-r1"].runs == "yes"
    assert "R12d looks experts up by product keys" in found["doge"].reason


def test_true_sizes():
    with TrueSizes("small", device="golden") as sizes:
        for m in (model("mixtral-8x7b"), model("gpt-oss-20b"), model("nllb-moe-54b")):
            little = replace(with_expert(m, d_expert=96), d_model=160)
            verdict = sizes.added(verify_of(little), little)
            assert verdict.ok and 0 < verdict.relative_error < 1e-4
        unknown = sizes.added(verify_of(m), model("aria"))
        assert unknown.reason == "experts: their size is not published" and not unknown.ok
    assert largest("wide512", 18304).max_dim == 32768
    assert largest("wide512", 16384) is PRESETS["wide512"]


def verify_of(m):
    return verifying.Verdict(m.key, True, m.router.text, m.expert.text, 0, 1e-6, "")
