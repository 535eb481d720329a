"""The agent's end of the local sockets."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import cast

from molink.core.errors import WireError
from molink.core.ids import Port
from molink.transport.local import SOCKET_BUFFER
from molink.transport.rooms import Rooms
from molink.wire.frames import HEADER_SIZE, FrameHeader

FrameHandler = Callable[["LocalPeer", FrameHeader, bytes], Awaitable[None] | None]
LostHandler = Callable[["LocalPeer"], None]


class LocalPeer(asyncio.BufferedProtocol):
    """A socket of a local process, whose first frame says its port and rank for good.

    Args:
        handle: called with every frame; may return an awaitable, until which reading pauses.
        lost: called once when it is closed.
    """

    port: Port | None = None
    rank: int = 0

    def __init__(self, handle: FrameHandler, lost: LostHandler) -> None:
        self._handle = handle
        self._lost = lost
        self._header: FrameHeader | None = None
        self._buffer = bytearray(HEADER_SIZE)
        self._filled = 0
        self._is_full = False  # more waits to be written than SOCKET_BUFFER
        self._rooms = Rooms()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=SOCKET_BUFFER)

    def get_buffer(self, sizehint: int) -> memoryview:
        return memoryview(self._buffer)[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        self._filled += nbytes
        if self._filled < len(self._buffer):
            return
        try:
            self._advance()
        except WireError:
            self._transport.abort()
            raise

    def _advance(self) -> None:
        if self._header is None:
            self._header = FrameHeader.unpack(self._buffer)
            if self._header.length:
                frame = bytearray(HEADER_SIZE + self._header.length)
                frame[:HEADER_SIZE] = self._buffer
                self._buffer = frame
                return
        header, data = self._header, bytes(self._buffer)
        self._header, self._buffer, self._filled = None, bytearray(HEADER_SIZE), 0
        if self.port is None:
            self.port, self.rank = header.source.port, header.rank
        elif (self.port, self.rank) != (header.source.port, header.rank):
            raise WireError(f"{self.port.name} {self.rank} speaks for {header.source}")
        waiting = self._handle(self, header, data)
        if waiting is not None:
            self._transport.pause_reading()
            asyncio.ensure_future(waiting).add_done_callback(self._resume)

    def _resume(self, _: object) -> None:
        if not self._transport.is_closing():
            self._transport.resume_reading()

    def send(self, frame: bytes) -> asyncio.Future[None] | None:
        """Write a frame; wait for a returned future before sending more of its class.

        The transport keeps what the process has not taken yet.
        """
        self._transport.write(frame)
        return self._rooms.wait() if self._is_full else None

    def pause_writing(self) -> None:
        self._is_full = True

    def resume_writing(self) -> None:
        self._is_full = False
        self._rooms.release()

    def close(self) -> None:
        self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.resume_writing()
        self._lost(self)
