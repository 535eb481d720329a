"""The switch inside an agent: where a frame goes next."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from molink.core.errors import WireError
from molink.core.ids import EVERY_STAGE, HEAD, Address, NodeId, Port
from molink.transport.allowance import Allowance
from molink.transport.link import Link
from molink.transport.local_server import LocalPeer
from molink.wire.frames import HEADER_SIZE, FrameHeader, Kind, Priority

ControlHandler = Callable[[FrameHeader, bytes], None]


class Switch:
    """Forwards frames between the node's own processes and its links; keeps no message.

    A frame for a node without a link of its own goes to the head, which relays it. Owns the tables
    of links and local processes; `control` receives what is addressed to the agent itself.
    `relay_allowance` bounds what the head relays.
    """

    relay_allowance: Allowance | None = None

    def __init__(self, node: NodeId, control: ControlHandler) -> None:
        self.node = node
        self.links: dict[NodeId, Link] = {}
        self.local: dict[Port, dict[int, LocalPeer]] = {}
        self.stage_nodes: tuple[NodeId, ...] = ()
        self.standby_nodes: frozenset[NodeId] = frozenset()  # they answer calls, and do no steps
        self.dropped: Counter[str] = Counter()
        self.relayed: Counter[tuple[NodeId, NodeId]] = Counter()  # bytes, by source and destination
        self._control = control
        self._ways: dict[tuple[Address, int, Priority, NodeId], Link] = {}  # of messages half sent

    def from_local(
        self, peer: LocalPeer, header: FrameHeader, frame: bytes
    ) -> Awaitable[None] | None:
        """Handle a frame of a process on this node."""
        if header.priority < Priority.PREFILL:  # those come over a socket that nobody reads
            self.local.setdefault(header.source.port, {})[header.rank] = peer
        return self.forward(header, frame)

    def from_link(self, link: Link, header: FrameHeader, frame: bytes) -> Awaitable[None] | None:
        """Handle a frame of another node. Only the head may relay, and speak to every stage.

        Raises:
            WireError: the frame claims to come from a node it does not come from, or is not for us.
        """
        source, destination = header.source.node, header.destination.node
        if source != link.peer and link.peer != HEAD:
            raise WireError(f"node {link.peer} sent a frame in the name of {source}")
        if (reason := self._unwanted(header)) is not None:
            self.dropped[reason] += 1
            return None
        if destination == EVERY_STAGE and link.peer == HEAD:  # it has already made the copies
            return self._deliver(header, frame)
        if destination == EVERY_STAGE or (destination != self.node and self.node != HEAD):
            raise WireError(f"node {link.peer} sent a frame for {header.destination}")
        room = self._to_node(destination, header, frame)
        if destination != self.node and destination in self.links:
            self.relayed[source, destination] += len(frame)
            return self._within_allowance(header.priority, len(frame), room)
        return room

    def _within_allowance(
        self, priority: Priority, size: int, room: asyncio.Future[Any] | None
    ) -> Awaitable[Any] | None:
        """Asks the source to wait for room, and for its time where relaying is bounded."""
        if self.relay_allowance is None:
            return room
        now, is_urgent = asyncio.get_running_loop().time(), priority < Priority.PREFILL
        wait_s = self.relay_allowance.take(size, now, is_urgent=is_urgent)
        if wait_s == 0:
            return room
        return _both(asyncio.sleep(wait_s), room) if room is not None else asyncio.sleep(wait_s)

    def _unwanted(self, header: FrameHeader) -> str | None:
        """Why a frame of another node that is true to its name goes no further."""
        if header.kind == Kind.CONTROL:
            return None if header.destination.port == Port.AGENT else "control for a process"
        if self.node == HEAD and not self._may_speak(header):
            return "not of a stage"  # its pipeline is gone, or it was never in one
        return None

    def _may_speak(self, header: FrameHeader) -> bool:
        source, is_answer = header.source.node, header.kind in (Kind.REPLY, Kind.FAILURE)
        return source in self.stage_nodes or (is_answer and source in self.standby_nodes)

    def forward(self, header: FrameHeader, frame: bytes) -> asyncio.Future[Any] | None:
        """Send a frame on; an awaitable asks the source to wait for room."""
        destination = header.destination
        if destination.node == EVERY_STAGE:
            if not self.stage_nodes:
                self.dropped["no stage"] += 1
            return _all(self._to_node(node, header, frame) for node in self.stage_nodes)
        return self._to_node(destination.node, header, frame)

    def _to_node(
        self, node: NodeId, header: FrameHeader, frame: bytes
    ) -> asyncio.Future[Any] | None:
        if node == self.node:
            return self._deliver(header, frame)
        link = self._link_to(node, header)
        if link is None:
            self.dropped["no link"] += 1
            return None
        return link.send(frame, header.priority)

    def _link_to(self, node: NodeId, header: FrameHeader) -> Link | None:
        """The link for a frame; the pieces of one message all take that of the first.

        A receiver puts messages together in order, and a direct link may come or go meanwhile.
        """
        now = self.links.get(node) or self.links.get(HEAD)
        if header.length == header.total and not self._ways:
            return now
        message = (header.source, header.rank, header.priority, node)
        way = self._ways.pop(message, None)
        link = (header.offset and way) or now
        is_last = header.offset + header.length == header.total
        if link is not None and header.source.node == self.node and not is_last:
            self._ways[message] = link
        return link

    def is_used(self, link: Link) -> bool:
        """Whether a message has begun to leave over a link, and has not ended."""
        return link in self._ways.values()

    def _deliver(self, header: FrameHeader, frame: bytes) -> asyncio.Future[Any] | None:
        if header.destination.port == Port.AGENT:
            if header.kind == Kind.CONTROL and header.length == header.total:
                self._control(header, frame[HEADER_SIZE:])
            else:
                self.dropped["not for an agent"] += 1
            return None
        peers = self.local.get(header.destination.port)
        if not peers:
            self.dropped["no process"] += 1
            return None
        return _all(peer.send(frame) for peer in peers.values())

    def forget(self, peer: LocalPeer) -> None:
        """Remove a local process that is gone."""
        if peer.port is not None:
            peers = self.local.get(peer.port, {})
            if peers.get(peer.rank) is peer:  # otherwise its successor is here already
                del peers[peer.rank]


def _all(waits: Iterable[asyncio.Future[Any] | None]) -> asyncio.Future[Any] | None:
    waiting = [wait for wait in waits if wait is not None]
    return asyncio.gather(*waiting) if waiting else None


async def _both(first: Awaitable[None], second: Awaitable[None]) -> None:
    await first
    await second
