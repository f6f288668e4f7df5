"""ROUTE: the RTL and the golden model choose the same experts with the same weights."""

import numpy as np
import pytest

from moeaccel.config import preset
from moeaccel.cycles.route_unit import route_cycles
from moeaccel.golden.router import route
from moeaccel.host import Router
from moeaccel.host.errors import CommandRejected, LogitOverflow, NonFiniteInput
from moeaccel.host.rings import Command
from moeaccel.interface.commands import ENTRY_BYTES, ROUTER, Opcode, Status, encode, field_of
from moeaccel.router.choices import MODES, Score
from moeaccel.router.descriptor import descriptor
from moeaccel.router.settings import RouterSettings
from moeaccel.sim import MemoryModel, StallModel
from tests.support.pair import MEMORY_BYTES

pytestmark = pytest.mark.timeout(900)  # the first test builds a model

CONFIG = preset("tiny").replace(
    name="tiny-router", router=tuple(score.key for score in Score), router_top_k=8,
    router_modes=MODES, max_experts=64, second_up=True, buffer_slots=2, buffer_beats=32)


SIGMOID = {"score": "sigmoid", "renormalize": "sum", "groups": 4, "keep_groups": 2,
           "group_score": "top2_sum"}


@pytest.fixture(scope="module")
def pair(pair_of):
    with pair_of(CONFIG) as pair:
        yield pair


