"""Predictions and PREFETCH on the golden device, whose bits and counters are the hardware's."""

import numpy as np
import pytest
import torch

from moeaccel.config import PRESETS
from moeaccel.host import errors, open_device
from moeaccel.host.buffering import PREDICTIONS, Prefetcher, replay
from moeaccel.host.buffering.device import replay_on, with_buffer
from moeaccel.host.errors import InvalidOption, LimitExceeded
from moeaccel.host.prefetch import most_bytes
from moeaccel.host.traces import RoutingTrace
from moeaccel.interface.commands import Status

LAYERS, EXPERTS, TOP_K, SLOTS = 3, 8, 2, 3
CONFIG, CALL = with_buffer(PRESETS["tiny"], SLOTS)


def weights_of(rng, experts=EXPERTS):
    return (rng.standard_normal((experts, 64, 64)).astype(np.float32) / 8,
            rng.standard_normal((experts, 64, 32)).astype(np.float32) / 8)


@pytest.fixture
def device():
    with open_device("golden", config=CONFIG, memory_bytes=1 << 22) as opened:
        yield opened


def cyclic(tokens):
    """Paths that repeat: a token's first expert says all others, and that of the next token."""
    first = (3 * np.arange(tokens)[:, None] + np.arange(LAYERS)) % EXPERTS
    return np.stack([first, (first + 1) % EXPERTS], axis=2)


@pytest.mark.parametrize("name", [name for name in PREDICTIONS if name != "oracle"])
@pytest.mark.parametrize("paths", ["cyclic", "drawn"])
def test_the_device_counts_what_the_model_does(name, paths):
    ids = cyclic(30)
    if paths == "drawn":
        rng = np.random.default_rng(1)
        ids = np.stack([[rng.permutation(EXPERTS)[:TOP_K] for _ in range(LAYERS)]
                        for _ in range(30)])
    trace = RoutingTrace.of_requests([(ids, None)], n_experts=EXPERTS)
    model = replay(trace, CALL, slots=SLOTS, gap=None, prediction=PREDICTIONS[name])
    with open_device("golden", config=CONFIG, memory_bytes=1 << 22) as device:
        assert replay_on(device, trace, PREDICTIONS[name]) == model.counts
    assert model.counts.uses == 29 * LAYERS * TOP_K
    if (name, paths) == ("circular", "cyclic"):
        assert model.hit_rate > 0.7


def test_what_is_predicted_is_brought(device):
    rng = np.random.default_rng(0)
    layers = [device.load_experts(*weights_of(rng)) for _ in range(LAYERS)]
    prefetcher = Prefetcher(layers, "previous-token", top_k=TOP_K)
    x, weights = np.ones((1, 64), np.float32), np.ones((1, TOP_K), np.float32)
    for turn in range(2):
        prefetcher.begin_pass(new_request=not turn)
        for at, layer in enumerate(layers):
            ids = np.array([[at, at + 2]])
            layer(x, ids, weights)
            command = prefetcher.observe(at, ids)
            assert (command is None) == (turn == 0 and at < LAYERS - 1)  # nothing is known yet
    counters = device.counters()
    assert counters["buffer_hits"] == LAYERS * TOP_K == counters["buffer_misses"]
    prefetcher.check()


def test_what_fails_is_raised_by_whoever_comes_next(device):
    layers = [device.load_experts(*weights_of(np.random.default_rng(0))) for _ in range(2)]
    prefetcher = Prefetcher(layers, "popularity", top_k=1)
    prefetcher.observe(1, np.array([[0]]))
    prefetcher.observe(0, np.array([[0]]))
    table = layers[1]._descriptor.address + 64
    device.transport.memory_write(table, np.full(64, 0xFF, np.uint8))
    command = prefetcher.observe(0, np.array([[0]]))
    device.wait(command)
    assert command.error().status == Status.BAD_EXPERT
    with pytest.raises(errors.ExpertRejected, match="expert 0"):
        prefetcher.observe(1, np.array([[0]]))


