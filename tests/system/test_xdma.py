"""The XDMA transport with the RTL behind the driver's files."""

import errno

import numpy as np
import pytest

from moeaccel.host import open_device
from moeaccel.host.errors import AccessFailed, LinkLost
from moeaccel.interface.registers import REGISTERS
from moeaccel.sim import MemoryModel, StallModel
from tests.support.pair import MEMORY_BYTES, assert_same_bits, draw_experts
from tests.support.xdma_files import StandIn


@pytest.fixture(scope="module")
def calls():
    """A layer and its calls."""
    rng = np.random.default_rng(11)
    gate_up, down = draw_experts(rng, 4, 64, 96)
    batches = [(rng.standard_normal((n, 64)).astype(np.float32), rng.integers(0, 4, (n, 2)),
                rng.random((n, 2)).astype(np.float32)) for n in (1, 7, 3)]
    with open_device("golden", config="tiny", memory_bytes=MEMORY_BYTES) as device, \
            device.load_experts(gate_up, down) as experts:
        return gate_up, down, batches, [experts(*batch) for batch in batches]


@pytest.fixture
def files(pair_of):
    memory = MemoryModel(size=MEMORY_BYTES, stalls=StallModel.uniform(0.1), seed=4)
    with pair_of("tiny", memory=memory) as pair:
        yield StandIn(pair.rtl.transport)


def opened(files):
    return open_device("xdma:0", files=files, memory_bytes=MEMORY_BYTES)


def test_bits_counters_and_short_transfers(files, calls):
    """Several commands in flight over transfers that end early: golden's bits."""
    gate_up, down, batches, expected = calls
    files.rng = np.random.default_rng(6)
    with opened(files) as device, device.load_experts(gate_up, down) as experts:
        assert device.config.name == "tiny"
        handles = [experts.submit(*batch) for batch in batches]
        for handle, y in zip(handles, expected, strict=True):
            assert_same_bits(experts.sync(handle), y)
        assert device.counters()["commands"] == len(batches)
        assert device.last_cycles > 100
    lengths = {count for _, count, _ in files.calls}
    assert len(lengths) > 10


def test_a_card_that_vanishes_in_the_middle_of_a_command(files, calls):
    """The command is lost, its weights are not: after reset the same call gives its bits."""
    gate_up, down, batches, expected = calls
    with opened(files) as device, device.load_experts(gate_up, down) as experts:
        handle = experts.submit(*batches[1])
        for _ in range(20):  # registers take time
            status = device.transport.register_read(REGISTERS["STATUS"].address)
        assert status & 1  # busy
        files.gone = True
        with pytest.raises(LinkLost, match="card /dev/xdma0 must answer"):
            experts.sync(handle)
        files.gone = False
        device.reset()
        for batch, y in zip(batches, expected, strict=True):
            assert_same_bits(experts(*batch), y)
    with opened(files) as device, device.load_experts(gate_up, down) as experts:
        assert_same_bits(experts(*batches[0]), expected[0])


@pytest.mark.parametrize("name", ["h2c_0", "c2h_0"])
def test_an_error_of_one_transfer(files, calls, name):
    """EIO while the card still answers is an error of that call alone."""
    gate_up, down, batches, expected = calls
    with opened(files) as device, device.load_experts(gate_up, down) as experts:
        files.fail[name] = errno.EIO
        with pytest.raises(AccessFailed, match=f"xdma0_{name}"):
            experts(*batches[0])
        device.reset()
        assert_same_bits(experts(*batches[2]), expected[2])
