"""The agent of a node that has joined: dials the head, runs one stage, obeys."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from molink.checkpoint.model import FoundModel, config_hash, find_model
from molink.core.cluster import Versions
from molink.core.errors import (
    AdmissionError,
    IdentityError,
    LinkError,
    MolinkError,
    UsageError,
    WireError,
)
from molink.core.ids import HEAD, NodeId, Port
from molink.node.agent import Agent
from molink.node.home import RunFolder
from molink.node.stage_host import StageHost, StageSettings
from molink.transport.credentials import server_credentials
from molink.transport.identity import NODE_LIFETIME, NodeIdentity, NodeKey
from molink.transport.link import Link
from molink.transport.server import Accepted, LinkServer, dial
from molink.wire import to_agent, to_head
from molink.wire.frames import FrameHeader
from molink.wire.to_agent import (
    Dial,
    Downloading,
    Notice,
    Probe,
    Refused,
    RestartStage,
    Shutdown,
    StageAssigned,
    StageUp,
    Welcome,
)

HEAD_DIAL_TIMEOUT_S = 10.0
RETRY_S = 2.0
REPORT_INTERVAL_S = 1.0
RENEWAL_INTERVAL_S = 3600.0


@dataclass(frozen=True, slots=True)
class MemberSettings:
    """What the node's user said."""

    name: str
    head: str  # HOST:PORT
    listen: str
    advertise: str | None
    model: str | None  # None: where the head has it
    layers: str | None
    stands_by: bool
    versions: Versions
    stage: StageSettings