def test_row_blocks_take_a_slot_each(device):
    rng = np.random.default_rng(0)
    gate_up = rng.standard_normal((2, 256, 64)).astype(np.float32)
    down = rng.standard_normal((2, 64, 128)).astype(np.float32)
    layer = device.load_experts(gate_up, down, row_blocks=2)
    device.wait(device.prefetch(layer, [1]))
    layer(np.ones((1, 64), np.float32), np.array([[1]]), np.ones((1, 1), np.float32))
    assert device.counters()["buffer_hits"] == 2
    with pytest.raises(LimitExceeded, match="from 1 to 1 different experts of 2 row blocks each"):
        device.prefetch(layer, [0, 1])


def test_a_prefetch_names_as_many_experts_as_a_command_has_tokens():
    config = CONFIG.replace(max_tokens=2)
    with open_device("golden", config=config, memory_bytes=1 << 22) as device:
        layer = device.load_experts(*weights_of(np.random.default_rng(0)))
        prefetcher = Prefetcher([layer], "previous-token", top_k=3)
        device.wait(prefetcher.observe(0, np.array([[1, 2, 3]])))
        prefetcher.check()
        with pytest.raises(LimitExceeded, match="from 1 to 2 different experts"):
            device.prefetch(layer, [1, 2, 3])


def test_uploads_and_resets_empty_the_buffer(device):
    rng = np.random.default_rng(0)
    layer = device.load_experts(*weights_of(rng))
    x, ids, weights = np.ones((1, 64), np.float32), np.array([[0]]), np.ones((1, 1), np.float32)

    def hits(*, after):
        device.wait(device.prefetch(layer, [0]))
        after()
        before = device.counters()["buffer_hits"]
        layer(x, ids, weights)
        return device.counters()["buffer_hits"] - before

    assert hits(after=lambda: None) == 1
    assert hits(after=lambda: device.load_experts(*weights_of(rng))) == 0
    assert hits(after=device.forget_experts) == 0
    assert device.counters()["bytes_wasted"] > 0
    device.prefetch(layer, [0])
    device.reset()
    layer(x, ids, weights)
    assert device.counters()["buffer_hits"] == 0
    commands = device.counters()["commands"]
    device.forget_experts()  # nothing was brought: there is nothing to send
    assert device.counters()["commands"] == commands


def test_an_image_that_is_there_is_not_sent_again_and_stays_held(device):
    weights = weights_of(np.random.default_rng(0))
    with device.load_experts(*weights) as layer:
        device.wait(device.prefetch(layer, [0, 1]))
    commands = device.counters()["commands"]
    layer = device.load_experts(*weights)
    assert device.counters()["commands"] == commands  # no FORGET
    layer(np.ones((1, 64), np.float32), np.array([[0, 1]]), np.ones((1, 2), np.float32))
    assert device.counters()["buffer_hits"] == 2


@pytest.mark.parametrize("ids", [[-1], [EXPERTS], [0, 1.5], ["a"], [True], [[0]], 3, None,
                                 np.array([[0, 1]]), torch.tensor([[0, 1]])])
def test_ids_that_there_are_not(device, ids):
    layer = device.load_experts(*weights_of(np.random.default_rng(0)))
    what = rf"(.*from 0 to {EXPERTS - 1}, those of|some numbers of experts, such as \[0, 3\])"
    with pytest.raises(InvalidOption, match=f"ids must be {what}"):
        device.prefetch(layer, ids)


@pytest.mark.parametrize("ids", [np.array([0, 2]), torch.tensor([0, 2]), range(0, 4, 2), (0, 2, 2),
                                 iter([0, 2])], ids=lambda ids: type(ids).__name__)
def test_ids_of_any_kind(device, ids):
    layer = device.load_experts(*weights_of(np.random.default_rng(0)))
    device.wait(device.prefetch(layer, ids))
    layer(np.ones((1, 64), np.float32), np.array([[0, 2, 1]]), np.ones((1, 3), np.float32))
    assert device.counters()["buffer_hits"] == 2


