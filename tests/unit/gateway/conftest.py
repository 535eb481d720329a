"""A gateway on a real port, before an engine that says what a test tells it to."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvloop

from molink.gateway import gateway, server
from molink.gateway.admission import Admission, Limits
from molink.gateway.connection import Budget
from molink.gateway.gateway import Gateway
from molink.gateway.keys import Keys
from molink.gateway.server import GatewayServer, Tls
from molink.gateway.upstream import Upstream


class FakeAgent:
    """What the agent has told the gateway."""

    view_json = b'{"serving": true}'
    view = None

    def __init__(self) -> None:
        self.down: str | None = None
        self.engines_lost = 0
        self.drains = asyncio.Event()
        self.waits_for_s = 0.0
        self._changed = asyncio.Event()

    @property
    def trouble(self) -> str:
        return f"the pipeline is down: {self.down}"

    async def change(self, timeout_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), timeout_s)

    def lose(self, reason: str) -> None:
        self.down = reason
        self._change()

    def lose_engine(self) -> None:
        """One is gone; the next is there already."""
        self.engines_lost += 1
        self._change()

    def come_back(self) -> None:
        self.down = None
        self._change()

    def _change(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


class Asked:
    """One request as the engine got it, and the connection on which to answer."""

    def __init__(
        self,
        head: bytes,
        body: bytes,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        connection: int,
    ) -> None:
        self.first, *lines = head.decode().split("\r\n")
        self.headers = dict(line.split(": ", 1) for line in lines if line)
        self.body = body
        self.reader = reader
        self.writer = writer
        self.connection = connection  # its number

    @property
    def path(self) -> str:
        return self.first.split()[1]

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    async def whole(self, status: int, body: bytes, *more: str) -> None:
        head = f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\n"
        head += f"content-length: {len(body)}\r\n" + "".join(f"{line}\r\n" for line in more)
        self.writer.write(head.encode() + b"\r\n" + body)
        await self.writer.drain()

    async def begin(self, kind: str = "text/event-stream; charset=utf-8") -> None:
        head = f"HTTP/1.1 200 OK\r\ncontent-type: {kind}\r\ntransfer-encoding: chunked\r\n\r\n"
        self.writer.write(head.encode())
        await self.writer.drain()

    async def say(self, data: bytes) -> None:
        self.writer.write(b"%x\r\n%b\r\n" % (len(data), data))
        await self.writer.drain()

    async def end(self) -> None:
        self.writer.write(b"0\r\n\r\n")
        await self.writer.drain()

    async def die(self) -> None:
        """Close the connection in the middle of whatever it was."""
        self.writer.close()


Script = Callable[[Asked], Awaitable[None]]


class FakeEngine:
    """Answers each request as `script` says."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.script: Script
        self.asked: list[Asked] = []
        self.gone = asyncio.Event()  # a client of it
        self.connections = 0
        self._server: asyncio.Server

    async def start(self) -> None:
        self._server = await asyncio.start_unix_server(self._serve, self.path)

    async def stop(self) -> None:
        self._server.close()
        self.path.unlink()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        number = self.connections
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).removesuffix(b"\r\n\r\n")
                length = [x for x in head.split(b"\r\n") if x.startswith(b"content-length: ")]
                body = await reader.readexactly(int(length[0].split()[1])) if length else b""
                asked = Asked(head, body, reader, writer, number)
                self.asked.append(asked)
                await self.script(asked)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            self.gone.set()
        finally:
            writer.close()


class Served:
    """A running gateway, its engine and its agent."""

    budget: Budget

    def __init__(
        self, agent: FakeAgent, engine: FakeEngine, keys: Keys, admission: Admission, port: int
    ) -> None:
        self.agent = agent
        self.keys = keys
        self.admission = admission
        self.engine = engine
        self.port = port
        self.http = httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False)

    async def raw(self, data: bytes) -> bytes:
        """All that comes back for some bytes, until the gateway closes."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(data)
        try:
            async with asyncio.timeout(5):
                return await reader.read()
        finally:
            writer.close()


@pytest.fixture
def event_loop_policy() -> uvloop.EventLoopPolicy:
    return uvloop.EventLoopPolicy()


@pytest.fixture
async def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Served]:
    monkeypatch.setattr(gateway, "NOTICE_S", 0.05)
    monkeypatch.setattr(gateway, "RECONNECT_S", 0.01)
    monkeypatch.setattr(server, "CHECK_S", 0.05)
    agent, engine = FakeAgent(), FakeEngine(tmp_path / "engine")
    await engine.start()
    upstream = Upstream(engine.path)
    keys, admission = Keys([], None), Admission(Limits(), lambda: None)
    handle = Gateway(agent, upstream, keys, admission)  # type: ignore[arg-type]
    port = GatewayServer(handle, keys.tenant_of)
    served = Served(agent, engine, keys, admission, await port.start("127.0.0.1", 0, Tls()))
    served.budget = port._budget
    async with served.http:
        yield served
    upstream.close()
    async with asyncio.timeout(5):
        await port.stop()
    await engine.stop()
