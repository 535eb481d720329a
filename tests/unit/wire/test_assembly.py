"""Messages from frames: whole or not at all, and never for free."""

import random
import tracemalloc
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from molink.core.ids import HEAD, Address, NodeId, Port
from molink.wire.assembly import TRUST, Assembler, Message
from molink.wire.frames import MAX_MESSAGE, MAX_PAYLOAD, FrameHeader, Kind, Priority, cut

quick = settings(deadline=None, max_examples=50)

STAGE = Address(NodeId(1), Port.STAGE)
OTHER = Address(NodeId(2), Port.STAGE)
Frame = tuple[FrameHeader, bytes]
NOISE = random.Random(0).randbytes(4 * MAX_PAYLOAD)

lengths = st.sampled_from([0, 1, MAX_PAYLOAD - 1, MAX_PAYLOAD, MAX_PAYLOAD + 1]) | st.integers(
    0, 3 * MAX_PAYLOAD
)


def payload(sequence: int, length: int) -> bytes:
    """Bytes unlike those of the other messages."""
    return NOISE[sequence : sequence + length]


def frames(
    sequence: int,
    data: bytes,
    *,
    kind: Kind = Kind.ACTIVATIONS,
    epoch: int = 1,
    parts: int = 1,
    source: Address = STAGE,
) -> list[Frame]:
    step = len(data) // parts + 1
    views = [memoryview(data)[at : at + step] for at in range(0, len(data), step)]
    pieces = cut(kind, Priority.DECODE, source, STAGE, views, epoch=epoch, sequence=sequence)
    return [(FrameHeader.unpack(header), b"".join(piece)) for header, piece in pieces]


def announcement(number: int, source: Address, rank: int = 0) -> Frame:
    """The first piece of the longest message there is."""
    header = FrameHeader(
        *(Kind.STEP, Priority.DECODE, source, STAGE, rank, 1, number, 0, MAX_MESSAGE, MAX_PAYLOAD)
    )
    return header, payload(number, MAX_PAYLOAD)


def feed(assembler: Assembler, stream: Iterable[Frame]) -> list[Message]:
    """What comes out, with the books checked after every frame."""
    messages = []
    for header, data in stream:
        assembler.buffer(header)[:] = data
        message = assembler.commit(header)
        assembler.check_conservation()
        if message is not None:
            messages.append(message)
    return messages


def interleave(streams: list[list[Frame]], source: random.Random) -> list[Frame]:
    turns = [index for index, stream in enumerate(streams) for _ in stream]
    source.shuffle(turns)
    iterators = [iter(stream) for stream in streams]
    return [next(iterators[turn]) for turn in turns]


@quick
@given(
    sizes=st.lists(st.tuples(lengths, st.integers(1, 5)), max_size=5),
    source=st.randoms(use_true_random=False),
)
def test_cutting_and_assembling_is_the_identity_in_any_interleaving(
    sizes: list[tuple[int, int]], source: random.Random
) -> None:
    sent = {number: payload(number, size) for number, (size, _) in enumerate(sizes)}
    streams = [frames(number, sent[number], parts=parts) for number, (_, parts) in enumerate(sizes)]
    assembler = Assembler(MAX_MESSAGE)
    messages = feed(assembler, interleave(streams, source))
    assert {message.sequence: message.payload for message in messages} == sent
    assert len(messages) == len(sent)
    assert assembler._open_bytes == assembler.skipped == 0


@quick
@given(
    sizes=st.lists(lengths, min_size=1, max_size=4),
    source=st.randoms(use_true_random=False),
    losses=st.sets(st.integers(0, 12)),
)
def test_a_message_that_lost_a_piece_is_missing_and_no_other(
    sizes: list[int], source: random.Random, losses: set[int]
) -> None:
    streams = [frames(number, payload(number, size)) for number, size in enumerate(sizes)]
    stream = interleave(streams, source)
    lost = {header.sequence for at, (header, _) in enumerate(stream) if at in losses}
    arrived = [frame for at, frame in enumerate(stream) if at not in losses]
    messages = feed(Assembler(MAX_MESSAGE), arrived)
    whole = {number: payload(number, size) for number, size in enumerate(sizes)}
    assert {message.sequence: message.payload for message in messages} == {
        number: data for number, data in whole.items() if number not in lost
    }


@quick
@given(
    pieces=st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 2), st.booleans()),
        max_size=25,
    )
)
def test_a_hostile_sender_gets_no_more_memory_than_the_bound(
    pieces: list[tuple[int, int, int, bool]],
) -> None:
    bound = 20 * MAX_PAYLOAD
    assembler = Assembler(bound)
    for sequence, index, epoch, is_huge in pieces:
        total = MAX_MESSAGE if is_huge else 3 * MAX_PAYLOAD + 1
        offset = index * MAX_PAYLOAD
        length = min(MAX_PAYLOAD, total - offset)
        header = FrameHeader(
            *(Kind.STEP, Priority.DECODE, STAGE, STAGE, 0, epoch, sequence, offset, total, length)
        )
        feed(assembler, [(header, payload(0, length))])
        assert assembler._open_bytes <= bound


