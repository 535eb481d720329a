"""The hops of a pipeline, from what nodes report of their links."""

import pytest
from tests.links import make_link

from molink.cluster.path import measured_hops
from molink.core.ids import HEAD, NodeId
from molink.wire.to_agent import StageCounters
from molink.wire.to_engine import HopFigures
from molink.wire.to_head import LinkCounters, NodeReport

ONE, TWO = NodeId(1), NodeId(2)


def report(*links: LinkCounters) -> NodeReport:
    return NodeReport(StageCounters(), list(links))


HEAD_S = report(
    make_link(ONE, bytes_per_s=10.0, rtt_s=0.1), make_link(TWO, bytes_per_s=20.0, rtt_s=0.2)
)


def test_each_hop_is_as_its_sender_measured_it() -> None:
    reports = {
        HEAD: HEAD_S,
        ONE: report(make_link(HEAD), make_link(TWO, bytes_per_s=30.0, rtt_s=0.3)),
        TWO: report(make_link(HEAD, bytes_per_s=40.0, rtt_s=0.4), make_link(ONE)),
    }
    assert measured_hops([HEAD, ONE, TWO], reports) == [
        HopFigures(10.0, 0.1),
        HopFigures(30.0, 0.3),
        HopFigures(40.0, 0.4),
    ]


def test_within_a_node_there_is_no_link() -> None:
    assert measured_hops([HEAD], {HEAD: HEAD_S}) == [HopFigures(None, 0.0)]


@pytest.mark.parametrize(("rate", "smaller"), [(5.0, 5.0), (50.0, 20.0)])
def test_a_relayed_hop_has_the_smaller_rate_and_both_round_trips(
    rate: float, smaller: float
) -> None:
    reports = {HEAD: HEAD_S, ONE: report(make_link(HEAD, bytes_per_s=rate, rtt_s=0.5))}
    hops = measured_hops([HEAD, ONE, TWO], reports)
    assert hops == [HopFigures(10.0, 0.1), HopFigures(smaller, 0.7), HopFigures(None, None)]


def test_what_is_not_known_on_the_way_is_not_known_of_the_way() -> None:
    reports = {HEAD: HEAD_S, ONE: report(make_link(HEAD, rtt_s=0.5))}
    assert measured_hops([ONE, TWO], reports)[0] == HopFigures(None, 0.7)
    assert measured_hops([ONE, TWO], {HEAD: HEAD_S})[0] == HopFigures(None, None)