def drawn(rng, experts, **modes):
    """Return a router, at random, but for its modes."""
    if "mixer" in modes:
        return Router(experts=experts, top_k=2, scale=float(rng.choice([1.0, 2.446])),
                      bias=rng.standard_normal(experts) if rng.random() < 0.5 else None, **modes)
    groups = int(rng.choice([g for g in (1, 2, 4, 8) if experts % g == 0]))
    keep = int(rng.integers(1, groups + 1))
    score = str(rng.choice([score.key for score in Score]))
    renormalize = "softmax_top_k" if score == "identity" else str(
        rng.choice(["none", "sum", "sum_eps", "clamp", "softmax_top_k"]))
    group_score = "max" if score == "identity" or experts // groups < 2 else str(
        rng.choice(["max", "top2_sum"]))
    biased = rng.random() < 0.5
    return Router(
        experts=experts, top_k=int(rng.integers(1, min(8, keep * experts // groups) + 1)),
        score=score, renormalize=renormalize, groups=groups, keep_groups=keep,
        group_score=group_score, scale=float(rng.choice([1.0, 2.446, 16.0])),
        epsilon=1e-3 if renormalize in ("sum_eps", "clamp") else 0.0,
        bias=rng.standard_normal(experts) if rng.random() < 0.3 else None,
        selection_bias=rng.standard_normal(experts) * 0.3 if biased else None, **modes)


def check(pair, router, logits, resident=None):
    """Route on both, and hold them against the golden router."""
    def script(device):
        ids, weights = device.route(router, logits, resident=resident)
        return np.concatenate([ids.astype(np.float32), weights], axis=1)

    got = pair.same(script)
    want = route(logits, router.settings, bias=router.bias, selection_bias=router.selection_bias,
                 resident=resident)
    assert (got[:, : router.settings.top_k] == want.ids).all()
    assert (got[:, router.settings.top_k:] == want.weights).all()


@pytest.mark.parametrize("seed", range(6))
def test_bits(pair, seed):
    rng = np.random.default_rng(seed)
    router = drawn(rng, int(rng.choice([1, 7, 16, 40, 64])))
    experts = router.settings.experts
    logits = (rng.standard_normal((int(rng.integers(1, 40)), experts)) * 3).astype(np.float32)
    check(pair, router, logits, rng.random(experts) < 0.7 if seed % 3 == 0 else None)
    pair.check()


def test_more_tokens_than_a_command_has(pair):
    rng = np.random.default_rng(9)
    check(pair, Router(experts=16, top_k=8),
          rng.standard_normal((CONFIG.max_assignments // 8 + 5, 16)).astype(np.float32))
    check(pair, Router(experts=16, top_k=8), np.zeros((0, 16), np.float32))


def test_cycles(pair):
    rng = np.random.default_rng(10)
    for experts, tokens in ((64, 1), (64, 20), (7, 9), (40, 30), (16, 3)):
        router = drawn(rng, experts)
        settings = router.settings
        biased = router.selection_bias is not None
        logits = rng.standard_normal((tokens, experts)).astype(np.float32)
        for device in pair.devices:
            device.route(router, logits)
        want = route_cycles(
            CONFIG, settings, tokens, biased=biased and settings.biases_scores,
            tables=biased or router.bias is not None)
        assert abs(pair.rtl.last_cycles - want) <= max(16, 0.01 * want), (settings, tokens)


MODE_SETTINGS = {
    "threshold": {"threshold": 0.5}, "top_p": {"top_p": 0.7, "threshold": 0.1},
    "prior": {"prior": 0.8, "prior_keep": 1}, "capacity": {"capacity": 4},
    "all": {"capacity": 3, "capacity_order": "priority", "prior": 0.2, "threshold": 0.3},
    "mixer": {"mixer": 0.02}, "mixer-far": {"mixer": 1.0},
    "one": {"capacity": 1 << 30, "top_p": 2.0**-16}, "none": {"capacity": 1},
}


@pytest.mark.parametrize("name", MODE_SETTINGS)
def test_modes(pair, name):
    rng = np.random.default_rng(list(MODE_SETTINGS).index(name))
    for experts, tokens in ((64, 31), (16, 12), (7, 1)):
        router = drawn(rng, experts, **MODE_SETTINGS[name])
        logits = (rng.standard_normal((tokens, experts)) * 2).astype(np.float32)
        logits[: tokens // 4] = logits[tokens // 2 : tokens // 2 + tokens // 4]  # equal ones
        check(pair, router, logits, rng.random(experts) < 0.4 if router.settings.prior else None)
    pair.check()


@pytest.mark.parametrize("name", MODE_SETTINGS)
def test_cycles_of_modes(pair, name):
    rng = np.random.default_rng(20)
    for experts, tokens in ((64, 1), (64, 20), (7, 9), (40, 30)):
        router = drawn(rng, experts, **MODE_SETTINGS[name])
        settings = router.settings
        biased = router.selection_bias is not None
        resident = np.arange(experts) % 3 == 0 if settings.prior else None
        logits = rng.standard_normal((tokens, experts)).astype(np.float32)
        for device in pair.devices:
            device.route(router, logits, resident=resident)
        want = route_cycles(
            CONFIG, settings, tokens, biased=biased and settings.biases_scores,
            tables=biased or router.bias is not None, residents=resident is not None)
        assert abs(pair.rtl.last_cycles - want) <= max(16, 0.01 * want), (settings, tokens)


@pytest.mark.parametrize(("settings", "shared"), [
    ({"top_k": 3}, False), ({"top_k": 2, **SIGMOID}, True), ({"top_k": 2, "mixer": 0.05}, True),
    ({"top_k": 2, "renormalize": "clamp", "epsilon": 1e-7, "capacity": 3}, True)])
def test_whole_layers(pair, settings, shared):
    """The router's product, ROUTE and the experts, each from what the one before has left."""
    rng = np.random.default_rng(12)

    def draw(*shape):
        return (rng.standard_normal(shape) / 8).astype(np.float32)

    router = Router(draw(16, 64) * 8, **settings,
                    selection_bias=draw(16) if "score" in settings else None)
    gate_up, down = draw(16, 64, 64), draw(16, 64, 32)
    more = [(draw(128, 64), draw(64, 64)) for _ in range(2)]
    x = draw(21, 64) * 8

    def script(device):
        with device.load_moe(router, gate_up, down, shared=more if shared else None) as moe:
            ids, weights = moe.route(x)
            return np.concatenate([moe(x), ids.astype(np.float32), weights], axis=1)

    assert pair.same(script).any()
    pair.check()


def test_slow_memory(pair_of):
    memory = MemoryModel(size=MEMORY_BYTES, stalls=StallModel.uniform(0.4), seed=3)
    rng = np.random.default_rng(11)
    with pair_of(CONFIG, memory=memory) as pair:
        for experts in (40, 64):
            check(pair, drawn(rng, experts),
                  rng.standard_normal((12, experts)).astype(np.float32))
        for settings in ({"capacity": 2, "prior": 0.1}, {"mixer": 0.1}):
            check(pair, drawn(rng, 40, **settings),
                  rng.standard_normal((12, 40)).astype(np.float32),
                  rng.random(40) < 0.4 if "prior" in settings else None)
        pair.check()


def test_what_is_wrong_with_logits(pair):
    router = Router(experts=16, top_k=2, bias=np.full(16, 1000, np.float32))
    logits = np.zeros((9, 16), np.float32)
    logits[4, 3], logits[7, 0] = np.nan, np.inf
    for device in pair.devices:
        with pytest.raises(NonFiniteInput, match="logit must be finite, but token 4 holds"):
            device.route(router, logits)
        with pytest.raises(LogitOverflow, match=r"logits must be below 2048 .* but 2 were not"):
            device.route(router, np.where(np.isfinite(logits), logits, 1500).astype(np.float32))
        # The next command runs.
        assert device.route(router, np.zeros((1, 16), np.float32))[0].tolist() == [[0, 1]]


GOOD = descriptor(RouterSettings(experts=16, top_k=2, groups=4, keep_groups=2), biased=False,
                  tables=False, table_address=0)


@pytest.mark.parametrize(("changes", "status", "word"), [
    ({"score": 9}, Status.BAD_ROUTER, "score"),
    ({"renormalize": 5}, Status.BAD_ROUTER, "renormalize"),
    ({"score": 3}, Status.BAD_ROUTER, "renormalize"),
    ({"selection": 4}, Status.BAD_ROUTER, "selection"),
    ({"group_score": 1, "selection": 2}, Status.BAD_ROUTER, "group_score"),
    ({"num_experts": 0}, Status.BAD_ROUTER, "num_experts"),
    ({"num_experts": 65}, Status.BAD_ROUTER, "num_experts"),
    ({"groups": 3}, Status.BAD_ROUTER, "groups"),
    ({"groups": 65}, Status.BAD_ROUTER, "groups"),
    ({"num_experts": 17}, Status.BAD_ROUTER, "groups"),
    ({"keep_groups": 5}, Status.BAD_ROUTER, "keep_groups"),
    ({"keep_groups": 9}, Status.BAD_ROUTER, "keep_groups"),
    ({"keep_groups": 0}, Status.BAD_ROUTER, "keep_groups"),
    ({"tables": 2}, Status.BAD_ROUTER, "tables"),
    ({"scale": 0x7F800000}, Status.BAD_ROUTER, "scale"),
    ({"epsilon": 1}, Status.BAD_ROUTER, "epsilon"),
    ({"table_address": 32}, Status.BAD_ROUTER, "table_address"),
    ({"tables": 1, "table_address": (1 << 40) - 64}, Status.BAD_ROUTER, "table_address"),
    ({"top_k": 9}, Status.BAD_FIELD, "top_k"),
    ({"num_experts": 4, "group_size": 1, "top_k": 3}, Status.BAD_FIELD, "top_k"),
    ({"shared": 2}, Status.BAD_FIELD, "top_k"),
    ({"shared": 16}, Status.BAD_ROUTER, "shared"),
    ({"gates": 1}, Status.BAD_ROUTER, "shared"),
    ({"gates": 2, "shared": 1, "top_k": 3, "score": 0}, Status.BAD_ROUTER, "score"),
    ({"threshold": 65537}, Status.BAD_ROUTER, "threshold"),
    ({"prior_keep": 2}, Status.BAD_ROUTER, "prior_keep"),
    ({"top_p": 65537}, Status.BAD_ROUTER, "top_p"),
    ({"capacity_order": 2}, Status.BAD_ROUTER, "capacity_order"),
    ({"prior": 1 << 31}, Status.BAD_ROUTER, "prior"),
    ({"prior": 1, "table_address": (1 << 40) - 128}, Status.BAD_ROUTER, "table_address"),
    ({"capacity": 1 << 31}, Status.BAD_ROUTER, "capacity"),
    ({"mixer": (1 << 20) + 1}, Status.BAD_ROUTER, "mixer"),
    ({"selection": 3, "renormalize": 1}, Status.BAD_ROUTER, "renormalize"),
    ({"selection": 3}, Status.BAD_ROUTER, "groups"),
    *(({"selection": 3, "groups": 1, "group_size": 16, "keep_groups": 1, name: 1},
       Status.BAD_ROUTER, name)
      for name in ("threshold", "prior_keep", "top_p", "prior", "capacity")),
    ({"selection": 3, "groups": 1, "group_size": 16, "keep_groups": 1, "top_k": 3},
     Status.BAD_FIELD, "top_k"),
    ({"x_type": 1}, Status.BAD_FIELD, "x_type"),
    ({"ids_address": (1 << 40) - 64}, Status.OK, ""),
    ({"weights_address": (1 << 40) - 64, "tokens": 9}, Status.BAD_FIELD, "weights_address"),
    ({"keep_groups": 1, "num_experts": 4, "group_size": 1, "x_address": (1 << 40) - 64},
     Status.BAD_FIELD, "top_k"),
])
def test_bad_fields_are_named(pair, changes, status, word):
    from moeaccel.interface.commands import SUBMISSION

    fields = {name: changes.get(name, value) for name, value in GOOD.items()}
    ours = {name: value for name, value in changes.items() if name not in fields}

    def script(device):
        buffers = device.memory.allocate(8192)
        base = buffers.address
        device.transport.memory_write(base, encode(ROUTER, fields) + bytes(8192 - ENTRY_BYTES))
        command = Command("ROUTE", (buffers,))
        device.submit({
            "opcode": int(Opcode.ROUTE), "tokens": 4, "top_k": 2, "layer_address": base,
            "x_address": base + 64, "ids_address": base + 4096, "weights_address": base + 6144,
            **ours}, command)
        device.wait(command)
        return command

    done = pair.same_completion(script)
    if status is Status.OK:
        assert done.status == Status.WINDOW  # nothing but the window forbids it
        return
    structure = SUBMISSION if status is Status.BAD_FIELD else ROUTER
    assert (done.status, done.detail) == (status, field_of(structure, word).word)


def test_without_a_router(tiny):
    def script(device):
        command = Command("ROUTE")
        device.submit({"opcode": int(Opcode.ROUTE), "tokens": 1, "top_k": 1}, command)
        device.wait(command)
        return command

    done = tiny.same_completion(script)
    assert (done.status, done.detail) == (Status.BAD_OPCODE, Opcode.ROUTE)


def test_the_driver_says_what_is_wrong_as_the_device_does():
    from moeaccel.host.errors import command_error

    error = command_error(Status.BAD_ROUTER, 2, 0)
    assert isinstance(error, CommandRejected)
    assert "router descriptor field groups must be from 1 to 64" in str(error)
