"""What `/cluster` shows of the nodes' reports."""

from collections.abc import Callable
from typing import Any

import msgspec

from molink.cluster.view import decode_view, make_view
from molink.core.ids import HEAD, NodeId
from molink.wire.to_agent import Downloading, StageCounters
from molink.wire.to_head import LinkCounters, NodeReport


def test_a_link_to_a_node_that_nobody_knows_is_left_out(make_cluster: Callable[..., Any]) -> None:
    cluster = make_cluster(2)
    beta = cluster.ready("beta")
    links = [LinkCounters(peer, 10, 20, 0, 0.5) for peer in (HEAD, NodeId(99))]
    view = make_view(
        cluster.state,
        http="http://127.0.0.1:8080",
        serving=False,
        steps_in_flight=0,
        reports={beta: NodeReport(StageCounters(), links)},
    )
    assert [(link.source, link.destination) for link in view.links] == [("beta", "alpha")]
    assert decode_view(msgspec.json.encode(view)) == view


def test_a_download_is_shown_with_its_node(make_cluster: Callable[..., Any]) -> None:
    cluster = make_cluster(2)
    beta = cluster.ready("beta")
    download = Downloading("model.safetensors", 3, 8)
    view = make_view(
        cluster.state,
        http="http://127.0.0.1:8080",
        serving=False,
        steps_in_flight=0,
        reports={beta: NodeReport(StageCounters(), [], download)},
    )
    assert {node.name: node.download for node in view.nodes} == {"alpha": None, "beta": download}
    assert decode_view(msgspec.json.encode(view)) == view
