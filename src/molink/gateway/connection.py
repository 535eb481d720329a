"""A client's connection: reads its requests one after the other, and writes their answers."""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Protocol, cast

import httptools

from molink.gateway.http import (
    JSON_HEADERS,
    LAST_CHUNK,
    MAX_BODY,
    MAX_HEAD,
    Headers,
    Refusal,
    Request,
    chunk,
    head,
    status_line,
)

logger = logging.getLogger("molink.gateway")

HEAD_TIMEOUT_S = 30.0  # from a request's first byte to the end of its headers
QUIET_TIMEOUT_S = 60.0  # between two pieces of a body
IDLE_TIMEOUT_S = 120.0  # between two requests
STALLED_TIMEOUT_S = 60.0  # that a client may not read while there is something for it

LINGER_S = 0.5
MAX_AHEAD = 32  # requests of a client that wait for the answer to one before
MAX_BODIES = 1 << 30  # bytes, of all clients

_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class Handler(Protocol):
    """Answers one request; is cancelled when the client goes away."""

    def __call__(self, request: Request, answer: "Answer") -> Awaitable[None]: ...


class Budget:
    """Bytes of all bodies that are kept at a time."""

    used = 0


class Connection(asyncio.Protocol):
    """One client. Requests that come before the answer to the last one wait for their turn.

    Args:
        handle: answers requests.
        check: raises Refusal for a request whose body shall not even be read.
        budget: shared by all connections.
        connections: where it is while it is open; one whose TLS fails never is.
    """

    def __init__(
        self,
        handle: Handler,
        check: Callable[[Request], object],
        budget: Budget,
        connections: set["Connection"],
    ) -> None:
        self._handle = handle
        self._check = check
        self._budget = budget
        self._kept = 0  # bytes of bodies
        self._unread = 0  # bytes since anything but headers has come
        self._is_reading = False  # a request has begun, and is not complete
        self._connections = connections
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport
        self._request = Request(b"", b"")  # that is being read
        self._body = bytearray()
        self._head_size = 0
        self._ready: deque[Request] = deque()
        self._task: asyncio.Task[None] | None = None
        self._is_ending = False
        self._is_deaf = False  # what comes is not understood any more
        self._writable = asyncio.Event()
        self._writable.set()
        self._loop = asyncio.get_running_loop()
        self._waits_since = self._loop.time()  # for the client's next bytes
        self._timeout_s = IDLE_TIMEOUT_S

    # What asyncio tells it

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._connections.add(self)

    def data_received(self, data: bytes) -> None:
        if self._is_deaf:
            return
        if self._timeout_s == IDLE_TIMEOUT_S:
            self._waits_for(HEAD_TIMEOUT_S)
        elif self._timeout_s == QUIET_TIMEOUT_S:
            self._waits_for(QUIET_TIMEOUT_S)
        self._unread += len(data)
        try:
            self._parser.feed_data(data)
            self._check_head(self._unread)  # headers, or trailers, that have no end yet
        except httptools.HttpParserUpgrade:
            pass  # to HTTP/2, which we may decline: the request is answered
        except httptools.HttpParserError as error:
            refusal = error.__context__
            if not isinstance(refusal, Refusal):
                refusal = Refusal(400, "BadRequestError", f"no HTTP request: {error}")
            self._refuse(refusal)
        except Refusal as refusal:
            self._refuse(refusal)

    def eof_received(self) -> bool:
        return False  # a client that has closed one half is gone

    def connection_lost(self, error: Exception | None) -> None:
        self._is_ending = True
        if self._task is not None:
            self._task.cancel()
        self._writable.set()
        self._keep(-self._kept)
        self._connections.discard(self)

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    # What the parser tells it

    def on_message_begin(self) -> None:
        self._request = Request(b"", b"")
        self._body = bytearray()
        self._head_size = 0
        self._is_reading = True

    def on_url(self, part: bytes) -> None:
        self._add_to_head(len(part))
        self._request.target += part

    def on_header(self, name: bytes, value: bytes) -> None:
        self._add_to_head(len(name) + len(value) + 4)
        self._request.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        self._request.method = self._parser.get_method()
        if self._task is None:
            self._waits_for(QUIET_TIMEOUT_S)
        self._check(self._request)
        if (self._request.header(b"upgrade") or b"").lower() == b"websocket":
            raise Refusal(501, "NotImplementedError", "the gateway takes no WebSockets")
        if (length := self._request.header(b"content-length")) is not None:
            self._check_body(int(length))
        if (self._request.header(b"expect") or b"").lower() == b"100-continue" and not self._task:
            self._transport.write(_CONTINUE)

    def on_body(self, part: bytes) -> None:
        self._unread = 0
        self._check_body(len(self._body) + len(part))
        self._keep(len(part))
        self._body += part

    def on_message_complete(self) -> None:
        request = self._request
        self._unread, self._is_reading = 0, False
        request.body, self._body = bytes(self._body), bytearray()
        request.keeps_alive = self._parser.should_keep_alive() and not self._parser.should_upgrade()
        request.is_old = self._parser.get_http_version() == "1.0"
        self._ready.append(request)
        if self._task is None:
            self._answer_next()
        elif len(self._ready) > MAX_AHEAD:
            text = f"more than {MAX_AHEAD} requests at once on one connection"
            raise Refusal(429, "RateLimitError", text)

    def _add_to_head(self, size: int) -> None:
        self._head_size += size
        self._check_head(self._head_size)

    def _check_head(self, size: int) -> None:
        if size > MAX_HEAD:
            text = f"the headers are larger than {MAX_HEAD} bytes"
            raise Refusal(431, "RequestHeaderFieldsTooLargeError", text)

    def _keep(self, size: int) -> None:
        """Count bytes of bodies that are kept, or not any more."""
        if size > 0 and self._budget.used + size > MAX_BODIES:
            text = "too much is being sent at once; try again later"
            raise Refusal(503, "ServiceUnavailableError", text, retry_after_s=5)
        self._kept += size
        self._budget.used += size

    def _check_body(self, size: int) -> None:
        if size > MAX_BODY:
            text = f"the body is larger than {MAX_BODY} bytes"
            raise Refusal(413, "RequestEntityTooLargeError", text)

    # Answers

    def _answer_next(self) -> None:
        self._timeout_s = float("inf")
        request = self._ready.popleft()
        self._task = self._loop.create_task(self._answer(request))

    async def _answer(self, request: Request) -> None:
        answer = Answer(self._transport, self._writable, request)
        try:
            await self._handle(request, answer)
        except Refusal as refusal:
            answer.refuse(refusal)
        except ClientGone:
            pass
        except Exception:
            logger.exception("%s %s", request.method, request.path)
            answer.refuse(Refusal(500, "InternalServerError", "the gateway failed; see its log"))
        with contextlib.suppress(ClientGone):  # nothing more is answered before this is read
            await answer.until_read()
        self._keep(-len(request.body))
        self._task = None
        if not request.keeps_alive or not answer.is_complete:
            self.end()
        elif self._ready:
            self._answer_next()
        elif self._is_ending:
            self.end()
        else:
            self._waits_for(QUIET_TIMEOUT_S if self._is_reading else IDLE_TIMEOUT_S)

    def _refuse(self, refusal: Refusal) -> None:
        """What comes further on this connection is not understood.

        It is read all the same for a moment: a socket that is closed before takes back the answer.
        """
        is_new, self._is_ending, self._is_deaf = not self._is_ending, True, True
        self._ready.clear()
        if is_new and self._task is None:
            request = Request(b"GET", b"", keeps_alive=False)
            Answer(self._transport, self._writable, request).refuse(refusal)
            self._loop.call_later(LINGER_S, self.end)

    def end(self) -> None:
        """Close it, once what is under way is answered."""
        self._is_ending = True
        if self._task is None:
            self._waits_for(STALLED_TIMEOUT_S)  # for it to read what it was sent
            self._transport.close()

    def _waits_for(self, timeout_s: float) -> None:
        self._waits_since, self._timeout_s = self._loop.time(), timeout_s

    def check_time(self, now: float) -> None:
        """End it if its client has kept it waiting for too long."""
        if now - self._waits_since > self._timeout_s:
            if self._transport.is_closing():
                self._transport.abort()
            elif self._timeout_s == IDLE_TIMEOUT_S:
                self.end()
            else:
                self._refuse(Refusal(408, "RequestTimeoutError", "the request took too long"))


