"""What `/cluster` shows of the nodes' reports."""

from collections.abc import Callable
from typing import Any

import msgspec
from tests.links import make_link

from molink.cluster.view import ClusterView, RelayView, decode_view, make_view
from molink.core.cluster import Versions
from molink.core.ids import HEAD, NodeId
from molink.wire.to_agent import Downloading, StageCounters
from molink.wire.to_head import NodeReport


def view_of(cluster: Any, reports: dict[NodeId, NodeReport], **paths: Any) -> ClusterView:
    paths = {"relayed": set(), "relayed_bytes": {}} | paths
    return make_view(
        cluster.state,
        http="http://127.0.0.1:8080",
        serving=False,
        steps_in_flight=0,
        pace=None,
        at_once=None,
        has_served=True,
        at=1.0,
        versions=Versions(1, "0.1.0", "0.32.0"),
        reports=reports,
        **paths,
    )


def test_a_link_to_a_node_that_nobody_knows_is_left_out(make_cluster: Callable[..., Any]) -> None:
    cluster = make_cluster(2)
    beta = cluster.ready("beta")
    links = [make_link(peer) for peer in (HEAD, NodeId(99))]
    view = view_of(cluster, {beta: NodeReport(StageCounters(), links)})
    assert [(link.source, link.destination) for link in view.links] == [("beta", "alpha")]
    assert decode_view(msgspec.json.encode(view)) == view


def test_a_download_is_shown_with_its_node(make_cluster: Callable[..., Any]) -> None:
    cluster = make_cluster(2)
    beta = cluster.ready("beta")
    download = Downloading("model.safetensors", 3, 8)
    view = view_of(cluster, {beta: NodeReport(StageCounters(), [], download)})
    assert {node.name: node.download for node in view.nodes} == {"alpha": None, "beta": download}
    assert decode_view(msgspec.json.encode(view)) == view


def test_how_every_two_nodes_reach_each_other(make_cluster: Callable[..., Any]) -> None:
    cluster = make_cluster(3)
    beta, gamma, delta = (cluster.ready(name) for name in ("beta", "gamma", "delta"))
    reports = {
        HEAD: NodeReport(StageCounters(), [make_link(node) for node in (beta, gamma, delta)]),
        gamma: NodeReport(StageCounters(), [make_link(delta)]),
    }
    view = view_of(
        cluster,
        reports,
        relayed={frozenset((beta, gamma)), frozenset((gamma, delta))},
        relayed_bytes={(beta, gamma): 7, (beta, NodeId(99)): 8},
    )
    assert view.relays == [RelayView("beta", "gamma", 7)]
    assert {path.nodes: path.way for path in view.paths} == {
        ("alpha", "beta"): "direct",
        ("alpha", "gamma"): "direct",
        ("alpha", "delta"): "direct",
        ("beta", "gamma"): "relayed",
        ("beta", "delta"): "unknown",
        ("gamma", "delta"): "direct",
    }
    assert decode_view(msgspec.json.encode(view)) == view
