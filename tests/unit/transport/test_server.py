"""Links over real gRPC and TLS on loopback: frames flow, strangers stay out, ends are noticed."""

import asyncio
import gc
import signal
import socket
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from time import monotonic, time

import pytest

from molink.core.errors import IdentityError, LinkError, MolinkError, UsageError
from molink.core.ids import HEAD, Address, NodeId, Port
from molink.transport import server
from molink.transport.credentials import server_credentials
from molink.transport.identity import ClusterAuthority, NodeIdentity
from molink.transport.link import SILENCE_S, Link
from molink.transport.server import (
    MAX_ENROLL_REQUEST,
    Accepted,
    Dialled,
    LinkServer,
    dial,
    enroll,
    fetch_status,
)
from molink.transport.token import JoinToken, new_secret
from molink.wire.frames import MAX_PAYLOAD, FrameHeader, Kind, Priority

from .conftest import identity_of

NODE = NodeId(1)
ENGINE, STAGE = Address(HEAD, Port.ENGINE), Address(NODE, Port.STAGE)
FOREIGN_TIMEOUT_S = 0.3  # a handshake on loopback takes a hundredth of it


def frame(number: int, length: int = 0) -> bytes:
    header = FrameHeader(
        *(Kind.STEP, Priority.DECODE, ENGINE, STAGE, 0, 1, number, 0, length, length)
    )
    return header.pack() + bytes(length)


class End:
    """One side of a link while it runs."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.frames: list[bytes] = []
        self.ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._arrived = asyncio.Event()

    def _handle(self, link: Link, header: FrameHeader, data: bytes) -> None:
        self.frames.append(data)
        self._arrived.set()

    async def has(self, count: int) -> None:
        while len(self.frames) < count:
            self._arrived.clear()
            await asyncio.wait_for(self._arrived.wait(), 5)

    async def run(self) -> None:
        try:
            await self.link.run(self._handle)
            self.ended.set_result("end of stream")
        except MolinkError as error:
            self.ended.set_result(str(error))


class Head:
    """A cluster of one node and its listening agent."""

    def __init__(self, authority: ClusterAuthority) -> None:
        self.authority = authority
        self.identity = self.node(HEAD)
        self.roots: list[bytes] = []
        self.accepted: asyncio.Queue[tuple[Accepted, End]] = asyncio.Queue()
        self.handlers = 0  # that run now
        self.server = LinkServer(
            lambda: authority.certificate_pem, self._accept, self._enroll, lambda: b"{}"
        )
        self.port = 0

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def node(self, node: NodeId) -> NodeIdentity:
        return identity_of(self.authority, node)

    def token(self) -> JoinToken:
        token = JoinToken(
            addresses=(self.address,),
            authority_key=self.authority.public_key_bytes,
            secret=new_secret(),
            cluster_id="home",
            expires_at=int(time()) + 3600,
        )
        self.roots.append(token.enrolment_root())
        return token

    async def start(self) -> None:
        credentials = server_credentials(lambda: self.identity, lambda: self.roots)
        self.port = await self.server.start("127.0.0.1:0", credentials)

    async def _accept(self, accepted: Accepted) -> None:
        end = End(accepted.link)
        self.handlers += 1
        self.accepted.put_nowait((accepted, end))
        await end.run()
        self.handlers -= 1

    def _enroll(self, certificate: bytes, request: bytes) -> bytes:
        if request == b"stranger":
            raise IdentityError("the token was revoked")
        return request[::-1]


@pytest.fixture
async def head(authority: ClusterAuthority) -> AsyncIterator[Head]:
    head = Head(authority)
    await head.start()
    yield head
    await head.server.stop()
    assert head.handlers == 0


Connect = Callable[..., Awaitable[tuple[Dialled, End]]]


@pytest.fixture
async def connect(head: Head) -> AsyncIterator[Connect]:
    """Dial the head as node 1 and run the link."""
    running: list[tuple[Dialled, asyncio.Task[None]]] = []

    async def connect(address: str = "") -> tuple[Dialled, End]:
        dialled = await dial(address or head.address, head.node(NODE), HEAD, 5)
        end = End(dialled.link)
        running.append((dialled, asyncio.create_task(end.run())))
        return dialled, end

    yield connect
    for dialled, task in running:
        await dialled.channel.close()
        await task


class Cable:
    """A TCP relay in front of the head that can be cut, as when a machine dies."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._writers: list[asyncio.StreamWriter] = []
        self._pumps: list[asyncio.Task[None]] = []

    async def start(self) -> str:
        self._server = await asyncio.start_server(self._relay, "127.0.0.1", 0)
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there_reader, there_writer = await asyncio.open_connection("127.0.0.1", self._port)
        self._writers += [writer, there_writer]
        self._pumps += [
            asyncio.create_task(_pump(reader, there_writer)),
            asyncio.create_task(_pump(there_reader, writer)),
        ]

    async def cut(self) -> None:
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()
        await asyncio.gather(*self._pumps, return_exceptions=True)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(1 << 16):
        writer.write(data)
        await writer.drain()


