"""What the coordinator knows, and how each event changes it."""

import hashlib
from dataclasses import dataclass, replace
from enum import StrEnum

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
from molink.core.cluster import Resources, Versions
from molink.core.ids import MAX_NODE_ID, NodeId
from molink.core.model import ModelFacts
from molink.core.plan import LayerRange, Pipeline, Stage


class NodeStatus(StrEnum):
    ENROLLED = "enrolled"  # has an identity, was never connected
    JOINED = "joined"  # connected, not measured yet
    READY = "ready"  # its resources are known
    LOST = "lost"  # not connected


class Role(StrEnum):
    STAGE = "stage"
    STANDBY = "standby"  # a spare that has loaded a stage's layers ahead
    SPARE = "spare"


@dataclass(frozen=True, slots=True)
class NodeRecord:
    id: NodeId
    name: str  # no two connected nodes have the same
    status: NodeStatus
    since: float  # unix seconds at which it took this status
    versions: Versions | None = None
    address: str | None = None  # where others may dial it; None: it only dials out
    layers: LayerRange | None = None  # pinned by its user
    computes: bool = True  # False: the head, with `--layers none`
    tensor_parallel_size: int = 1
    stands_by: bool = False  # its user wants it to take over stages that are lost, and no others
    is_revoked: bool = False  # it may never take part again
    drains: bool = False  # it shall compute nothing until it joins again
    token: str | None = None  # the id of the one with which it was let in
    bound_name: str | None = None  # the only one it may have
    resources: Resources | None = None  # known exactly while it is ready
    loaded: LayerRange | None = None  # ahead, while it is a spare
    trouble: str = ""  # why it, or its stage, was lost; empty again once it joins or is planned

    @property
    def is_connected(self) -> bool:
        return self.status in (NodeStatus.JOINED, NodeStatus.READY)


@dataclass(frozen=True, slots=True)
class TokenRecord:
    """What the head needs to let the holder of a join token in; the secret is not kept."""

    root_certificate: bytes  # PEM
    expires_at: float  # unix seconds
    node_name: str | None = None  # the only one with which it may be used
    uses_left: int | None = None  # None: no limit

    @property
    def id(self) -> str:
        """A name for it, which says nothing of its secret."""
        return hashlib.sha256(self.root_certificate).hexdigest()[:8]


@dataclass(frozen=True, slots=True)
class ClusterState:
    cluster_id: str
    model: ModelFacts | None = None  # None until the head has started once
    nodes: tuple[NodeRecord, ...] = ()  # by id; no record is ever removed, so no id is used twice
    tokens: tuple[TokenRecord, ...] = ()
    pipeline: Pipeline | None = None
    is_down: bool = False  # a stage was lost since the pipeline was planned
    last_epoch: int = 0  # outlives the pipeline, so that epochs grow over restarts too
    last_stages: tuple[Stage, ...] = ()  # likewise: nodes may hold these layers still

    @property
    def ready(self) -> tuple[NodeRecord, ...]:
        return tuple(node for node in self.nodes if node.status is NodeStatus.READY)

    @property
    def connected(self) -> tuple[NodeRecord, ...]:
        return tuple(node for node in self.nodes if node.is_connected)

    def role(self, node: NodeId) -> Role | None:
        """None while there is no pipeline."""
        if self.pipeline is None:
            return None
        if node in self.pipeline.nodes:
            return Role.STAGE
        return Role.STANDBY if self.node(node).loaded else Role.SPARE

    def knows(self, node: NodeId) -> bool:
        return 0 <= node < len(self.nodes)

    def node(self, node: NodeId) -> NodeRecord:
        """Raises ValueError for an id that was never given."""
        if not self.knows(node):
            raise ValueError(f"node {node} is not known to cluster {self.cluster_id}")
        return self.nodes[node]


