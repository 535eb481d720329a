"""The switch: every frame goes where it should, once, or is counted as dropped."""

import asyncio
from collections import Counter
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from molink.core.errors import WireError
from molink.core.ids import EVERY_STAGE, HEAD, Address, NodeId, Port
from molink.node.switch import Switch
from molink.transport.allowance import Allowance
from molink.transport.link import Link
from molink.transport.local_server import LocalPeer
from molink.transport.pieces import Reassembly
from molink.transport.queue import HIGH_WATER
from molink.transport.window import LARGEST_PIECE
from molink.wire.frames import MAX_PAYLOAD, FrameHeader, Kind, Priority, cut

quick = settings(deadline=None, max_examples=100)

ONE, TWO, NOBODY = NodeId(1), NodeId(2), NodeId(9)
ENGINE = Address(HEAD, Port.ENGINE)


class Process:
    """A local process as the switch sees it: it keeps what it is sent."""

    def __init__(self, switch: Switch, port: Port, rank: int = 0) -> None:
        self.switch = switch
        self.port = port
        self.rank = rank
        self.received: list[bytes] = []

    @property
    def peer(self) -> LocalPeer:
        return cast(LocalPeer, self)

    room: asyncio.Future[None] | None = None  # while it is behind

    def send(self, frame: bytes) -> asyncio.Future[None] | None:
        self.received.append(frame)
        return self.room

    def emit(self, frame: bytes) -> object:
        return self.switch.from_local(self.peer, FrameHeader.unpack(frame), frame)

    def attach(self) -> "Process":
        """Say who it is; the agent takes note."""
        source, agent = Address(self.switch.node, self.port), Address(self.switch.node, Port.AGENT)
        self.emit(make(source, agent, rank=self.rank, kind=Kind.CONTROL))
        return self


def make(
    source: Address,
    destination: Address,
    *,
    kind: Kind = Kind.STEP,
    priority: Priority = Priority.DECODE,
    rank: int = 0,
    number: int = 0,
    length: int = 0,
    total: int | None = None,
) -> bytes:
    total = length if total is None else total
    header = FrameHeader(*(kind, priority, source, destination, rank, 1, number, 0, total, length))
    return header.pack() + bytes(length)


class Network:
    """Switches whose links are moved by hand; the head is linked to all."""

    def __init__(self, *direct: tuple[NodeId, NodeId], nodes: int = 3) -> None:
        self.control: list[tuple[NodeId, bytes]] = []
        self.switches = {NodeId(n): self._switch(NodeId(n)) for n in range(nodes)}
        for node in range(1, nodes):
            self.link(HEAD, NodeId(node))
        for one, other in direct:
            self.link(one, other)

    def _switch(self, node: NodeId) -> Switch:
        return Switch(node, lambda header, payload: self.control.append((node, payload)))

    def link(self, one: NodeId, other: NodeId) -> None:
        for here, there in ((one, other), (other, one)):
            self.switches[here].links[there] = Link(there, stream=None)

    async def settle(self) -> None:
        """Carry frames until no queue holds any, and check the books."""
        while waiting := [
            (node, link)
            for node, switch in self.switches.items()
            for link in switch.links.values()
            if len(link.queue)
        ]:
            for node, link in waiting:
                there = self.switches[link.peer]
                message = link.queue.take(LARGEST_PIECE) or b""
                for header, frame in Reassembly().take(message):
                    there.from_link(there.links[node], header, frame)
        for switch in self.switches.values():
            for link in switch.links.values():
                link.queue.check_conservation()

    def dropped(self) -> Counter[str]:
        return sum((switch.dropped for switch in self.switches.values()), Counter())


@pytest.fixture
async def network() -> Network:
    return Network((ONE, TWO))


def process(network: Network, node: NodeId, port: Port, rank: int = 0) -> Process:
    return Process(network.switches[node], port, rank).attach()


# --- everything at once


sends = st.tuples(
    st.integers(0, 4),  # which process sends
    st.sampled_from([HEAD, ONE, TWO, NodeId(3), NOBODY, EVERY_STAGE]),
    st.sampled_from(sorted(Port)),
    st.sampled_from([Kind.STEP, Kind.CONTROL]),
)


