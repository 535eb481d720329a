"""The head's agent: admits nodes, plans, starts the engine, and tells everybody.

Its decisions are the coordinator's; this carries them out. One task, `_settle`, brings the cluster
from what it is to what the coordinator wants, each time something has changed.
"""

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import msgspec

from molink.cluster.admission import HeldModel, Hello, check_model
from molink.cluster.assignment import Waiting
from molink.cluster.coordinator import Coordinator
from molink.cluster.state import Role
from molink.cluster.watch import Patience
from molink.core.cluster import Resources, Versions
from molink.core.errors import (
    MolinkError,
    PlanError,
    ProcessError,
    StageError,
    UsageError,
    WireError,
)
from molink.core.ids import HEAD, NodeId, Port
from molink.node.agent import Agent
from molink.node.deployment import Deployment
from molink.node.enrolment import enrol
from molink.node.home import RunFolder
from molink.node.orders import Orders
from molink.node.reports import Reports
from molink.node.server_hosts import EngineHost, GatewayHost
from molink.node.stage_host import StageHost, StageSettings
from molink.node.watchman import Watchman
from molink.transport.allowance import Allowance
from molink.transport.credentials import server_credentials
from molink.transport.identity import ClusterAuthority, NodeIdentity
from molink.transport.server import Accepted, LinkServer
from molink.transport.tunnel import TunnelExit
from molink.wire import to_agent, to_engine, to_gateway, to_head
from molink.wire.frames import FrameHeader
from molink.wire.to_agent import (
    Attach,
    Downloading,
    EngineFailed,
    EngineState,
    Notice,
    Probe,
    RestartStage,
    Shutdown,
    StageUp,
    StandbyPrepared,
    Welcome,
)

VIEW_INTERVAL_S = 1.0
LAST_WORDS_S = 0.5
GATEWAY_PAUSE_S = 1.0  # before another one starts


@dataclass(frozen=True, slots=True)
class HeadSettings:
    """What the head's user said."""

    name: str
    listen: str
    advertise: str | None
    layers: str | None  # A:B, "none" or not pinned
    versions: Versions
    stage: StageSettings
    http: str  # URL of the OpenAI API
    patience: Patience
    split_after_s: float  # that the others wait for a lost node's successor
    drain_s: float  # that requests may take to end when the head is told to
    relay_bytes_per_s: float | None = None  # most that the head relays between other nodes