def apply(state: ClusterState, event: Event) -> ClusterState:
    """The state after `event`; ValueError for an event that cannot follow on `state`."""
    match event:
        case HeadStarted():
            return _head_started(state, event)
        case TokenCreated(root_certificate, expires_at, at, node_name, uses):
            live = (token for token in state.tokens if token.expires_at > at)
            token = TokenRecord(root_certificate, expires_at, node_name, uses)
            return replace(state, tokens=(*live, token))
        case TokenUsed(root_certificate, _):
            return _token_used(state, root_certificate)
        case TokenRevoked(root_certificate, _):
            left = (t for t in state.tokens if t.root_certificate != root_certificate)
            return replace(state, tokens=tuple(left))
        case NodeRevoked(node, at):
            lost = _with_node(state, node, NodeStatus.LOST, at, resources=None, trouble="revoked")
            return _stage_down(_put(lost, replace(lost.node(node), is_revoked=True)), node)
        case NodeDrained(node, _):
            drained = _put(state, replace(state.node(node), drains=True, loaded=None))
            return _stage_down(drained, node)
        case NodeEnrolled(node, name, at, token_id, is_bound):
            if node != len(state.nodes) or node > MAX_NODE_ID:
                raise ValueError(f"node id {node} is not the next one")
            bound = name if is_bound else None
            record = NodeRecord(
                node, name, NodeStatus.ENROLLED, at, token=token_id, bound_name=bound
            )
            return replace(state, nodes=(*state.nodes, record))
        case NodeJoined():
            return _node_joined(state, event)
        case NodeMeasured(node, resources, at):
            if not state.node(node).is_connected:
                raise ValueError(f"node {node} was measured while it was not connected")
            return _with_node(state, node, NodeStatus.READY, at, resources=resources)
        case StandbyLoaded(node, layers, _):
            if state.node(node).status is not NodeStatus.READY or state.role(node) is Role.STAGE:
                raise ValueError(f"node {node} has loaded layers while it was no spare")
            return _put(state, replace(state.node(node), loaded=layers))
        case NodeLost(node, reason, at):
            lost = _with_node(state, node, NodeStatus.LOST, at, resources=None, trouble=reason)
            return _stage_down(lost, node)
        case StageLost(node, reason, at):
            # Connected still, but not ready before its next process has measured the device.
            joined = _with_node(state, node, NodeStatus.JOINED, at, resources=None, trouble=reason)
            return _stage_down(joined, node)
        case PipelinePlanned(pipeline, _):
            return _pipeline_planned(state, pipeline)
        case EngineLost():
            nodes = tuple(replace(node, loaded=None) for node in state.nodes)
            return replace(state, nodes=nodes, is_down=state.pipeline is not None)
        case PipelineDropped():
            return replace(state, pipeline=None, is_down=False, last_stages=())


def _token_used(state: ClusterState, root_certificate: bytes) -> ClusterState:
    tokens = []
    for token in state.tokens:
        if token.root_certificate == root_certificate and token.uses_left is not None:
            token = replace(token, uses_left=token.uses_left - 1)
        if token.uses_left != 0:
            tokens.append(token)
    return replace(state, tokens=tuple(tokens))


def _head_started(state: ClusterState, event: HeadStarted) -> ClusterState:
    nodes = tuple(
        replace(
            node,
            status=NodeStatus.LOST,
            since=event.at,
            resources=None,
            loaded=None,
            trouble="the head was started again",
        )
        for node in state.nodes
    )
    is_same = state.model is not None and state.model.config_hash == event.model.config_hash
    return replace(
        state,
        model=event.model,
        nodes=nodes,
        pipeline=None,
        is_down=False,
        last_stages=state.last_stages if is_same else (),
    )


def _node_joined(state: ClusterState, event: NodeJoined) -> ClusterState:
    before = state.node(event.node)
    record = NodeRecord(
        event.node,
        event.name,
        NodeStatus.JOINED,
        event.at,
        versions=event.versions,
        address=event.address,
        layers=event.layers,
        computes=event.computes,
        tensor_parallel_size=event.tensor_parallel_size,
        stands_by=event.stands_by,
        is_revoked=before.is_revoked,
        token=before.token,
        bound_name=before.bound_name,
    )
    # Whatever it computed before, this process of it has loaded nothing.
    return _stage_down(_put(state, record), event.node)


def _pipeline_planned(state: ClusterState, pipeline: Pipeline) -> ClusterState:
    _check_pipeline(state, pipeline)
    nodes = tuple(
        replace(node, trouble="", loaded=None) if node.id in pipeline.nodes else node
        for node in state.nodes
    )
    return replace(
        state,
        nodes=nodes,
        pipeline=pipeline,
        is_down=False,
        last_epoch=pipeline.epoch,
        last_stages=pipeline.stages,
    )


def _check_pipeline(state: ClusterState, pipeline: Pipeline) -> None:
    starts = [stage.layers.start for stage in pipeline.stages]
    ends = [stage.layers.end for stage in pipeline.stages]
    if state.model is None or [*starts, state.model.num_layers] != [0, *ends]:
        raise ValueError(f"{pipeline} does not cover each layer of the model once")
    if len(set(pipeline.nodes)) != len(pipeline.nodes):
        raise ValueError(f"{pipeline} has two stages on one node")
    if any(state.node(node).status is not NodeStatus.READY for node in pipeline.nodes):
        raise ValueError(f"{pipeline} has a stage on a node that is not ready")
    if pipeline.epoch <= state.last_epoch:
        raise ValueError(f"epoch {pipeline.epoch} does not follow on {state.last_epoch}")


def _with_node(
    state: ClusterState,
    node: NodeId,
    status: NodeStatus,
    at: float,
    *,
    resources: Resources | None,
    trouble: str = "",
) -> ClusterState:
    record = replace(
        state.node(node), status=status, since=at, resources=resources, trouble=trouble, loaded=None
    )
    return _put(state, record)


def _put(state: ClusterState, record: NodeRecord) -> ClusterState:
    nodes = (*state.nodes[: record.id], record, *state.nodes[record.id + 1 :])
    return replace(state, nodes=nodes)


def _stage_down(state: ClusterState, node: NodeId) -> ClusterState:
    return replace(state, is_down=state.is_down or state.role(node) is Role.STAGE)
