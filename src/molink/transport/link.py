"""A link: frames between two agents over one bidirectional gRPC stream.

The gRPC service has four methods and no generated code: `Enroll` (see node.enrolment), `Status`,
`Tunnel` (see transport.tunnel) and `Link`. Every message of `Link` is one or more whole frames.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import grpc
import grpc.aio

from molink.core.errors import LinkError, WireError
from molink.core.ids import NodeId
from molink.transport.queue import FrameQueue
from molink.wire.frames import HEADER_SIZE, MAX_PAYLOAD, FrameHeader, Priority

LINK_METHOD = "/molink.Agent/Link"
ENROLL_METHOD = "/molink.Agent/Enroll"
STATUS_METHOD = "/molink.Agent/Status"
TUNNEL_METHOD = "/molink.Agent/Tunnel"
MAX_GRPC_MESSAGE = 2 * (MAX_PAYLOAD + HEADER_SIZE)

KEEPALIVE_S = 2.0
KEEPALIVE_TIMEOUT_S = 3.0
LAST_WORDS_S = 0.2
CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_GRPC_MESSAGE),
    ("grpc.max_send_message_length", MAX_GRPC_MESSAGE),
    ("grpc.keepalive_time_ms", int(KEEPALIVE_S * 1000)),
    ("grpc.keepalive_timeout_ms", int(KEEPALIVE_TIMEOUT_S * 1000)),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 1000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 500),
    ("grpc.enable_retries", 0),
    ("grpc.use_local_subchannel_pool", 1),
]

FrameHandler = Callable[["Link", FrameHeader, bytes], Awaitable[None] | None]


class Link:
    """One end of the stream to `peer`. Owns the queue in front of it; counts bytes and frames."""

    def __init__(self, peer: NodeId, stream: Any) -> None:
        self.peer = peer
        self.queue = FrameQueue()
        self.bytes_sent = 0
        self.bytes_received = 0
        self.rtt_s: float | None = None  # seconds, latest probe
        self._stream = stream
        self._closed = asyncio.Event()

    def send(self, frame: bytes, priority: Priority) -> asyncio.Future[None] | None:
        """Queue one frame; wait for a returned future before sending more."""
        return self.queue.put(frame, priority)

    async def run(self, handle: FrameHandler) -> None:
        """Send and receive until either fails; returns at the end of the stream.

        To the side that was dialled, a peer that was killed looks like one that closed.

        Raises:
            LinkError: the connection broke.
            WireError: the peer broke the protocol.
        """
        receiving = asyncio.create_task(self._receive_all(handle))
        sending = asyncio.create_task(self._send_all())
        closing = asyncio.create_task(self._closed.wait())
        tasks = (receiving, sending, closing)
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if closing.done():
                raise LinkError(f"link to node {self.peer} was closed")
            if sending.done():  # when a stream is over, reading tells why
                await asyncio.wait((receiving,), timeout=LAST_WORDS_S)
            self._settle(receiving if receiving.done() else sending)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self.queue.close()

    def close(self) -> None:
        """End `run` with a LinkError, from the outside."""
        self._closed.set()

    def _settle(self, task: asyncio.Task[None]) -> None:
        """Translate what gRPC raised into a LinkError."""
        if task.cancelled():  # by gRPC, whose channel was closed under it
            raise LinkError(f"link to node {self.peer} was closed")
        try:
            task.result()
        except grpc.aio.AioRpcError as error:
            reason = f"{error.code().name.lower()}: {error.details()}"
            raise LinkError(f"link to node {self.peer} broke: {reason}") from error
        except (grpc.aio.BaseError, asyncio.InvalidStateError) as error:
            raise LinkError(f"link to node {self.peer} broke: {error}") from error

    async def _send_all(self) -> None:
        while True:
            data = await self.queue.get()
            await self._stream.write(data)
            self.bytes_sent += len(data)

    async def _receive_all(self, handle: FrameHandler) -> None:
        while (data := await self._stream.read()) is not grpc.aio.EOF:
            self.bytes_received += len(data)
            for header, frame in split(data):
                waiting = handle(self, header, frame)
                if waiting is not None:
                    await waiting


def split(data: bytes) -> Iterator[tuple[FrameHeader, bytes]]:
    """The frames of one gRPC message.

    Raises:
        WireError: the bytes are not whole frames.
    """
    offset = 0
    view = memoryview(data)
    while offset < len(data):
        header = FrameHeader.unpack(view[offset:])
        end = offset + HEADER_SIZE + header.length
        if end > len(data):
            raise WireError("a frame is cut off")
        yield header, data if end - offset == len(data) else data[offset:end]
        offset = end
