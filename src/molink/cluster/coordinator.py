"""The only writer of a cluster's state. No I/O but the store; the head's agent calls it."""

import math
from collections.abc import Callable, Mapping, Set

from molink.cluster.admission import HeldModel, Hello, check_model, check_node_name, check_versions
from molink.cluster.assignment import (
    Waiting,
    first_stages,
    heir_of,
    mended_stages,
    misplaced,
    next_standby,
    remaining_stages,
)
from molink.cluster.events import (
    EngineLost,
    Event,
    HeadStarted,
    NodeDrained,
    NodeEnrolled,
    NodeJoined,
    NodeLost,
    NodeMeasured,
    NodeRevoked,
    PipelineDropped,
    PipelinePlanned,
    StageLost,
    StandbyLoaded,
    TokenCreated,
    TokenRevoked,
    TokenUsed,
)
from molink.cluster.state import ClusterState, NodeRecord, NodeStatus, Role, TokenRecord, apply
from molink.cluster.store import StateStore
from molink.core.cluster import Resources, Versions
from molink.core.errors import AdmissionError, PlanError, UsageError
from molink.core.ids import HEAD, MAX_NODE_ID, NodeId
from molink.core.model import ModelFacts
from molink.core.plan import LayerRange, Pipeline, Stage
from molink.planning.split import find_gaps

_MAX_REASON = 500  # characters; reasons come from other machines and are kept


