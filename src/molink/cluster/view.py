"""What a cluster looks like from outside: `/cluster`, `molink status`, the metrics."""

from collections.abc import Mapping, Set
from itertools import combinations
from typing import Literal

import msgspec

from molink.cluster.path import Reports, link_between
from molink.cluster.state import ClusterState, NodeRecord
from molink.core.cluster import Versions
from molink.core.ids import NodeId
from molink.wire.frames import Priority
from molink.wire.to_agent import Downloading, PaceDecision, StageCounters
from molink.wire.to_head import LinkCounters, NodeReport


class NodeView(msgspec.Struct, frozen=True):
    id: int
    name: str
    status: str
    role: str | None
    device: str | None
    free_bytes: int | None  # when it was measured, before it loaded anything
    address: str | None
    trouble: str
    download: Downloading | None = None
    loaded: str | None = None  # START:END of the stage that a standby could take over at once


class StageView(msgspec.Struct, frozen=True):
    index: int
    node: str
    layers: str  # START:END
    tensor_parallel_size: int
    counters: StageCounters


class LinkView(msgspec.Struct, frozen=True, kw_only=True):
    """One direction of a link, as counted by its sender. None: not known."""

    source: str
    destination: str
    bytes_sent: int
    frames_queued: int
    bytes_queued: dict[str, int]  # by class of frames
    bytes_in_flight: int
    window: int  # bytes that may be in flight
    bytes_per_s: float | None
    rtt_s: float | None
    jitter_s: float
    loss: float | None  # share of TCP's segments


class PathView(msgspec.Struct, frozen=True):
    """How two connected nodes reach each other."""

    nodes: tuple[str, str]
    way: Literal["direct", "relayed", "unknown"]  # unknown: they have not tried


class RelayView(msgspec.Struct, frozen=True):
    """What the head has passed on between two other nodes, one way."""

    source: str
    destination: str
    bytes_relayed: int


class ClusterView(msgspec.Struct, frozen=True):
    cluster_id: str
    model: str
    http: str
    serving: bool
    epoch: int
    steps_in_flight: int
    nodes: list[NodeView]
    stages: list[StageView]
    links: list[LinkView]
    paths: list[PathView] = []
    relays: list[RelayView] = []
    pace: PaceDecision | None = None
    at_once: int | None = None  # requests that the engine computes at once
    has_served: bool = False  # since the head was started
    at: float = 0.0  # when it looked so, in unix seconds by the head's clock
    molink: str = ""  # the head's versions
    vllm: str = ""


def make_view(
    state: ClusterState,
    *,
    http: str,
    serving: bool,
    steps_in_flight: int,
    pace: PaceDecision | None,
    at_once: int | None,
    has_served: bool,
    at: float,
    versions: Versions,
    reports: Mapping[NodeId, NodeReport],
    relayed: Set[frozenset[NodeId]],
    relayed_bytes: Mapping[tuple[NodeId, NodeId], int],
) -> ClusterView:
    """Put the coordinator's state and the nodes' latest reports together."""
    stages = state.pipeline.stages if state.pipeline else ()
    return ClusterView(
        cluster_id=state.cluster_id,
        model=state.model.name if state.model else "",
        http=http,
        serving=serving,
        epoch=state.last_epoch,
        steps_in_flight=steps_in_flight,
        pace=pace,
        at_once=at_once,
        has_served=has_served,
        at=at,
        molink=versions.molink,
        vllm=versions.vllm,
        nodes=[_node_view(state, node, reports.get(node.id)) for node in state.nodes],
        stages=[
            StageView(
                index,
                state.node(stage.node).name,
                str(stage.layers),
                stage.tensor_parallel_size,
                reports[stage.node].stage if stage.node in reports else StageCounters(),
            )
            for index, stage in enumerate(stages)
        ],
        links=[
            _link_view(state, node, link)
            for node in reports
            for link in reports[node].links
            if state.knows(NodeId(link.peer))  # a node may still be linked to one of another time
        ],
        paths=[
            PathView((one.name, other.name), _way(one.id, other.id, reports, relayed))
            for one, other in combinations([n for n in state.nodes if n.is_connected], 2)
        ],
        relays=[
            RelayView(state.node(source).name, state.node(target).name, size)
            for (source, target), size in relayed_bytes.items()
            if state.knows(source) and state.knows(target)
        ],
    )


def _node_view(state: ClusterState, node: NodeRecord, report: NodeReport | None) -> NodeView:
    role = state.role(node.id)
    resources = node.resources
    return NodeView(
        id=node.id,
        name=node.name,
        status=node.status,
        role=None if role is None else str(role),
        device=resources.device if resources else None,
        free_bytes=resources.free_bytes if resources else None,
        address=node.address,
        trouble=node.trouble,
        download=report.download if report else None,
        loaded=str(node.loaded) if node.loaded else None,
    )


def _link_view(state: ClusterState, node: NodeId, link: LinkCounters) -> LinkView:
    return LinkView(
        source=state.node(node).name,
        destination=state.node(NodeId(link.peer)).name,
        bytes_sent=link.bytes_sent,
        frames_queued=link.frames_queued,
        bytes_queued={
            lane.name.lower(): size for lane, size in zip(Priority, link.bytes_queued, strict=False)
        },
        bytes_in_flight=link.bytes_in_flight,
        window=link.window,
        bytes_per_s=link.bytes_per_s,
        rtt_s=link.rtt_s,
        jitter_s=link.jitter_s,
        loss=link.loss,
    )


def _way(
    one: NodeId, other: NodeId, reports: Reports, relayed: Set[frozenset[NodeId]]
) -> Literal["direct", "relayed", "unknown"]:
    if link_between(one, other, reports) or link_between(other, one, reports):
        return "direct"
    return "relayed" if frozenset((one, other)) in relayed else "unknown"


_decoder = msgspec.json.Decoder(ClusterView)


def decode_view(data: bytes) -> ClusterView:
    """Raises msgspec.DecodeError for anything else."""
    return _decoder.decode(data)
