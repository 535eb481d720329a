"""Prometheus metrics of the cluster, beside vLLM's own."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from molink.cluster.view import ClusterView, LinkView
from molink.gateway.connection import Answer
from molink.gateway.http import Refusal


class GatewayMetrics:
    """What the gateway counts itself."""

    def __init__(
        self,
        registry: CollectorRegistry,
        waiting: Callable[[], int],
        engines_lost: Callable[[], int],
    ) -> None:
        self._in_flight = Gauge(
            "molink_gateway_requests_in_flight", "Requests without an answer", registry=registry
        )
        Gauge(
            "molink_gateway_requests_waiting",
            "Requests that wait for a place at the engine",
            registry=registry,
        ).set_function(waiting)
        Gauge(
            "molink_gateway_engines_lost",
            "Engines that have ended since the gateway was started",
            registry=registry,
        ).set_function(engines_lost)
        self._answers = Counter(
            "molink_gateway_answers", "Answers by status", ["status"], registry=registry
        )
        self.resumed = Counter(
            "molink_gateway_streams_resumed",
            "Streams that another engine has gone on with",
            registry=registry,
        )

    @contextmanager
    def counted(self, answer: Answer) -> Iterator[None]:
        """Count a request while it is under way, and its answer."""
        with self._in_flight.track_inprogress():
            try:
                yield
            except Refusal as refusal:
                self._answers.labels(refusal.status).inc()
                raise
        self._answers.labels(answer.status).inc()


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
        yield from _pace_metrics(view)
        yield from _stage_metrics(view)
        yield from _link_metrics(view)
        yield from _relay_metrics(view)


def _pace_metrics(view: ClusterView) -> Iterator[Metric]:
    if (pace := view.pace) is None:
        return
    gauges = {
        "micro_batches": ("Decode steps that may be in flight", pace.micro_batches),
        "prefill_step_tokens": ("Prompt tokens of one step", pace.prefill_tokens),
        "prefill_steps": ("Steps with prompts that may be in flight", pace.prefill_steps),
        "steps_split": ("1 while a step holds decodes or prompts, not both", pace.is_split),
        "round_seconds": ("What a round of decodes should take", pace.round_s),
        "draft_chance": ("Chance that a drafted token is accepted", pace.draft_chance),
        "draft_tokens": ("Drafted tokens that a request of that chance takes along", pace.drafts),
    }
    for name, (text, value) in gauges.items():
        if value is not None:
            yield GaugeMetricFamily(f"molink_{name}", text, value=float(value))


def _stage_metrics(view: ClusterView) -> Iterator[Metric]:
    labels = ["stage", "node", "layers"]
    steps = CounterMetricFamily("molink_stage_steps", "Steps a stage has run", labels=labels)
    compute = CounterMetricFamily(
        "molink_stage_compute_seconds", "Seconds a stage has computed", labels=labels
    )
    waiting = CounterMetricFamily(
        "molink_stage_waiting_seconds", "Seconds a stage has waited for input", labels=labels
    )
    cost = GaugeMetricFamily(
        "molink_stage_step_seconds",
        "Measured cost of a step: fixed, and for each token",
        labels=[*labels, "kind", "part"],
    )
    for stage in view.stages:
        values = [str(stage.index), stage.node, stage.layers]
        for kind in ("decode", "prefill"):
            if (found := getattr(stage.counters, kind)) is not None:
                cost.add_metric([*values, kind, "fixed"], found.fixed_s)
                cost.add_metric([*values, kind, "token"], found.per_token_s)
        steps.add_metric(values, stage.counters.steps)
        compute.add_metric(values, stage.counters.compute_s)
        waiting.add_metric(values, stage.counters.waiting_s)
    yield from (steps, compute, waiting, cost)


def _link_metrics(view: ClusterView) -> Iterator[Metric]:
    labels = ["source", "destination"]
    sent = CounterMetricFamily("molink_link_bytes", "Bytes sent over a link", labels=labels)
    queued = GaugeMetricFamily(
        "molink_link_frames_queued", "Frames that wait for a link", labels=labels
    )
    waiting = GaugeMetricFamily(
        "molink_link_bytes_queued", "Bytes that wait for a link", labels=[*labels, "class"]
    )
    for link in view.links:
        values = [link.source, link.destination]
        sent.add_metric(values, link.bytes_sent)
        queued.add_metric(values, link.frames_queued)
        for lane, size in link.bytes_queued.items():
            waiting.add_metric([*values, lane], size)
    yield from (sent, queued, waiting)
    for name, (help_text, value) in _LINK_GAUGES.items():
        gauge = GaugeMetricFamily(f"molink_link_{name}", help_text, labels=labels)
        for link in view.links:
            if (figure := value(link)) is not None:
                gauge.add_metric([link.source, link.destination], figure)
        yield gauge


def _relay_metrics(view: ClusterView) -> Iterator[Metric]:
    relayed = CounterMetricFamily(
        "molink_relay_bytes",
        "Bytes the head has passed on between two other nodes",
        labels=["source", "destination"],
    )
    for relay in view.relays:
        relayed.add_metric([relay.source, relay.destination], relay.bytes_relayed)
    yield relayed


_LINK_GAUGES: dict[str, tuple[str, Callable[[LinkView], float | None]]] = {
    "round_trip_seconds": ("Shortest round trip of late", lambda link: link.rtt_s),
    "jitter_seconds": ("Mean change of the time under way", lambda link: link.jitter_s),
    "bytes_per_second": ("What a link delivers when it is full", lambda link: link.bytes_per_s),
    "bytes_in_flight": ("Bytes sent and not acknowledged", lambda link: link.bytes_in_flight),
    "window_bytes": ("Most bytes that may be in flight", lambda link: link.window),
    "loss_ratio": ("Share of TCP's segments that were sent again", lambda link: link.loss),
}
