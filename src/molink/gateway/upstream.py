"""Connections to a replica: each carries one request at a time, and is kept for the next one."""

import asyncio
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import cast

import httptools

from molink.gateway.http import MAX_HEAD, Headers, end_to_end, head

READ_AHEAD = 256 * 1024  # bytes of an answer that may wait for its client
CONNECT_TIMEOUT_S = 5.0
FULL_S = 0.01


class UpstreamLostError(Exception):
    """The replica went away before its answer was complete."""


class UnreachableError(UpstreamLostError):
    """The replica cannot be reached: it knows nothing of the request."""


class Upstream:
    """One replica, behind a unix socket. Owns the connections to it that nobody uses."""

    def __init__(self, path: Path) -> None:
        self._path = str(path)
        self._idle: deque[_Connection] = deque()

    async def request(self, method: bytes, target: bytes, headers: Headers, body: bytes) -> "Reply":
        """Send a request, and wait for the head of its answer. Raises UpstreamLostError."""
        own = [(b"content-length", str(len(body)).encode())] if body or method == b"POST" else []
        first = b"%b %b HTTP/1.1\r\n" % (method, target)
        sent = head(first, [*end_to_end(headers), *own]) + body
        while self._idle:
            connection = self._idle.pop()  # the one used last is the least likely to be closed
            with suppress(_ClosedWhileIdle):
                return await self._exchange(connection, method, sent)
        return await self._exchange(await self._connect(), method, sent)

    async def _exchange(self, connection: "_Connection", method: bytes, sent: bytes) -> "Reply":
        reply = Reply(self, connection, has_body=method != b"HEAD")
        try:
            await connection.send(sent, reply)
        except BaseException:
            connection.close()
            raise
        return reply

    async def _connect(self) -> "_Connection":
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                return await self._connect_in_turn()
        except (OSError, TimeoutError) as error:
            raise UnreachableError(f"the engine cannot be reached: {error}") from error

    async def _connect_in_turn(self) -> "_Connection":
        loop = asyncio.get_running_loop()
        while True:
            try:
                _, connection = await loop.create_unix_connection(_Connection, self._path)
            except BlockingIOError:  # as many as its queue holds wait to be accepted
                await asyncio.sleep(FULL_S)
            else:
                return connection

    def keep(self, connection: "_Connection") -> None:
        """Take back a connection whose answer is complete."""
        if connection.is_open:
            connection.was_kept = True
            self._idle.append(connection)

    def close(self) -> None:
        """Close what nobody uses."""
        while self._idle:
            self._idle.pop().close()


class _ClosedWhileIdle(Exception):
    """A kept connection was closed before the replica read what was sent."""


class Reply:
    """The answer of a replica: its head, and its body as it comes."""

    def __init__(self, upstream: Upstream, connection: "_Connection", *, has_body: bool) -> None:
        self.status = 0
        self.headers: Headers = []
        self.is_complete = False  # all of it has been received
        self._upstream = upstream
        self._connection = connection
        self.has_body = has_body

    async def read(self) -> bytes:
        """What has come since the last time; b"" at the end. Raises UpstreamLostError."""
        return await self._connection.read()

    async def read_all(self) -> bytes:
        """The whole body."""
        parts = []
        while part := await self.read():
            parts.append(part)
        return b"".join(parts)

    def close(self) -> None:
        """Have done with it: if it is not complete, the replica stops working on it."""
        if self.is_complete:
            self._upstream.keep(self._connection)
        else:
            self._connection.close()


class _Connection(asyncio.Protocol):
    """Feeds one reply after the other from one socket."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport
        self._reply: Reply | None = None
        self._parser: httptools.HttpResponseParser
        self._parts: list[bytes] = []
        self._size = 0  # bytes of them
        self._head_size = 0
        self._waiter: asyncio.Future[None] | None = None
        self._has_head = False
        self.was_kept = False
        self._is_paused = False
        self._lost: str | None = None
        self._loop = asyncio.get_running_loop()

    @property
    def is_open(self) -> bool:
        return self._lost is None

    async def send(self, data: bytes, reply: Reply) -> None:
        """Send a request and wait for the head of its answer."""
        if self._lost is not None:
            raise _ClosedWhileIdle
        self._reply, self._has_head, self._head_size = reply, False, 0
        self._parser = httptools.HttpResponseParser(self)
        self._transport.write(data)
        while not self._has_head:
            if self._lost is not None:
                if self.was_kept and not self._head_size:
                    raise _ClosedWhileIdle
                raise UpstreamLostError(self._lost)
            await self._wait()

    async def read(self) -> bytes:
        assert self._reply is not None
        while not self._parts:
            if self._reply.is_complete:
                return b""
            if self._lost is not None:
                raise UpstreamLostError(self._lost)
            await self._wait()
        data = b"".join(self._parts) if len(self._parts) > 1 else self._parts[0]
        self._parts.clear()
        self._size = 0
        if self._is_paused:
            self._is_paused = False
            self._transport.resume_reading()
        return data

    async def _wait(self) -> None:
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def close(self) -> None:
        self._lost = self._lost or "closed"
        self._transport.abort()

    # What asyncio tells it

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self._reply is None or self._reply.is_complete:
            self._fail("the engine spoke without being asked")
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._fail(f"the engine's answer is no HTTP: {error}")
        if self._size > READ_AHEAD and not self._is_paused:
            self._is_paused = True
            self._transport.pause_reading()
        self._wake()

    def _fail(self, reason: str) -> None:
        self._lost = self._lost or reason
        self._transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        self._lost = self._lost or f"the engine closed the connection: {error or 'end of file'}"
        self._wake()

    # What the parser tells it

    def on_status(self, text: bytes) -> None:
        self._head_size += len(text)

    def on_header(self, name: bytes, value: bytes) -> None:
        assert self._reply is not None
        self._head_size += len(name) + len(value)
        if self._head_size > MAX_HEAD:
            raise ValueError(f"headers of more than {MAX_HEAD} bytes")
        self._reply.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        assert self._reply is not None
        self._reply.status = self._parser.get_status_code()
        self._has_head = True
        if not self._reply.has_body:
            self._reply.is_complete = True

    def on_body(self, part: bytes) -> None:
        self._parts.append(part)
        self._size += len(part)

    def on_message_complete(self) -> None:
        assert self._reply is not None
        self._reply.is_complete = True
        if not self._parser.should_keep_alive():
            self._lost = "the engine closes connections"
