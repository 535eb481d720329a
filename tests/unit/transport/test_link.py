"""A link over the in-memory twin of its stream: both directions, and every way to end."""

import asyncio
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace

import grpc.aio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from molink.core.errors import LinkError, WireError
from molink.core.ids import HEAD, Address, NodeId, Port
from molink.transport.link import Link
from molink.transport.memory import CAPACITY, MemoryStream, memory_streams
from molink.transport.pieces import join, pack_receipt, split_receipt
from molink.transport.queue import HIGH_WATER
from molink.transport.window import (
    FEW_BYTES,
    FIRST_PIECE,
    LEAST_PIECE,
    RECEIPT_INTERVAL_S,
    Receipt,
)
from molink.wire.frames import HEADER_SIZE, MAX_PAYLOAD, FrameHeader, Kind, Priority

quick = settings(deadline=None, max_examples=50)

NODE = NodeId(1)
ENGINE, STAGE = Address(HEAD, Port.ENGINE), Address(NODE, Port.STAGE)


def frame(number: int, length: int = 0, priority: Priority = Priority.DECODE) -> bytes:
    header = FrameHeader(Kind.STEP, priority, ENGINE, STAGE, 0, 1, number, 0, length, length)
    return header.pack() + number.to_bytes(8, "little")[:1] * length


class End:
    """One side: a link, its task, and what it received."""

    def __init__(self, peer: NodeId, stream: MemoryStream) -> None:
        self.stream = stream
        self.link = Link(peer, stream)
        self.received: list[bytes] = []
        self.gate: asyncio.Future[None] | None = None
        self.refusal: WireError | None = None
        self.running = asyncio.create_task(self.link.run(self.handle))

    def handle(self, link: Link, header: FrameHeader, data: bytes) -> asyncio.Future[None] | None:
        assert link is self.link
        assert data[:HEADER_SIZE] == header.pack()
        self.received.append(data)
        if self.refusal is not None:
            raise self.refusal
        return self.gate

    async def has(self, count: int) -> None:
        await self.until(lambda: len(self.received) >= count)

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(5):
            while not condition():  # noqa: ASYNC110 - a link has no such event
                await asyncio.sleep(0)

    async def end(self) -> None:
        """Wait for the link to end; its books are closed whatever the reason."""
        try:
            await asyncio.wait_for(asyncio.shield(self.running), 5)
        finally:
            assert self.link.queue.waiting_bytes == 0
            self.link.queue.check_conservation()
            assert self.link.send(frame(0), Priority.CONTROL) is None


@pytest.fixture
async def ends() -> AsyncIterator[tuple[End, End]]:
    left, right = memory_streams()
    ends = End(NODE, left), End(HEAD, right)
    yield ends
    for end in ends:
        end.running.cancel()
    await asyncio.gather(*(end.running for end in ends), return_exceptions=True)


@quick
@given(
    batches=st.lists(st.lists(st.sampled_from([0, 1, 500, MAX_PAYLOAD]), max_size=12), max_size=2)
)
async def test_frames_flow_in_both_directions(batches: list[list[int]]) -> None:
    ends = [End(peer, stream) for peer, stream in zip((NODE, HEAD), memory_streams(), strict=True)]
    sent = [[frame(number, size) for number, size in enumerate(batch)] for batch in batches]
    for end, frames in zip(ends, sent, strict=False):
        for data in frames:
            end.link.send(data, Priority.DECODE)
    for end, frames in zip(reversed(ends), sent, strict=False):
        await end.has(len(frames))
        assert end.received == frames
    await ends[0].stream.close()
    for end in ends:
        await end.end()
    for end, other in (ends, reversed(ends)):
        assert end.link.bytes_sent == other.link.bytes_received
        pieces = end.link.bytes_sent - sum(map(len, other.received))
        assert 0 <= pieces <= end.link.bytes_sent / LEAST_PIECE + 1  # a byte each


