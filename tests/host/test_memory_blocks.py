"""Nothing is read before it was written, and every write is whole blocks of 64 bytes.

Memory with error correction faults on the one and reads before it writes on the other, and two
writes to parts of one beat stop a known card. Here device memory refuses both, from either side.
"""

import numpy as np
import pytest

from moeaccel.config import PRESETS
from moeaccel.formats import FORMATS
from moeaccel.host import errors, open_device
from moeaccel.host.transports.golden import GoldenTransport, memory_port

BLOCK = 64
CONFIGS = {"one channel": PRESETS["tiny"],
           "four channels": PRESETS["tiny"].replace(name="four channels", channels=4)}


class StrictMemory(memory_port.Memory):
    """Memory that knows which blocks were written."""

    def __init__(self, size):
        super().__init__(size)
        self.written = np.zeros(size // BLOCK, bool)

    def check(self, address, count):
        blocks = self.written[address // BLOCK : -(-(address + count) // BLOCK)]
        assert blocks.all(), f"read of {count} bytes at {address:#x}, which nobody wrote"

    def read(self, address, count):
        self.check(address, count)
        return super().read(address, count)

    def view(self, address, count):
        self.check(address, count)
        return super().view(address, count)

    def write(self, address, data):
        assert not (address % BLOCK or data.size % BLOCK), (
            f"write of {data.size} bytes at {address:#x}: not whole blocks")
        self.written[address // BLOCK : (address + data.size) // BLOCK] = True
        super().write(address, data)


class Card(GoldenTransport):
    """A device that stays when it is closed."""

    def close(self):
        pass


@pytest.fixture(params=CONFIGS)
def card(request, monkeypatch):
    monkeypatch.setattr(memory_port, "Memory", StrictMemory)
    config = CONFIGS[request.param]
    return config, Card(config, memory_bytes=1 << 20)


def weights(seed, experts=3, d_model=64, d_expert=32):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((experts, 2 * d_expert, d_model), np.float32),
            rng.standard_normal((experts, d_model, d_expert), np.float32))


def call(tokens, top_k=3, d_model=64):
    """Return a call in several passes: some tokens have no expert, and sums use the workspace."""
    rng = np.random.default_rng(tokens)
    ids = rng.integers(-1, 3, (tokens, top_k))
    ids[::3] = -1
    return (rng.standard_normal((tokens, d_model), np.float32), ids,
            rng.standard_normal((tokens, top_k)).astype(np.float32))


def test_the_memory_itself():
    memory = StrictMemory(4096)
    memory.write(64, np.ones(64, np.uint8))
    assert memory.read(70, 50).all()
    for address, count in ((63, 2), (127, 2), (0, 64)):
        with pytest.raises(AssertionError, match="nobody wrote"):
            memory.read(address, count)
    for address, count in ((0, 28), (32, 64)):
        with pytest.raises(AssertionError, match="not whole blocks"):
            memory.write(address, np.ones(count, np.uint8))


def test_a_first_session_and_those_behind_it(card):
    """Also with more images than the list's first block has room for."""
    config, transport = card
    stacks = [(name, bits, weights(i)) for i, name in enumerate(FORMATS) for bits in (8, 16)]
    results = []
    for _ in range(3):
        with open_device(transport, config=config) as device:
            layers = [device.load_experts(*stack, weight_format=name, activation_bits=bits)
                      for name, bits, stack in stacks]
            linear = device.load_linear(stacks[0][2][1][0])
            handles = [layer.submit(*call((1, 9, 5, 40, 2, 3, 4, 70)[i % 8]))
                       for i, layer in enumerate(layers)]
            results.append([layer.sync(handle) for layer, handle in
                            zip(layers, handles, strict=True)])
            results[-1].append(linear(np.ones((7, 32), np.float32)))
            layers[2].close()
            device.load_experts(*weights(9, d_model=96))(*call(7, d_model=96))
    for again in results[1:]:
        for first, y in zip(results[0], again, strict=True):
            assert np.array_equal(first, y)


def test_errors_and_resets(card):
    config, transport = card
    with open_device(transport, config=config, ring_log2=1) as device:
        layer = device.load_experts(*weights(0))
        x, ids, scores = call(8)
        expected = layer(x, ids, scores)
        bad = x.copy()
        bad[1] = np.nan
        ids[1] = 0
        with pytest.raises(errors.NonFiniteInput):
            layer(bad, ids, scores)
        device.reset()
        assert layer(x, ids, scores).shape == expected.shape
        device.fence()
    open_device(transport, config=config, ring_log2=8).close()
