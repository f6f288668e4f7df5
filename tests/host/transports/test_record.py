"""Record a session, replay it, and find the first difference."""

import json

import numpy as np
import pytest

from moeaccel.config import PRESETS
from moeaccel.host import errors, open_device
from moeaccel.host.transports.base import Transport
from moeaccel.host.transports.golden import GoldenTransport
from moeaccel.interface.registers import REGISTERS

rng = np.random.default_rng(1)
GATE_UP = rng.standard_normal((4, 64, 64), np.float32)
DOWN = rng.standard_normal((4, 64, 32), np.float32)
X = rng.standard_normal((9, 64), np.float32)
IDS, WEIGHTS = rng.integers(0, 4, (9, 2)), rng.random((9, 2), np.float32)


def session(spec, *, change=None, **options):
    """Run a session and return what it computed."""
    options = {"memory_bytes": 1 << 20} | options if spec == "golden" else options
    with open_device(spec, config="tiny", **options) as device:
        experts = device.load_experts(GATE_UP, DOWN)
        x = X.copy()
        if change is not None:
            x[change] += 1
        y = experts(x, IDS, WEIGHTS)
        with pytest.raises(errors.NonFiniteInput):
            experts(X * np.nan, IDS, WEIGHTS)
        device.reset()
        return y, device.counters()


@pytest.fixture
def recording(tmp_path):
    path = tmp_path / "session.jsonl"
    session("golden", record=path)
    return path


def test_a_session_is_replayed(tmp_path):
    path = tmp_path / "session.jsonl"
    y, counters = session("golden", record=path)
    again, replayed = session(f"replay:{path}")
    assert np.array_equal(again, y)
    assert replayed == counters
    assert np.array_equal(session("golden")[0], y)
    # Every line is JSON; weights are not in it.
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[-1] == {"call": "close", "result": None}
    assert path.stat().st_size < GATE_UP.nbytes


def test_a_replay_can_be_recorded(recording, tmp_path):
    copy = tmp_path / "copy.jsonl"
    session(f"replay:{recording}", record=copy)
    assert copy.read_text() == recording.read_text()


def test_a_session_that_crashed_is_recorded_as_far_as_it_came(tmp_path):
    path = tmp_path / "session.jsonl"
    device = open_device("golden", config="tiny", memory_bytes=1 << 20, record=path)
    device.counters()
    replayed = open_device(f"replay:{path}", config="tiny")
    assert replayed.counters() == device.counters()
    device.close()


def test_the_first_difference_is_named(recording):
    """Other inputs: the write that differs, by its line."""
    lines = [json.loads(line) for line in recording.read_text().splitlines()]
    with pytest.raises(errors.ReplayMismatch) as caught:
        session(f"replay:{recording}", change=0)
    number = int(str(caught.value).split("in line ")[1].split()[0])
    assert lines[number - 1]["call"] == "memory_write"
    assert f"count {lines[number - 1]['count']:#x}, blake2b" in str(caught.value)
    assert str(caught.value).count("memory_write(address") == 2


def test_other_calls(recording):
    message = r"memory_.*, not register_read\(address 0x"
    device = open_device(f"replay:{recording}", config="tiny")
    for call in (device.counters, device.reset, device.close):
        with pytest.raises(errors.ReplayMismatch, match=message):
            call()


def test_a_driver_that_asks_more(recording):
    lines = recording.read_text().splitlines()
    recording.write_text("\n".join(lines[:40]) + "\n")
    with pytest.raises(errors.ReplayMismatch, match="ends after 40 lines, but the driver asked"):
        session(f"replay:{recording}")


class Cut(Transport):
    """A device whose link breaks at one call."""

    def __init__(self, inner, at):
        self.inner, self.left = inner, at

    def _count(self):
        self.left -= 1
        if self.left == 0:
            raise errors.LinkLost("cut; call device.reset()")

    @property
    def memory_bytes(self):
        return self.inner.memory_bytes

    def register_read(self, address):
        self._count()
        return self.inner.register_read(address)

    def register_write(self, address, value):
        self._count()
        self.inner.register_write(address, value)

    def memory_read(self, address, count):
        self._count()
        return self.inner.memory_read(address, count)

    def memory_write(self, address, data):
        self._count()
        self.inner.memory_write(address, data)

    def wait_interrupt(self, timeout_s):
        return self.inner.wait_interrupt(timeout_s)

    def reconnect(self):
        return self.left <= 0

    def close(self):
        self.inner.close()


def test_errors_are_replayed(tmp_path):
    path = tmp_path / "session.jsonl"
    cut = Cut(GoldenTransport(PRESETS["tiny"], memory_bytes=1 << 20), 40)
    found = []
    for spec, options in ((cut, {"record": path}), (f"replay:{path}", {})):
        with open_device(spec, config="tiny", **options) as device:
            with pytest.raises(errors.LinkLost, match="cut"):
                device.load_experts(GATE_UP, DOWN)
            device.reset()
            found.append(device.load_experts(GATE_UP, DOWN)(X, IDS, WEIGHTS))
    assert np.array_equal(*found)


@pytest.mark.parametrize(("text", "kind", "message"), [
    ("", errors.ReplayMismatch, "ends after 0 lines"),
    ("hello\n", errors.RecordingError, "line 1 of .* must be a JSON object, not 'hello'"),
    ("{}\n", errors.RecordingError, "must begin as a recording of version 2"),
    ('{"format": "moeaccel recording", "version": 2}\n', errors.RecordingError, "record the"),
])
def test_files_that_are_no_recordings(tmp_path, text, kind, message):
    path = tmp_path / "file"
    path.write_text(text)
    with pytest.raises(kind, match=message):
        open_device(f"replay:{path}")


def test_bad_files(tmp_path, recording):
    with pytest.raises(errors.RecordingError, match="replay must name a recording"):
        open_device(f"replay:{tmp_path / 'nowhere'}")
    with pytest.raises(errors.RecordingError, match="record must name a file that can be written"):
        open_device("golden", config="tiny", memory_bytes=1 << 20, record=tmp_path)
    with pytest.raises(errors.ConfigMismatch, match="must be of config 'small', not 'tiny'"):
        open_device(f"replay:{recording}")
    with pytest.raises(errors.InvalidOption, match="memory_bytes must be left out for replay"):
        open_device(f"replay:{recording}", memory_bytes=1 << 20)
    lines = recording.read_text().splitlines()
    at, line = next((k, json.loads(text)) for k, text in enumerate(lines) if "memory_read" in text)
    lines[at] = json.dumps(line | {"result": "AAAA"})
    recording.write_text("\n".join(lines))
    with pytest.raises(errors.RecordingError, match=f"line {at + 1} of .* compressed bytes"):
        open_device(f"replay:{recording}", config="tiny").load_experts(GATE_UP, DOWN)


def test_closed(recording):
    device = open_device(f"replay:{recording}", config="tiny")
    transport = device.transport
    device.transport.close()
    with pytest.raises(errors.DeviceClosed):
        transport.register_read(REGISTERS["ID"].address)
