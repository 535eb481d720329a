"""Both ends of a local socket over a real one: the process's blocking, the agent's on a loop."""

import asyncio
import os
import random
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st

from molink.core.errors import LinkError, WireError
from molink.core.ids import Address, NodeId, Port
from molink.transport.local import LocalSocket
from molink.transport.local_server import LocalPeer
from molink.wire.frames import HEADER_SIZE, MAX_PAYLOAD, FrameHeader, Kind, Priority, cut

MIB = 1 << 20
NODE = NodeId(1)
STAGE, AGENT = Address(NODE, Port.STAGE), Address(NODE, Port.AGENT)
NOISE = random.Random(0).randbytes(5 * MIB)

Wait = asyncio.Future[None] | None


@pytest.fixture(params=[asyncio.DefaultEventLoopPolicy, uvloop.EventLoopPolicy])
def event_loop_policy(request: pytest.FixtureRequest) -> asyncio.AbstractEventLoopPolicy:
    """The agent runs on uvloop; what it relies on must not be one loop's habit."""
    policy: asyncio.AbstractEventLoopPolicy = request.param()
    return policy


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    threads = set(threading.enumerate())
    yield
    names = [thread.name for thread in set(threading.enumerate()) - threads]
    assert "local-outbox" not in names


class Server:
    """An agent's listening socket that does with a frame what the test says."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.peers: list[LocalPeer] = []
        self.frames: list[tuple[FrameHeader, bytes]] = []
        self.lost: asyncio.Queue[LocalPeer] = asyncio.Queue()
        self.on_frame: Callable[[LocalPeer, bytes], Wait] = lambda *_: None
        self._arrived = asyncio.Event()

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda *_: None)  # it reports peers that break the protocol
        self._server = await loop.create_unix_server(self._accept, str(self.path))

    def _accept(self) -> LocalPeer:
        self.peers.append(LocalPeer(self._handle, self.lost.put_nowait))
        return self.peers[-1]

    def _handle(self, peer: LocalPeer, header: FrameHeader, frame: bytes) -> Wait:
        assert frame[:HEADER_SIZE] == header.pack()
        self.frames.append((header, frame))
        self._arrived.set()
        return self.on_frame(peer, frame)

    async def has(self, count: int) -> None:
        while len(self.frames) < count:
            self._arrived.clear()
            await self._arrived.wait()

    async def stop(self) -> None:
        self._server.close()
        for peer in self.peers:
            peer.close()
        for _ in self.peers:
            await self.lost.get()


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    server = Server(tmp_path / "agent.sock")
    await server.start()
    yield server
    await server.stop()


@pytest.fixture
async def process(server: Server) -> AsyncIterator[LocalSocket]:
    process = LocalSocket(server.path, STAGE, rank=3)
    yield process
    process.close()


def echo(peer: LocalPeer, frame: bytes) -> Wait:
    peer.send(frame)
    return None


def send(process: LocalSocket, payload: bytes, sequence: int = 0) -> None:
    third = len(payload) // 3
    parts: list[bytes | bytearray | memoryview] = [
        payload[:third],
        bytearray(payload[third:]),
        memoryview(b""),
    ]
    process.send(Kind.ACTIVATIONS, STAGE, parts, priority=Priority.DECODE, sequence=sequence)


def receive(process: LocalSocket, count: int) -> list[bytes]:
    return [bytes(process.receive().payload) for _ in range(count)]


def in_thread(function: Callable[..., Any], *arguments: Any) -> asyncio.Future[Any]:
    """A blocking call that ends on its own; asyncio's pool would keep its thread."""
    future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    loop = asyncio.get_running_loop()

    def run() -> None:
        try:
            result = function(*arguments)
        except (AssertionError, LinkError, WireError) as error:
            loop.call_soon_threadsafe(future.set_exception, error)
        else:
            loop.call_soon_threadsafe(future.set_result, result)

    threading.Thread(target=run, daemon=True).start()
    return future


