"""The queue in front of a link: every frame leaves once, in its turn, and nobody waits for ever."""

import asyncio
from contextlib import suppress

from hypothesis import given, settings
from hypothesis import strategies as st

from molink.core.ids import HEAD, Address, NodeId, Port
from molink.transport.link import split
from molink.transport.queue import FrameQueue
from molink.wire.frames import HEADER_SIZE, MAX_PAYLOAD, FrameHeader, Kind, Priority

quick = settings(deadline=None, max_examples=100)

STAGE = Address(NodeId(1), Port.STAGE)
HIGH_WATER = 4 * MAX_PAYLOAD
lengths = st.integers(0, 300) | st.sampled_from([MAX_PAYLOAD // 3, MAX_PAYLOAD])
puts = st.tuples(st.sampled_from(Priority), lengths)
gets = st.none()


def frame(number: int, priority: Priority = Priority.DECODE, length: int = 0) -> bytes:
    header = FrameHeader(
        *(Kind.STEP, priority, Address(HEAD, Port.ENGINE), STAGE, 0, 1, number, 0, length, length)
    )
    return header.pack() + bytes(length)


def numbers(batch: bytes) -> list[int]:
    return [header.sequence for header, _ in split(batch)]


class Model:
    """What must happen: a list for every priority, and the first of the first list leaves."""

    def __init__(self) -> None:
        self.queue = FrameQueue(HIGH_WATER)
        self.waiting: dict[Priority, list[int]] = {priority: [] for priority in Priority}
        self.rooms: list[asyncio.Future[None]] = []

    def put(self, number: int, priority: Priority, length: int) -> None:
        room = self.queue.put(frame(number, priority, length), priority)
        self.waiting[priority].append(number)
        assert (room is not None) == (self.queue.waiting_bytes > HIGH_WATER)
        if room is not None:
            self.rooms.append(room)

    async def get(self) -> None:
        batch = await self.queue.get()
        got = numbers(batch)
        assert got
        assert len(got) == 1 or len(batch) <= MAX_PAYLOAD
        assert got == [number for line in self.waiting.values() for number in line][: len(got)]
        for line in self.waiting.values():
            line[:] = [number for number in line if number not in got]

    def check(self) -> None:
        self.queue.check_conservation()
        assert len(self.queue) == sum(map(len, self.waiting.values()))
        if self.queue.waiting_bytes <= HIGH_WATER // 2:
            assert all(room.done() for room in self.rooms)


@quick
@given(actions=st.lists(puts | gets, max_size=40))
async def test_every_frame_leaves_once_in_its_turn(
    actions: list[tuple[Priority, int] | None],
) -> None:
    model = Model()
    for number, action in enumerate(actions):
        if action is not None:
            model.put(number, *action)
        elif len(model.queue):
            await model.get()
        model.check()
    while len(model.queue):
        await model.get()
        model.check()
    assert model.queue.waiting_bytes == 0
    assert all(room.done() for room in model.rooms)


async def test_small_frames_leave_together_and_large_ones_alone() -> None:
    queue = FrameQueue()
    sizes = [100, 100, MAX_PAYLOAD, 100]
    for number, size in enumerate(sizes):
        queue.put(frame(number, length=size), Priority.DECODE)
    assert [numbers(await queue.get()) for _ in range(3)] == [[0, 1], [2], [3]]


async def test_what_matters_more_overtakes() -> None:
    queue = FrameQueue()
    for priority in reversed(Priority):
        queue.put(frame(priority, length=MAX_PAYLOAD), priority)
    assert [numbers(await queue.get()) for _ in Priority] == [[priority] for priority in Priority]


async def test_an_empty_queue_waits_and_a_cancelled_wait_takes_nothing() -> None:
    queue = FrameQueue()
    waiting = asyncio.create_task(queue.get())
    await asyncio.sleep(0)
    queue.put(frame(1), Priority.DECODE)
    waiting.cancel()
    with suppress(asyncio.CancelledError):
        await waiting
    queue.check_conservation()
    assert numbers(await queue.get()) == [1]


async def test_a_source_that_no_longer_waits_does_no_harm() -> None:
    queue = FrameQueue(high_water=0)
    rooms = [queue.put(frame(number), Priority.BULK) for number in range(2)]
    assert rooms[0] is not None
    rooms[0].cancel()
    await queue.get()
    assert rooms[1] is not None
    assert rooms[1].done()


async def test_a_closed_queue_holds_nothing_and_keeps_nobody_waiting() -> None:
    queue = FrameQueue(high_water=HEADER_SIZE)
    queue.put(frame(1), Priority.DECODE)
    room = queue.put(frame(2), Priority.BULK)
    assert room is not None
    queue.close()
    assert room.done()
    assert queue.put(frame(3, length=1000), Priority.CONTROL) is None
    queue.check_conservation()
    assert len(queue) == queue.waiting_bytes == 0
