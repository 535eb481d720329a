"""Who can dial whom: neighbours try, relayed pairs try again, and what is found out is said."""

import asyncio
from collections.abc import Callable

import pytest

from molink.cluster.coordinator import Coordinator
from molink.cluster.state import ClusterState, NodeRecord, NodeStatus
from molink.cluster.store import MemoryStore
from molink.core.cluster import Versions
from molink.core.ids import HEAD, NodeId
from molink.node import paths
from molink.node.paths import Paths
from molink.wire.to_agent import Dial

ONE, TWO = NodeId(1), NodeId(2)
PAIR = frozenset((ONE, TWO))
NODES = (HEAD, ONE, TWO)


class Nodes:
    """Nodes that dial when they are told, and can or cannot."""

    def __init__(self) -> None:
        self.can_dial = False
        self.dials: list[tuple[NodeId, NodeId]] = []
        self.said: list[str] = []
        records = tuple(
            NodeRecord(NodeId(i), f"n{i}", NodeStatus.READY, 0.0, address=f"h:{i}")
            for i in range(3)
        )
        state = ClusterState("c", None, records)
        self.coordinator = Coordinator(
            state, MemoryStore(), lambda: 0.0, Versions(1, "0.1.0", "0.32.0")
        )
        self.paths = Paths(self.coordinator, self)

    def tell(self, node: NodeId, message: Dial) -> None:
        self.dials.append((node, NodeId(message.node)))
        loop = asyncio.get_running_loop()
        loop.call_soon(self.paths.dialled, node, NodeId(message.node), self.can_dial)

    def say(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture
async def nodes(monkeypatch: pytest.MonkeyPatch) -> Nodes:
    for name, seconds in (("SEEK_S", 0.001), ("FIRST_RETRY_S", 0.01), ("DIAL_ANSWER_S", 0.1)):
        monkeypatch.setattr(paths, name, seconds)
    return Nodes()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - nothing says when
            await asyncio.sleep(0.001)


async def test_neighbours_but_not_the_head_are_linked(nodes: Nodes) -> None:
    nodes.can_dial = True
    await nodes.paths.link(NODES)
    assert nodes.dials == [(ONE, TWO)]
    assert nodes.paths.relayed == frozenset()


async def test_a_pair_that_cannot_dial_tries_both_ways_and_is_relayed(nodes: Nodes) -> None:
    await nodes.paths.link(NODES)
    assert nodes.dials == [(ONE, TWO), (TWO, ONE)]
    assert nodes.paths.relayed == {PAIR}
    assert nodes.said == ["n1 and n2 cannot dial each other; the head relays"]


async def test_a_direct_path_is_taken_up_when_it_appears(nodes: Nodes) -> None:
    await nodes.paths.link(NODES)
    seeking = asyncio.create_task(nodes.paths.seek())
    await until(lambda: len(nodes.dials) >= 6)
    assert nodes.paths.relayed == {PAIR}
    nodes.can_dial = True
    await until(lambda: not nodes.paths.relayed)
    assert nodes.said[-1] == "n1 and n2 are linked directly now"
    attempts = len(nodes.dials)
    await asyncio.sleep(0.05)
    assert len(nodes.dials) == attempts
    seeking.cancel()


async def test_a_pair_whose_link_broke_tries_again(nodes: Nodes) -> None:
    nodes.paths.broke(TWO, ONE, "reset")
    nodes.paths.broke(ONE, TWO, "reset")  # each end says so
    assert nodes.said == ["the link between n1 and n2 broke (reset); the head relays"]
    assert nodes.paths.relayed == {PAIR}
    nodes.can_dial = True
    seeking = asyncio.create_task(nodes.paths.seek())
    await until(lambda: not nodes.paths.relayed)
    seeking.cancel()


async def test_a_node_that_is_gone_is_not_asked_to_dial(nodes: Nodes) -> None:
    await nodes.paths.link(NODES)
    nodes.coordinator.node_lost(TWO, "gone")
    asked = len(nodes.dials)
    seeking = asyncio.create_task(nodes.paths.seek())
    await until(lambda: not nodes.paths.relayed)
    assert len(nodes.dials) == asked
    seeking.cancel()