async def test_the_end_of_the_stream_ends_both_sides_in_good_order(ends: tuple[End, End]) -> None:
    for number in range(3):
        ends[0].link.send(frame(number, MAX_PAYLOAD), Priority.DECODE)
    await ends[1].has(3)
    await ends[0].stream.close()
    for end in ends:
        await end.end()


async def test_a_broken_connection_is_a_link_error_that_says_why(ends: tuple[End, End]) -> None:
    await ends[0].stream.fail("Socket closed")
    for end, peer in zip(ends, (NODE, HEAD), strict=True):
        with pytest.raises(LinkError, match=f"node {peer} broke: unavailable: Socket closed"):
            await end.end()


@pytest.mark.parametrize(
    "data",
    [
        b"x",
        b"\0" * 100,
        frame(1, 100)[:-1],
        frame(1) + b"x",
        frame(1, 100) + frame(2, 100)[: HEADER_SIZE + 1],
    ],
)
async def test_a_peer_that_breaks_the_protocol_is_a_wire_error(
    ends: tuple[End, End], data: bytes
) -> None:
    await ends[0].stream.write(data)
    with pytest.raises(WireError):
        await ends[1].end()


async def test_a_handler_s_refusal_ends_the_link(ends: tuple[End, End]) -> None:
    ends[1].refusal = WireError("spoke for another")
    ends[0].link.send(frame(1), Priority.DECODE)
    with pytest.raises(WireError, match="spoke for another"):
        await ends[1].end()


async def test_a_receiver_without_room_pauses_one_class_and_no_other(
    ends: tuple[End, End],
) -> None:
    sender, receiver = ends
    gate: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    receiver.gate = gate
    sender.link.send(frame(0, 100, Priority.PREFILL), Priority.PREFILL)
    await sender.until(lambda: sender.link.queue.paused == {Priority.PREFILL})
    receiver.gate = None
    for number in range(1, 20):
        sender.link.send(frame(number, MAX_PAYLOAD, Priority.PREFILL), Priority.PREFILL)
    sender.link.send(frame(20, 100), Priority.DECODE)
    await receiver.has(2)
    assert int(receiver.received[1][HEADER_SIZE]) == 20
    assert sender.link.queue.waiting[Priority.PREFILL] > 18 * MAX_PAYLOAD
    gate.set_result(None)
    await receiver.has(21)
    assert [int(data[HEADER_SIZE]) for data in receiver.received] == [0, 20, *range(1, 20)]


async def test_a_sender_that_does_not_pause_is_held_up(
    ends: tuple[End, End], monkeypatch: pytest.MonkeyPatch
) -> None:
    sender, receiver = ends
    monkeypatch.setattr("molink.transport.link.LARGEST_WINDOW", 2000)
    receiver.gate = asyncio.get_running_loop().create_future()
    for number in range(6):  # as many as the stream holds, and two
        await sender.stream.write(frame(number, 1000))
    for _ in range(100):
        await asyncio.sleep(0)
    assert len(receiver.received) == 2
    receiver.gate.set_result(None)
    await receiver.has(6)


async def test_a_full_link_makes_its_sources_wait(ends: tuple[End, End]) -> None:
    sender, receiver = ends
    room, sent = None, 0
    while room is None:
        room = sender.link.send(frame(sent, MAX_PAYLOAD, Priority.BULK), Priority.BULK)
        sent += 1
    assert sender.link.queue.waiting_bytes > HIGH_WATER // 2
    assert not room.done()
    await receiver.has(sent)
    assert room.done()
    assert sender.link.queue.waiting_bytes == 0
    assert [int(data[HEADER_SIZE]) for data in receiver.received] == list(range(sent))


