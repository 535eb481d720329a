"""An in-memory twin of the gRPC stream under a link: `Link.run` works over it without a socket."""

import asyncio
from collections import deque
from typing import Any

import grpc
import grpc.aio

CAPACITY = 4  # messages on their way in one direction; then `write` waits, as HTTP/2 makes it wait


class MemoryStream:
    """One end of a stream. `write` and `read` behave as those of a `grpc.aio` call."""

    def __init__(self, connection: "_Connection", incoming: int) -> None:
        self._connection = connection
        self._incoming = connection.lanes[incoming]
        self._outgoing = connection.lanes[1 - incoming]

    async def write(self, data: bytes) -> None:
        """Raises AioRpcError if the connection broke, InvalidStateError if it was closed."""
        changed = self._connection.changed
        async with changed:
            await changed.wait_for(
                lambda: self._connection.is_over or len(self._outgoing) < CAPACITY
            )
            self._connection.check()
            if self._connection.is_over:
                raise asyncio.InvalidStateError("RPC already finished.")
            self._outgoing.append(data)
            changed.notify_all()

    async def read(self) -> Any:
        """The next message; `grpc.aio.EOF` once it was closed. Raises AioRpcError if it broke."""
        changed = self._connection.changed
        async with changed:
            await changed.wait_for(lambda: self._connection.is_over or self._incoming)
            self._connection.check()
            if not self._incoming:
                return grpc.aio.EOF
            changed.notify_all()
            return self._incoming.popleft()

    async def close(self) -> None:
        """End the stream in good order: the other end still reads what was written."""
        await self._connection.end(None)

    async def fail(self, details: str) -> None:
        """Break the connection for both ends; what was on its way is lost."""
        nothing = grpc.aio.Metadata()
        error = grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, nothing, nothing, details)
        await self._connection.end(error)


class _Connection:
    """What both ends share."""

    def __init__(self) -> None:
        self.lanes: tuple[deque[bytes], deque[bytes]] = (deque(), deque())
        self.changed = asyncio.Condition()
        self.is_over = False
        self._error: Exception | None = None

    def check(self) -> None:
        if self._error is not None:
            raise self._error

    async def end(self, error: Exception | None) -> None:
        async with self.changed:
            self.is_over, self._error = True, error
            self.changed.notify_all()


def memory_streams() -> tuple[MemoryStream, MemoryStream]:
    """Two connected ends."""
    connection = _Connection()
    return MemoryStream(connection, 0), MemoryStream(connection, 1)
