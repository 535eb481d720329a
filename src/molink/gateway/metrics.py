"""Prometheus metrics of the cluster, beside vLLM's own."""

from collections.abc import Callable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from molink.cluster.view import ClusterView


class ClusterCollector(Collector):
    """Turns the latest view into metrics when Prometheus asks."""

    def __init__(self, view: Callable[[], ClusterView | None]) -> None:
        self._view = view

    def collect(self) -> Iterator[Metric]:
        view = self._view()
        if view is None:
            return
        yield GaugeMetricFamily(
            "molink_serving", "1 while the pipeline takes requests", value=float(view.serving)
        )
        yield GaugeMetricFamily(
            "molink_epoch", "Number of the pipeline's membership", value=float(view.epoch)
        )
        yield GaugeMetricFamily(
            "molink_steps_in_flight", "Steps without a result", value=float(view.steps_in_flight)
        )
        yield from _stage_metrics(view)
        yield from _link_metrics(view)


def _stage_metrics(view: ClusterView) -> Iterator[Metric]:
    labels = ["stage", "node", "layers"]
    steps = CounterMetricFamily("molink_stage_steps", "Steps a stage has run", labels=labels)
    compute = CounterMetricFamily(
        "molink_stage_compute_seconds", "Seconds a stage has computed", labels=labels
    )
    waiting = CounterMetricFamily(
        "molink_stage_waiting_seconds", "Seconds a stage has waited for input", labels=labels
    )
    for stage in view.stages:
        values = [str(stage.index), stage.node, stage.layers]
        steps.add_metric(values, stage.counters.steps)
        compute.add_metric(values, stage.counters.compute_s)
        waiting.add_metric(values, stage.counters.waiting_s)
    yield from (steps, compute, waiting)


def _link_metrics(view: ClusterView) -> Iterator[Metric]:
    labels = ["source", "destination"]
    sent = CounterMetricFamily("molink_link_bytes", "Bytes sent over a link", labels=labels)
    queued = GaugeMetricFamily(
        "molink_link_frames_queued", "Frames that wait for a link", labels=labels
    )
    rtt = GaugeMetricFamily(
        "molink_link_round_trip_seconds", "Latest round trip between two agents", labels=labels
    )
    for link in view.links:
        values = [link.source, link.destination]
        sent.add_metric(values, link.bytes_sent)
        queued.add_metric(values, link.frames_queued)
        if link.rtt_s is not None:
            rtt.add_metric(values, link.rtt_s)
    yield from (sent, queued, rtt)