@quick
@given(
    direct=st.sampled_from([(), ((ONE, TWO),), ((ONE, TWO), (TWO, NodeId(3)))]),
    stages=st.sets(st.sampled_from([HEAD, ONE, TWO])),
    frames=st.lists(sends, max_size=30),
)
async def test_every_frame_arrives_once_at_every_receiver_or_is_counted_as_dropped(
    direct: tuple[tuple[NodeId, NodeId], ...],
    stages: set[NodeId],
    frames: list[tuple[int, NodeId, Port, Kind]],
) -> None:
    network = Network(*direct, nodes=4)
    network.switches[HEAD].stage_nodes = tuple(sorted(stages))
    processes = [
        process(network, HEAD, Port.ENGINE),
        process(network, HEAD, Port.STAGE),
        process(network, ONE, Port.STAGE, rank=0),
        process(network, ONE, Port.STAGE, rank=1),
        process(network, TWO, Port.STAGE),
    ]
    network.control.clear()
    expected: Counter[tuple[NodeId, Port, int, bytes]] = Counter()
    controls = drops = 0
    for number, (sender, node, port, kind) in enumerate(frames):
        source = processes[sender]
        here = source.switch.node
        frame = make(
            Address(here, source.port), Address(node, port), kind=kind, rank=source.rank,
            number=number,
        )  # fmt: skip
        source.emit(frame)
        at_head = here == HEAD
        nodes = [node] if node != EVERY_STAGE else sorted(stages) if at_head else []
        drops += node == EVERY_STAGE and not nodes
        for target in nodes:
            if not may_pass(here, target, port, kind, direct, stages):
                drops += 1
                continue
            receivers = [p for p in processes if (p.switch.node, p.port) == (target, port)]
            expected.update((target, port, p.rank, frame) for p in receivers)
            is_control = target != NOBODY and port == Port.AGENT and kind == Kind.CONTROL
            controls += is_control
            drops += not receivers and not is_control
    await network.settle()
    assert expected == Counter(
        (p.switch.node, p.port, p.rank, frame) for p in processes for frame in p.received
    )
    assert len(network.control) == controls
    assert network.dropped().total() == drops


def may_pass(
    source: NodeId,
    target: NodeId,
    port: Port,
    kind: Kind,
    direct: tuple[tuple[NodeId, NodeId], ...],
    stages: set[NodeId],
) -> bool:
    """Agents alone hear other nodes' control; only what stages say passes the head."""
    if source == target:
        return True
    if kind == Kind.CONTROL:
        return port == Port.AGENT
    is_direct = (source, target) in direct or (target, source) in direct
    return source == HEAD or is_direct or source in stages


# --- one at a time


async def test_a_stage_sends_straight_to_the_next_where_there_is_a_link(network: Network) -> None:
    stage, following = process(network, ONE, Port.STAGE), process(network, TWO, Port.STAGE)
    frame = make(Address(ONE, Port.STAGE), Address(TWO, Port.STAGE), kind=Kind.ACTIVATIONS)
    stage.emit(frame)
    assert len(network.switches[ONE].links[TWO].queue) == 1
    await network.settle()
    assert following.received == [frame]


async def test_the_head_relays_where_there_is_none(network: Network) -> None:
    network.switches[HEAD].stage_nodes = (ONE, TWO)
    stage, following = process(network, ONE, Port.STAGE), process(network, TWO, Port.STAGE)
    del network.switches[ONE].links[TWO]
    frame = make(Address(ONE, Port.STAGE), Address(TWO, Port.STAGE), kind=Kind.ACTIVATIONS)
    stage.emit(frame)
    assert len(network.switches[ONE].links[HEAD].queue) == 1
    await network.settle()
    assert following.received == [frame]


async def test_the_pieces_of_a_message_take_one_way_while_links_come_and_go(
    network: Network,
) -> None:
    switch = network.switches[ONE]
    stage = process(network, ONE, Port.STAGE)
    direct = switch.links.pop(TWO)
    pieces = [
        header + bytes(view[0])
        for header, view in cut(
            *(Kind.ACTIVATIONS, Priority.DECODE, Address(ONE, Port.STAGE)),
            *(Address(TWO, Port.STAGE), [memoryview(bytes(2 * MAX_PAYLOAD + 1))]),
        )
    ]
    relay = switch.links[HEAD]
    stage.emit(pieces[0])
    switch.links[TWO] = direct
    stage.emit(pieces[1])
    assert switch.is_used(relay)
    stage.emit(pieces[2])
    assert (len(relay.queue), len(direct.queue)) == (3, 0)
    stage.emit(pieces[0])
    assert switch.is_used(direct)
    assert not switch.is_used(relay)
    del switch.links[TWO]
    stage.emit(pieces[1])
    stage.emit(pieces[2])
    assert (len(relay.queue), len(direct.queue)) == (3, 3)
    assert not switch.is_used(direct)


