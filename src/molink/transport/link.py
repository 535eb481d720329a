"""A link: frames between two agents over one bidirectional gRPC stream.

The gRPC service has five methods and no generated code: `Enroll` (see node.enrolment), `Status`,
`Order` (see wire.orders), `Tunnel` (see transport.tunnel) and `Link`, whose messages are in
`transport.pieces`.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio

from molink.core.errors import LinkError, WireError
from molink.core.ids import NodeId
from molink.transport import pieces
from molink.transport.queue import FrameQueue
from molink.transport.tcp import TcpSocket
from molink.transport.window import (
    FEW_BYTES,
    FEW_BYTES_INTERVAL_S,
    LARGEST_WINDOW,
    RECEIPT_INTERVAL_S,
    Receipt,
    Window,
)
from molink.wire.frames import HEADER_SIZE, MAX_PAYLOAD, FrameHeader, Priority

LINK_METHOD = "/molink.Agent/Link"
ENROLL_METHOD = "/molink.Agent/Enroll"
STATUS_METHOD = "/molink.Agent/Status"
TUNNEL_METHOD = "/molink.Agent/Tunnel"
ORDER_METHOD = "/molink.Agent/Order"
MAX_GRPC_MESSAGE = 2 * (MAX_PAYLOAD + HEADER_SIZE)

KEEPALIVE_S = 2.0  # of silence, after which the connection is tried
# A link that is dead for 5 s must live on, and TCP, whose attempts double their distance, may
# notice the end of a pause only after twice its time. gRPC makes this TCP_USER_TIMEOUT too.
KEEPALIVE_TIMEOUT_S = 12.0
SILENCE_S = KEEPALIVE_S + KEEPALIVE_TIMEOUT_S  # then a peer is lost, at the latest
LAST_WORDS_S = 0.2
CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_GRPC_MESSAGE),
    ("grpc.max_send_message_length", MAX_GRPC_MESSAGE),
    ("grpc.keepalive_time_ms", int(KEEPALIVE_S * 1000)),
    ("grpc.keepalive_timeout_ms", int(KEEPALIVE_TIMEOUT_S * 1000)),
    # For a machine that is there and whose agent has stopped: its kernel acknowledges to TCP.
    ("grpc.http2.ping_timeout_ms", int(KEEPALIVE_TIMEOUT_S * 1000)),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 1000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 500),
    ("grpc.enable_retries", 0),
    ("grpc.use_local_subchannel_pool", 1),
]

STEPS = (Priority.DECODE, Priority.PREFILL)  # classes of what is lost with a link

FrameHandler = Callable[["Link", FrameHeader, bytes], Awaitable[None] | None]


class Link:
    """One end of the stream to `peer`. Owns the queue in front of it and what is in flight."""

    def __init__(self, peer: NodeId, stream: Any, tcp: TcpSocket | None = None) -> None:
        self.peer = peer
        self.tcp = tcp
        self.window = Window()
        self.bytes_received = 0
        self._stream = stream
        self._wake = asyncio.Event()
        self.queue = FrameQueue(self._wake.set)
        self._intake = _Intake(self._wake.set)
        self._closed = asyncio.Event()
        self._heard_at = time.monotonic()
        self._is_reading = True  # otherwise nothing can be heard
        self._steps_end = 0  # bytes sent, with the last of them that steps wait for
        self.has_delivered = True  # once it has ended: all that steps wait for had arrived

    @property
    def silence_s(self) -> float:
        """How long the peer has said nothing."""
        return time.monotonic() - self._heard_at if self._is_reading else 0.0

    @property
    def bytes_sent(self) -> int:
        return self.window.sent

    def send(self, frame: bytes, priority: Priority) -> asyncio.Future[None] | None:
        """Queue one frame; wait for a returned future before sending more of its class."""
        return self.queue.put(frame, priority)

    async def run(self, handle: FrameHandler) -> None:
        """Send and receive until either fails; returns at the end of the stream.

        To the side that was dialled, a peer that was killed looks like one that closed; one that
        has been silent before, to gRPC too, does not.

        Raises:
            LinkError: the connection broke.
            WireError: the peer broke the protocol.
        """
        self._heard_at = time.monotonic()
        receiving = asyncio.create_task(self._receive_all(handle))
        sending = asyncio.create_task(self._send_all())
        closing = asyncio.create_task(self._closed.wait())
        tasks = (receiving, sending, closing)
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if closing.done():
                raise LinkError(f"link to node {self.peer} was closed")
            if receiving.done() and not receiving.cancelled():
                if isinstance(receiving.exception(), WireError):  # the peer may be told why
                    await asyncio.wait((sending,), timeout=LAST_WORDS_S)
            elif sending.done():  # when a stream is over, reading tells why
                await asyncio.wait((receiving,), timeout=LAST_WORDS_S)
            self._settle(receiving if receiving.done() else sending)
            if (silence_s := time.monotonic() - self._heard_at) > KEEPALIVE_S:
                reason = f"nothing was heard for {silence_s:.0f} s"
                raise LinkError(f"link to node {self.peer} broke: {reason}")
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._intake.close()
            waiting = any(self.queue.waiting[lane] for lane in STEPS)
            self.has_delivered = not waiting and self.window.delivered >= self._steps_end
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
            self._wake.clear()
            data = self._next_message()
            if data is None:
                await self._wake.wait()
            else:
                await self._stream.write(data)

    def _next_message(self) -> bytes | None:
        """A receipt if one is due, or what waits in the queue if there is room in flight.

        A message of its own costs more than all else about a receipt, so one that is soon due
        leaves with a small message.
        """
        now = time.monotonic()
        if self._intake.is_due:
            return self._intake.receipt(self.bytes_received, now)
        if not self.window.has_room:
            return None
        data = self.queue.take(self.window.piece)
        if data is None:
            self.window.on_starved()
            return None
        self.window.on_sent(len(data), now)
        if pieces.lane_of(data) in STEPS:
            self._steps_end = self.window.sent
        if self._intake.is_soon_due(now) and len(data) <= self.window.piece // 2:
            return self._intake.receipt(self.bytes_received, now) + data
        return data

    async def _receive_all(self, handle: FrameHandler) -> None:
        frames = pieces.Reassembly()
        while (data := await self._stream.read()) is not grpc.aio.EOF:
            self._heard_at = time.monotonic()
            if data and data[0] == pieces.RECEIPT:
                receipt, self.queue.paused, data = pieces.split_receipt(data)
                self.window.on_receipt(receipt, self._heard_at)
                if len(self.queue):
                    self._wake.set()
                if not data:
                    continue
            self.bytes_received += len(data)
            self._intake.arrived(len(data), self._heard_at)
            for header, frame in frames.take(data):
                waiting = handle(self, header, frame)
                if waiting is not None:
                    self._is_reading = False
                    await self._intake.pause(header.priority, waiting, len(frame))
                    self._is_reading, self._heard_at = True, time.monotonic()


class _Intake:
    """The receiving side's receipts: when one is due, and which classes it asks to pause.

    Args:
        due: called when a receipt should leave.
    """

    def __init__(self, due: Callable[[], None]) -> None:
        self.is_due = False
        self._due = due
        self._first_s = self._arrived_s = 0.0  # of what arrived since the last receipt
        self._received = 0  # bytes of it
        self._is_held = False
        self._timer: asyncio.TimerHandle | None = None
        self._full: dict[asyncio.Future[None], Priority] = {}
        self._overrun = 0  # bytes handled of classes that are to pause

    def arrived(self, size: int, now: float) -> None:
        self._arrived_s = now
        self._received += size
        if self._timer is None:
            self._first_s = now
            self._wait(RECEIPT_INTERVAL_S, self._hold)
        elif self._is_held and self._received >= FEW_BYTES:
            self._is_due_now()

    def _hold(self) -> None:
        self._is_held = self._received < FEW_BYTES
        if self._is_held:
            self._wait(FEW_BYTES_INTERVAL_S - RECEIPT_INTERVAL_S, self._is_due_now)
        else:
            self._is_due_now()

    def _wait(self, seconds: float, then: Callable[[], None]) -> None:
        self._timer = asyncio.get_running_loop().call_later(seconds, then)

    def is_soon_due(self, now: float) -> bool:
        return self._timer is not None and now - self._first_s >= RECEIPT_INTERVAL_S / 2

    def receipt(self, received: int, now: float) -> bytes:
        self.close()
        self.is_due = self._is_held = False
        self._received = 0
        receipt = Receipt(received, self._arrived_s, now - self._arrived_s)
        return pieces.pack_receipt(receipt, set(self._full.values()))

    async def pause(self, lane: Priority, room: Awaitable[None], size: int) -> None:
        """Ask the peer to pause a class until there is room; other classes go on meanwhile.

        Waits for room only if the peer goes on sending what it was asked to pause.
        """
        waiting = asyncio.ensure_future(room)
        if lane not in self._full.values():
            self._is_due_now()
        self._full[waiting] = lane
        waiting.add_done_callback(self._has_room)
        self._overrun += size
        if self._overrun > LARGEST_WINDOW:
            await asyncio.wait(self._full)

    def _has_room(self, waiting: asyncio.Future[None]) -> None:
        lane = self._full.pop(waiting, None)
        if lane is not None and lane not in self._full.values():
            self._is_due_now()
        if not self._full:
            self._overrun = 0

    def _is_due_now(self) -> None:
        self.close()
        self.is_due = True
        self._due()

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
