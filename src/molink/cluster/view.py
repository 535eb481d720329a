"""What a cluster looks like from outside: `/cluster`, `molink status`, the metrics."""

from collections.abc import Mapping

import msgspec

from molink.cluster.state import ClusterState, NodeRecord
from molink.core.ids import NodeId
from molink.wire.to_agent import Downloading, StageCounters
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


class StageView(msgspec.Struct, frozen=True):
    index: int
    node: str
    layers: str  # START:END
    tensor_parallel_size: int
    counters: StageCounters


class LinkView(msgspec.Struct, frozen=True):
    """One direction of a link, as counted by its sender."""

    source: str
    destination: str
    bytes_sent: int
    frames_queued: int
    rtt_s: float | None


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


def make_view(
    state: ClusterState,
    *,
    http: str,
    serving: bool,
    steps_in_flight: int,
    reports: Mapping[NodeId, NodeReport],
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
    )


def _link_view(state: ClusterState, node: NodeId, link: LinkCounters) -> LinkView:
    return LinkView(
        source=state.node(node).name,
        destination=state.node(NodeId(link.peer)).name,
        bytes_sent=link.bytes_sent,
        frames_queued=link.frames_queued,
        rtt_s=link.rtt_s,
    )


_decoder = msgspec.json.Decoder(ClusterView)


def decode_view(data: bytes) -> ClusterView:
    """Raises msgspec.DecodeError for anything else."""
    return _decoder.decode(data)
