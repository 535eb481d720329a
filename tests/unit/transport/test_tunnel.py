"""Tunnels over real sockets, gRPC and TLS on loopback."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator

import grpc.aio
import pytest
import uvloop

from molink.core.errors import UsageError
from molink.core.ids import HEAD, NodeId
from molink.transport import tunnel
from molink.transport.credentials import channel_credentials, expect_node, server_credentials
from molink.transport.identity import ClusterAuthority, NodeIdentity
from molink.transport.link import TUNNEL_METHOD
from molink.transport.server import LinkServer, TunnelChannel
from molink.transport.token import JoinToken, new_secret
from molink.transport.tunnel import CHUNK, TunnelEntrance, TunnelExit

from .conftest import identity_of

BIG = bytes(range(256)) * 40_000  # 10 MB, more than all buffers on the way


class Service:
    """Stands for the head's HTTP server: answers `hello` with `hello`, and knows a few words."""

    def __init__(self) -> None:
        self.connections: list[asyncio.StreamWriter] = []
        self.received = 0
        self.reads = asyncio.Event()
        self.reads.set()

    async def start(self, port: int = 0) -> int:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", port, limit=CHUNK)
        bound: int = self._server.sockets[0].getsockname()[1]
        return bound

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections.append(writer)
        try:
            while data := await self._read(reader):
                if data == b"break":
                    writer.transport.abort()
                    return
                if data == b"big":
                    writer.write(BIG)
                elif data == b"bye":
                    writer.write(b"bye")
                    break
                else:
                    writer.write(data)
                await writer.drain()
            else:
                writer.write(b"-end")
        except ConnectionError:
            pass
        finally:
            writer.close()
            self.connections.remove(writer)

    async def _read(self, reader: asyncio.StreamReader) -> bytes:
        await self.reads.wait()
        data = await reader.read(CHUNK)
        self.received += len(data)
        return data

    async def stop(self) -> None:
        self._server.close()
        for writer in list(self.connections):
            writer.transport.abort()


class Tunnel:
    """A head with its service, and a node whose port leads there."""

    def __init__(self, authority: ClusterAuthority) -> None:
        self.authority = authority
        self.service = Service()

    def node(self, node: NodeId) -> NodeIdentity:
        return identity_of(self.authority, node)

    async def start(self) -> None:
        self.service_port = await self.service.start()
        self.exit = TunnelExit("127.0.0.1", self.service_port)
        await self.start_agent("127.0.0.1:0")
        self.channel = TunnelChannel(f"127.0.0.1:{self.agent_port}", self.node(NodeId(1)))
        self.entrance = TunnelEntrance(self.channel.open_stream)
        self.port = await self.entrance.start("127.0.0.1", 0)

    async def start_agent(self, listen: str) -> None:
        identity = self.node(HEAD)
        self.agent = LinkServer(
            lambda: self.authority.certificate_pem, _no_links, tunnel=self.exit.serve
        )
        self.token = JoinToken(
            addresses=("127.0.0.1:1",),
            authority_key=self.authority.public_key_bytes,
            secret=new_secret(),
            cluster_id="home",
            expires_at=1 << 36,
        )
        roots = [self.token.enrolment_root()]
        credentials = server_credentials(lambda: identity, lambda: roots)
        self.agent_port = await self.agent.start(listen, credentials)

    async def stop(self) -> None:
        await self.entrance.stop()
        await self.channel.close()
        await self.agent.stop()
        await self.service.stop()

    async def connect(self) -> "Client":
        return Client(*await asyncio.open_connection("127.0.0.1", self.port, limit=CHUNK))

    async def is_empty(self) -> None:
        """Wait until nothing is left of any connection."""
        for _ in range(500):
            if not (self.service.connections or self.exit._running or self.entrance._connections):
                return
            await asyncio.sleep(0.01)
        raise AssertionError("a connection is left")


class Client:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.sent = 0

    async def send_for_ever(self) -> None:
        while True:
            self.writer.write(BIG)
            self.sent += len(BIG)
            await self.writer.drain()

    async def ask(self, data: bytes, length: int) -> bytes:
        self.writer.write(data)
        async with asyncio.timeout(10):
            return await self.reader.readexactly(length)

    async def rest(self) -> bytes:
        async with asyncio.timeout(10):
            return await self.reader.read()

    def close(self) -> None:
        self.writer.close()


