"""The head's HTTP API at another node: bytes of a TCP connection over a stream between two agents.

A node listens (`TunnelEntrance`); for each connection it opens a stream to the head's agent, which
connects to its own HTTP server (`TunnelExit`). Nobody on the way reads the bytes.

The head's first message is empty and says that its server has answered; an empty message from the
node is its client's end of file. The stream ends when the server closes its connection.
"""

import asyncio
import contextlib
import json
import os
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

import grpc
import grpc.aio

from molink.core.errors import LinkError, UsageError
from molink.core.ids import NodeId

MAX_TUNNELS = 256  # at once
MAX_TUNNELS_OF_NODE = 128  # so that one node's clients do not shut out all others
MAX_SOCKETS = 1024  # of clients that may not have said anything yet
CHUNK = 64 * 1024  # bytes read at once; the buffers of a direction hold a few
CONNECT_TIMEOUT_S = 5.0
OPEN_TIMEOUT_S = 10.0
FIRST_BYTES_TIMEOUT_S = 30.0  # a connection that says nothing costs no stream, and not for ever
LINGER_S = 5.0  # for what a client has not read yet
RETRY_AFTER_S = 5
_EMPTY = b""
_BROKEN = (
    OSError,
    RuntimeError,  # uvloop's word for a client that has reset its connection
    grpc.aio.AioRpcError,
    grpc.aio.BaseError,
    asyncio.InvalidStateError,
)


class TunnelExit:
    """The head's end: connects each stream to the HTTP server at `host` and `port`."""

    def __init__(self, host: str, port: int) -> None:
        self._host = host
        self._port = port
        self._running: Counter[NodeId] = Counter()

    async def serve(self, stream: Any, node: NodeId) -> None:
        """Carry bytes for a client of `node` until the server closes its connection.

        Raises:
            LinkError: there are too many tunnels, the server does not answer, or a side broke off.
        """
        for running, most in (
            (self._running.total(), MAX_TUNNELS),
            (self._running[node], MAX_TUNNELS_OF_NODE),
        ):
            if running >= most:
                raise LinkError(f"the head carries {running} connections already")
        self._running[node] += 1
        try:
            reader, writer = await self._connect()
            try:
                await stream.write(_EMPTY)
                await _carry(_to_stream(reader, stream, _EMPTY), _to_socket(stream, writer))
            finally:
                await _close(writer)
        except _BROKEN as error:
            raise LinkError(f"a tunnel broke: {error}") from error
        finally:
            self._running -= Counter({node: 1})

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        connecting = asyncio.open_connection(self._host, self._port, limit=CHUNK)
        try:
            return await asyncio.wait_for(connecting, CONNECT_TIMEOUT_S)
        except (OSError, TimeoutError) as error:
            raise LinkError("the head's HTTP server does not answer; it may be starting") from error


class TunnelEntrance:
    """A node's end: listens for HTTP clients, and answers 503 itself while the head cannot.

    Args:
        open_stream: begins a stream to the head's agent; returns gRPC's call object.
    """

    def __init__(self, open_stream: Callable[[], Any]) -> None:
        self._open_stream = open_stream
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def start(self, host: str, port: int) -> int:
        """Listen; returns the port.

        Raises:
            UsageError: the address is taken or not this machine's.
        """
        try:
            self._server = await asyncio.start_server(self._accept, host, port, limit=CHUNK)
        except OSError as error:
            raise UsageError(
                f"cannot serve HTTP on {host}:{port}: "
                f"{os.strerror(error.errno) if error.errno else error}; "
                "choose another --port or --host"
            ) from error
        bound: int = self._server.sockets[0].getsockname()[1]
        return bound

    async def stop(self) -> None:
        """Close the port and every connection."""
        if self._server is not None:
            self._server.close()
        connections = list(self._connections)
        for connection in connections:
            connection.cancel()
        await asyncio.gather(*connections, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._connections) >= MAX_SOCKETS:
            writer.transport.abort()
            return
        connection = asyncio.ensure_future(self._serve(reader, writer))
        self._connections.add(connection)
        connection.add_done_callback(self._connections.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            first = await asyncio.wait_for(reader.read(CHUNK), FIRST_BYTES_TIMEOUT_S)
            if first:
                await self._forward(first, reader, writer)
        except LinkError as error:
            await _refuse(reader, writer, str(error))
        except (*_BROKEN, TimeoutError):
            writer.transport.abort()  # HTTP's own lengths tell the client that it was cut
        finally:
            await _close(writer)

    async def _forward(
        self, first: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Raises LinkError if nothing could be forwarded, something of _BROKEN after that."""
        stream = self._open_stream()
        try:
            await _opened(stream)
            await _carry(_to_socket(stream, writer), _to_stream(reader, stream, first))
        finally:
            stream.cancel()


async def _opened(stream: Any) -> None:
    """Wait for the head to say that its server has answered. Raises LinkError if it does not."""
    try:
        first = await asyncio.wait_for(stream.read(), OPEN_TIMEOUT_S)
    except TimeoutError:
        raise LinkError("the head does not answer") from None
    except grpc.aio.AioRpcError as error:
        raise LinkError(f"no way to the head's API: {error.details()}") from error
    if first != _EMPTY:
        raise LinkError("the head's agent does not open tunnels as this node does")


async def _carry(down: Coroutine[Any, Any, None], up: Coroutine[Any, Any, None]) -> None:
    """Run both directions until `down`, towards the HTTP client, is over or one raises."""
    tasks = asyncio.create_task(down), asyncio.create_task(up)
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
        await tasks[0]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _to_stream(reader: asyncio.StreamReader, stream: Any, first: bytes) -> None:
    """Send `first`, what the socket brings, and an empty message for its end."""
    if first:
        await stream.write(first)
    while data := await reader.read(CHUNK):
        await stream.write(data)
    await stream.write(_EMPTY)


async def _to_socket(stream: Any, writer: asyncio.StreamWriter) -> None:
    """Write what the stream brings, until it ends or says that the socket's other end has."""
    while (data := await stream.read()) is not grpc.aio.EOF and data:
        writer.write(data)
        await writer.drain()
    writer.write_eof()


async def _refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, reason: str) -> None:
    """Answer 503, and read what is on its way: a reset would take the answer with it."""
    error = {"message": reason, "type": "ServiceUnavailableError", "param": None, "code": 503}
    body = json.dumps({"error": error}).encode()
    head = (
        "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\n"
        f"Retry-After: {RETRY_AFTER_S}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    with contextlib.suppress(OSError, RuntimeError, TimeoutError):
        writer.write(head.encode() + body)
        writer.write_eof()
        async with asyncio.timeout(LINGER_S):
            while await reader.read(CHUNK):
                pass


async def _close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    try:
        await asyncio.wait_for(writer.wait_closed(), LINGER_S)
    except (OSError, TimeoutError):
        writer.transport.abort()
