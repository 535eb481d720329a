"""What every agent does: local sockets, the switch, links, and the processes of its node."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from itertools import count
from typing import Any

from molink.core.errors import HubError, LinkError, MolinkError, StageError, UsageError, WireError
from molink.core.ids import Address, NodeId, Port
from molink.node.home import RunFolder
from molink.node.switch import Switch
from molink.transport.identity import NodeIdentity
from molink.transport.link import Link
from molink.transport.local_server import LocalPeer
from molink.transport.server import Dialled, dial
from molink.wire import to_agent, to_stage
from molink.wire.frames import FrameHeader, Kind, Priority, cut
from molink.wire.to_agent import Downloading, Notice, StageCounters, StageUp
from molink.wire.to_head import LinkCounters, NodeReport

logger = logging.getLogger("molink.agent")
PEER_DIAL_TIMEOUT_S = 3.0
PROBE_INTERVAL_S = 1.0
PROBE_AT_S = (0, 10, 60)  # of a link's life: machines that start are busy, and look slow
PROBE_S, PROBE_BYTES = 1.0, 4 * 1024 * 1024  # most that measuring may take each time
PROBE_TURN_S, PROBE_FILLER = 0.005, 64 * 1024
RATES_INTERVAL_S = 1.0
STAGE_RESTARTS = 3  # in a row without a step


class Agent:
    """The machine's switch. Subclasses say what control messages mean on the head and elsewhere.

    Owns the links, the local server and the counters of the node's stage.

    Args:
        say: shows a line to the person in front of the node.
        show_download: shows how far the stage's download is; None: there is none any more.
    """

    def __init__(
        self,
        node: NodeId,
        run_folder: RunFolder,
        say: Callable[[str], None],
        show_download: Callable[[Downloading | None], None],
    ) -> None:
        self.node = node
        self.run_folder = run_folder
        self.switch = Switch(node, self._control)
        self.say = say
        self.stage_counters: dict[int, StageCounters] = {}
        self._counted_at = time.monotonic()
        self.download: Downloading | None = None
        self._show_download = show_download
        self._failed_stages = 0
        self._local_server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._ending: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def end(self, reason: str) -> None:
        """Have `run` return; the first end counts."""
        if not self._ending.done():
            self._ending.set_result(reason)

    def fail(self, error: BaseException) -> None:
        """Have `run` raise."""
        if not self._ending.done():
            self._ending.set_exception(error)

    def spawn(self, work: Coroutine[Any, Any, None], *, is_vital: bool = False) -> None:
        """Run something beside everything else; a failure is logged, that of a vital one raised."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(partial(self._finished, is_vital=is_vital))

    def _finished(self, task: asyncio.Task[None], *, is_vital: bool) -> None:
        self._tasks.discard(task)
        if task.cancelled() or (error := task.exception()) is None:
            return
        if is_vital:
            self.fail(error)
        else:
            logger.error("%s failed", task.get_coro(), exc_info=error)

    def cancel_tasks(self) -> None:
        for task in self._tasks:
            task.cancel()

    async def listen_locally(self) -> None:
        """Open the socket for the node's own processes."""
        loop = asyncio.get_running_loop()
        self._local_server = await loop.create_unix_server(
            lambda: LocalPeer(self._from_local, self._local_lost), str(self.run_folder.socket)
        )

    def close_local(self) -> None:
        self._downloads(None)
        if self._local_server is not None:
            self._local_server.close()
        for peers in self.switch.local.values():
            for peer in list(peers.values()):
                peer.close()

    def send_control(
        self, node: NodeId, port: Port, payload: bytes, priority: Priority = Priority.CONTROL
    ) -> None:
        """Send a control message to a process of any node of the cluster."""
        source = Address(self.node, Port.AGENT)
        view = memoryview(payload)
        for header, pieces in cut(Kind.CONTROL, priority, source, Address(node, port), [view]):
            self.switch.forward(FrameHeader.unpack(header), b"".join([header, *pieces]))

    async def run_link(self, link: Link) -> None:
        """Run a link until it ends. Raises LinkError or WireError if it broke."""
        if (old := self.switch.links.get(link.peer)) is not None:
            old.close()
        self.switch.links[link.peer] = link
        prober = asyncio.create_task(self._probe(link))
        try:
            await link.run(self.switch.from_link)
        finally:
            prober.cancel()
            if self.switch.links.get(link.peer) is link:
                del self.switch.links[link.peer]

    async def _probe(self, link: Link) -> None:
        """Measure a new link with bytes that matter least, then keep its figures fresh."""
        probe = to_agent.encode(to_agent.Probe())
        self.send_control(link.peer, Port.AGENT, probe)
        for seconds in count():
            if seconds in PROBE_AT_S:
                await self._fill(link)
            await asyncio.sleep(PROBE_INTERVAL_S)
            self.send_control(link.peer, Port.AGENT, probe)

    async def _fill(self, link: Link) -> None:
        """Give a link as much to do as it can, while nothing else waits for it."""
        filler = to_agent.encode(to_agent.Probe(bytes(PROBE_FILLER)))
        clock, left = asyncio.get_running_loop().time, PROBE_BYTES
        until = clock() + PROBE_S
        while left > 0 and clock() < until:
            backlog = max((link.window.bytes_per_s or 0.0) * 4 * PROBE_TURN_S, PROBE_FILLER)
            while left > 0 and link.queue.waiting_bytes < backlog:
                self.send_control(link.peer, Port.AGENT, filler, Priority.BULK)
                left -= len(filler)
            await asyncio.sleep(PROBE_TURN_S)

    async def tell_rates(self) -> None:
        """Tell the node's stage, for ever, how fast links carry what it sends."""
        while True:
            await asyncio.sleep(RATES_INTERVAL_S)
            rates = {peer: link.window.bytes_per_s for peer, link in self.switch.links.items()}
            known = {int(peer): rate for peer, rate in rates.items() if rate is not None}
            self.send_control(self.node, Port.STAGE, to_stage.encode(to_stage.LinkRates(known)))

    async def dial_peer(self, node: NodeId, address: str, identity: NodeIdentity) -> bool:
        """Try to link directly to another node; False if it cannot be dialled."""
        try:
            dialled = await dial(address, identity, node, PEER_DIAL_TIMEOUT_S)
        except LinkError as error:
            logger.info("no direct link to node %d: %s", node, error)
            return False
        self.spawn(self._run_dialled(dialled))
        return True

    async def _run_dialled(self, dialled: Dialled) -> None:
        try:
            await self.run_direct(dialled.link)
        finally:
            await dialled.channel.close()

    async def run_direct(self, link: Link) -> None:
        """Run a link to a node that is not the head, and say when it has ended."""
        reason = "it was closed"
        try:
            await self.run_link(link)
        except MolinkError as error:
            reason = str(error)
        self.link_lost(link, reason)

    def link_lost(self, link: Link, reason: str) -> None:
        """A direct link to another node ended."""

    def stage_report(self) -> NodeReport:
        """What the node's stage and links have done."""
        counters = self.stage_counters.get(0, StageCounters())
        age_s = time.monotonic() - self._counted_at
        return NodeReport(counters, self.link_counters(), self.download, age_s)

    def link_counters(self) -> list[LinkCounters]:
        return [_counters(link) for link in self.switch.links.values()]

    # What arrives

    def _from_local(
        self, peer: LocalPeer, header: FrameHeader, frame: bytes
    ) -> Awaitable[None] | None:
        if header.source.node != self.node:
            raise WireError(f"a process of node {self.node} speaks for node {header.source.node}")
        return self.switch.from_local(peer, header, frame)

    def _local_lost(self, peer: LocalPeer) -> None:
        self.switch.forget(peer)

    def _control(self, header: FrameHeader, payload: bytes) -> None:
        try:
            if header.source.node == self.node:
                self.on_local(header, to_agent.decode(payload))
            else:
                self.on_remote(header.source.node, payload)
        except WireError as error:
            logger.warning("from %s: %s", header.source, error)

    def on_local(self, header: FrameHeader, message: to_agent.ToAgent) -> None:
        """Handle a message of one of the node's own processes."""
        match message:
            case StageCounters():
                self.stage_counters[header.rank] = message
                self._counted_at = time.monotonic()
                if message.steps:
                    self._failed_stages = 0
            case StageUp():  # another process, which downloads nothing yet
                self._downloads(None)
            case Downloading():
                self._downloads(None if message.is_done else message)
            case Notice(text=text):
                self.say(text)
            case _:
                pass

    def _downloads(self, download: Downloading | None) -> None:
        self.download = download
        self._show_download(download)

    def may_restart_stage(self, reason: MolinkError) -> bool:
        """Whether another process for a stage that ended might do better; if not, `run` raises."""
        self._downloads(None)
        self._failed_stages += 1
        if isinstance(reason, UsageError | HubError):
            self.fail(reason)
        elif self._failed_stages > STAGE_RESTARTS:
            self.fail(StageError(f"the stage's process does not come up: {reason}"))
        else:
            return True
        return False

    def has_all_ranks(self, tensor_parallel_size: int) -> bool:
        """Whether every process of the node's stage is there."""
        return len(self.switch.local.get(Port.STAGE, {})) == tensor_parallel_size

    def on_remote(self, node: NodeId, payload: bytes) -> None:
        """Handle a message of another node's agent."""
        raise NotImplementedError


def _counters(link: Link) -> LinkCounters:
    window = link.window
    return LinkCounters(
        peer=link.peer,
        bytes_sent=link.bytes_sent,
        bytes_received=link.bytes_received,
        frames_queued=len(link.queue),
        bytes_queued=link.queue.waiting,
        bytes_in_flight=window.in_flight,
        window=window.size,
        bytes_per_s=window.bytes_per_s,
        rtt_s=window.rtt_s,
        jitter_s=window.jitter_s,
        loss=link.tcp.loss if link.tcp else None,
    )