async def test_frames_flow_in_both_directions(head: Head, connect: Connect) -> None:
    _, here = await connect()
    accepted, there = await head.accepted.get()
    assert (accepted.identity.node, accepted.remote_host) == (NODE, "127.0.0.1")
    sent = [frame(number, size) for number, size in enumerate([0, 5, MAX_PAYLOAD, 1] * 5)]
    for data in sent:
        here.link.send(data, Priority.DECODE)
        there.link.send(data, Priority.DECODE)
    for end in (here, there):
        await end.has(len(sent))
        assert end.frames == sent
    assert here.link.queue.waiting_bytes == there.link.queue.waiting_bytes == 0


async def test_a_node_that_goes_away_ends_its_handler(head: Head, connect: Connect) -> None:
    dialled, here = await connect()
    _, there = await head.accepted.get()
    await dialled.channel.close()
    assert await asyncio.wait_for(there.ended, 5)
    assert "node 0" in await here.ended
    assert there.link.send(frame(1), Priority.CONTROL) is None
    assert len(there.link.queue) == 0


async def test_a_connection_that_is_cut_ends_both_sides(head: Head, connect: Connect) -> None:
    cable = Cable(head.port)
    _, here = await connect(await cable.start())
    _, there = await head.accepted.get()
    here.link.send(frame(1), Priority.DECODE)
    await there.has(1)
    await cable.cut()
    assert await asyncio.wait_for(there.ended, 5)
    assert "link to node 0 broke: unavailable" in await asyncio.wait_for(here.ended, 5)


async def test_a_node_that_breaks_the_protocol_is_cut_off(head: Head, connect: Connect) -> None:
    _, here = await connect()
    _, there = await head.accepted.get()
    here.link.send(b"\0" * 100, Priority.CONTROL)
    assert "protocol version 0" in await asyncio.wait_for(there.ended, 5)
    assert await asyncio.wait_for(here.ended, 5) == "end of stream"


async def test_a_server_that_stops_ends_its_links(head: Head, connect: Connect) -> None:
    _, here = await connect()
    _, there = await head.accepted.get()
    await head.server.stop()
    assert await asyncio.wait_for(here.ended, 5)
    assert there.ended.done()


async def test_a_foreign_node_is_refused_in_words(head: Head, authority: ClusterAuthority) -> None:
    other = Head(ClusterAuthority.create("home"))
    with pytest.raises(LinkError, match="belongs to another cluster"):
        await dial(head.address, other.node(NODE), HEAD, FOREIGN_TIMEOUT_S)
    stranger = other.node(NODE)
    trusting = NodeIdentity(stranger.key_pem, stranger.certificate_pem, authority.certificate_pem)
    with pytest.raises(LinkError, match="does not accept this node's certificate"):
        await dial(head.address, trusting, HEAD, FOREIGN_TIMEOUT_S)


async def test_another_node_than_expected_is_refused(head: Head) -> None:
    with pytest.raises(LinkError, match="another node of the cluster than node 7"):
        await dial(head.address, head.node(NODE), NodeId(7), FOREIGN_TIMEOUT_S)


async def test_nobody_there_is_a_link_error(head: Head) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(LinkError, match=f"nothing listens at {address}"):
            await dial(address, head.node(NODE), HEAD, FOREIGN_TIMEOUT_S)