def test_a_message_carries_what_its_header_said_and_is_writable() -> None:
    views = [memoryview(b"tensor")]
    ((header, _),) = cut(
        Kind.RESULT, Priority.DECODE, STAGE, Address(HEAD, Port.ENGINE), views, epoch=4, sequence=9,
        rank=2,
    )  # fmt: skip
    (message,) = feed(Assembler(0x1000), [(FrameHeader.unpack(header), b"tensor")])
    assert message == (Kind.RESULT, STAGE, 2, 4, 9, bytearray(b"tensor"))
    message.payload[0] = 0


def test_a_huge_announcement_costs_in_proportion_to_what_has_arrived() -> None:
    first = announcement(1, STAGE)
    assembler = Assembler(2 * MAX_MESSAGE)
    tracemalloc.start()
    assert feed(assembler, [first]) == []
    assert tracemalloc.get_traced_memory()[1] < (TRUST + 1) * MAX_PAYLOAD
    tracemalloc.stop()


def test_a_node_that_passes_the_bound_loses_what_it_has_begun() -> None:
    assembler = Assembler(8 * len(NOISE))
    begun = [frames(number, NOISE) for number in range(9)]
    assert feed(assembler, [pieces[0] for pieces in begun]) == []
    assert assembler._open_bytes == 0
    assert assembler.dropped == 9
    assert feed(assembler, [frame for pieces in begun for frame in pieces[1:]]) == []
    (message,) = feed(assembler, frames(99, NOISE))
    assert message.payload == NOISE


def test_a_message_larger_than_the_bound_is_dropped_alone() -> None:
    assembler = Assembler(2 * len(NOISE))
    messages = feed(assembler, [*frames(1, NOISE * 3), *frames(2, NOISE)])
    assert [message.sequence for message in messages] == [2]
    assert assembler.dropped == 1


@pytest.mark.parametrize("begins", range(4))
def test_a_node_that_fills_the_bound_takes_no_room_from_another(begins: int) -> None:
    """Whatever port and rank it writes into its headers."""
    assembler = Assembler(8 * TRUST * MAX_PAYLOAD)
    ports, honest = list(Port), frames(7, NOISE, source=OTHER)
    assert feed(assembler, honest[:begins]) == []
    for number in range(512):
        source = Address(STAGE.node, ports[number % 4])
        assert feed(assembler, [announcement(number, source, rank=number % 256)]) == []
    (message,) = feed(assembler, honest[begins:])
    assert message.payload == NOISE
    assert assembler.dropped > 500


@quick
@given(
    greedy=st.lists(st.sampled_from([3, 4]), max_size=60),
    source=st.randoms(use_true_random=False),
)
def test_a_node_within_its_share_of_the_bound_loses_nothing(
    greedy: list[int], source: random.Random
) -> None:
    hostile = [
        announcement(number, Address(NodeId(node), Port.STAGE))
        for number, node in enumerate(greedy)
    ]
    stream = interleave([hostile, frames(1, NOISE)], source)
    (message,) = feed(Assembler(3 * len(NOISE)), stream)
    assert message.payload == NOISE


def test_a_long_message_grows() -> None:
    data = NOISE * TRUST
    (message,) = feed(Assembler(MAX_MESSAGE), frames(1, data))
    assert message.payload == data


def test_a_message_that_begins_again_replaces_its_unfinished_self() -> None:
    """A process was killed in mid-message; its successor counts from the same number."""
    assembler = Assembler(MAX_MESSAGE)
    old, new = bytes(2 * MAX_PAYLOAD), NOISE[: MAX_PAYLOAD + 7]
    assert feed(assembler, frames(1, old)[:1]) == []
    (message,) = feed(assembler, frames(1, new))
    assert message.payload == new
    assert assembler._open_bytes == 0


def test_a_new_epoch_forgets_unfinished_messages_of_older_ones_but_no_control() -> None:
    assembler = Assembler(MAX_MESSAGE)
    old = frames(1, NOISE, epoch=1)
    control = frames(0, NOISE, kind=Kind.CONTROL, epoch=0)
    assert feed(assembler, [old[0], control[0]]) == []
    (message,) = feed(assembler, frames(2, b"x", epoch=2))
    assert message.epoch == 2
    assert assembler._open_bytes == len(NOISE)
    assert feed(assembler, old[1:]) == []
    assert assembler.skipped == 3
    (message,) = feed(assembler, control[1:])
    assert message.payload == NOISE


@pytest.mark.parametrize(("node", "is_forgotten"), [(HEAD, True), (OTHER.node, False)])
def test_only_the_head_begins_an_epoch_for_others(node: NodeId, is_forgotten: bool) -> None:
    assembler = Assembler(MAX_MESSAGE)
    old = frames(1, NOISE)
    assert feed(assembler, old[:1]) == []
    newer = frames(2, b"x", epoch=2, source=Address(node, Port.STAGE))
    assert len(feed(assembler, newer)) == 1
    assert len(feed(assembler, old[1:])) == (0 if is_forgotten else 1)


def test_the_same_number_from_elsewhere_is_another_message() -> None:
    one, two = frames(1, NOISE[: MAX_PAYLOAD + 1]), frames(1, NOISE, kind=Kind.CALL)
    messages = feed(Assembler(MAX_MESSAGE), [one[0], two[0], one[1], *two[1:]])
    assert [message.kind for message in messages] == [Kind.ACTIVATIONS, Kind.CALL]
