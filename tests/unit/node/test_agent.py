"""Agents over the in-memory twin of a link's stream: what they measure, and within which bounds."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import cast

import pytest

from molink.core.ids import HEAD, NodeId
from molink.node.agent import PROBE_BYTES, PROBE_FILLER, Agent
from molink.node.home import RunFolder
from molink.transport.link import Link
from molink.transport.memory import memory_streams
from molink.wire import to_agent

NODE = NodeId(1)


class BareAgent(Agent):
    """An agent that only switches, and notes what it hears."""

    def __init__(self, node: NodeId) -> None:
        super().__init__(node, cast(RunFolder, None), lambda _: None, lambda _: None)
        self.heard: list[to_agent.ToAgent] = []

    def on_remote(self, node: NodeId, payload: bytes) -> None:
        self.heard.append(to_agent.decode(payload))


@pytest.fixture
async def agents() -> AsyncIterator[tuple[BareAgent, BareAgent]]:
    agents = BareAgent(HEAD), BareAgent(NODE)
    for agent, peer, stream in zip(agents, (NODE, HEAD), memory_streams(), strict=True):
        agent.spawn(agent.run_link(Link(peer, stream)))
    yield agents
    for agent in agents:
        agent.cancel_tasks()
    await asyncio.sleep(0)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - a link has no such event
            await asyncio.sleep(0.001)


async def test_a_new_link_is_measured_in_both_directions_with_bounded_bytes(
    agents: tuple[BareAgent, BareAgent],
) -> None:
    await until(lambda: all(a.link_counters() and a.link_counters()[0].bytes_per_s for a in agents))
    await until(lambda: all(sum(len(m.filler) for m in a.heard if isinstance(m, to_agent.Probe))
                            >= PROBE_BYTES - PROBE_FILLER for a in agents))  # fmt: skip
    for agent in agents:
        (counters,) = agent.link_counters()
        assert counters.rtt_s is not None
        assert counters.bytes_sent < PROBE_BYTES + 2 * PROBE_FILLER
        assert counters.loss is None  # of a connection that is none of TCP's
