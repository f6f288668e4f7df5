"""Images that memory still holds are not sent again; what may be damaged is."""

import numpy as np
import pytest

from moeaccel.config import PRESETS
from moeaccel.errors import FormatError
from moeaccel.formats import weight_format
from moeaccel.host import errors, open_device
from moeaccel.host.memory import PAGE
from moeaccel.host.residents import Residents
from moeaccel.host.transports.base import Transport
from moeaccel.host.transports.golden import GoldenTransport
from moeaccel.image import HEADER_BYTES, Expert, ExpertShape
from moeaccel.interface.registers import REGISTERS

TINY = PRESETS["tiny"]
STATE = REGISTERS["MEMORY_STATE"].address
EXPERTS, D_MODEL, D_EXPERT = 4, 64, 96
TABLE = 64 * (1 + EXPERTS) + 1
"""More than the layer descriptor and the table of its experts."""


class Board(Transport):
    """A device that stays when it is closed; counts what is written, and can be cut off."""

    def __init__(self):
        self.model = GoldenTransport(TINY, memory_bytes=1 << 20)
        self.written = 0
        self.left = None  # bytes until the link is cut

    @property
    def memory_bytes(self):
        return self.model.memory_bytes

    def register_read(self, address):
        return self.model.register_read(address)

    def register_write(self, address, value):
        self.model.register_write(address, value)

    def memory_read(self, address, count):
        return self.model.memory_read(address, count)

    def memory_write(self, address, data):
        data = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else data
        if self.left is not None:
            data, whole = data[: self.left], data.size
            self.left -= data.size
            self.model.memory_write(address, data)
            if data.size < whole:
                raise errors.LinkLost("cut")
        else:
            self.model.memory_write(address, data)
        self.written += data.size

    def wait_interrupt(self, timeout_s):
        return self.model.wait_interrupt(timeout_s)

    def close(self):
        pass


def weights(seed, experts=EXPERTS):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((experts, 2 * D_EXPERT, D_MODEL), np.float32),
            rng.standard_normal((experts, D_MODEL, D_EXPERT), np.float32))


rng = np.random.default_rng(9)
CALL = (rng.standard_normal((5, D_MODEL), np.float32), rng.integers(0, EXPERTS, (5, 2)),
        rng.random((5, 2), np.float32))


def expected(stacks):
    with open_device("golden", config=TINY, memory_bytes=1 << 20) as device:
        return device.load_experts(*stacks)(*CALL)


def load(board, stacks):
    """Open the device, load, compute; return the bytes written for loading."""
    with open_device(board, config=TINY) as device:
        before = board.written
        experts = device.load_experts(*stacks)
        written = board.written - before
        assert np.array_equal(experts(*CALL), expected(stacks))
        board.image = experts.shape.image_bytes
    return written


@pytest.fixture
def board():
    return Board()


@pytest.fixture
def stacks():
    return weights(1)


def test_resident_images_are_not_sent_again(board, stacks):
    assert load(board, stacks) >= EXPERTS * board.image
    assert load(board, stacks) < TABLE


def test_one_expert_that_changed(board, stacks):
    load(board, stacks)
    other = stacks[0].copy(), stacks[1]
    other[0][2] *= -1
    assert board.image <= load(board, other) < board.image + TABLE + 100


def test_within_a_session(board, stacks):
    with open_device(board, config=TINY) as device:
        device.load_experts(*stacks).close()
        linear = device.load_linear(stacks[1][0])
        y = linear(CALL[0][:, :64].repeat(2, 1)[:, :D_EXPERT])
        linear.close()
        before = board.written
        again = device.load_linear(stacks[1][0])
        assert board.written - before < TABLE
        assert np.array_equal(again(CALL[0][:, :64].repeat(2, 1)[:, :D_EXPERT]), y)


@pytest.mark.parametrize("whole", range(EXPERTS))
def test_an_upload_that_was_cut_is_taken_up(board, stacks, whole):
    """Whole images stay, the one that was cut is sent again, the bits are right."""
    with open_device(board, config=TINY) as device:
        image = ExpertShape(weight_format("int4_g32"), D_MODEL, D_EXPERT, 2).image_bytes
        board.left = whole * image + image // 2
        with pytest.raises(errors.LinkLost):
            device.load_experts(*stacks)
        board.left = None
    written = load(board, stacks)
    assert (EXPERTS - whole) * image <= written < (EXPERTS - whole) * image + TABLE + 100


def test_an_expert_that_is_refused_leaves_those_before_it(board, stacks):
    """Experts are looked at one by one: memory is free again, and what was sent is still listed."""
    broken = stacks[0].copy(), stacks[1]
    broken[0][2, 0, 0] = np.nan
    with open_device(board, config=TINY) as device:
        free = device.memory.free_bytes
        with pytest.raises(FormatError, match="must be finite"):
            device.load_experts(*broken)
        assert (device.memory.free_bytes, device.memory.free_blocks) == (free, 1)
        before = board.written
        device.load_experts(*stacks).close()
        image = ExpertShape(weight_format("int4_g32"), D_MODEL, D_EXPERT, 2).image_bytes
        assert 0 < board.written - before - (EXPERTS - 2) * image < TABLE
    assert load(board, stacks) < TABLE