@pytest.mark.parametrize("row_blocks", [1, 2])
def test_a_budget_takes_the_likeliest(row_blocks):
    """No byte more is brought, and what fits is."""
    config = CONFIG.replace(name="two channels", channels=2, buffer_slots=8)
    with open_device("golden", config=config, memory_bytes=1 << 22) as device:
        layer = device.load_experts(*weights_of(np.random.default_rng(0)), row_blocks=row_blocks)
        size = most_bytes(layer, 0)
        for budget, brought in ((0, 0), (size - 1, 0), (size, 1), (3 * size - 1, 2), (None, 3)):
            device.forget_experts()
            device.reset()
            prefetcher = Prefetcher([layer], "previous-token", top_k=3, budget=budget)
            command = prefetcher.observe(0, np.array([[5, 1, 3], [5, 1, -1], [5, -1, -1]]))
            assert (command is None) == (not brought)
            device.fence()
            assert device.counters()["bytes_prefetched"] == brought * size
            if brought:
                layer(np.ones((1, 64), np.float32), np.array([[5]]), np.ones((1, 1), np.float32))
                assert device.counters()["buffer_hits"] == row_blocks


@pytest.mark.parametrize(("change", "message"), [
    ({"budget": -1}, "budget must be at least 0 bytes, not -1"),
    ({"layers": 3}, "layers must be a sequence of what load_experts"),
    ({"layers": [1, 2]}, "layers must be a sequence of what load_experts"),
    ({"prediction": None}, "prediction must be one that looks at routes alone"),
    ({"prediction": "oracle"}, "prediction must be one that looks at routes alone"),
    ({"top_k": 0}, "top_k must be from 1 to 16, not 0"),
    ({"top_k": "two"}, "top_k must be a whole number")])
def test_what_a_prefetcher_cannot_be_made_of(device, change, message):
    layers = [device.load_experts(*weights_of(np.random.default_rng(0)))]
    with pytest.raises(InvalidOption, match=message):
        Prefetcher(**{"layers": layers, "top_k": 2} | change)
    with pytest.raises(InvalidOption, match="layer must be a whole number"):
        Prefetcher(layers, top_k=2).observe("a", np.array([[0]]))


@pytest.mark.parametrize("ids", [[], range(SLOTS + 1)])
def test_as_many_experts_as_slots(device, ids):
    layer = device.load_experts(*weights_of(np.random.default_rng(0)))
    with pytest.raises(LimitExceeded, match=f"from 1 to {SLOTS} different experts, as the buffer"):
        device.prefetch(layer, ids)
    assert device.wait(device.prefetch(layer, [2, 0, 2, 1, 0])).status == Status.OK


def test_what_is_no_layer_of_the_device(device):
    layer = device.load_experts(*weights_of(np.random.default_rng(0)))
    with pytest.raises(InvalidOption, match="layer must be one of this device's load_experts"):
        device.prefetch(device.load_linear(np.ones((32, 64), np.float32)), [0])
    with open_device("golden", config="tiny", memory_bytes=1 << 22) as other:
        with pytest.raises(LimitExceeded, match="must have an expert buffer, and 'tiny' has none"):
            other.prefetch(layer, [0])
        strange = other.load_experts(*weights_of(np.random.default_rng(0)))
        with pytest.raises(LimitExceeded, match="must have an expert buffer"):
            Prefetcher([strange], top_k=1)
        with pytest.raises(InvalidOption, match="layers must be one or more, of one device"):
            Prefetcher([layer, strange], top_k=1)
    with pytest.raises(InvalidOption, match="layer must be from 0 to 0, not 3"):
        Prefetcher([layer], top_k=1).observe(3, np.array([[0]]))
    layer.close()
    with pytest.raises(errors.DeviceClosed):
        device.prefetch(layer, [0])
