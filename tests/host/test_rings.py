import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from moeaccel.host.errors import CompletionLost, InvalidOption
from moeaccel.host.memory import Allocator
from moeaccel.host.rings import Command, CommandRings
from moeaccel.host.transports import Transport
from moeaccel.interface.commands import COMPLETION, ENTRY_BYTES, SUBMISSION, Opcode, decode, encode
from moeaccel.interface.registers import REGISTERS

NAMES = {register.address: name for name, register in REGISTERS.items()}


class Endpoint(Transport):
    """The device's end of the rings; a test says when it completes what, and in which order."""

    def __init__(self):
        self.memory = np.zeros(1 << 16, np.uint8)
        self.registers = {"CQ_TAIL": 0}
        self.head = self.tail = 0
        self.phase = 1

    memory_bytes = 1 << 16

    def register_read(self, address):
        return self.registers[NAMES[address]]

    def register_write(self, address, value):
        self.registers[NAMES[address]] = value

    def memory_read(self, address, count):
        return self.memory[address : address + count].copy()

    def memory_write(self, address, data):
        self.memory[address : address + len(data)] = np.frombuffer(bytes(data), np.uint8)

    def wait_interrupt(self, timeout_s):
        return True

    def close(self):
        pass

    def fetch(self):
        if self.head == self.registers["SQ_TAIL"]:
            return None
        at = self.registers["SQ_BASE_LO"] + ENTRY_BYTES * self.head
        self.head = (self.head + 1) % (1 << self.registers["RING_LOG2"])
        return decode(SUBMISSION, self.memory_read(at, ENTRY_BYTES).tobytes())

    def complete(self, tag, *, written=ENTRY_BYTES, acknowledged=True):
        """Write so many bytes of a completion; its index advances when that is acknowledged."""
        entries = 1 << self.registers["RING_LOG2"]
        assert (self.tail + 1) % entries != self.registers["CQ_HEAD"], "no room for a completion"
        values = {"tag": tag, "phase": self.phase, "cycles": tag * 10, "underflows": tag * 3}
        at = self.registers["CQ_BASE_LO"] + ENTRY_BYTES * self.tail
        self.memory_write(at, encode(COMPLETION, values)[:written])
        if not acknowledged:
            return
        self.tail = (self.tail + 1) % entries
        self.phase ^= self.tail == 0
        self.registers["CQ_TAIL"] = self.tail


def rings_on(endpoint, entries_log2):
    rings = CommandRings(endpoint, Allocator(4096, 1 << 15), entries_log2=entries_log2)
    rings.reset()
    return rings


def goes_on(rings, endpoint):
    """Check that every entry of the completion ring comes back before it is needed."""
    for _ in range(2 * rings.entries):
        tag = rings.submit({})
        endpoint.complete(tag)
        assert [c.tag for c in rings.take()] == [tag]


@settings(deadline=None)
@given(st.integers(1, 4), st.lists(st.integers(0, 3), max_size=150), st.randoms())
def test_what_goes_in_comes_out_once(entries_log2, script, random):
    """0, 1: submit; 2: the device completes one of what it fetched; 3: take."""
    endpoint = Endpoint()
    rings = rings_on(endpoint, entries_log2)
    submitted, fetched, completed, taken = [], [], [], []
    for step in script:
        if step < 2 and not rings.full:
            submitted.append(rings.submit({"opcode": Opcode.NOP, "tokens": len(submitted)}))
        elif step == 2:
            while (entry := endpoint.fetch()) is not None:
                assert entry["tokens"] == submitted.index(entry["tag"])
                fetched.append(entry["tag"])
            if fetched:
                completed.append(fetched.pop(random.randrange(len(fetched))))
                endpoint.complete(completed[-1])
        elif step == 3:
            new = rings.take()
            assert [c.cycles for c in new] == [10 * c.tag for c in new]
            assert [c.underflows for c in new] == [3 * c.tag for c in new]
            taken += [c.tag for c in new]
            assert taken == completed
        assert rings.in_flight == len(submitted) - len(taken)


def test_a_full_ring_refuses():
    rings = rings_on(Endpoint(), 2)
    for _ in range(3):
        rings.submit({})
    assert rings.full
    with pytest.raises(InvalidOption, match="must have room, but all 3"):
        rings.submit({})


def test_tags_in_use_are_not_given_again():
    endpoint = Endpoint()
    rings = rings_on(endpoint, 2)
    first = rings.submit({})
    rings._tag = first
    assert rings.submit({}) != first
    rings._tag = 0xFFFF
    assert rings.submit({}) == 0xFFFF
    assert rings._tag == 0


def test_a_completion_is_taken_when_it_is_whole():
    """With a narrow port its phase is in memory beats before the rest of it."""
    endpoint = Endpoint()
    rings = rings_on(endpoint, 2)
    rings.submit({})
    tag = rings.submit({})
    assert tag != 0  # cycles are ten times the tag
    endpoint.complete(tag, written=8, acknowledged=False)
    assert rings.take() == []
    endpoint.complete(tag)
    assert [(c.tag, c.cycles) for c in rings.take()] == [(tag, 10 * tag)]


def test_a_completion_that_was_not_written_does_not_hide_others(caplog):
    endpoint = Endpoint()
    rings = rings_on(endpoint, 2)
    lost, tag = rings.submit({}), rings.submit({})
    endpoint.complete(lost, written=0)
    endpoint.complete(tag)
    assert [c.tag for c in rings.take()] == [lost, tag]
    assert rings.in_flight == 0
    goes_on(rings, endpoint)
    assert "completion 0, of tag 0, was not written" in caplog.text


def test_the_oldest_command_is_the_one_whose_completion_was_not_written():
    endpoint = Endpoint()
    rings = rings_on(endpoint, 2)
    commands = [Command(name) for name in ("first", "second", "third")]
    tags = [rings.submit({}, command) for command in commands]
    endpoint.complete(tags[0])
    endpoint.complete(tags[1], written=0)
    endpoint.complete(tags[2])
    rings.take()
    assert commands[0].error() is commands[2].error() is None
    assert isinstance(commands[1].error(), CompletionLost)
    assert not rings.full


def test_completions_of_strangers_are_dropped(caplog):
    endpoint = Endpoint()
    rings = rings_on(endpoint, 2)
    tag = rings.submit({})
    endpoint.complete(777)
    endpoint.complete(tag)
    assert [c.tag for c in rings.take()] == [tag]
    assert "unknown tag 777" in caplog.text
    goes_on(rings, endpoint)
