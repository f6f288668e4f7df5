"""Modes of a router through the driver, on golden devices."""

import numpy as np
import pytest

from moeaccel.config import preset
from moeaccel.golden.router import route
from moeaccel.host import Router, open_device
from moeaccel.host.errors import LimitExceeded
from moeaccel.router.choices import MODES
from moeaccel.router.descriptor import descriptor, settings_of, table_bytes
from moeaccel.router.settings import RouterError, RouterSettings

PLAIN = preset("tiny").replace(router=("softmax", "sigmoid"), router_top_k=8)
SETTINGS = {"threshold": 0.25, "top_p": 0.75, "prior": 1.5, "prior_keep": 1, "capacity": 4,
            "mixer": 0.125}


@pytest.fixture(scope="module")
def device():
    config = PLAIN.replace(router_modes=MODES)
    with open_device("golden", config=config, memory_bytes=1 << 26) as device:
        yield device


@pytest.mark.parametrize("name", SETTINGS)
def test_a_mode_that_is_not_there_is_named(name):
    mode = "prior" if name == "prior_keep" else name
    config = PLAIN.replace(router_modes=tuple(m for m in MODES if m != mode))
    router = Router(experts=8, top_k=2, **{name: SETTINGS[name]})
    logits = np.zeros((3, 8), np.float32)
    with open_device("golden", config=config, memory_bytes=1 << 22) as device:
        device.route(Router(experts=8, top_k=2), logits)
        with pytest.raises(LimitExceeded, match=f"{name} must be .* without {mode!r} in router_mo"):
            device.route(router, logits)


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_survive_the_descriptor(name):
    settings = RouterSettings(experts=8, top_k=2, **{name: SETTINGS[name]})
    fields = descriptor(settings, biased=False, tables=False, residents=True, table_address=64)
    assert settings_of(fields, 2) == settings


def test_residents_lie_behind_the_table():
    words, resident = np.ones((10, 2), np.int32), np.arange(10) % 3 == 0
    assert table_bytes(None, None).size == 0
    assert table_bytes(words, None).size == 128
    both = table_bytes(words, resident)
    assert (both[:80].view("<i4") == 1).all() and not both[80:128].any()
    assert both[128:].tolist() == [0b01001001, 0b10, *[0] * 62]
    assert table_bytes(None, resident).tolist() == both[128:].tolist()


@pytest.mark.parametrize("bias", [False, True])
def test_residents_are_preferred(device, bias):
    rng = np.random.default_rng(3)
    logits = rng.standard_normal((20, 16)).astype(np.float32)
    router = Router(experts=16, top_k=4, prior=0.5, prior_keep=1,
                    selection_bias=rng.standard_normal(16) * 0.1 if bias else None)
    resident = rng.random(16) < 0.4
    for mask in (resident, None):  # without any, the prior is for nobody
        ids, weights = device.route(router, logits, resident=mask)
        want = route(logits, router.settings, selection_bias=router.selection_bias, resident=mask)
        assert (ids == want.ids).all() and (weights == want.weights).all()


def test_a_capacity_is_one_of_all_tokens_of_a_call(device):
    logits = np.zeros((device.config.max_tokens + 1, 8), np.float32)
    router = Router(experts=8, top_k=1, capacity=5)
    ids, _ = device.route(router, logits[1:])
    assert ids[:, 0].tolist() == [0] * 5 + [-1] * (len(logits) - 6)
    with pytest.raises(LimitExceeded, match="tokens must be at most 64, those of one command, with "
                                            "a capacity, not 65; split the call"):
        device.route(router, logits)
    weights = np.ones((8, 64), np.float32)
    experts = np.ones((8, 128, 64), np.float32), np.ones((8, 64, 64), np.float32)
    with device.load_moe(Router(weights, top_k=1, capacity=5), *experts) as moe, pytest.raises(
            LimitExceeded, match="tokens must be at most 64, those of one command"):
        moe.route(np.ones((65, 64), np.float32))
    with pytest.raises(LimitExceeded, match=r"prior must be 0, not 1\.5: a layer has no residents"):
        device.load_moe(Router(weights, top_k=1, prior=1.5), *experts)


def test_a_sparsemixer_looks_at_logits_only(device):
    with pytest.raises(RouterError, match="selection_bias must be None with mixer"):
        Router(experts=8, top_k=2, mixer=0.02, selection_bias=np.zeros(8, np.float32))
    with pytest.raises(RouterError, match="resident must be None with mixer"):
        device.route(Router(experts=8, top_k=2, mixer=0.02), np.zeros((1, 8), np.float32),
                     resident=np.ones(8, bool))


def test_a_sparsemixer_has_no_capacity():
    with pytest.raises(RouterError, match="capacity must be None with mixer, not 3"):
        RouterSettings(experts=8, top_k=2, mixer=0.02, capacity=3)
