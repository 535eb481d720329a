"""What the links of a pipeline can do, from the nodes' reports."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

from molink.core.ids import HEAD, NodeId
from molink.wire.to_engine import HopFigures
from molink.wire.to_head import LinkCounters, NodeReport

_WITHIN = HopFigures(bytes_per_s=None, rtt_s=0.0)
_UNKNOWN = HopFigures(bytes_per_s=None, rtt_s=None)

Reports = Mapping[NodeId, NodeReport]


def measured_hops(nodes: Sequence[NodeId], reports: Reports) -> list[HopFigures]:
    """The hops between stages on these nodes in turn, and from the last one back to the head."""
    return [_hop(source, target, reports) for source, target in pairwise([*nodes, HEAD])]


def link_between(source: NodeId, target: NodeId, reports: Reports) -> LinkCounters | None:
    """A direct link, as its sender counts it."""
    links = reports[source].links if source in reports else []
    return next((link for link in links if link.peer == target), None)


def _hop(source: NodeId, target: NodeId, reports: Reports) -> HopFigures:
    if source == target:
        return _WITHIN
    direct = link_between(source, target, reports)
    if direct is not None:
        return HopFigures(direct.bytes_per_s, direct.rtt_s)
    if HEAD in (source, target):
        return _UNKNOWN
    return _relayed(_hop(source, HEAD, reports), _hop(HEAD, target, reports))


def _relayed(first: HopFigures, second: HopFigures) -> HopFigures:
    rates, times = (first.bytes_per_s, second.bytes_per_s), (first.rtt_s, second.rtt_s)
    return HopFigures(
        None if None in rates else min(rate for rate in rates if rate is not None),
        None if None in times else sum(time for time in times if time is not None),
    )