async def test_messages_of_all_sizes_come_back_whole_and_in_order(
    server: Server, process: LocalSocket
) -> None:
    server.on_frame = echo
    source = random.Random(1)
    sizes = [0, 1, MAX_PAYLOAD, MAX_PAYLOAD + 1, 4 * MIB]
    sizes += [int(4 * MIB * source.random() ** 6) for _ in range(60)]
    source.shuffle(sizes)
    sent = [NOISE[i : i + size] for i, size in enumerate(sizes)]
    for sequence, payload in enumerate(sent):  # nobody reads yet: most of it waits in the thread
        send(process, payload, sequence)
    assert await in_thread(receive, process, len(sent)) == sent
    first, _ = server.frames[0]
    assert (first.source, first.destination, first.rank) == (STAGE, STAGE, 3)


async def test_large_messages_cross_in_both_directions_at_once(
    server: Server, process: LocalSocket
) -> None:
    """Both ends write before either reads; neither may wait for the other."""
    down, up = [NOISE[:MIB]] * 24, [NOISE[1 : MIB + 1]] * 24
    send(process, b"first")
    await server.has(1)
    for sequence, payload in enumerate(down):
        views = [memoryview(payload)]
        for header, pieces in cut(Kind.CALL, Priority.BULK, AGENT, STAGE, views, sequence=sequence):
            server.peers[0].send(b"".join([header, *pieces]))
    for sequence, payload in enumerate(up):
        send(process, payload, sequence)
    assert await in_thread(receive, process, len(down)) == down
    await server.has(1 + 24 * MIB // MAX_PAYLOAD)
    received = b"".join(frame[HEADER_SIZE:] for _, frame in server.frames)
    assert received == b"first" + b"".join(up)


async def test_threads_send_without_mixing_their_messages(
    server: Server, process: LocalSocket
) -> None:
    server.on_frame = echo
    source = random.Random(2)
    sent = [[NOISE[: source.randrange(MIB)] for _ in range(15)] for _ in range(4)]

    def work(number: int) -> None:
        for turn, payload in enumerate(sent[number]):
            send(process, payload, 100 * number + turn)

    def collect() -> list[tuple[int, bytes]]:
        messages = [process.receive() for _ in range(60)]
        return [(message.sequence, bytes(message.payload)) for message in messages]

    everything, *_ = await asyncio.gather(
        in_thread(collect), *(in_thread(work, i) for i in range(4))
    )
    for number in range(4):
        own = [(at, data) for at, data in everything if at // 100 == number]
        assert own == [(100 * number + turn, data) for turn, data in enumerate(sent[number])]


async def test_sending_never_blocks_and_reading_pauses_while_the_agent_has_no_room(
    server: Server, process: LocalSocket
) -> None:
    gate: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    server.on_frame = lambda *_: gate
    for sequence in range(40):
        send(process, NOISE[:MAX_PAYLOAD], sequence)
    await server.has(1)
    await asyncio.sleep(0.02)
    assert len(server.frames) == 1
    server.on_frame = lambda *_: None
    gate.set_result(None)
    await server.has(40)
    assert [header.sequence for header, _ in server.frames] == list(range(40))


async def known(server: Server, process: LocalSocket) -> LocalPeer:
    """The agent's end of a process's socket, once the process has said who it is."""
    process.send(Kind.CONTROL, AGENT, [b""])
    await server.has(1)
    (peer,) = server.peers
    return peer


async def test_sending_to_a_process_that_does_not_read_asks_to_wait(
    server: Server, process: LocalSocket
) -> None:
    peer = await known(server, process)
    views = [memoryview(bytes(MAX_PAYLOAD))]
    (frame,) = (
        b"".join([header, *pieces])
        for header, pieces in cut(Kind.CALL, Priority.BULK, AGENT, STAGE, views)
    )
    sent, room = 0, None
    while room is None and sent * len(frame) < 64 * MIB:
        room = peer.send(frame)
        sent += 1
        await asyncio.sleep(0.001)
    assert room is not None
    cancelled = peer.send(frame)
    assert cancelled is not None
    cancelled.cancel()  # whoever waited for it has gone
    assert not room.done()
    for _ in range(sent + 1):
        await asyncio.to_thread(process.receive)
    await asyncio.wait_for(room, 10)
    assert peer.send(frame) is None


async def test_a_process_that_ends_lets_nobody_wait_for_room(
    server: Server, process: LocalSocket
) -> None:
    peer = await known(server, process)
    room = None
    for _ in range(64 * MIB // MAX_PAYLOAD):
        room = room or peer.send(bytes(MAX_PAYLOAD))
        await asyncio.sleep(0.001)
    assert room is not None
    process.close()
    await asyncio.wait_for(room, 10)


async def test_what_was_sent_does_not_change_when_its_memory_is_written_again(
    server: Server, process: LocalSocket
) -> None:
    """Most of it has not left yet: the agent takes nothing at first."""
    gate: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    server.on_frame = lambda *_: gate
    memory = bytearray(4 * MIB)
    for _ in range(2):
        memory[:] = NOISE[: len(memory)]
        process.send(Kind.ACTIVATIONS, STAGE, [memory], priority=Priority.DECODE)
        memory[:] = bytes(len(memory))
    server.on_frame = lambda *_: None
    gate.set_result(None)
    await server.has(2 * len(memory) // MAX_PAYLOAD)
    received = b"".join(frame[HEADER_SIZE:] for _, frame in server.frames)
    assert received == 2 * NOISE[: len(memory)]


async def test_an_agent_that_goes_away_is_a_link_error(
    server: Server, process: LocalSocket
) -> None:
    server.on_frame = lambda peer, _: peer.close()
    send(process, b"hello")
    with pytest.raises(LinkError, match="agent is gone"):
        await in_thread(process.receive)
    for sequence in range(100):
        send(process, NOISE[:MAX_PAYLOAD], sequence)  # drops what cannot leave, and says nothing


def test_no_agent_is_a_link_error(tmp_path: Path) -> None:
    with pytest.raises(LinkError, match=r"no local agent at .*agent\.sock"):
        LocalSocket(tmp_path / "agent.sock", STAGE)


async def test_an_agent_that_breaks_the_protocol_is_a_wire_error(
    server: Server, process: LocalSocket
) -> None:
    server.on_frame = lambda peer, frame: peer.send(b"\7" + frame)
    send(process, b"hello")
    with pytest.raises(WireError, match="version 7"):
        await in_thread(process.receive)


async def test_closing_wakes_a_blocked_receive(server: Server, process: LocalSocket) -> None:
    receiving = in_thread(process.receive)
    await asyncio.sleep(0.01)
    process.close()
    with pytest.raises(LinkError):
        await receiving


async def test_closing_does_not_wait_for_what_cannot_leave(server: Server) -> None:
    gate: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    server.on_frame = lambda *_: gate
    fds = len(os.listdir("/proc/self/fd"))
    process = LocalSocket(server.path, STAGE)
    for sequence in range(20):
        send(process, NOISE[:MIB], sequence)
    await server.has(1)
    process.close()
    process.close()
    gate.set_result(None)
    assert await server.lost.get() is server.peers[0]
    server.peers.clear()
    await asyncio.sleep(0)
    assert len(os.listdir("/proc/self/fd")) == fds


async def test_a_process_that_ends_is_reported_once(server: Server) -> None:
    process = LocalSocket(server.path, STAGE, rank=2)
    send(process, b"hello")
    await server.has(1)
    process.close()
    peer = await server.lost.get()
    assert (peer.port, peer.rank) == (Port.STAGE, 2)
    server.peers.clear()


@pytest.mark.parametrize("data", [b"\0" * 100, bytes(range(256))])
async def test_a_process_that_breaks_the_protocol_is_cut_off(server: Server, data: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.connect(str(server.path))
        stranger.sendall(data)
        await server.lost.get()
        server.peers.clear()
        with suppress(ConnectionResetError):
            assert stranger.recv(1) == b""
    assert server.frames == []


# --- the agent's end, without a socket


class Wire(asyncio.Transport):
    """What the loop gives a protocol, and what the protocol did with it."""

    def __init__(self) -> None:
        super().__init__()
        self.is_paused = self.is_aborted = False

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def pause_reading(self) -> None:
        self.is_paused = True

    def resume_reading(self) -> None:
        self.is_paused = False

    def is_closing(self) -> bool:
        return self.is_aborted

    def abort(self) -> None:
        self.is_aborted = True

    def feed(self, peer: LocalPeer, data: bytes, source: random.Random) -> None:
        """Deliver bytes as a loop does: as many as it likes, up to what the peer has room for."""
        view = memoryview(data)
        while view and not self.is_paused:
            room = peer.get_buffer(-1)
            assert len(room) > 0
            count = source.randint(1, min(len(room), len(view)))
            room[:count] = view[:count]
            peer.buffer_updated(count)
            view = view[count:]


def frame(sequence: int, length: int, rank: int = 0, port: Port = Port.STAGE) -> bytes:
    source = Address(NODE, port)
    header = FrameHeader(
        *(Kind.STEP, Priority.DECODE, source, AGENT, rank, 1, sequence, 0, length, length)
    )
    return header.pack() + NOISE[:length]


@settings(deadline=None)
@given(sizes=st.lists(st.integers(0, 200), max_size=8), source=st.randoms(use_true_random=False))
def test_frames_are_found_however_the_bytes_arrive(sizes: list[int], source: random.Random) -> None:
    got: list[bytes] = []
    peer, wire = LocalPeer(lambda _, __, data: got.append(data), lambda _: None), Wire()
    peer.connection_made(wire)
    sent = [frame(number, size) for number, size in enumerate(sizes)]
    wire.feed(peer, b"".join(sent), source)
    assert got == sent


async def test_reading_pauses_until_there_is_room() -> None:
    room: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    peer, wire = LocalPeer(lambda *_: room, lambda _: None), Wire()
    peer.connection_made(wire)
    wire.feed(peer, frame(1, 10), random.Random(0))
    assert wire.is_paused
    room.set_result(None)
    await asyncio.sleep(0)
    assert not wire.is_paused


@pytest.mark.parametrize("other", [frame(2, 0, rank=1), frame(2, 0, port=Port.ENGINE)])
def test_a_process_cannot_speak_for_another(other: bytes) -> None:
    peer, wire = LocalPeer(lambda *_: None, lambda _: None), Wire()
    peer.connection_made(wire)
    wire.feed(peer, frame(1, 5), random.Random(0))
    with pytest.raises(WireError, match="STAGE 0 speaks for"):
        wire.feed(peer, other, random.Random(0))
    assert wire.is_aborted


async def test_prefill_that_is_not_read_holds_up_nothing_else(
    server: Server, process: LocalSocket
) -> None:
    gate: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    server.on_frame = lambda peer, frame: (
        gate if FrameHeader.unpack(frame).priority == Priority.PREFILL else None
    )
    send(process, b"first")
    for sequence in range(3):
        process.send(Kind.ACTIVATIONS, STAGE, [NOISE], priority=Priority.PREFILL, sequence=sequence)
    for sequence in range(10):
        send(process, NOISE[:MIB], sequence)
    frames = 10 * MIB // MAX_PAYLOAD
    await server.has(1 + 1 + frames)
    assert sum(header.priority == Priority.DECODE for header, _ in server.frames) == 1 + frames
    gate.set_result(None)
    await server.has(1 + frames + 3 * 5 * MIB // MAX_PAYLOAD)
    prefill = [header for header, _ in server.frames if header.priority == Priority.PREFILL]
    assert [(header.sequence, header.offset) for header in prefill] == sorted(
        (header.sequence, header.offset) for header in prefill
    )


async def test_what_follows_prefill_still_ends_when_the_agent_is_gone(
    server: Server, process: LocalSocket
) -> None:
    process.send(Kind.ACTIVATIONS, STAGE, [b"x"], priority=Priority.PREFILL)
    await server.has(1)
    for peer in server.peers:
        peer.close()
    with pytest.raises(LinkError):
        await in_thread(receive, process, 1)
    process.send(Kind.ACTIVATIONS, STAGE, [NOISE], priority=Priority.PREFILL)  # goes nowhere