class HeadAgent(Agent):
    """Owns the coordinator and the engine's process."""

    def __init__(
        self,
        coordinator: Coordinator,
        authority: ClusterAuthority,
        identity: NodeIdentity,
        settings: HeadSettings,
        run_folder: RunFolder,
        stage_host: Callable[[Callable[[MolinkError], None]], StageHost],
        engine_host: Callable[[Callable[[MolinkError], None]], EngineHost],
        gateway_host: Callable[[Callable[[MolinkError], None]], GatewayHost],
        say: Callable[[str], None],
        show_download: Callable[[Downloading | None], None],
        api: TunnelExit,
    ) -> None:
        super().__init__(HEAD, run_folder, say, show_download)
        self._coordinator = coordinator
        self._authority = authority
        self._identity = identity
        self._settings = settings
        if settings.relay_bytes_per_s is not None:
            self.switch.relay_allowance = Allowance(settings.relay_bytes_per_s)
        self._deployment = Deployment(coordinator, self, settings.http)
        self._stage = stage_host(self._own_stage_gone)
        self._engine = engine_host(self._engine_gone)
        self._gateway = gateway_host(self._gateway_gone)
        self._server = LinkServer(
            lambda: authority.certificate_pem,
            self._accept,
            self._enrol,
            lambda: self._reports.view_json(),
            api.serve,
            self.carry_out,
            coordinator.is_revoked,
        )
        self._changed = asyncio.Event()
        self._engine_failure: MolinkError | None = None  # in its own words, if it had time for them
        self._held: dict[NodeId, HeldModel] = {}
        self._remote_hosts: dict[NodeId, str] = {}
        self._waiting_for = ""
        self._waiting_since: float | None = None
        self._is_leaving = False
        self._said_draining = False
        self.addresses: tuple[str, ...] = ()  # where nodes reach this one
        self._orders = Orders(
            coordinator, authority, lambda: self.addresses, self._shut_out, self._changed.set
        )
        self.invite = self._orders.invite
        self._reports = Reports(
            coordinator, self._deployment, self.switch, self.stage_report, settings.http
        )
        self._watchman = Watchman(
            self.switch, coordinator, self._deployment, self._reports, settings.patience, self
        )

    async def listen(self) -> int:
        """Open the agent's port. Raises UsageError if it is taken."""
        await self.listen_locally()
        roots = lambda: self._coordinator.live_roots  # noqa: E731
        credentials = server_credentials(lambda: self._identity, roots)
        return await self._server.start(self._settings.listen, credentials)

    async def run(self) -> str:
        """Serve until `end`; returns why it ended. Raises what cannot be mended."""
        hello = Hello(
            self._settings.name,
            self._settings.versions,
            self._settings.advertise,
            self._settings.layers,
            self._settings.stage.tensor_parallel_size,
        )
        self._coordinator.admit(HEAD, hello)
        assert self._coordinator.state.model is not None
        self._held[HEAD] = HeldModel.of(self._coordinator.state.model)
        await self._gateway.start()
        await self._engine.start()
        if self._settings.layers == "none":
            nothing = Resources("none", 0, 0, 0.0, 0.0)
            self._coordinator.measured(HEAD, nothing, self._held[HEAD])
        else:
            await self._stage.restart(self._settings.stage)
        self.spawn(self._settle_forever(), is_vital=True)
        self.spawn(self._publish_views(), is_vital=True)
        self.spawn(self._watchman.watch(), is_vital=True)
        self.spawn(self.tell_rates())
        self.spawn(self._deployment.paths.seek())
        try:
            return await self._ending
        finally:
            self.cancel_tasks()
            await self._stop()

    def leave(self) -> None:
        """End once all requests are answered, which may take `drain_s`; at once if asked again."""
        has_gateway = bool(self.switch.local.get(Port.GATEWAY))
        if self._is_leaving or not has_gateway or not self._deployment.serving:
            self.end("stopped")
            return
        self._is_leaving = True
        self.tell_gateway(to_gateway.Drain())
        late = f"stopped, although requests were under way after {self._settings.drain_s:g} s"
        asyncio.get_running_loop().call_later(self._settings.drain_s, self.end, late)

    def _drained(self, requests: int) -> None:
        if requests == 0:
            self.end("stopped")
        elif not self._said_draining:
            self._said_draining = True
            many = "1 request is" if requests == 1 else f"{requests} requests are"
            self.say(f"{many} under way, and may end; Ctrl-C once more ends everything at once")

    async def _stop(self) -> None:
        for node in list(self.switch.links):
            self.tell(node, Shutdown("the head has ended"))
        await asyncio.gather(self._gateway.stop(), self._engine.stop(), self._stage.stop())
        await self._server.stop()
        self.close_local()

    def tell(self, node: NodeId, message: to_agent.ToAgent) -> None:
        self.send_control(node, Port.AGENT, to_agent.encode(message))

    def tell_engine(self, message: to_engine.ToEngine) -> None:
        payload = to_engine.encode(message)
        for port in (Port.SERVER, Port.ENGINE):
            self.send_control(HEAD, port, payload)
        self.publish_view()

    def tell_gateway(self, message: to_gateway.ToGateway) -> None:
        self.send_control(HEAD, Port.GATEWAY, to_gateway.encode(message))

    def carry_out(self, order: bytes) -> bytes:
        """Answer the operator. Raises MolinkError for what cannot be done."""
        return self._orders.carry_out(order)

    # Nodes come and go

    def _shut_out(self, node: NodeId) -> None:
        """A node was revoked: end what it has with anybody."""
        name = self._coordinator.state.node(node).name
        self.say(f"{name} is revoked")
        self.tell(node, to_agent.Refused("this node was revoked"))
        self.node_lost(node, "it was revoked")
        self._server.end_tunnels(node)
        self._changed.set()
        if (link := self.switch.links.get(node)) is not None:
            asyncio.get_running_loop().call_later(LAST_WORDS_S, link.close)
        for other in self.switch.links.keys() - {node}:
            self.tell(other, to_agent.NodesRevoked([node]))

    def _renew(self, node: NodeId, request: bytes) -> None:
        record = self._coordinator.state.node(node)
        try:
            certificate = self._authority.sign_node(request, node=node, name=record.name)
        except MolinkError as error:
            self.say(f"cannot renew the certificate of {record.name}: {error}")
        else:
            self.tell(node, to_agent.Renewed(certificate))

    def _enrol(self, leaf: bytes, request: bytes) -> bytes:
        return msgspec.msgpack.encode(enrol(self._coordinator, self._authority, leaf, request))

    async def _accept(self, accepted: Accepted) -> None:
        node = accepted.identity.node
        self._remote_hosts[node] = accepted.remote_host
        reason = "its message could not be handled"
        try:
            await self.run_link(accepted.link)
            reason = "it closed its link"
        except MolinkError as error:
            reason = str(error)
            if isinstance(error, WireError):
                self.say(f"cannot read {accepted.identity.name}'s messages: {reason}")
        finally:
            self._link_ended(node, reason)

    def _link_ended(self, node: NodeId, reason: str) -> None:
        is_back = node in self.switch.links  # over another link
        is_known = self._coordinator.state.knows(node)
        if is_known and not is_back and not self._ending.done():
            self.node_lost(node, reason)

    def node_lost(self, node: NodeId, reason: str) -> None:
        """A node is gone, or counts as gone."""
        record = self._coordinator.state.node(node)
        self._deployment.stage_gone(node)
        self._reports.forget(node)
        if record.is_connected:
            self._coordinator.node_lost(node, reason)
            self.say(f"{record.name} is gone: {reason}")
            self._changed.set()

    def _stage_lost(self, node: NodeId, reason: str) -> None:
        self._deployment.stage_gone(node)
        self._coordinator.stage_lost(node, reason)
        self._changed.set()

    def _own_stage_gone(self, reason: MolinkError) -> None:
        if not self.may_restart_stage(reason):
            return
        self.say(f"the stage's process on this machine is gone ({reason}); starting another")
        self._stage_lost(HEAD, str(reason))
        self.spawn(self._stage.restart(self._settings.stage), is_vital=True)

    def _stage_failed(self, node: NodeId, reason: str) -> None:
        """A stage could not be brought to where the others are: its node must not take it again."""
        if node == HEAD:
            self.fail(StageError(reason))
        elif self._coordinator.state.node(node).is_connected:
            self._refuse(node, self._coordinator.state.node(node).name, StageError(reason))
            self.node_lost(node, reason)

    def _hello(self, node: NodeId, hello: to_head.Hello) -> None:
        versions = Versions(hello.protocol, hello.molink, hello.vllm)
        host = self._remote_hosts.get(node)
        address = hello.advertise or (f"{host}:{hello.listen_port}" if host else None)
        checked = Hello(
            hello.name,
            versions,
            address,
            hello.layers,
            hello.tensor_parallel_size,
            hello.stands_by,
        )
        try:
            record = self._coordinator.admit(node, checked)
        except MolinkError as error:
            self._refuse(node, hello.name, error)
            return
        self._deployment.arrived(node)
        model = self._coordinator.state.model
        assert model is not None
        cluster_id = self._coordinator.state.cluster_id
        revoked = [int(other.id) for other in self._coordinator.state.nodes if other.is_revoked]
        about = model.name, model.config_hash, model.revision
        self.tell(node, Welcome(cluster_id, *about, revoked))
        self.say(f"{record.name} has joined from {host}")
        self._changed.set()

    def _refuse(self, node: NodeId, name: str, error: MolinkError) -> None:
        self.say(f"refused {name}: {error}")
        self.tell(node, to_agent.Refused(str(error), isinstance(error, UsageError | PlanError)))

    def _stage_up(self, node: NodeId, stage: StageUp) -> None:
        model = self._held.get(node)
        name = self._coordinator.state.node(node).name
        try:
            if model is None:
                raise WireError("it says it is ready before it has checked the model")
            self._coordinator.measured(node, stage.resources, model)
        except MolinkError as error:
            self._refuse(node, name, error)
            return
        self._deployment.unloaded.add(node)
        self.say(f"{name} is ready: {stage.device}, {stage.free_bytes / (1 << 30):.1f} GiB free")
        if self._coordinator.state.role(node) is Role.SPARE:
            self.tell(node, Notice("all layers are taken; this node is kept as a spare"))
        self._changed.set()

    # Messages

    def on_local(self, header: FrameHeader, message: to_agent.ToAgent) -> None:
        super().on_local(header, message)
        match message:
            case Attach() if header.source.port in (Port.ENGINE, Port.SERVER):
                if (news := self._deployment.news) is not None:
                    self.send_control(HEAD, header.source.port, to_engine.encode(news))
            case Attach() if header.source.port == Port.GATEWAY:
                self.publish_view()
            case StageUp() if self.has_all_ranks(self._settings.stage.tensor_parallel_size):
                self._stage_up(HEAD, message)
            case EngineFailed(reason=reason, is_usage=is_usage):
                self._engine_failure = (UsageError if is_usage else ProcessError)(reason)
            case EngineState():
                had_served = self._deployment.serving
                failed = self._deployment.engine_state(header.source.port, message)
                if failed is not None:
                    self._stage_failed(failed, message.error or "")
                if self._deployment.serving and not had_served:
                    self._changed.set()  # there is time for standbys
            case to_agent.GatewayDrains(requests=requests):
                self._drained(requests)
            case StandbyPrepared(node=node, error=error):
                self._standby_prepared(NodeId(node), error)
            case _:
                pass

    def on_remote(self, node: NodeId, payload: bytes) -> None:
        message = to_head.decode(payload)
        # One whose record is lost has a certificate still; its hello is refused in words.
        if not self._coordinator.state.knows(node) and not isinstance(message, to_head.Hello):
            return
        match message:
            case Probe():
                pass
            case to_head.Hello() as hello:
                self._hello(node, hello)
            case to_head.ModelChecked(config_hash=config_hash, revision=revision):
                self._model_checked(node, HeldModel(config_hash, revision))
            case StageUp() as stage:
                self._stage_up(node, stage)
            case to_head.StageGone(reason=reason):
                self._stage_lost(node, reason)
            case to_head.Renew(signing_request=request):
                self._renew(node, request)
            case to_head.Leaving(reason=reason):
                self.node_lost(node, reason)
            case to_head.Dialled(node=other, ok=ok):
                self._deployment.paths.dialled(node, NodeId(other), ok)
            case to_head.LinkLost() as lost:
                self._link_lost(node, lost)
            case to_head.NodeReport() as report:
                self._reported(node, report)

    def _reported(self, node: NodeId, report: to_head.NodeReport) -> None:
        if self._reports.put(node, report):
            name = self._coordinator.state.node(node).name
            self.say(f"{name} downloads {report.download}")

    def _model_checked(self, node: NodeId, model: HeldModel) -> None:
        record = self._coordinator.state.node(node)
        assert self._coordinator.state.model is not None
        try:
            check_model(record.name, model, self._coordinator.state.model)
        except MolinkError as error:
            self._refuse(node, record.name, error)
        else:
            self._held[node] = model

    def _link_lost(self, node: NodeId, lost: to_head.LinkLost) -> None:
        """A direct link broke; if anything was lost with it, so are the steps in flight."""
        record, other = self._coordinator.state.node(node), NodeId(lost.node)
        if record.resources is None or not record.is_connected:
            return
        if {node, other} <= set(self._deployment.nodes):
            if lost.nothing:
                self._deployment.paths.broke(node, other, lost.reason)
                return
            self.lose_steps(node, f"its link to node {other} broke: {lost.reason}")

    def lose_steps(self, node: NodeId, reason: str) -> None:
        """All that is under way is lost, and nothing else: the same stages begin a new epoch."""
        record = self._coordinator.state.node(node)
        if record.resources is not None and record.is_connected:
            self._coordinator.stage_lost(node, reason)
            self._coordinator.measured(node, record.resources, self._held[node])
            self._changed.set()

    # From what is to what the coordinator wants

    async def _settle_forever(self) -> None:
        while True:
            self._changed.clear()
            await self._settle()
            await self._changed.wait()

    async def _settle(self) -> None:
        state = self._coordinator.state
        if state.is_down:
            nodes = [state.node(node) for node in self._deployment.nodes]
            troubles = [f"{node.name}: {node.trouble}" for node in nodes if node.trouble]
            self._deployment.take_down("; ".join(troubles) or "a stage is lost")
            await self.empty_stages(self._deployment.take_half_loaded(), "it was half loaded")
        plan = self._coordinator.plan()
        if isinstance(plan, Waiting):
            self._wait_for(plan.text)
            if self._coordinator.state.is_down:
                await self.empty_stages(self._coordinator.misplaced(), "another stage is lost")
            await self._split_anew_in_time()
            return
        self._waiting_since = None
        if plan != self._deployment.pipeline:
            self.switch.stage_nodes = plan.nodes
            await self._deployment.assign(plan)
        elif self._deployment.serving:
            self._warm_up_standbys()

    async def _split_anew_in_time(self) -> None:
        """Once nobody has taken a lost node's place for long, the others share its layers."""
        loop = asyncio.get_running_loop()
        after_s = self._settings.split_after_s
        if self._waiting_since is None:
            self._waiting_since = loop.time()
            loop.call_later(after_s, self._changed.set)
        elif loop.time() - self._waiting_since >= after_s and self._coordinator.split_anew():
            self._waiting_since = None
            self.say("nobody takes its place: those who are here share the layers anew")
            await self._restart_engine(keep=False)

    def _warm_up_standbys(self) -> None:
        """Have every spare load the layers of a stage ahead, each in its own time."""
        state, deployment = self._coordinator.state, self._deployment
        while chosen := self._coordinator.next_standby(deployment.warming, deployment.unable):
            node, stage = chosen
            deployment.warming[node.id] = stage.layers
            deployment.unloaded.discard(node.id)
            self.spawn(deployment.warm_up(node.id, stage))
        loaded = {node.id for node in state.ready if node.loaded}
        self.switch.standby_nodes = frozenset(loaded | deployment.warming.keys())

    def _standby_prepared(self, node: NodeId, error: str | None) -> None:
        layers = self._deployment.warming.pop(node, None)
        if layers is None:
            return  # the pipeline was lost meanwhile, and the node begins anew
        name = self._coordinator.state.node(node).name
        if error is None:
            self._coordinator.standby_loaded(node, layers)
            self.publish_view()
            self.say(f"{name} has loaded layers {layers} ahead, and stands by")
            self.tell(node, Notice(f"layers {layers} are loaded; this node stands by"))
        else:
            self._deployment.unable.add((node, layers))
            self.say(f"{name} cannot load layers {layers} ahead: {error}")
            self.tell(node, Notice(f"layers {layers} cannot be loaded here: {error}"))
            self._coordinator.stage_lost(node, error)
            self.tell(node, RestartStage())
        self._changed.set()

    def _wait_for(self, text: str) -> None:
        """Say what is missing, once, to everybody who could compute."""
        if text != self._waiting_for:
            self.say(text)
            for node in self._coordinator.state.ready:
                if node.id != HEAD:
                    self.tell(node.id, Notice(text))
        self._waiting_for = text

    # The engine

    def _engine_gone(self, reason: MolinkError) -> None:
        """One that has served, or lost its pipeline while it loaded, begins anew; else we end."""
        has_served = self._deployment.http_up
        if has_served:
            self.say(f"{reason}\nstarting another engine; requests wait for it")
        elif not self._deployment.was_lost:
            self.fail(self._engine_failure or reason)
            return
        self.spawn(self._restart_engine(keep=has_served), is_vital=True)

    def _gateway_gone(self, reason: MolinkError) -> None:
        if isinstance(reason, UsageError):
            self.fail(reason)
            return
        self.say(f"{reason}\nstarting another gateway")
        self.spawn(self._restart_gateway(), is_vital=True)

    async def _restart_gateway(self) -> None:
        await asyncio.sleep(GATEWAY_PAUSE_S)
        await self._gateway.start()

    async def _restart_engine(self, *, keep: bool) -> None:
        """Give a new engine the stages of the one before, or such as hold nothing.

        Args:
            keep: the layers stay where they are.
        """
        nodes = self._deployment.nodes
        self._deployment.forget("the engine has ended; another one is starting")
        self._engine_failure = None
        if keep:
            self._coordinator.engine_lost()
            self._deployment.unloaded.update(node.id for node in self._coordinator.state.ready)
        else:
            self._coordinator.drop_pipeline()
            await self.empty_stages(nodes, "its engine starts anew")
        await self._engine.start()
        self._changed.set()

    async def empty_stages(self, nodes: Iterable[NodeId], reason: str) -> None:
        """Have those stages that hold something, and are not gone themselves, begin anew."""
        ready = {node.id for node in self._coordinator.state.ready}
        full = (ready & set(nodes)) - self._deployment.unloaded
        for node in full:
            self._coordinator.stage_lost(node, reason)
            if node != HEAD:
                self.tell(node, RestartStage())
        if full:
            self._changed.set()
        if HEAD in full:
            await self._stage.restart(self._settings.stage)

    # What others see

    async def _publish_views(self) -> None:
        while True:
            self.publish_view()
            self._tell_path()
            await asyncio.sleep(VIEW_INTERVAL_S)

    def publish_view(self) -> None:
        self.tell_gateway(to_gateway.ClusterView(self._reports.view_json()))

    def _tell_path(self) -> None:
        if (path := self._reports.path()) is not None:
            self.send_control(HEAD, Port.ENGINE, to_engine.encode(path))
