import gc
import itertools
import sys

import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    rule,
)

from moeaccel.host import memory
from moeaccel.host.errors import DeviceClosed, InvalidOption, OutOfDeviceMemory
from moeaccel.host.memory import Allocator

SIZE = 1 << 16


class AllocatorMachine(RuleBasedStateMachine):
    """Allocations never overlap, are aligned and inside, and no byte gets lost."""

    live = Bundle("live")

    @initialize()
    def start(self):
        self.base = 4096
        self.allocator = Allocator(self.base, SIZE)
        self.owned = {}

    @rule(target=live, size=st.integers(1, 12000), alignment=st.sampled_from([64, 256, 4096]),
          top=st.booleans())
    def allocate(self, size, alignment, top):
        before = self.allocator.largest_free_block
        try:
            allocation = self.allocator.allocate(size, alignment=alignment, top=top)
        except OutOfDeviceMemory:
            assert before < size + alignment
            return None
        assert allocation.address % alignment == 0
        assert allocation.size >= size
        low, high = allocation.address, allocation.address + allocation.size
        assert self.base <= low
        assert high <= self.base + SIZE
        assert all(high <= a or low >= b for a, b in self.owned.values())
        self.owned[id(allocation)] = (low, high)
        return allocation

    @rule(allocation=consumes(live))
    def free(self, allocation):
        if allocation is not None:
            del self.owned[id(allocation)]
            allocation.free()
            allocation.free()
            assert not allocation.live

    @invariant()
    def no_byte_is_lost(self):
        if hasattr(self, "owned"):
            used = sum(b - a for a, b in self.owned.values())
            assert self.allocator.free_bytes == SIZE - used
            if not self.owned:
                assert self.allocator.free_blocks == 1
                assert self.allocator.largest_free_block == SIZE


TestAllocator = AllocatorMachine.TestCase
TestAllocator.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@given(st.lists(st.integers(1, 2000), min_size=2, max_size=12), st.randoms())
def test_short_lived_buffers_leave_no_holes_between_images(sizes, random):
    allocator = Allocator(0, 1 << 20)
    images, buffers = [], []
    for size in sizes:
        buffers.append(allocator.allocate(size, top=True))
        images.append(allocator.allocate(size, alignment=4096))
    random.shuffle(buffers)
    for buffer in buffers:
        buffer.free()
    top = max(image.address + image.size for image in images)
    assert allocator.largest_free_block == (1 << 20) - top


def test_garbage_goes_back():
    allocator = Allocator(0, 1 << 12)
    kept = allocator.allocate(1 << 12)
    address = kept.address
    del kept
    gc.collect()
    assert allocator.allocate(1 << 12).address == address


def test_lack_of_memory_names_the_sizes():
    allocator = Allocator(0, 8192)
    kept = [allocator.allocate(2048) for _ in range(4)]
    kept[0].free()
    kept[2].free()
    with pytest.raises(OutOfDeviceMemory, match=r"4,096 bytes.*4,096 of 8,192.*block has 2,048"):
        allocator.allocate(4096)


def test_freed_memory_has_no_address():
    allocation = Allocator(0, 4096).allocate(64)
    allocation.free()
    with pytest.raises(DeviceClosed, match="after it was freed"):
        assert allocation.address


@pytest.mark.parametrize(("size", "alignment"), [(0, 64), (-1, 64), (64, 32), (64, 96)])
def test_nonsense_is_refused(size, alignment):
    with pytest.raises(InvalidOption, match="must be"):
        Allocator(0, 4096).allocate(size, alignment=alignment)


@pytest.mark.parametrize(("base", "size"), [(1, 64), (0, 65), (-64, 64)])
def test_odd_ranges_are_refused(base, size):
    with pytest.raises(InvalidOption, match="multiple of 64"):
        Allocator(base, size)


def test_a_signal_handler_may_allocate_and_free_within_a_call():
    """At every line of allocate() and free(): nothing hangs, overlaps or gets lost."""
    lines = 0
    for at in itertools.count():
        allocator = Allocator(4096, SIZE)
        first, second = allocator.allocate(64), allocator.allocate(128)
        garbage = [allocator.allocate(256)]
        owned, passed = [], 0

        def trace(frame, event, _, at=at, allocator=allocator, second=second, owned=owned):
            nonlocal passed
            if frame.f_code.co_filename != memory.__file__:
                return None
            if event == "line":
                if passed == at:
                    sys.settrace(None)
                    second.free()
                    owned.append(allocator.allocate(64))
                passed += 1
            return trace

        sys.settrace(trace)
        try:
            garbage.clear()
            first.free()
            owned.append(allocator.allocate(64, top=True))
        finally:
            sys.settrace(None)
        if passed <= at:
            break
        lines += 1
        assert len({one.address for one in owned}) == 2 and all(one.live for one in owned)
        assert allocator.free_bytes == SIZE - 128
        owned.clear()
        assert (allocator.free_bytes, allocator.free_blocks) == (SIZE, 1)
    assert lines > 20


def test_an_allocation_is_split():
    memory = Allocator(0, 1024)
    whole = memory.allocate(512)
    parts = whole.split([64, 384, 64])
    assert [(part.address, part.size) for part in parts] == [(0, 64), (64, 384), (448, 64)]
    assert not whole.live and memory.free_bytes == 512
    whole.free()  # has nothing any more
    assert memory.free_bytes == 512
    parts[1].free()
    assert memory.free_bytes == 896 and memory.allocate(384).address == 64
    with pytest.raises(InvalidOption, match="add up to 64, not to 128"):
        parts[0].split([64, 64])
    with pytest.raises(DeviceClosed):
        whole.split([64, 384, 64])
    del parts
    assert memory.free_bytes >= 640
