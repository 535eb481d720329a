"""The queue in front of a link: every byte leaves once, in its turn, and nobody waits for ever."""

import asyncio
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from molink.core.ids import HEAD, Address, NodeId, Port
from molink.transport.pieces import Reassembly, lane_of
from molink.transport.queue import WEIGHTS, FrameQueue, Turns
from molink.transport.window import LARGEST_PIECE
from molink.wire.frames import HEADER_SIZE, MAX_PAYLOAD, FrameHeader, Kind, Priority

quick = settings(deadline=None, max_examples=100)

STAGE = Address(NodeId(1), Port.STAGE)
HIGH_WATER = 4 * MAX_PAYLOAD
lengths = st.integers(0, 300) | st.sampled_from([MAX_PAYLOAD // 3, MAX_PAYLOAD])
puts = st.tuples(st.sampled_from(Priority), lengths)
takes = st.sampled_from([100, 2048, 50_000, LARGEST_PIECE])
paused = st.frozensets(st.sampled_from(Priority))


def frame(number: int, priority: Priority = Priority.DECODE, length: int = 0) -> bytes:
    header = FrameHeader(
        *(Kind.STEP, priority, Address(HEAD, Port.ENGINE), STAGE, 0, 1, number, 0, length, length)
    )
    return header.pack() + number.to_bytes(2, "little")[:1] * length


class Model:
    """What must happen: frames of a class come out whole and in order, and none is held back."""

    def __init__(self) -> None:
        self.queue = FrameQueue(high_water=HIGH_WATER)
        self.waiting: dict[Priority, list[bytes]] = {priority: [] for priority in Priority}
        self.rooms: dict[Priority, list[asyncio.Future[None]]] = {p: [] for p in Priority}
        self._reassembly = Reassembly()

    def put(self, number: int, priority: Priority, length: int) -> None:
        data = frame(number, priority, length)
        room = self.queue.put(data, priority)
        self.waiting[priority].append(data)
        assert (room is not None) == (self.queue.waiting[priority] > HIGH_WATER)
        if room is not None:
            self.rooms[priority].append(room)

    def take(self, size: int) -> None:
        before, allowed = self.queue.waiting, set(Priority) - self.queue.paused
        message = self.queue.take(size)
        if message is None:
            assert not any(self.waiting[lane] for lane in allowed)
            return
        lane = lane_of(message)
        assert lane in allowed
        assert not (before[Priority.CONTROL] and Priority.CONTROL in allowed) or not lane
        gone = before[lane] - self.queue.waiting[lane]
        assert 0 < gone <= max(size * 3 // 2, HEADER_SIZE)
        for header, data in self._reassembly.take(message):
            assert header.priority == lane
            assert data == self.waiting[lane].pop(0)

    def check(self) -> None:
        self.queue.check_conservation()
        assert len(self.queue) == sum(map(len, self.waiting.values()))
        for lane, rooms in self.rooms.items():
            if self.queue.waiting[lane] <= HIGH_WATER // 2:
                assert all(room.done() for room in rooms)


@quick
@given(actions=st.lists(puts | takes | paused, max_size=60))
async def test_every_frame_leaves_once_in_the_order_of_its_class(
    actions: list[tuple[Priority, int] | int | frozenset[Priority]],
) -> None:
    model = Model()
    for number, action in enumerate(actions):
        match action:
            case int() as size:
                model.take(size)
            case frozenset() as lanes:
                model.queue.paused = lanes
            case (priority, length):
                model.put(number, priority, length)
        model.check()
    model.queue.paused = frozenset()
    while len(model.queue):
        model.take(LARGEST_PIECE)
        model.check()
    assert model.queue.waiting_bytes == 0


@given(
    waits=st.lists(
        st.tuples(st.frozensets(st.sampled_from(list(WEIGHTS)), min_size=1), st.integers(1, 5000)),
        min_size=1,
        max_size=300,
    )
)
def test_bytes_are_as_weights_between_any_two_that_wait(
    waits: list[tuple[frozenset[Priority], int]],
) -> None:
    """Bounded unfairness, so no starvation: theorem 1 of Goyal, Vin and Cheng."""
    turns = Turns()
    served = dict.fromkeys(WEIGHTS, 0.0)
    since: dict[tuple[Priority, Priority], tuple[float, float]] = {}
    most = max(size for _, size in waits)
    for waiting, size in waits:
        lane = turns.choose(sorted(waiting))
        assert lane in waiting
        for one, other in pairwise(sorted(WEIGHTS)):
            if {one, other} <= waiting:
                start = since.setdefault((one, other), (served[one], served[other]))
                apart = (served[one] - start[0]) - (served[other] - start[1])
                assert abs(apart) <= most / WEIGHTS[one] + most / WEIGHTS[other] + 1e-6
            else:
                since.pop((one, other), None)
        served[lane] += size / WEIGHTS[lane]
        turns.charge(lane, size)


def test_while_all_wait_each_gets_its_share() -> None:
    queue = FrameQueue(high_water=1 << 30)
    for lane in WEIGHTS:
        for number in range(400):
            queue.put(frame(number, lane, 10_000), lane)
    start = queue.waiting
    for _ in range(1000):
        queue.take(2048)
    gone = [before - after for before, after in zip(start, queue.waiting, strict=True)][1:]
    assert [size / gone[2] for size in gone] == pytest.approx([64, 8, 1], rel=0.05)


def test_what_has_waited_long_has_saved_up_nothing() -> None:
    queue = FrameQueue(high_water=1 << 30)
    for number in range(20):
        queue.put(frame(number, Priority.BULK, MAX_PAYLOAD), Priority.BULK)
    for _ in range(10):
        queue.take(LARGEST_PIECE)
    queue.put(frame(0, Priority.PREFILL, MAX_PAYLOAD), Priority.PREFILL)
    queue.put(frame(0, Priority.DECODE, MAX_PAYLOAD), Priority.DECODE)
    assert [lane_of(queue.take(LARGEST_PIECE) or b"") for _ in range(2)] == [
        Priority.DECODE,
        Priority.PREFILL,
    ]


def test_what_matters_more_interrupts_a_large_frame() -> None:
    queue, reassembly = FrameQueue(), Reassembly()
    queue.put(frame(0, Priority.PREFILL, MAX_PAYLOAD), Priority.PREFILL)
    messages = [queue.take(4096) or b""]
    queue.put(frame(1, Priority.DECODE, 1000), Priority.DECODE)
    while len(queue):
        messages.append(queue.take(4096) or b"")
    order = [h.sequence for message in messages for h, _ in reassembly.take(message)]
    assert order == [1, 0]
    assert lane_of(messages[1]) == Priority.DECODE


def test_small_frames_leave_together_and_large_ones_alone() -> None:
    queue = FrameQueue()
    for number, size in enumerate([100, 100, MAX_PAYLOAD, 100]):
        queue.put(frame(number, length=size), Priority.DECODE)
    messages = [queue.take(LARGEST_PIECE) or b"" for _ in range(3)]
    numbers = [[header.sequence for header, _ in Reassembly().take(m)] for m in messages]
    assert numbers == [[0, 1], [2], [3]]


async def test_a_full_class_does_not_hold_up_the_sources_of_another() -> None:
    queue = FrameQueue(high_water=HEADER_SIZE)
    queue.put(frame(1, Priority.PREFILL, 100), Priority.PREFILL)
    assert queue.put(frame(2, Priority.DECODE), Priority.DECODE) is None
    room = queue.put(frame(3, Priority.PREFILL, 100), Priority.PREFILL)
    assert room is not None
    queue.take(LARGEST_PIECE)  # decode's
    assert not room.done()
    queue.take(LARGEST_PIECE)
    assert room.done()


async def test_a_source_that_no_longer_waits_does_no_harm() -> None:
    queue = FrameQueue(high_water=0)
    rooms = [queue.put(frame(number), Priority.BULK) for number in range(2)]
    assert rooms[0] is not None
    rooms[0].cancel()
    queue.take(LARGEST_PIECE)
    assert rooms[1] is not None
    assert rooms[1].done()


async def test_a_closed_queue_holds_nothing_and_keeps_nobody_waiting() -> None:
    queue = FrameQueue(high_water=HEADER_SIZE)
    queue.put(frame(1), Priority.BULK)
    room = queue.put(frame(2, length=5000, priority=Priority.BULK), Priority.BULK)
    queue.take(1000)
    queue.take(1000)
    assert room is not None
    queue.close()
    assert room.done()
    assert queue.put(frame(3, length=1000), Priority.CONTROL) is None
    queue.check_conservation()
    assert len(queue) == queue.waiting_bytes == 0
    assert queue.take(LARGEST_PIECE) is None