class Coordinator:
    """Turns what the head's agent sees into events; each is on disk before its method returns.

    `clock` gives unix seconds, `versions` are the head's, `nodes_wanted` is `--nodes`. Call `start`
    once before anything else, then `plan` after every change.
    """

    def __init__(
        self,
        state: ClusterState,
        store: StateStore,
        clock: Callable[[], float],
        versions: Versions,
        nodes_wanted: int | None = None,
    ) -> None:
        self._state = state
        self._store = store
        self._clock = clock
        self.versions = versions
        self._nodes_wanted = nodes_wanted
        self._has_planned = False
        self._remaining: int | None = None  # nodes that share what others have left

    @property
    def state(self) -> ClusterState:
        return self._state

    @property
    def live_tokens(self) -> list[TokenRecord]:
        """Those that let nodes in now."""
        now = self._clock()
        return [token for token in self._state.tokens if token.expires_at > now]

    @property
    def live_roots(self) -> list[bytes]:
        """PEM certificates below which holders of live join tokens make theirs."""
        return [token.root_certificate for token in self.live_tokens]

    def start(self, model: ModelFacts, head_name: str) -> None:
        """Begin to serve `model`: all nodes are away, the head is node 0."""
        self._record(HeadStarted(model, self._clock()))
        if not self._state.nodes:
            self._record(NodeEnrolled(HEAD, check_node_name(head_name), self._clock()))

    def add_token(
        self,
        root_certificate: bytes,
        expires_at: float,
        node_name: str | None = None,
        uses: int | None = None,
    ) -> None:
        """Let holders of a token enrol until `expires_at` (unix seconds).

        Args:
            node_name: the only name they may take.
            uses: so many of them, and no more.

        Raises:
            UsageError: a malformed name.
        """
        if node_name is not None:
            check_node_name(node_name)
        at = self._clock()
        self._record(TokenCreated(root_certificate, expires_at, at, node_name, uses))

    def revoke_token(self, token_id: str) -> None:
        """Let nobody in with a token any more. Raises UsageError for one that is not live."""
        for token in self.live_tokens:
            if token.id == token_id:
                self._record(TokenRevoked(token.root_certificate, self._clock()))
                return
        raise UsageError(f"there is no token {token_id}; molink token list shows those there are")

    def revoke_node(self, name: str) -> list[NodeId]:
        """Shut a node out for good, with all identities of that name and the tokens it had.

        Raises UsageError for one that is not known, or the head.
        """
        self._named(name)
        found = [n for n in self._state.nodes if n.name == name and not n.is_revoked]
        for node in found:
            self._record(NodeRevoked(node.id, self._clock()))
            if node.token in [token.id for token in self.live_tokens]:
                self.revoke_token(str(node.token))
        return [node.id for node in found]

    def is_revoked(self, node: NodeId) -> bool:
        """Whether a node was shut out."""
        return self._state.knows(node) and self._state.node(node).is_revoked

    def drain(self, name: str) -> str | None:
        """Have others compute a node's layers; who does now, None if it computed none.

        Raises UsageError if nobody could, or for a node that is not connected, or the head.
        """
        node = self._named(name)
        if not node.is_connected:
            raise UsageError(f"{name} is {node.status}")
        heir = None
        if self._state.role(node.id) is Role.STAGE:
            heir = heir_of(self._state, self._model, node.id)
            if heir is None:
                raise UsageError(
                    f"nobody could compute the layers of {name}: join another node first, or stop "
                    f"{name}, and the others share its layers after molink serve --split-after"
                )
        self._record(NodeDrained(node.id, self._clock()))
        return heir.name if heir else None

    def _named(self, name: str) -> NodeRecord:
        """A node of that name, rather one that is connected. Raises UsageError."""
        found = [node for node in self._state.nodes if node.name == name and not node.is_revoked]
        if not found:
            known = ", ".join(node.name for node in self._state.nodes if node.id != HEAD)
            raise UsageError(f"there is no node {name}; there are: {known or 'none'}")
        node = max(found, key=lambda node: (node.is_connected, node.since))
        if node.id == HEAD:
            raise UsageError(f"{name} is the head: it goes when its molink serve ends")
        return node

    def enrol(self, name: str, root_certificate: bytes | None = None) -> NodeId:
        """Give a machine a new identity.

        Args:
            root_certificate: of the token that it holds.

        Raises:
            UsageError: a malformed name.
            AdmissionError: all identities are given, or its token is for another name.
        """
        token = next((t for t in self.live_tokens if t.root_certificate == root_certificate), None)
        if token is not None:
            if token.node_name not in (None, name):
                raise AdmissionError(f"the token is for a node named {token.node_name}, not {name}")
            self._record(TokenUsed(token.root_certificate, self._clock()))
        node = NodeId(len(self._state.nodes))
        if node > MAX_NODE_ID:
            raise AdmissionError(f"the cluster has given all its {MAX_NODE_ID + 1} identities")
        free, is_bound = self._free_name(name, node), bool(token and token.node_name)
        token_id = token.id if token else None
        self._record(NodeEnrolled(node, free, self._clock(), token_id, is_bound))
        return node

    def admit(self, node: NodeId, hello: Hello) -> NodeRecord:
        """Take a connected node in; its name may have been made unique.

        Raises:
            AdmissionError: unknown identity, other versions, or layers that are another node's.
            UsageError: a malformed name or parallel size.
            PlanError: its pinned layers are malformed or outside the model.
        """
        record = self._known(node)
        if record.is_revoked:
            raise AdmissionError(f"{hello.name} was revoked: it may only join anew, with a token")
        if record.bound_name not in (None, hello.name):
            raise AdmissionError(f"{hello.name} was let in as {record.bound_name}, and as no other")
        name = self._free_name(hello.name, node)
        check_versions(name, hello.versions, self.versions)
        if hello.tensor_parallel_size < 1:
            raise UsageError(f"{name}: tensor parallel size {hello.tensor_parallel_size} < 1")
        computes = hello.layers != "none"
        if not computes and node != HEAD:
            raise PlanError(f"{name}: only the head may compute no layers")
        layers = None
        if computes and hello.layers:
            layers = self._pinned(node, name, hello.layers, stands_by=hello.stands_by)
        joined = NodeJoined(
            node,
            name,
            hello.versions,
            hello.address,
            layers,
            computes,
            hello.tensor_parallel_size,
            self._clock(),
            hello.stands_by,
        )
        self._record(joined)
        return self._state.node(node)

    def measured(self, node: NodeId, resources: Resources, model: HeldModel) -> None:
        """A node that was admitted is ready; a head that computes nothing reports zeros.

        Raises:
            AdmissionError: it was not admitted, holds another model, or reports nonsense.
        """
        record = self._known(node)
        if not record.is_connected:
            raise AdmissionError(f"{record.name} was measured before it joined")
        check_model(record.name, model, self._model)
        _check_resources(record, resources)
        self._record(NodeMeasured(node, resources, self._clock()))

    def standby_loaded(self, node: NodeId, layers: LayerRange) -> None:
        """A spare holds the layers of a stage; nothing happens for one that is lost meanwhile."""
        if self._known(node).status is NodeStatus.READY and self._state.role(node) is Role.SPARE:
            self._record(StandbyLoaded(node, layers, self._clock()))

    def node_lost(self, node: NodeId, reason: str) -> None:
        """The connection to a node ended. Nothing happens for one that is already lost."""
        if self._known(node).status is not NodeStatus.LOST:
            self._record(NodeLost(node, reason[:_MAX_REASON], self._clock()))

    def stage_lost(self, node: NodeId, reason: str) -> None:
        """A node's stage process ended; nothing happens for a node that is lost itself."""
        if self._known(node).is_connected:
            self._record(StageLost(node, reason[:_MAX_REASON], self._clock()))

    def engine_lost(self) -> None:
        """Plan the same stages for another engine, as far as their nodes are there."""
        self._record(EngineLost(self._clock()))

    def drop_pipeline(self) -> None:
        """Plan as if for the first time: the engine that knew the pipeline never served."""
        self._record(PipelineDropped(self._clock()))

    def split_anew(self) -> bool:
        """Have those who are here share all layers, if they can, instead of waiting for others.

        Nothing that stages hold is of use then. False: they cannot, or nothing was planned before.
        """
        stages = remaining_stages(self._state, self._model)
        if not self._has_planned or isinstance(stages, Waiting):
            return False
        idle = sum(not node.computes for node in self._state.ready)
        self._remaining = len(stages) + idle
        self._record(PipelineDropped(self._clock()))
        return True

    def plan(self) -> Pipeline | Waiting:
        """The pipeline to run now: the present one, a new one, or a mended one of a later epoch.

        Raises:
            PlanError: the nodes wanted are there, but cannot make a pipeline. Those of an earlier
                one could, so that for them it waits.
        """
        state = self._state
        if state.pipeline is None:
            stages = self._first_stages()
        elif state.is_down:
            stages = mended_stages(state, self._model)
        else:
            return state.pipeline
        if isinstance(stages, Waiting):
            return stages
        pipeline = Pipeline(stages, state.last_epoch + 1)
        self._record(PipelinePlanned(pipeline, self._clock()))
        self._has_planned = True
        return pipeline

    def next_standby(
        self, warming: Mapping[NodeId, LayerRange], unable: Set[tuple[NodeId, LayerRange]]
    ) -> tuple[NodeRecord, Stage] | None:
        """A spare, and the stage whose layers it should load ahead; None: no more are needed."""
        return next_standby(self._state, self._model, warming, unable)

    def has_standby(self, node: NodeId) -> bool:
        """Whether another node could take a node's stage at once."""
        state = self._state
        if state.pipeline is None or state.is_down:
            return False
        layers = [stage.layers for stage in state.pipeline.stages if stage.node == node]
        return any(spare.loaded in layers for spare in state.ready if spare.loaded)

    def misplaced(self) -> list[NodeId]:
        """Standbys that must give up what they hold before they can take a lost stage."""
        return misplaced(self._state, self._model)

    def _first_stages(self) -> tuple[Stage, ...] | Waiting:
        if self._remaining is not None:
            return remaining_stages(self._state, self._model, self._remaining)
        try:
            return first_stages(self._state, self._model, self._nodes_wanted)
        except PlanError as error:
            if self._has_planned:
                return Waiting(str(error))
            raise

    def _record(self, event: Event) -> None:
        state = apply(self._state, event)
        self._store.save(state)  # first, so that nobody acts on what a restart would forget
        self._state = state

    @property
    def _model(self) -> ModelFacts:
        assert self._state.model is not None, "start() comes first"
        return self._state.model

    def _known(self, node: NodeId) -> NodeRecord:
        try:
            return self._state.node(node)
        except ValueError as error:
            raise AdmissionError(f"{error}: it must join again with a token") from error

    def _pinned(self, node: NodeId, name: str, text: str, *, stands_by: bool) -> LayerRange:
        try:
            layers = LayerRange.parse(text, self._model.num_layers)
        except PlanError as error:
            raise PlanError(f"{name}: {error}") from error
        others = [
            (other.name, other.layers)
            for other in self._state.connected
            if other.layers and other.id != node and not other.stands_by
        ]
        if stands_by:  # for whoever has them
            return layers
        try:
            find_gaps([*others, (name, layers)], self._model.num_layers)
        except PlanError as error:
            raise AdmissionError(str(error)) from error  # the other may leave
        return layers

    def _free_name(self, wanted: str, node: NodeId) -> str:
        """`wanted`, or `wanted-2` and so on while another node goes by that name."""
        check_node_name(wanted)
        taken = {
            other.name
            for other in self._state.nodes
            if other.id != node and other.status is not NodeStatus.LOST
        }
        names = (wanted if n == 1 else f"{wanted}-{n}" for n in range(1, len(taken) + 2))
        return next(name for name in names if name not in taken)


def _check_resources(node: NodeRecord, resources: Resources) -> None:
    speeds = (resources.bytes_per_s, resources.flop_per_s)
    possible = resources.free_bytes >= 0 and all(0 <= speed < math.inf for speed in speeds)
    if not possible or (node.computes and resources.bytes_per_s == 0):
        raise AdmissionError(f"{node.name} reports impossible measurements: {resources}")