@pytest.mark.parametrize("is_bounded", [False, True])
async def test_what_the_head_relays_is_counted_and_may_be_bounded(
    network: Network, is_bounded: bool
) -> None:
    switch = network.switches[HEAD]
    switch.stage_nodes = (ONE, TWO)
    switch.relay_allowance = Allowance(1000.0) if is_bounded else None
    frame = make(Address(ONE, Port.STAGE), Address(TWO, Port.STAGE), length=5000)
    wait = switch.from_link(switch.links[ONE], FrameHeader.unpack(frame), frame)
    assert (wait is not None) == is_bounded
    assert switch.relayed == {(ONE, TWO): len(frame)}
    assert len(switch.links[TWO].queue) == 1
    own = make(Address(ONE, Port.STAGE), Address(HEAD, Port.ENGINE), length=5000)
    assert switch.from_link(switch.links[ONE], FrameHeader.unpack(own), own) is None
    assert switch.relayed.total() == len(frame)
    if wait is not None:
        waiting = asyncio.ensure_future(wait)
        await asyncio.sleep(0)
        assert not waiting.done()
        waiting.cancel()


@pytest.mark.parametrize("to", [TWO, EVERY_STAGE])
async def test_whoever_sends_to_a_process_that_is_behind_is_asked_to_wait(
    network: Network, to: NodeId
) -> None:
    ranks = [process(network, TWO, Port.STAGE, rank) for rank in range(2)]
    switch = network.switches[TWO]
    frame = make(ENGINE, Address(to, Port.STAGE))
    for behind in (False, True, False):
        ranks[1].room = asyncio.get_running_loop().create_future() if behind else None
        wait = switch.from_link(switch.links[HEAD], FrameHeader.unpack(frame), frame)
        assert (wait is not None) == behind
        if wait is not None and ranks[1].room is not None:
            ranks[1].room.set_result(None)
            await wait


async def test_unknown_destinations_are_counted(network: Network) -> None:
    engine = process(network, HEAD, Port.ENGINE)
    engine.emit(make(ENGINE, Address(NOBODY, Port.STAGE)))
    engine.emit(make(ENGINE, Address(HEAD, Port.GATEWAY)))
    engine.emit(make(ENGINE, Address(EVERY_STAGE, Port.STAGE)))
    engine.emit(make(ENGINE, Address(HEAD, Port.AGENT)))
    engine.emit(
        make(ENGINE, Address(HEAD, Port.AGENT), kind=Kind.CONTROL, length=MAX_PAYLOAD, total=2**20)
    )
    assert network.switches[HEAD].dropped == {
        "no link": 1,
        "no process": 1,
        "no stage": 1,
        "not for an agent": 2,
    }


async def test_control_messages_reach_the_agent_without_their_header(network: Network) -> None:
    stage = process(network, ONE, Port.STAGE)
    network.control.clear()
    stage.emit(
        make(Address(ONE, Port.STAGE), Address(HEAD, Port.AGENT), kind=Kind.CONTROL, length=3)
    )
    await network.settle()
    assert network.control == [(HEAD, b"\0\0\0")]


FORGED = {
    "in the name of another": (ONE, make(Address(TWO, Port.STAGE), Address(HEAD, Port.ENGINE))),
    "in the name of the head": (ONE, make(ENGINE, Address(HEAD, Port.AGENT), kind=Kind.CONTROL)),
    "to every stage": (ONE, make(Address(ONE, Port.STAGE), Address(EVERY_STAGE, Port.STAGE))),
}


@pytest.mark.parametrize("receiver", [HEAD, TWO])
@pytest.mark.parametrize("forged", FORGED)
async def test_a_member_speaks_for_itself_alone(
    network: Network, receiver: NodeId, forged: str
) -> None:
    stage = process(network, receiver, Port.STAGE)
    sender, frame = FORGED[forged]
    switch = network.switches[receiver]
    switch.stage_nodes = (ONE, TWO)
    with pytest.raises(WireError, match=f"node {sender} sent a frame"):
        switch.from_link(switch.links[sender], FrameHeader.unpack(frame), frame)
    await network.settle()
    assert stage.received == []


async def test_processes_hear_control_of_their_own_agent_alone(network: Network) -> None:
    engine = process(network, HEAD, Port.ENGINE)
    switch = network.switches[HEAD]
    frame = make(Address(ONE, Port.AGENT), ENGINE, kind=Kind.CONTROL)
    switch.from_link(switch.links[ONE], FrameHeader.unpack(frame), frame)
    assert engine.received == []
    assert switch.dropped == {"control for a process": 1}


