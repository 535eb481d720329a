"""Finds what is lost though nothing has broken: silent machines, stages that hang, lost steps."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Protocol

from molink.cluster.coordinator import Coordinator
from molink.cluster.watch import Patience, Progress, hung
from molink.core.ids import NodeId
from molink.node.deployment import Deployment
from molink.node.reports import Reports
from molink.node.switch import Switch

WATCH_S = 0.25


class Repairs(Protocol):
    """What a watchman can have done."""

    say: Callable[[str], None]

    def node_lost(self, node: NodeId, reason: str) -> None: ...

    def lose_steps(self, node: NodeId, reason: str) -> None: ...

    def empty_stages(self, nodes: list[NodeId], reason: str) -> Awaitable[None]: ...


class Watchman:
    """Looks after the machines and stages of one head."""

    def __init__(
        self,
        switch: Switch,
        coordinator: Coordinator,
        deployment: Deployment,
        reports: Reports,
        patience: Patience,
        repairs: Repairs,
    ) -> None:
        self._switch = switch
        self._coordinator = coordinator
        self._deployment = deployment
        self._reports = reports
        self._patience = patience
        self._repairs = repairs
        self._progress = Progress()

    async def watch(self) -> None:
        """Look for ever."""
        clock = asyncio.get_running_loop().time
        while True:
            began = clock()
            await asyncio.sleep(WATCH_S)
            if clock() - began > 4 * WATCH_S:
                continue  # this machine itself stood still
            self._watch_machines()
            if self._deployment.serving:
                await self._watch_stages(clock())

    def _watch_machines(self) -> None:
        """Do not wait for a machine to come back whose stage somebody else has loaded."""
        for node, link in list(self._switch.links.items()):
            silence_s = link.silence_s
            if silence_s > self._patience.lost_s and self._coordinator.has_standby(node):
                self._repairs.node_lost(node, f"nothing was heard of it for {silence_s:.1f} s")
                link.close()

    async def _watch_stages(self, now: float) -> None:
        """Have stages that hang begin anew, and a pipeline in which nobody has anything to do."""
        reports, nodes = self._reports.all(), self._deployment.nodes
        for node in nodes:
            reason = hung(reports[node], self._patience) if node in reports else None
            if reason is not None:
                name = self._coordinator.state.node(node).name
                self._repairs.say(f"the stage of {name} hangs: {reason}")
                await self._repairs.empty_stages([node], reason)
                self._reports.forget(node)
        in_flight = self._deployment.steps_in_flight
        if self._progress.is_stuck(reports, nodes, in_flight, now, self._patience):
            self._repairs.say("steps are under way, and nobody has any: the pipeline begins anew")
            self._repairs.lose_steps(nodes[-1], "its step was lost")