async def test_a_taken_port_is_a_usage_error_and_leaves_nothing(head: Head) -> None:
    second = Head(head.authority)
    credentials = server_credentials(lambda: head.identity)
    for address in (head.address, "192.0.2.1:0"):
        with pytest.raises(UsageError, match=f"cannot listen on {address}"):
            await second.server.start(address, credentials)
        await second.server.stop()
    del second
    gc.collect()


async def test_a_connection_that_says_nothing_is_closed(
    authority: ClusterAuthority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "HANDSHAKE_TIMEOUT_S", 0.2)
    head = Head(authority)
    await head.start()
    reader, writer = await asyncio.open_connection("127.0.0.1", head.port)
    try:
        assert await asyncio.wait_for(reader.read(), 5) == b""
    finally:
        writer.close()
        await head.server.stop()


async def test_a_token_allows_to_enrol_and_nothing_else(head: Head) -> None:
    token = head.token()
    assert await enroll(head.address, token, b"please", 5) == b"esaelp"
    with pytest.raises(LinkError, match="refused: the token was revoked"):
        await enroll(head.address, token, b"stranger", 5)
    with pytest.raises(LinkError, match="too large"):
        await enroll(head.address, token, bytes(MAX_ENROLL_REQUEST + 1), 5)
    key, leaf = token.enrolment_leaf()
    holder = NodeIdentity(key, leaf, head.authority.certificate_pem)
    with pytest.raises(LinkError, match="refused"):
        await fetch_status(head.address, holder, 5)
    dialled = await dial(head.address, holder, HEAD, 5)
    with pytest.raises(LinkError, match="node 0 broke: unauthenticated"):
        await dialled.link.run(lambda *_: None)
    await dialled.channel.close()
    assert head.accepted.empty()


async def test_a_node_may_ask_for_the_status(head: Head) -> None:
    assert await fetch_status(head.address, head.node(NODE), 5) == b"{}"


SEND_A_PIECE = """
import asyncio, sys
from pathlib import Path
from molink.core.ids import HEAD
from molink.transport.identity import NodeIdentity
from molink.transport.pieces import join
from molink.transport.server import dial
from molink.wire.frames import Priority

async def main():
    link = (await dial(sys.argv[1], NodeIdentity.load(Path(sys.argv[2])), HEAD, 5.0)).link
    await link._stream.write(join(Priority.DECODE, memoryview(sys.stdin.buffer.read())))
    print("sent", flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""
FASTER = 4  # than links notice silence elsewhere


async def test_a_process_that_stops_in_the_middle_of_a_frame_is_lost_and_nobody_else(
    authority: ClusterAuthority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its kernel goes on acknowledging to TCP what it is sent."""
    faster = [(k, v // FASTER if k.endswith("_ms") else v) for k, v in server.CHANNEL_OPTIONS]
    monkeypatch.setattr(server, "CHANNEL_OPTIONS", faster)
    head = Head(authority)
    await head.start()
    head.node(NODE).save(tmp_path / "node.pem")
    command = (sys.executable, "-c", SEND_A_PIECE, head.address, str(tmp_path / "node.pem"))
    stopped = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE)
    try:
        assert stopped.stdin is not None
        assert stopped.stdout is not None
        stopped.stdin.write(frame(1, MAX_PAYLOAD)[: MAX_PAYLOAD // 2])
        stopped.stdin.write_eof()
        assert await asyncio.wait_for(stopped.stdout.readline(), 20) == b"sent\n"
        stopped.send_signal(signal.SIGSTOP)
        since = monotonic()
        _, lost = await asyncio.wait_for(head.accepted.get(), 5)
        dialled = await dial(head.address, head.node(NodeId(2)), HEAD, 5.0)
        other = asyncio.create_task(dialled.link.run(lambda *_: None))
        reason = await asyncio.wait_for(asyncio.shield(lost.ended), 2 * SILENCE_S / FASTER)
        assert "link to node 1 broke: nothing was heard for" in reason
        assert monotonic() - since < SILENCE_S / FASTER + 1
        assert lost.frames == []
        _, end = await asyncio.wait_for(head.accepted.get(), 5)
        dialled.link.send(frame(2), Priority.DECODE)
        await end.has(1)
        other.cancel()
        await asyncio.gather(other, return_exceptions=True)
        await dialled.channel.close()
    finally:
        stopped.kill()
        await stopped.wait()
        await head.server.stop()
