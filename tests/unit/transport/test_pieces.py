"""Messages of a link: frames come out as they went in, and nothing else does."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from molink.core.errors import WireError
from molink.core.ids import HEAD, Address, NodeId, Port
from molink.transport.pieces import RECEIPT, Reassembly, join, pack_receipt, split_receipt
from molink.transport.window import Receipt
from molink.wire.frames import HEADER_SIZE, FrameHeader, Kind, Priority

quick = settings(deadline=None, max_examples=100)
STAGE = Address(NodeId(1), Port.STAGE)
seconds = st.floats(0, 1e8)


def frame(number: int, length: int, lane: Priority = Priority.DECODE) -> bytes:
    source = Address(HEAD, Port.ENGINE)
    header = FrameHeader(Kind.STEP, lane, source, STAGE, 0, 1, number, 0, length, length)
    return header.pack() + bytes([number % 256]) * length


def cut_up(data: bytes, lane: Priority, size: int) -> list[bytes]:
    view = memoryview(data)
    return [join(lane, view[at : at + size]) for at in range(0, len(data), size)]


def taken(messages: list[bytes]) -> list[bytes]:
    reassembly = Reassembly()
    return [data for message in messages for _, data in reassembly.take(message)]


@quick
@given(sizes=st.lists(st.integers(0, 300), min_size=1, max_size=20))
def test_joined_frames_are_taken_apart(sizes: list[int]) -> None:
    frames = [frame(number, size) for number, size in enumerate(sizes)]
    apart = list(Reassembly().take(b"".join(frames)))
    assert [data for _, data in apart] == frames
    assert [header.sequence for header, _ in apart] == list(range(len(sizes)))


@quick
@given(
    lanes=st.dictionaries(
        st.sampled_from(Priority),
        st.lists(st.tuples(st.integers(0, 300), st.integers(1, 400)), max_size=5),
    ),
    source=st.randoms(use_true_random=False),
)
def test_pieces_of_all_classes_may_be_mixed(
    lanes: dict[Priority, list[tuple[int, int]]], source: random.Random
) -> None:
    frames = {lane: [frame(n, size, lane) for n, (size, _) in enumerate(of)]
              for lane, of in lanes.items()}  # fmt: skip
    waiting = {
        lane: [piece for data, (_, size) in zip(frames[lane], of, strict=True)
               for piece in cut_up(data, lane, size)]
        for lane, of in lanes.items()
    }  # fmt: skip
    messages = []
    while left := [lane for lane, pieces in waiting.items() if pieces]:
        messages.append(waiting[source.choice(left)].pop(0))
    back: dict[Priority, list[bytes]] = {lane: [] for lane in lanes}
    for data in taken(messages):
        back[FrameHeader.unpack(data).priority].append(data)
    assert back == frames


WHOLE, LANE = frame(1, 100), Priority.DECODE
FIRST = join(LANE, memoryview(WHOLE)[:50])
BAD = {
    "nothing": [b""],
    "half a frame": [WHOLE[:-1]],
    "more than a frame": [WHOLE + b"x"],
    "a message of no kind": [b"\x70" + WHOLE],
    "an empty piece": [join(LANE, memoryview(b""))],
    "a piece that is longer than its frame": [FIRST, join(LANE, memoryview(bytes(200)))],
    "a piece of another class": [join(Priority.BULK, memoryview(WHOLE)[:50])],
    "a piece without a header": [join(LANE, memoryview(b"\xfe" * HEADER_SIZE))],
    "a frame before the rest of another": [FIRST, WHOLE],
}


@pytest.mark.parametrize("bad", BAD)
def test_what_breaks_the_protocol_is_refused(bad: str) -> None:
    with pytest.raises(WireError):
        taken(BAD[bad])


@quick
@given(
    sizes=st.lists(st.integers(0, 100), min_size=1, max_size=5),
    cut=st.none() | st.integers(1, 80),
    source=st.randoms(use_true_random=False),
)
def test_damaged_messages_are_whole_frames_or_a_wire_error(
    sizes: list[int], cut: int | None, source: random.Random
) -> None:
    frames = [frame(number, size) for number, size in enumerate(sizes)]
    messages = [bytearray(b"".join(frames))]
    if cut is not None:
        messages = [bytearray(piece) for data in frames for piece in cut_up(data, LANE, cut)]
    damaged = source.choice(messages)
    damaged[source.randrange(len(damaged))] ^= 1 << source.randrange(8)
    reassembly, most = Reassembly(), sum(map(len, messages))
    try:
        for message in messages:
            for header, data in reassembly.take(bytes(message)):
                assert len(data) == HEADER_SIZE + header.length <= most
    except WireError:
        pass


@given(
    receipt=st.builds(Receipt, st.integers(0, 2**64 - 1), st.floats(-1e15, 1e15), seconds),
    paused=st.frozensets(st.sampled_from(Priority)),
    message=st.binary(max_size=40),
)
def test_a_receipt_comes_back_and_what_follows_it(
    receipt: Receipt, paused: frozenset[Priority], message: bytes
) -> None:
    data = pack_receipt(receipt, paused) + message
    assert data[0] == RECEIPT
    assert split_receipt(data) == (receipt, paused, message)


@given(data=st.binary(max_size=40))
def test_other_bytes_are_no_receipt_or_a_sound_one(data: bytes) -> None:
    try:
        receipt, paused, message = split_receipt(bytes([RECEIPT]) + data)
    except WireError:
        return
    assert pack_receipt(receipt, paused)[1:] + message == data
    assert receipt.held_s >= 0


@pytest.mark.parametrize("held_s", [-1.0, float("nan"), float("inf")])
def test_a_receipt_s_times_are_numbers(held_s: float) -> None:
    for receipt in (Receipt(1, 0.0, held_s), Receipt(1, held_s if held_s != -1 else 1e16, 0.0)):
        with pytest.raises(WireError):
            split_receipt(pack_receipt(receipt, ()))