class MemberAgent(Agent):
    """Owns the link to the head and the node's stage processes.

    Args:
        keep: stores the node's identity when it has been renewed.
    """

    def __init__(
        self,
        identity: NodeIdentity,
        keep: Callable[[NodeIdentity], None],
        settings: MemberSettings,
        run_folder: RunFolder,
        stage_host: Callable[[Callable[[MolinkError], None]], StageHost],
        say: Callable[[str], None],
        show_download: Callable[[Downloading | None], None],
    ) -> None:
        super().__init__(identity.verify().node, run_folder, say, show_download)
        self._identity = identity
        self._keep = keep
        self._next_key: NodeKey | None = None  # that the head is to sign
        self._revoked: set[NodeId] = set()
        self._settings = settings
        self._stage = stage_host(self._stage_gone)
        self._model: FoundModel | None = None
        self._up: StageUp | None = None  # what the stage has said, while it runs
        self._server = LinkServer(
            lambda: identity.authority_pem,
            self._accept,
            is_revoked=lambda node: node in self._revoked,
        )
        self._listen_port = 0

    async def run(self) -> str:
        """Serve until the head ends or refuses the node; returns the head's parting words.

        Raises:
            MolinkError: refused, or something here cannot work.
        """
        await self.listen_locally()
        credentials = server_credentials(lambda: self._identity)
        self._listen_port = await self._server.start(self._settings.listen, credentials)
        self.spawn(self._follow_head(), is_vital=True)
        self.spawn(self._report())
        self.spawn(self._renew())
        self.spawn(self.tell_rates())
        farewell = "the node was stopped"
        try:
            return await self._ending
        except MolinkError as error:
            farewell = str(error)
            raise
        finally:
            self.tell_head(to_head.Leaving(farewell))
            await asyncio.sleep(0.1)  # lets the farewell leave; nothing depends on it
            self.cancel_tasks()
            await self._stop()

    async def _stop(self) -> None:
        await self._stage.stop()
        await self._server.stop()
        self.close_local()

    async def _follow_head(self) -> None:
        """Keep a link to the head; while there is none, the stage keeps its layers and waits."""
        said = ""
        while not self._ending.done():
            try:
                dialled = await dial(self._settings.head, self._identity, HEAD, HEAD_DIAL_TIMEOUT_S)
            except LinkError as error:
                if str(error) != said:
                    said = str(error)
                    self.say(f"{said}; trying until it answers")
                await asyncio.sleep(RETRY_S)
                continue
            said = ""
            try:
                running = asyncio.create_task(self.run_link(dialled.link))
                await asyncio.sleep(0)
                self.tell_head(self._hello())
                await running
                reason = "the head closed the link"
            except LinkError as error:
                reason = str(error)
            except WireError as error:
                raise AdmissionError(f"the head's messages cannot be read: {error}") from error
            await dialled.channel.close()
            if not self._ending.done():
                self.say(f"lost the head: {reason}; trying again")
                await asyncio.sleep(RETRY_S)

    def _hello(self) -> to_head.Hello:
        settings = self._settings
        return to_head.Hello(
            protocol=settings.versions.protocol,
            molink=settings.versions.molink,
            vllm=settings.versions.vllm,
            name=settings.name,
            layers=settings.layers,
            tensor_parallel_size=settings.stage.tensor_parallel_size,
            listen_port=self._listen_port,
            advertise=settings.advertise,
            stands_by=settings.stands_by,
        )

    def tell_head(self, message: to_head.ToHead) -> None:
        self.send_control(HEAD, Port.AGENT, to_head.encode(message))

    async def _report(self) -> None:
        while True:
            await asyncio.sleep(REPORT_INTERVAL_S)
            if HEAD in self.switch.links and self.stage_counters:
                self.tell_head(self.stage_report())

    async def _renew(self) -> None:
        """Ask for another certificate once two thirds of this one's time are over."""
        while True:
            left = self._identity.valid_until - datetime.now(UTC)
            if left < NODE_LIFETIME / 3 and HEAD in self.switch.links:
                self._next_key = self._next_key or NodeKey()
                self.tell_head(to_head.Renew(self._next_key.request_pem()))
            await asyncio.sleep(RENEWAL_INTERVAL_S)

    def _renewed(self, certificate: bytes) -> None:
        key, self._next_key = self._next_key, None
        if key is None:
            return
        try:
            self._identity = key.renew(certificate, self._identity)
            self._keep(self._identity)
        except (IdentityError, OSError) as error:
            self.say(f"the head's new certificate cannot be used: {error}")

    async def _accept(self, accepted: Accepted) -> None:
        await self.run_direct(accepted.link)

    def link_lost(self, link: Link, reason: str) -> None:
        """Tell the head, unless the peer has been dialled again and nothing was on its way."""
        nothing = link.has_delivered and not self.switch.is_used(link)
        if not nothing or link.peer not in self.switch.links:
            self.tell_head(to_head.LinkLost(link.peer, reason, nothing))

    # Messages

    def on_local(self, header: FrameHeader, message: to_agent.ToAgent) -> None:
        super().on_local(header, message)
        size = self._settings.stage.tensor_parallel_size
        if isinstance(message, StageUp) and self.has_all_ranks(size):
            self._up = message
            self.tell_head(message)

    def on_remote(self, node: NodeId, payload: bytes) -> None:
        if node != HEAD:
            to_agent.decode(payload)
            return
        match to_agent.decode(payload):
            case Probe():
                pass
            case to_agent.NodesRevoked(nodes=nodes):
                self._shut_out(nodes)
            case to_agent.Renewed(certificate=certificate):
                self._renewed(certificate)
            case Welcome() as welcome:
                self._shut_out(welcome.revoked)
                self.spawn(self._welcomed(welcome), is_vital=True)
            case Refused(reason=reason, is_usage=is_usage):
                self.fail((UsageError if is_usage else AdmissionError)(reason))
            case Notice(text=text):
                self.say(text)
            case Dial() as order:
                self.spawn(self._dial(order))
            case StageAssigned() as stage:
                self.say(
                    f"computes layers {stage.start}:{stage.end}, "
                    f"stage {stage.stage_index + 1} of {stage.num_stages}"
                )
            case RestartStage():
                self.spawn(self._restart_stage(), is_vital=True)
            case Shutdown(reason=reason):
                self.end(reason)

    def _shut_out(self, nodes: list[int]) -> None:
        self._revoked.update(map(NodeId, nodes))
        for node in self._revoked & self.switch.links.keys():
            self.switch.links[node].close()

    async def _welcomed(self, welcome: Welcome) -> None:
        """Check that this machine holds the head's model, then start the stage.

        One that runs already may hold what the head wants of it, as measured when it began.
        """
        path = self._settings.model or welcome.model
        before, model = self._model, await asyncio.to_thread(find_model, path, welcome.revision)
        self._model = model
        self.say(f"joined cluster {welcome.cluster_id} as node {self.node}; model {path}")
        self.tell_head(to_head.ModelChecked(config_hash(model.config), model.revision))
        if self._up is not None and before == model:
            self.tell_head(self._up)
        else:
            await self._restart_stage()

    async def _restart_stage(self) -> None:
        self._up = None
        model = self._settings.model or (self._model.name if self._model else "")
        await self._stage.restart(replace(self._settings.stage, model=model))

    def _stage_gone(self, reason: MolinkError) -> None:
        if not self.may_restart_stage(reason):
            return
        self._up = None
        self.say(f"the stage's process is gone ({reason}); starting another")
        self.tell_head(to_head.StageGone(str(reason)))
        self.spawn(self._restart_stage(), is_vital=True)

    async def _dial(self, order: Dial) -> None:
        node = NodeId(order.node)
        ok = node in self.switch.links or await self.dial_peer(node, order.address, self._identity)
        self.tell_head(to_head.Dialled(order.node, ok))
