"""Frame headers and cutting: one way to cut a message, and nothing else is believed."""

import random
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from molink.core.errors import WireError
from molink.core.ids import HEAD, Address, NodeId, Port
from molink.wire.frames import (
    HEADER_SIZE,
    MAX_MESSAGE,
    MAX_PAYLOAD,
    PROTOCOL_VERSION,
    FrameHeader,
    Kind,
    Priority,
    cut,
)

quick = settings(deadline=None, max_examples=60)

ENGINE, STAGE = Address(HEAD, Port.ENGINE), Address(NodeId(7), Port.STAGE)
addresses = st.builds(Address, st.integers(0, 0xFFFF).map(NodeId), st.sampled_from(sorted(Port)))
sizes = st.sampled_from([0, 1, 1000, MAX_PAYLOAD - 1, MAX_PAYLOAD, MAX_PAYLOAD + 1]) | st.integers(
    0, 3 * MAX_PAYLOAD
)


@st.composite
def headers(draw: st.DrawFn) -> FrameHeader:
    total = draw(st.integers(0, MAX_MESSAGE))
    offset = MAX_PAYLOAD * draw(st.integers(0, max(total - 1, 0) // MAX_PAYLOAD))
    return FrameHeader(
        draw(st.sampled_from(Kind)),
        draw(st.sampled_from(Priority)),
        draw(addresses),
        draw(addresses),
        rank=draw(st.integers(0, 0xFF)),
        epoch=draw(st.integers(0, 2**32 - 1)),
        sequence=draw(st.integers(0, 2**64 - 1)),
        offset=offset,
        total=total,
        length=min(MAX_PAYLOAD, total - offset),
    )


def piece(offset: int, total: int, length: int) -> bytes:
    return FrameHeader(
        Kind.STEP, Priority.DECODE, ENGINE, STAGE, 0, 1, 1, offset, total, length
    ).pack()


def random_parts(lengths: list[int]) -> list[memoryview]:
    source = random.Random(0)
    return [memoryview(source.randbytes(length)) for length in lengths]


@given(header=headers())
def test_a_header_comes_back(header: FrameHeader) -> None:
    packed = header.pack()
    assert len(packed) == HEADER_SIZE
    assert FrameHeader.unpack(packed + b"payload") == header


@given(data=st.binary(max_size=2 * HEADER_SIZE) | st.binary(min_size=39).map(b"\1".__add__))
def test_foreign_bytes_are_a_header_or_a_wire_error(data: bytes) -> None:
    with suppress(WireError):
        assert_is_a_piece(FrameHeader.unpack(data))


@given(header=headers(), at=st.integers(0, HEADER_SIZE - 1), bit=st.integers(0, 7))
def test_damaged_headers_are_a_header_or_a_wire_error(
    header: FrameHeader, at: int, bit: int
) -> None:
    data = bytearray(header.pack())
    with pytest.raises(WireError, match="shorter"):
        FrameHeader.unpack(data[:at])
    data[at] ^= 1 << bit
    with suppress(WireError):
        assert_is_a_piece(FrameHeader.unpack(data))


def assert_is_a_piece(header: FrameHeader) -> None:
    assert 0 <= header.length <= MAX_PAYLOAD
    assert header.offset + header.length <= header.total <= MAX_MESSAGE
    assert header.length == MAX_PAYLOAD or header.offset + header.length == header.total
    assert header.length or not header.total  # no piece without progress


@pytest.mark.parametrize(
    ("offset", "total", "length"),
    [
        (0, MAX_MESSAGE + 1, MAX_PAYLOAD),
        (0, 2 * MAX_PAYLOAD, MAX_PAYLOAD + 1),
        (0, 2 * MAX_PAYLOAD, 2 * MAX_PAYLOAD),
        (MAX_PAYLOAD, MAX_PAYLOAD + 5, 6),
        (0, 10, 9),  # more pieces than needed
        (0, 10, 0),
        (1, 10, 9),
        (10, 10, 0),
        (MAX_PAYLOAD, MAX_PAYLOAD, 0),
        (MAX_PAYLOAD, 0, 0),
        (MAX_PAYLOAD, 10, 2**32 - MAX_PAYLOAD),
    ],
)
def test_a_piece_that_cut_never_makes_is_refused(offset: int, total: int, length: int) -> None:
    with pytest.raises(WireError, match="out of bounds"):
        FrameHeader.unpack(piece(offset, total, length))


@pytest.mark.parametrize(
    ("byte", "says"),
    [(0, f"version 99, expected {PROTOCOL_VERSION}"), (1, "Kind"), (2, "Priority"), (3, "Port")],
)
def test_an_unknown_version_kind_priority_or_port_is_named(byte: int, says: str) -> None:
    data = bytearray(piece(0, 0, 0))
    data[byte] = 99
    with pytest.raises(WireError, match=says):
        FrameHeader.unpack(data)


@quick
@given(lengths=st.lists(sizes, max_size=6))
def test_the_pieces_of_a_message_are_its_bytes_in_order(lengths: list[int]) -> None:
    parts = random_parts(lengths)
    frames = list(
        cut(Kind.CALL, Priority.BULK, ENGINE, STAGE, parts, epoch=3, sequence=2**40, rank=2)
    )
    assert b"".join(p for _, pieces in frames for p in pieces) == b"".join(parts)
    total = sum(lengths)
    unpacked = [FrameHeader.unpack(header) for header, _ in frames]
    assert [header.offset for header in unpacked] == list(range(0, total or 1, MAX_PAYLOAD))
    for header, (_, pieces) in zip(unpacked, frames, strict=True):
        assert header.total == total
        assert header.length == sum(len(p) for p in pieces)
        assert (header.kind, header.priority) == (Kind.CALL, Priority.BULK)
        assert (header.source, header.destination) == (ENGINE, STAGE)
        assert (header.epoch, header.sequence, header.rank) == (3, 2**40, 2)


def test_cutting_copies_nothing_and_leaves_the_parts_alone() -> None:
    data = bytes(3 * MAX_PAYLOAD)
    parts = [memoryview(data), memoryview(b"end")]
    frames = cut(Kind.ACTIVATIONS, Priority.PREFILL, STAGE, STAGE, parts)
    assert [p.obj for _, pieces in frames for p in pieces] == [data, data, data, b"end"]
    assert len(parts) == 2


def test_an_empty_message_is_one_empty_frame() -> None:
    ((header, pieces),) = cut(Kind.CONTROL, Priority.CONTROL, ENGINE, STAGE, [])
    assert pieces == []
    assert FrameHeader.unpack(header).total == 0


def test_a_message_beyond_the_limit_is_refused_at_its_sender() -> None:
    mebibyte = memoryview(bytes(1 << 20))
    with pytest.raises(WireError, match=str(MAX_MESSAGE)):
        next(cut(Kind.CALL, Priority.BULK, ENGINE, STAGE, [mebibyte] * 1025))
