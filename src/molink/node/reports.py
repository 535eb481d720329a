"""What the nodes report, put together for everybody who wants to know."""

import time
from collections.abc import Callable

import msgspec

from molink.cluster.coordinator import Coordinator
from molink.cluster.path import measured_hops
from molink.cluster.view import make_view
from molink.core.ids import HEAD, NodeId
from molink.node.deployment import Deployment
from molink.node.switch import Switch
from molink.wire.to_agent import StageCounters
from molink.wire.to_engine import PathMeasured
from molink.wire.to_head import NodeReport


class Reports:
    """Owns the latest report of every other node.

    Args:
        own: makes the head's.
    """

    def __init__(
        self,
        coordinator: Coordinator,
        deployment: Deployment,
        switch: Switch,
        own: Callable[[], NodeReport],
        http: str,
    ) -> None:
        self._coordinator = coordinator
        self._deployment = deployment
        self._switch = switch
        self._own = own
        self._http = http
        self._latest: dict[NodeId, NodeReport] = {}

    def put(self, node: NodeId, report: NodeReport) -> bool:
        """Keep a report; whether it is the first to say that the node downloads."""
        before = self._latest.get(node)
        self._latest[node] = report
        return bool(report.download and not (before and before.download))

    def forget(self, node: NodeId) -> None:
        self._latest.pop(node, None)

    def view_json(self) -> bytes:
        """The cluster, as `/cluster` serves it."""
        view = make_view(
            self._coordinator.state,
            http=self._http,
            serving=self._deployment.serving,
            steps_in_flight=self._deployment.steps_in_flight,
            at_once=self._deployment.at_once,
            has_served=self._deployment.has_served,
            at=time.time(),
            versions=self._coordinator.versions,
            pace=self._deployment.pace,
            reports=self.all(),
            relayed=self._deployment.paths.relayed,
            relayed_bytes=self._switch.relayed,
        )
        return msgspec.json.encode(view)

    def path(self) -> PathMeasured | None:
        """Stages and links of the pipeline that the engine was told of; None without one."""
        assigned = self._deployment.assigned
        if assigned is None or self._deployment.is_down:
            return None
        nodes = [NodeId(stage.node) for stage in assigned.stages]
        reports = self.all()
        stages = [reports[n].stage if n in reports else StageCounters() for n in nodes]
        return PathMeasured(assigned.epoch, measured_hops(nodes, reports), stages)

    def all(self) -> dict[NodeId, NodeReport]:
        return self._latest | {HEAD: self._own()}