async def _no_links(_: object) -> None:
    raise AssertionError("nobody links here")


@pytest.fixture(params=[asyncio.DefaultEventLoopPolicy, uvloop.EventLoopPolicy])
def event_loop_policy(request: pytest.FixtureRequest) -> asyncio.AbstractEventLoopPolicy:
    """Agents run under uvloop, whose closed transports behave otherwise."""
    policy: asyncio.AbstractEventLoopPolicy = request.param()
    return policy


@pytest.fixture
async def tunnelled(authority: ClusterAuthority) -> AsyncIterator[Tunnel]:
    tunnelled = Tunnel(authority)
    await tunnelled.start()
    yield tunnelled
    await tunnelled.stop()


async def test_bytes_flow_both_ways_for_several_requests(tunnelled: Tunnel) -> None:
    client = await tunnelled.connect()
    for word in (b"one", b"two", bytes(1000)):
        assert await client.ask(word, len(word)) == word
    client.close()
    await tunnelled.is_empty()


async def test_many_at_once(tunnelled: Tunnel) -> None:
    clients = [await tunnelled.connect() for _ in range(50)]
    words = [f"client {number:04}".encode() for number in range(50)]
    answers = await asyncio.gather(
        *(client.ask(word, len(word)) for client, word in zip(clients, words, strict=True))
    )
    assert list(answers) == words
    for client in clients:
        client.close()
    await tunnelled.is_empty()


async def test_a_large_answer_arrives_whole(tunnelled: Tunnel) -> None:
    client = await tunnelled.connect()
    assert await client.ask(b"big", len(BIG)) == BIG
    client.close()
    await tunnelled.is_empty()


async def test_the_end_of_a_clients_data_is_passed_on(tunnelled: Tunnel) -> None:
    client = await tunnelled.connect()
    client.writer.write(b"all")
    client.writer.write_eof()
    assert await client.rest() == b"all-end"
    client.close()
    await tunnelled.is_empty()


async def test_a_server_that_closes_ends_the_connection(tunnelled: Tunnel) -> None:
    client = await tunnelled.connect()
    client.writer.write(b"bye")
    assert await client.rest() == b"bye"
    await tunnelled.is_empty()
    client.close()


async def test_a_server_that_breaks_off_cuts_the_connection(tunnelled: Tunnel) -> None:
    client = await tunnelled.connect()
    await client.ask(b"one", 3)
    client.writer.write(b"break")
    assert await client.rest() == b""
    await tunnelled.is_empty()
    client.close()


async def test_a_client_that_is_killed_leaves_nothing(tunnelled: Tunnel) -> None:
    client = await tunnelled.connect()
    client.writer.write(b"big")
    await client.reader.readexactly(1000)
    client.writer.transport.abort()
    await tunnelled.is_empty()


async def test_a_slow_reader_holds_the_sender_back(tunnelled: Tunnel) -> None:
    tunnelled.service.reads.clear()
    client = await tunnelled.connect()
    sending = asyncio.create_task(client.send_for_ever())
    done, _ = await asyncio.wait((sending,), timeout=1)
    assert done == set()
    assert client.writer.transport.get_write_buffer_size() > 0
    assert client.sent < 5 * len(BIG)
    sending.cancel()
    assert tunnelled.service.received == 0
    client.writer.transport.abort()
    tunnelled.service.reads.set()
    await tunnelled.is_empty()


async def answer_of(client: Client) -> tuple[str, str]:
    """Headers and error message of a 503."""
    headers, _, body = (await client.rest()).partition(b"\r\n\r\n")
    assert headers.startswith(b"HTTP/1.1 503 ")
    assert b"Retry-After: " in headers
    assert f"Content-Length: {len(body)}".encode() in headers
    client.close()
    message: str = json.loads(body)["error"]["message"]
    return headers.decode(), message


async def test_503_while_the_heads_server_is_not_up(tunnelled: Tunnel) -> None:
    await tunnelled.service.stop()
    client = await tunnelled.connect()
    client.writer.write(b"GET / HTTP/1.1\r\n\r\n")
    _, message = await answer_of(client)
    assert "the head's HTTP server does not answer" in message
    await tunnelled.is_empty()


