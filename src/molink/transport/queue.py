"""The queue in front of a link: by priority, with a bound that pushes back."""

import asyncio
from collections import deque

from molink.wire.frames import MAX_PAYLOAD, Priority

HIGH_WATER = 16 * 1024 * 1024  # bytes; a source that passes it is asked to wait


class FrameQueue:
    """Frames that wait for one link. Within a priority, first in, first out."""

    def __init__(self, high_water: int = HIGH_WATER) -> None:
        self._classes: tuple[deque[bytes], ...] = tuple(deque() for _ in Priority)
        self._high_water = high_water
        self._filled = asyncio.Event()
        self._room: list[asyncio.Future[None]] = []
        self._is_closed = False
        self.waiting_bytes = 0

    def __len__(self) -> int:
        return sum(map(len, self._classes))

    @property
    def is_full(self) -> bool:
        return self.waiting_bytes > self._high_water

    def put(self, frame: bytes, priority: Priority) -> asyncio.Future[None] | None:
        """Add a frame. A returned future is done when there is room again; wait for it.

        A closed queue drops the frame.
        """
        if self._is_closed:
            return None
        self._classes[priority].append(frame)
        self.waiting_bytes += len(frame)
        self._filled.set()
        if not self.is_full:
            return None
        room: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._room.append(room)
        return room

    async def get(self) -> bytes:
        """Wait for frames; return the next one, with small ones behind it joined to it.

        Frames delimit themselves, so the receiver takes them apart again.
        """
        await self._filled.wait()
        batch: list[bytes] = []
        size = 0
        for waiting in self._classes:
            while waiting and size + len(waiting[0]) <= (MAX_PAYLOAD if batch else 1 << 31):
                size += len(waiting[0])
                batch.append(waiting.popleft())
            if waiting:
                break
        else:
            self._filled.clear()
        self.waiting_bytes -= size
        if self._room and self.waiting_bytes <= self._high_water // 2:
            self._release()
        return batch[0] if len(batch) == 1 else b"".join(batch)

    def close(self) -> None:
        """The link has ended: drop what waits and let every waiting source go on."""
        self._is_closed = True
        for waiting in self._classes:
            waiting.clear()
        self.waiting_bytes = 0
        self._filled.clear()
        self._release()

    def check_conservation(self) -> None:
        """Assert that the bytes counted are the bytes held, and that nobody waits for nothing."""
        assert self.waiting_bytes == sum(len(frame) for q in self._classes for frame in q)
        assert self._filled.is_set() == (len(self) > 0)
        assert not self._room or self.waiting_bytes > self._high_water // 2

    def _release(self) -> None:
        for room in self._room:
            if not room.done():
                room.set_result(None)
        self._room.clear()
