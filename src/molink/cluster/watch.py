"""When a stage counts as lost though nothing has broken: from what was heard of it, and when."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from molink.core.ids import NodeId
from molink.wire.to_head import NodeReport

MANY = 10.0  # times what a step was expected to take
UNKNOWN_S = 120.0  # that a step may take whose cost is not known: kernels may be compiled in it


@dataclass(frozen=True, slots=True)
class Patience:
    """How long others wait, in seconds."""

    lost_s: float = 4.0  # for a machine that is silent, if a standby could take its stage
    hung_s: float = 20.0  # for a stage that does nothing


def hung(report: NodeReport, patience: Patience) -> str | None:
    """Why a stage that should compute counts as lost; None: it may be well."""
    stage, hung_s = report.stage, patience.hung_s
    if report.stage_age_s > hung_s:
        return f"its process has said nothing for {report.stage_age_s:.0f} s"
    expected_s = UNKNOWN_S / MANY if stage.busy_cost_s is None else stage.busy_cost_s
    if stage.busy_s > max(hung_s, MANY * expected_s):
        return f"it has computed one step for {stage.busy_s:.0f} s"
    return None


class Progress:
    """Finds a pipeline in which nobody does anything although steps are under way."""

    def __init__(self) -> None:
        self._steps = 0
        self._since: float | None = None  # when it was first seen so, in seconds

    def is_stuck(
        self,
        reports: Mapping[NodeId, NodeReport],
        nodes: Iterable[NodeId],
        steps_in_flight: int,
        now: float,
        patience: Patience,
    ) -> bool:
        """Whether it has been so for long: no stage computes or has, and no link is waited for.

        Args:
            reports: the latest of every node.
            nodes: of the pipeline's stages.
        """
        here = [reports[node] for node in nodes if node in reports]
        steps = sum(report.stage.steps for report in here)
        is_moving = steps != self._steps or any(report.stage.busy_s for report in here)
        is_sending = any(sum(link.bytes_queued[1:3]) for r in reports.values() for link in r.links)
        self._steps = steps
        if not steps_in_flight or is_moving or is_sending:
            self._since = None
        elif self._since is None:
            self._since = now
        return self._since is not None and now - self._since > patience.hung_s