def test_every_cut_of_an_image(stacks):
    """Wherever the first image is cut, its bytes are not taken for whole, nor are old ones."""
    old = weights(2)
    total = load(Board(), stacks) // EXPERTS
    for cut in (*range(0, 200, 16), *range(200, total, 997), total - 1, total):
        board = Board()
        load(board, old)
        with open_device(board, config=TINY) as device:
            board.left = cut
            with pytest.raises(errors.LinkLost):
                device.load_experts(*stacks)
            board.left = None
        load(board, stacks)


@pytest.mark.parametrize("top", [False, True])
def test_memory_that_was_used_otherwise(board, stacks, top):
    """One page of the images was someone else's, though every header is still there."""
    load(board, stacks)
    with open_device(board, config=TINY) as device:
        size = device.memory.free_bytes - 3 * PAGE if top else 3 * PAGE
        device.memory.allocate(size, top=top)
    assert load(board, stacks) >= EXPERTS * board.image


def test_other_layers_at_the_same_place(board, stacks):
    load(board, stacks)
    with open_device(board, config=TINY) as device:
        device.load_linear(stacks[1][0])
    assert load(board, stacks) >= EXPERTS * board.image


def test_larger_rings_take_the_place_of_images(board, stacks):
    load(board, stacks)
    open_device(board, config=TINY, ring_log2=8).close()
    assert load(board, stacks) >= EXPERTS * board.image


@pytest.mark.parametrize("lost", ["memory", "magic", "entry", "count"])
def test_a_list_that_is_not_true(board, stacks, lost):
    """After a hardware reset, or with a damaged list, nothing is taken as resident."""
    load(board, stacks)
    if lost == "memory":
        board.register_write(STATE, 0)
    else:
        at = {"magic": 0, "count": 6, "entry": 20}[lost]
        board.model.memory_write(at, bytes([board.memory_read(at, 1)[0] ^ 1]))
    assert load(board, stacks) >= EXPERTS * board.image


def test_the_list_is_valid_only_when_it_is_written(board, stacks):
    """An old list survives a hardware reset, and the link breaks while a new one is written."""
    load(board, stacks)
    board.register_write(STATE, 0)
    with open_device(board, config=TINY) as device:
        board.left = EXPERTS * HEADER_BYTES
        with pytest.raises(errors.LinkLost):
            device.load_experts(*weights(2))
        board.left = None
    assert board.register_read(STATE) == 0
    assert load(board, stacks) >= EXPERTS * board.image


def test_the_list_forgets_the_oldest(board):
    """A page has room for 255 ranges."""
    residents = Residents(board)
    for k in range(300):
        residents.enter(PAGE + 64 * k, [64])
    board.written = 0
    again = Residents(board)
    for k in range(45, 300):
        again.enter(PAGE + 64 * k, [64])
    assert board.written == 0
    again.enter(PAGE + 64 * 44, [64])
    assert board.written > 0


def test_images_of_other_sizes_are_another_range(board):
    """As large together, but with headers elsewhere: what lies there may be anything."""
    residents = Residents(board)
    residents.enter(PAGE, [PAGE, 2 * PAGE])
    board.memory_write(PAGE, np.full(3 * PAGE, 7, np.uint8))  # images, as an upload leaves them
    board.written = 0
    Residents(board).enter(PAGE, [PAGE, 2 * PAGE])
    assert board.written == 0
    again = Residents(board)
    again.enter(PAGE, [2 * PAGE, PAGE])
    for header, cleared in ((PAGE, True), (2 * PAGE, False), (3 * PAGE, True)):
        assert board.memory_read(header, HEADER_BYTES).any() != cleared
    before = board.written
    Residents(board).enter(PAGE, [PAGE, 2 * PAGE])
    assert board.written > before


def test_experts_of_different_sizes_are_not_sent_again(board, stacks):
    layer = [Expert.quantise(g[: 2 * d], w[:, :d], name) for g, w, d, name in zip(
        *stacks, (96, 32, 64, 96), ("mxint8", "int4_g32", "mxfp4", "int4_g128"), strict=True)]
    with open_device("golden", config=TINY, memory_bytes=1 << 20) as device:
        expected = device.load_quantised(layer)(*CALL)
    for most in (None, TABLE, TABLE):
        with open_device(board, config=TINY) as device:
            before = board.written
            loaded = device.load_quantised(layer)
            assert most is None or board.written - before < most
            assert np.array_equal(loaded(*CALL), expected)
    other = [layer[0], layer[2], layer[1], layer[3]]  # as large together
    with open_device(board, config=TINY) as device:
        before = board.written
        loaded = device.load_quantised(other)
        assert board.written - before > sum(shape.image_bytes for shape in loaded.shapes)
        x, ids, scores = CALL
        assert np.array_equal(loaded(x, np.array([0, 2, 1, 3])[ids], scores), expected)
