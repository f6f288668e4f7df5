"""Frames of the serial link: what they cost, and what survives damage."""

import random

import pytest
from hypothesis import given, strategies as st

from moeaccel.interface.link import (
    HELLO_BYTES,
    MAX_PAYLOAD,
    FrameReader,
    Hello,
    LinkError,
    Opcode,
    Reply,
    Request,
    Status,
    frame,
)

LENGTHS = [0, 1, 245, 246, 247, 248, 249, 250, 251, 252, 253, 254, 255, 500, 504, 508, MAX_PAYLOAD]


def contents(data):
    return list(FrameReader().feed(data))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("fill", [b"\0", b"\1", b"\xff"])
def test_uniform_contents(length, fill):
    content = fill * length
    sent = frame(content)
    assert sent.index(0) == len(sent) - 1
    assert contents(sent) == [content]


@given(st.binary(max_size=600), st.integers(1, 20))
def test_round_trip_in_any_pieces(content, piece):
    sent = frame(content)
    assert len(sent) <= len(content) + 4 + (len(content) + 4) // 254 + 2
    reader = FrameReader()
    pieces = [sent[i : i + piece] for i in range(0, len(sent), piece)]
    assert [c for p in pieces for c in reader.feed(p)] == [content]
    assert reader.damaged == 0


@pytest.mark.parametrize("damage", ["flip", "lose", "double", "cut"])
def test_damage_costs_the_frame_and_at_most_the_next_one(damage):
    """Whatever happens to one byte, no wrong content comes out, and the third frame is intact."""
    rng = random.Random(1)
    frames = [rng.randbytes(rng.choice([8, 40, 520])) for _ in range(3)]
    first, second, third = (frame(content) for content in frames)
    for at in range(len(first)):
        match damage:
            case "flip":
                bad = first[:at] + bytes([first[at] ^ 1 << rng.randrange(8)]) + first[at + 1 :]
            case "lose":
                bad = first[:at] + first[at + 1 :]
            case "double":
                bad = first[: at + 1] + first[at:]
            case "cut":
                bad = first[:at]
        found = [c for c in contents(bad + second + third) if c is not None]
        assert found[-1] == frames[2]
        assert [c for c in found if c not in frames] == []
        if damage == "cut":
            assert contents(bad + b"\0" + second)[-1] == frames[1]


def test_a_recording_inside_a_frame_is_no_frame():
    """A frame as the payload of a frame that lost its first bytes."""
    inner = frame(
        Request(number=0, opcode=Opcode.REGISTER_WRITE, count=4, payload=b"evil").content())
    outer = frame(Request(number=1, opcode=Opcode.MEMORY_WRITE, count=len(inner),
                          payload=inner).content())
    for at in range(1, len(outer)):
        assert [c for c in contents(outer[at:]) if c is not None] == []


def test_endless_noise_is_not_kept():
    reader = FrameReader()
    for _ in range(100):
        assert list(reader.feed(b"\x55" * 1000)) == []
    assert len(reader._partial) <= 4 * MAX_PAYLOAD
    assert list(reader.feed(b"\0" + frame(b"good"))) == [None, b"good"]
    assert reader.damaged == 1


@pytest.mark.parametrize("request_", [
    Request(number=255, opcode=Opcode.HELLO, attempt=15, count=HELLO_BYTES, address=0xFFFF_FFFF),
    Request(number=0, opcode=Opcode.MEMORY_READ, count=512),
    Request(number=7, opcode=Opcode.MEMORY_WRITE, count=3, address=1, payload=b"abc"),
    Request(number=7, opcode=13, count=1, address=1, payload=b"a"),
])
def test_requests(request_):
    assert Request.parse(request_.content()) == request_


@pytest.mark.parametrize("status", Status)
@pytest.mark.parametrize("interrupt", [False, True])
def test_replies(status, interrupt):
    reply = Reply(number=3, opcode=Opcode.MEMORY_READ, attempt=9, status=status,
                  interrupt=interrupt, expected=200, payload=b"xyz")
    assert Reply.parse(reply.content()) == reply


def test_hello():
    hello = Hello(nonce=0x1234_5678, memory_bytes=1 << 25)
    assert len(hello.payload()) == HELLO_BYTES
    assert Hello.parse(hello.payload()) == hello


@pytest.mark.parametrize(("parse", "content", "message"), [
    (Request.parse, b"1234567", "request must have at least 8 bytes, not 7"),
    (Request.parse, bytes([0, 3, 5, 0, 0, 0, 0, 0, 1]), "payload must have 5 bytes .*, not 1"),
    (Request.parse, bytes([0, 2, 5, 0, 0, 0, 0, 0, 1]), "payload must have 0 bytes .*, not 1"),
    (Reply.parse, b"123", "reply must have at least 4 bytes, not 3"),
    (Reply.parse, bytes([0, 2, 9, 0]), r"status must be one of \[0, .*\], not 9"),
    (Hello.parse, b"1234", "hello must have 8 bytes, not 4"),
])
def test_what_is_no_frame_of_this_protocol(parse, content, message):
    with pytest.raises(LinkError, match=message):
        parse(content)


def test_opcodes_that_write():
    assert [o for o in Opcode if o.writes] == [Opcode.MEMORY_WRITE, Opcode.REGISTER_WRITE]