async def test_what_is_in_flight_is_bounded_and_acknowledged(ends: tuple[End, End]) -> None:
    sender, receiver = ends
    most = 0
    for number in range(200):
        sender.link.send(frame(number, 10_000, Priority.PREFILL), Priority.PREFILL)
    while len(receiver.received) < 200:
        window = sender.link.window
        most = max(most, window.in_flight - window.size)
        await asyncio.sleep(0)
    assert most <= 2 * sender.link.window.piece
    await sender.until(lambda: sender.link.window.in_flight == 0)
    assert sender.link.window.rtt_s is not None
    assert receiver.link.window.in_flight == 0  # receipts are not acknowledged


@pytest.mark.parametrize("size", [100, FIRST_PIECE])
@pytest.mark.parametrize("held_s", [0.0, 0.6 * RECEIPT_INTERVAL_S])
async def test_a_receipt_that_is_soon_due_leaves_with_a_small_message(
    held_s: float, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = memory_streams()
    now = 0.0
    monkeypatch.setattr("molink.transport.link.time", SimpleNamespace(monotonic=lambda: now))
    end = End(NODE, ours)
    await theirs.write(frame(1))
    await end.has(1)
    now = held_s
    end.link.send(frame(2, size), Priority.DECODE)
    receipt = pack_receipt(Receipt(HEADER_SIZE, 0.0, held_s), ())
    if held_s > 0 and size < FIRST_PIECE:
        assert await theirs.read() == receipt + frame(2, size)
    else:
        assert await theirs.read() == frame(2, size)
        assert await theirs.read() == receipt
    end.running.cancel()
    await asyncio.gather(end.running, return_exceptions=True)


@pytest.mark.parametrize("interval_s", [2 * RECEIPT_INTERVAL_S, 60.0])
async def test_a_receipt_for_few_bytes_waits_until_there_are_more(
    interval_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("molink.transport.link.FEW_BYTES_INTERVAL_S", interval_s)
    ours, theirs = memory_streams()
    end = End(NODE, ours)
    await theirs.write(frame(1))
    reading = asyncio.create_task(theirs.read())
    if interval_s > 1:
        await asyncio.sleep(2 * RECEIPT_INTERVAL_S)
        assert not reading.done()
        await theirs.write(frame(2, FEW_BYTES))
    receipt, _, _ = split_receipt(await asyncio.wait_for(reading, 5))
    assert receipt.received == end.link.bytes_received == sum(map(len, end.received))
    end.running.cancel()
    await asyncio.gather(end.running, return_exceptions=True)


async def test_messages_with_receipts_are_taken_as_those_without(ends: tuple[End, End]) -> None:
    for number in range(40):
        sender, receiver = ends if number % 2 else reversed(ends)
        sender.link.send(frame(number, 100), Priority.DECODE)
        await receiver.has(number // 2 + 1)
        await asyncio.sleep(RECEIPT_INTERVAL_S / 5)
    for end in ends:
        assert len(end.received) == 20
        await end.until(lambda end=end: end.link.window.in_flight == 0)
        assert end.link.bytes_sent == 20 * (HEADER_SIZE + 100)


async def test_a_receipt_for_more_than_was_sent_ends_the_link(ends: tuple[End, End]) -> None:
    await ends[0].stream.write(pack_receipt(Receipt(1, 0.0, 0.0), ()))
    with pytest.raises(WireError, match="acknowledged"):
        await ends[1].end()


@pytest.mark.parametrize("how", ["fail", "close", "link"])
async def test_who_waits_for_room_is_let_go_when_the_link_ends(
    ends: tuple[End, End], how: str
) -> None:
    sender, receiver = ends
    room = None
    while room is None:
        room = sender.link.send(frame(1, MAX_PAYLOAD, Priority.BULK), Priority.BULK)
    await receiver.has(1)
    match how:
        case "fail":
            await receiver.stream.fail("reset")
        case "close":
            await receiver.stream.close()
        case _:
            sender.link.close()
    if how == "close":
        await sender.end()
    else:
        with pytest.raises(LinkError):
            await sender.end()
    assert room.done()


async def test_an_end_after_silence_is_no_good_order(
    ends: tuple[End, End], monkeypatch: pytest.MonkeyPatch
) -> None:
    ends[0].link.send(frame(1), Priority.DECODE)
    await ends[1].has(1)
    monkeypatch.setattr("molink.transport.link.KEEPALIVE_S", 0.0)
    await ends[0].stream.close()
    with pytest.raises(LinkError, match="nothing was heard for 0 s"):
        await ends[1].end()


@pytest.mark.parametrize("lane", Priority)
async def test_a_link_that_ends_says_whether_steps_were_lost(
    ends: tuple[End, End], lane: Priority
) -> None:
    sender, receiver = ends
    sender.link.send(frame(0, 100, lane), lane)
    await sender.until(lambda: sender.link.window.delivered > 0)
    receiver.running.cancel()  # it takes no more
    await asyncio.gather(receiver.running, return_exceptions=True)
    sender.link.send(frame(1, 100, lane), lane)
    await sender.until(lambda: sender.link.window.in_flight > 0)
    sender.link.close()
    with pytest.raises(LinkError):
        await sender.end()
    assert sender.link.has_delivered == (lane in (Priority.CONTROL, Priority.BULK))


async def test_a_link_that_ends_idle_has_lost_nothing(ends: tuple[End, End]) -> None:
    sender, _ = ends
    sender.link.send(frame(0, MAX_PAYLOAD), Priority.DECODE)
    await sender.until(lambda: not len(sender.link.queue) and not sender.link.window.in_flight)
    sender.link.close()
    with pytest.raises(LinkError):
        await sender.end()
    assert sender.link.has_delivered


async def test_what_still_waits_for_a_link_is_lost_with_it(ends: tuple[End, End]) -> None:
    sender, _ = ends
    sender.link.queue.paused = frozenset(Priority)
    sender.link.send(frame(0, 100), Priority.DECODE)
    sender.link.close()
    with pytest.raises(LinkError):
        await sender.end()
    assert not sender.link.has_delivered


async def test_a_peer_that_sends_half_a_frame_and_stops_holds_up_no_other_class(
    ends: tuple[End, End],
) -> None:
    half = memoryview(frame(0, 1000, Priority.PREFILL))[:500]
    await ends[0].stream.write(join(Priority.PREFILL, half))
    ends[0].link.send(frame(1, 100), Priority.DECODE)
    await ends[1].has(1)
    assert [int(data[HEADER_SIZE]) for data in ends[1].received] == [1]
    await ends[0].stream.write(frame(2, 10, Priority.PREFILL))
    with pytest.raises(WireError, match="before the rest"):
        await ends[1].end()


async def test_a_link_that_was_closed_before_it_ran_ends_at_once() -> None:
    stream, _ = memory_streams()
    link = Link(NODE, stream)
    link.close()
    with pytest.raises(LinkError, match="closed"):
        await link.run(lambda *_: None)


async def test_a_cancelled_link_is_cancelled_and_leaves_no_task(ends: tuple[End, End]) -> None:
    before = asyncio.all_tasks() - {end.running for end in ends}
    await asyncio.sleep(0)
    ends[0].running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await ends[0].end()
    ends[1].link.close()
    with pytest.raises(LinkError):
        await ends[1].end()
    assert asyncio.all_tasks() <= before


async def test_the_twin_behaves_as_grpc_s_streams_do() -> None:
    left, right = memory_streams()
    for number in range(CAPACITY):
        await left.write(bytes([number]))
    blocked = asyncio.create_task(left.write(b"last"))
    await asyncio.sleep(0)
    assert not blocked.done()
    assert await right.read() == b"\0"
    await blocked
    await left.close()
    assert [await right.read() for _ in range(CAPACITY)] == [b"\1", b"\2", b"\3", b"last"]
    assert await right.read() is grpc.aio.EOF
    with pytest.raises(asyncio.InvalidStateError):
        await right.write(b"")
    await right.fail("gone")
    with pytest.raises(grpc.aio.AioRpcError, match="gone"):
        await left.read()
