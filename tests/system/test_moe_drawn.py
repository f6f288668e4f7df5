"""MOE and ROUTE of drawn sizes and settings, and on machines with two of everything."""

from dataclasses import asdict

import numpy as np
import pytest
import torch

from moeaccel.host import Router, open_device
from moeaccel.sim import MemoryModel
from tests.system.test_moe import SHAPES, SIZE, SLOW, draw, load
from tests.system.test_routing import CONFIG, MODE_SETTINGS, drawn

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

WIDE = CONFIG.replace(name="tiny-router-wide", channels=2, y_banks=2, hidden_banks=2,
                      results_per_cycle=2)
MODES = [{}, {}, {}, *(settings for settings in MODE_SETTINGS.values()
                       if "prior" not in settings)]


def drawn_layer(rng, device, seed):
    """Return a call and its operand, the same on every device: MOE, MOE_ROUTE, or ROUTE."""
    kind = ("moe", "moe", "route", "logits")[seed % 4]
    experts = int(rng.choice([4, 7, 16, 33, 40, 64]))
    tokens = int(rng.choice([1, 1, 2, 5, 20, 33]))
    modes = MODES[int(rng.integers(len(MODES)))]
    router = drawn(rng, experts, **modes)
    if kind == "logits":
        return (lambda logits: np.hstack([part.astype(np.float32) for part in device.route(
            router, logits)])), rng.standard_normal((tokens, experts)).astype(np.float32), None
    d_model, d_expert = (int(32 * rng.integers(1, most)) for most in (5, 4))
    settings = asdict(router.settings)
    del settings["experts"]
    weighed = Router(draw(rng, experts, d_model) * 4, bias=router.bias,
                     selection_bias=router.selection_bias, **settings)
    gated = rng.random() < 0.7
    shared = int(rng.integers(0, 3))
    rows = 2 if gated else 1
    moe = device.load_moe(
        weighed, draw(rng, experts, rows * d_expert, d_model),
        draw(rng, experts, d_model, d_expert),
        gated=bool(gated), weight_format=str(rng.choice(["int4_g32", "mxint8", "mxfp4"])),
        activation_bits=int(rng.choice([8, 16])),
        shared=[(draw(rng, rows * 64, d_model), draw(rng, d_model, 64))
                for _ in range(shared)] or None)
    x = draw(rng, tokens, d_model) * 8
    if kind == "route":
        return (lambda x: np.hstack([part.astype(np.float32) for part in moe.route(x)])), x, moe
    return moe, x, moe


def run(device, seed):
    """Return what a drawn call makes, and its cycles."""
    call, x, layer = drawn_layer(np.random.default_rng(seed), device, seed)
    try:
        return call(x), device.last_cycles
    finally:
        if layer is not None:
            layer.close()


@pytest.mark.parametrize("first", range(0, 200, 25))
def test_drawn_shapes(pair_of, first):
    """The same bits, also behind an adversarial memory, and the cycles that the model says."""
    off = []
    with (pair_of(CONFIG, memory=MemoryModel.ideal(size=SIZE)) as pair,
          pair_of(CONFIG, memory=SLOW) as slow,
          open_device("golden", config=CONFIG, memory_bytes=SIZE, timing=True) as model):
        for seed in range(first, first + 25):
            y, rtl = run(pair.rtl, seed)
            assert (pair.same(lambda device, seed=seed: run(device, seed)[0]) == y).all()
            again, cycles = run(model, seed)
            assert (again == y).all()
            if abs(rtl - cycles) > max(16, 0.01 * rtl):
                off.append((seed, rtl, cycles))
            assert (slow.same(lambda device, seed=seed: run(device, seed)[0]) == y).all()
    assert not off


@pytest.fixture(scope="module")
def wide(pair_of):
    with pair_of(WIDE, memory=MemoryModel.ideal(size=SIZE)) as pair:
        yield pair


def second_up(device, **settings):
    """Return a layer of OpenMoE's experts."""
    rng = np.random.default_rng(2)
    return device.load_moe(
        Router(draw(rng, 16, 64) * 8, top_k=2, **settings), draw(rng, 16, 3 * 32, 64),
        draw(rng, 16, 64, 32), second_up=True)


@pytest.mark.parametrize("settings", [*SHAPES, "second_up"], ids=str)
def test_two_of_everything(wide, pair_of, settings):
    """Two channels, banks of y and of h, and results a cycle: bits, and cycles of the model."""
    def loaded(device):
        return second_up(device) if settings == "second_up" else load(device, **settings)

    def script(device):
        found = []
        with loaded(device) as moe:
            d_model = moe.experts.shape.d_model
            for tokens in (1, 3, 20):
                x = draw(np.random.default_rng(tokens), tokens, d_model) * 8
                narrow = moe(torch.from_numpy(x).bfloat16())
                found += [moe(x), narrow.float().numpy(), *moe.route(x)]
        return np.concatenate([part.astype(np.float32).reshape(-1) for part in found])

    wide.reset()
    assert wide.same(script).any()
    wide.check()
    with pair_of(WIDE, memory=SLOW) as slow:
        slow.same(script)
    with open_device("golden", config=WIDE, memory_bytes=SIZE, timing=True) as golden:
        for tokens in (1, 7, 20):
            cycles = []
            for device in (wide.rtl, golden):
                with loaded(device) as moe:
                    moe(draw(np.random.default_rng(tokens), tokens, moe.experts.shape.d_model) * 8)
                    cycles.append(device.last_cycles)
            assert abs(cycles[0] - cycles[1]) <= max(16, 0.01 * cycles[0]), (tokens, cycles)