async def test_503_while_the_head_is_away_and_an_answer_when_it_is_back(tunnelled: Tunnel) -> None:
    await tunnelled.agent.stop()
    client = await tunnelled.connect()
    client.writer.write(b"GET / HTTP/1.1\r\n\r\n")
    _, message = await answer_of(client)
    assert "no way to the head's API" in message
    await tunnelled.start_agent(f"127.0.0.1:{tunnelled.agent_port}")
    first = b""
    for _ in range(50):
        client = await tunnelled.connect()
        client.writer.write(b"hello")
        first = await client.reader.read(5)
        client.close()
        if first == b"hello":
            break
        await asyncio.sleep(0.1)
    assert first == b"hello"


async def test_a_head_that_goes_away_cuts_connections(tunnelled: Tunnel) -> None:
    client = await tunnelled.connect()
    await client.ask(b"one", 3)
    await tunnelled.agent.stop()
    assert await client.rest() == b""
    await tunnelled.is_empty()
    client.close()


async def test_an_entrance_that_stops_cuts_connections(tunnelled: Tunnel) -> None:
    client = await tunnelled.connect()
    await client.ask(b"one", 3)
    await tunnelled.entrance.stop()
    assert await client.rest() == b""
    await tunnelled.is_empty()
    client.close()


@pytest.mark.parametrize("limit", ["MAX_TUNNELS", "MAX_TUNNELS_OF_NODE"])
async def test_tunnels_are_bounded_on_the_head(
    tunnelled: Tunnel, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    other = TunnelEntrance(tunnelled.channel.open_stream)
    port = await other.start("127.0.0.1", 0)
    first = await tunnelled.connect()
    await first.ask(b"one", 3)
    monkeypatch.setattr(tunnel, limit, 1)
    second = Client(*await asyncio.open_connection("127.0.0.1", port))
    second.writer.write(b"GET / HTTP/1.1\r\n\r\n")
    _, message = await answer_of(second)
    assert "the head carries 1 connections already" in message
    first.close()
    await other.stop()


async def test_silent_connections_shut_nobody_out(
    tunnelled: Tunnel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tunnel, "MAX_TUNNELS", 1)
    silent = [await tunnelled.connect() for _ in range(3)]
    client = await tunnelled.connect()
    assert await client.ask(b"one", 3) == b"one"
    monkeypatch.setattr(tunnel, "MAX_SOCKETS", 4)
    late = await tunnelled.connect()
    with contextlib.suppress(ConnectionError):  # cut at once
        assert await late.rest() == b""
    for each in (*silent, client, late):
        each.close()


async def test_a_connection_that_says_nothing_costs_no_stream(
    tunnelled: Tunnel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tunnel, "FIRST_BYTES_TIMEOUT_S", 0.1)
    client = await tunnelled.connect()
    assert await client.rest() == b""
    assert tunnelled.service.connections == []
    client.close()


async def test_only_nodes_of_the_cluster_pass(tunnelled: Tunnel) -> None:
    """A token's holder gets through the handshake; a stranger does not even that."""
    credentials = channel_credentials(tunnelled.token)
    options = [expect_node(HEAD)]
    address = f"127.0.0.1:{tunnelled.agent_port}"
    async with grpc.aio.secure_channel(address, credentials, options=options) as channel:
        with pytest.raises(grpc.aio.AioRpcError, match="UNAUTHENTICATED"):
            await channel.stream_stream(TUNNEL_METHOD)().read()
    stranger = Tunnel(ClusterAuthority.create("home")).node(NodeId(1))
    foreign = TunnelChannel(address, stranger)
    with pytest.raises(grpc.aio.AioRpcError, match="UNAVAILABLE"):
        await foreign.open_stream().read()
    await foreign.close()
    assert tunnelled.service.connections == []


async def test_a_taken_port_is_a_usage_error(tunnelled: Tunnel) -> None:
    second = TunnelEntrance(tunnelled.channel.open_stream)
    with pytest.raises(UsageError, match=f"cannot serve HTTP on 127.0.0.1:{tunnelled.port}"):
        await second.start("127.0.0.1", tunnelled.port)
    with pytest.raises(UsageError, match="cannot serve HTTP on 203"):
        await second.start("203.0.113.1", 0)
    await second.stop()