class ClientGone(Exception):
    """Nobody reads the answer any more."""


class Answer:
    """The answer to one request, written as it comes."""

    def __init__(
        self, transport: asyncio.Transport, writable: asyncio.Event, request: Request
    ) -> None:
        self._transport = transport
        self._writable = writable
        self._request = request
        self._is_chunked = False
        self.status = 0
        self.is_begun = False
        self.is_of_events = False
        self.is_complete = False

    def whole(self, status: int, headers: Headers, body: bytes) -> None:
        """Send all of it."""
        own = (b"content-length", str(len(body)).encode())
        shown = b"" if self._request.method == b"HEAD" else body
        self._begin(status, [*headers, own], shown)
        self.is_complete = True

    def json(self, body: bytes) -> None:
        """Send JSON, with status 200."""
        self.whole(200, JSON_HEADERS, body)

    def refuse(self, refusal: Refusal) -> None:
        """Send an error instead of an answer; what has begun is cut off."""
        if not self.is_begun:
            self.whole(refusal.status, refusal.headers, refusal.body)

    def begin(self, status: int, headers: Headers) -> None:
        """Send the head of a body whose length is not known."""
        self._is_chunked = not self._request.is_old
        if self._is_chunked:
            headers = [*headers, (b"transfer-encoding", b"chunked")]
        else:
            self._request.keeps_alive = False
        self._begin(status, headers, b"")

    def _begin(self, status: int, headers: Headers, body: bytes) -> None:
        self.status, self.is_begun = status, True
        kind = next((value for name, value in headers if name == b"content-type"), b"")
        self.is_of_events = kind.startswith(b"text/event-stream")
        if not self._request.keeps_alive:
            headers = [*headers, (b"connection", b"close")]
        self._transport.write(head(status_line(status), headers) + body)

    async def write(self, data: bytes) -> None:
        """Send a piece of the body. Raises ClientGone if the client has stopped reading."""
        if data:
            self._transport.write(chunk(data) if self._is_chunked else data)
        await self.until_read()

    async def until_read(self) -> None:
        """Wait while much waits to be read. Cuts off a client that stops reading: ClientGone."""
        if not self._writable.is_set():
            try:
                await asyncio.wait_for(self._writable.wait(), STALLED_TIMEOUT_S)
            except TimeoutError:
                self._transport.abort()
                raise ClientGone from None

    def end(self) -> None:
        """The body is complete."""
        if self._is_chunked:
            self._transport.write(LAST_CHUNK)
        self.is_complete = True