async def test_a_standby_answers_calls_and_no_more(network: Network) -> None:
    switch = network.switches[HEAD]
    switch.stage_nodes, switch.standby_nodes = (HEAD, TWO), frozenset([ONE])
    engine = process(network, HEAD, Port.ENGINE)
    for kind in (Kind.RESULT, Kind.REPLY, Kind.ACTIVATIONS, Kind.FAILURE):
        frame = make(Address(ONE, Port.STAGE), ENGINE, kind=kind)
        switch.from_link(switch.links[ONE], FrameHeader.unpack(frame), frame)
    kinds = [FrameHeader.unpack(frame).kind for frame in engine.received]
    assert kinds == [Kind.REPLY, Kind.FAILURE]


async def test_a_node_without_a_stage_cannot_speak_to_the_engine(network: Network) -> None:
    network.switches[HEAD].stage_nodes = (HEAD, TWO)
    engine = process(network, HEAD, Port.ENGINE)
    switch = network.switches[HEAD]
    for node in (ONE, TWO):
        frame = make(Address(node, Port.STAGE), ENGINE, kind=Kind.RESULT)
        switch.from_link(switch.links[node], FrameHeader.unpack(frame), frame)
    assert [FrameHeader.unpack(frame).source.node for frame in engine.received] == [TWO]
    assert switch.dropped == {"not of a stage": 1}


async def test_a_member_relays_for_nobody(network: Network) -> None:
    """It would speak for another then, and the head would cut it off in the sender's place."""
    frame = make(Address(ONE, Port.STAGE), Address(HEAD, Port.ENGINE))
    switch = network.switches[TWO]
    with pytest.raises(WireError, match="node 1 sent a frame for engine@0"):
        switch.from_link(switch.links[ONE], FrameHeader.unpack(frame), frame)
    assert len(switch.links[HEAD].queue) == 0


async def test_a_full_link_asks_its_source_to_wait_and_a_broken_one_lets_it_go(
    network: Network,
) -> None:
    network.switches[HEAD].stage_nodes = (ONE, TWO)
    engine = process(network, HEAD, Port.ENGINE)
    frame = make(ENGINE, Address(EVERY_STAGE, Port.STAGE), length=MAX_PAYLOAD)
    waits = [engine.emit(frame) for _ in range(HIGH_WATER // len(frame) + 1)]
    assert not any(waits[:-1])
    wait = waits[-1]
    assert isinstance(wait, asyncio.Future)
    one, two = (network.switches[HEAD].links[node].queue for node in (ONE, TWO))
    one.close()
    await asyncio.sleep(0)
    assert not wait.done()  # the other is still full
    while two.waiting_bytes > HIGH_WATER // 2:
        two.take(LARGEST_PIECE)
    await asyncio.wait_for(wait, 1)


@pytest.mark.parametrize("is_restarted", [False, True])
async def test_a_process_that_ends_is_forgotten_and_its_successor_is_not(
    network: Network, is_restarted: bool
) -> None:
    engine, stage = process(network, HEAD, Port.ENGINE), process(network, HEAD, Port.STAGE)
    successor = process(network, HEAD, Port.STAGE) if is_restarted else None
    network.switches[HEAD].forget(stage.peer)
    engine.emit(make(ENGINE, Address(HEAD, Port.STAGE)))
    assert stage.received == []
    if successor is not None:
        assert len(successor.received) == 1
    else:
        assert network.switches[HEAD].dropped == {"no process": 1}


async def test_answers_go_to_the_socket_that_is_read(network: Network) -> None:
    engine, stage = process(network, HEAD, Port.ENGINE), process(network, HEAD, Port.STAGE)
    second = Process(network.switches[HEAD], Port.STAGE)
    address = Address(HEAD, Port.STAGE)
    second.emit(make(address, ENGINE, priority=Priority.PREFILL))
    engine.emit(make(ENGINE, address))
    assert (len(stage.received), second.received) == (1, [])
    network.switches[HEAD].forget(second.peer)
    engine.emit(make(ENGINE, address))
    assert len(stage.received) == 2


async def test_a_process_that_never_said_who_it_is_is_forgotten_too(network: Network) -> None:
    nobody = LocalPeer(lambda *_: None, lambda _: None)
    network.switches[HEAD].forget(nobody)
