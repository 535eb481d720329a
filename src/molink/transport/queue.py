"""The queue in front of a link: a lane for each class of frames, with a bound that pushes back."""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence

from molink.transport import pieces
from molink.transport.rooms import Rooms
from molink.wire.frames import MAX_PAYLOAD, Priority

HIGH_WATER = 16 * 1024 * 1024  # bytes of one lane; a source that passes it is asked to wait
WEIGHTS = {Priority.DECODE: 64, Priority.PREFILL: 8, Priority.BULK: 1}


class Turns:
    """Whose turn it is: control's at once, the others' by weight while several wait.

    Start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996): over any while in which two
    lanes wait, the bytes of each are as their weights, but for one message.
    """

    def __init__(self) -> None:
        self._now = 0.0  # virtual time: bytes of a lane of weight one
        self._ready_at = dict.fromkeys(WEIGHTS, 0.0)

    def choose(self, waiting: Sequence[Priority]) -> Priority:
        if len(waiting) == 1:
            return waiting[0]
        return min(waiting, key=lambda lane: (self._start(lane), lane))

    def charge(self, lane: Priority, size: int) -> None:
        if lane != Priority.CONTROL:
            self._now = self._start(lane)
            self._ready_at[lane] = self._now + size / WEIGHTS[lane]

    def _start(self, lane: Priority) -> float:
        return -1.0 if lane == Priority.CONTROL else max(self._now, self._ready_at[lane])


class _Lane:
    """Frames of one class, first in, first out; the first may have left in part."""

    def __init__(self) -> None:
        self.frames: deque[bytes] = deque()
        self.waiting_bytes = 0
        self.gone = 0  # bytes of the first frame
        self.rooms = Rooms()

    def take(self, lane: Priority, size: int) -> tuple[bytes, int]:
        """The next message of about `size` bytes, and how many bytes of frames it holds."""
        first = self.frames[0]
        if self.gone or len(first) > size * 3 // 2:  # no tiny rest
            piece = memoryview(first)[self.gone :]
            if len(piece) > size * 3 // 2:
                piece = piece[:size]
                self.gone += len(piece)
            else:
                self.frames.popleft()
                self.gone = 0
            return pieces.join(lane, piece), len(piece)
        batch = [self.frames.popleft()]
        length, most = len(first), min(size, MAX_PAYLOAD)
        while self.frames and length + len(self.frames[0]) <= most:
            batch.append(self.frames.popleft())
            length += len(batch[-1])
        return batch[0] if len(batch) == 1 else b"".join(batch), length


class FrameQueue:
    """Frames that wait for one link.

    Args:
        filled: called when a frame was put.
    """

    def __init__(
        self, filled: Callable[[], None] = lambda: None, high_water: int = HIGH_WATER
    ) -> None:
        self._filled = filled
        self._high_water = high_water
        self._lanes = {priority: _Lane() for priority in Priority}
        self._turns = Turns()
        self._is_closed = False
        self.paused: frozenset[Priority] = frozenset()  # lanes whose frames must wait

    def __len__(self) -> int:
        return sum(len(lane.frames) for lane in self._lanes.values())

    @property
    def waiting_bytes(self) -> int:
        return sum(self.waiting)

    @property
    def waiting(self) -> list[int]:
        """Bytes by class."""
        return [lane.waiting_bytes for lane in self._lanes.values()]

    def put(self, frame: bytes, priority: Priority) -> asyncio.Future[None] | None:
        """Add a frame. A returned future is done when its class has room again; wait for it.

        A closed queue drops the frame.
        """
        if self._is_closed:
            return None
        lane = self._lanes[priority]
        lane.frames.append(frame)
        lane.waiting_bytes += len(frame)
        self._filled()
        if lane.waiting_bytes <= self._high_water:
            return None
        return lane.rooms.wait()

    def take(self, size: int) -> bytes | None:
        """The link's next message (`transport.pieces`) of about `size` bytes; None: nothing waits.

        Small frames leave together, and large ones in pieces.
        """
        waiting = [p for p, lane in self._lanes.items() if lane.frames and p not in self.paused]
        if not waiting:
            return None
        priority = self._turns.choose(waiting)
        lane = self._lanes[priority]
        message, length = lane.take(priority, size)
        self._turns.charge(priority, length)
        lane.waiting_bytes -= length
        if lane.rooms and lane.waiting_bytes <= self._high_water // 2:
            lane.rooms.release()
        return message

    def close(self) -> None:
        """The link has ended: drop what waits and let every waiting source go on."""
        self._is_closed = True
        for lane in self._lanes.values():
            lane.frames.clear()
            lane.waiting_bytes = lane.gone = 0
            lane.rooms.release()

    def check_conservation(self) -> None:
        """Assert that the bytes counted are the bytes held, and that nobody waits for nothing."""
        for lane in self._lanes.values():
            assert lane.waiting_bytes == sum(map(len, lane.frames)) - lane.gone
            assert 0 <= lane.gone < len(lane.frames[0]) if lane.frames else not lane.gone
            assert not lane.rooms or lane.waiting_bytes > self._high_water // 2
