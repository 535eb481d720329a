"""The cluster's metrics as Prometheus reads them."""

from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from molink.cluster.view import ClusterView, LinkView, RelayView, StageView
from molink.gateway.metrics import ClusterCollector
from molink.wire.to_agent import StageCounters

MEASURED = {"rtt_s": 0.002, "jitter_s": 0.001, "bytes_per_s": 1.25e6, "loss": 0.01}
QUEUED = {"control": 0, "decode": 0, "prefill": 700, "bulk": 0}


def make_link_view(source: str, destination: str, **changes: Any) -> LinkView:
    nothing: dict[str, Any] = {
        "bytes_sent": 0,
        "frames_queued": 0,
        "bytes_queued": QUEUED,
        "bytes_in_flight": 300,
        "window": 400,
        "bytes_per_s": None,
        "rtt_s": None,
        "jitter_s": 0.0,
        "loss": None,
    }
    return LinkView(source=source, destination=destination, **nothing | changes)


def view(**changes: object) -> ClusterView:
    values: dict[str, object] = {
        "cluster_id": "mini-1",
        "model": "mini",
        "http": "http://127.0.0.1:8080",
        "serving": True,
        "epoch": 3,
        "steps_in_flight": 2,
        "nodes": [],
        "stages": [
            StageView(0, "alpha", "0:4", 1, StageCounters(10, 1.5, 0.25)),
            StageView(1, 'b"e\\ta', "4:8", 1, StageCounters(9, 2.5, 0.5)),
        ],
        "links": [
            make_link_view("alpha", "beta", bytes_sent=1000, frames_queued=3, **MEASURED),
            make_link_view("beta", "alpha", bytes_sent=2000),
        ],
    }
    return ClusterView(**(values | changes))  # type: ignore[arg-type]


class Scrape:
    """The collector's output, read back by Prometheus's own parser."""

    def __init__(self, current: ClusterView | None) -> None:
        registry = CollectorRegistry()
        registry.register(ClusterCollector(lambda: current))
        families = text_string_to_metric_families(generate_latest(registry).decode())
        self.samples = [sample for family in families for sample in family.samples]

    def values(self, name: str, **labels: str) -> list[float]:
        return [s.value for s in self.samples if s.name == name and s.labels == labels]


def test_nothing_is_told_before_the_agent_has_spoken() -> None:
    assert Scrape(None).samples == []


@pytest.mark.parametrize(("serving", "value"), [(True, 1.0), (False, 0.0)])
def test_the_cluster_as_a_whole(serving: bool, value: float) -> None:
    scrape = Scrape(view(serving=serving))
    assert scrape.values("molink_serving") == [value]
    assert scrape.values("molink_epoch") == [3]
    assert scrape.values("molink_steps_in_flight") == [2]


def test_every_stage_has_its_counters_whatever_its_node_is_called() -> None:
    scrape = Scrape(view())
    alpha = {"stage": "0", "node": "alpha", "layers": "0:4"}
    beta = {"stage": "1", "node": 'b"e\\ta', "layers": "4:8"}
    assert scrape.values("molink_stage_steps_total", **alpha) == [10]
    assert scrape.values("molink_stage_compute_seconds_total", **alpha) == [1.5]
    assert scrape.values("molink_stage_waiting_seconds_total", **beta) == [0.5]


def test_what_the_head_relays_is_counted() -> None:
    scrape = Scrape(view(relays=[RelayView("beta", "gamma", 700)]))
    labels = {"source": "beta", "destination": "gamma"}
    assert scrape.values("molink_relay_bytes_total", **labels) == [700]


def test_every_link_has_its_counters_and_its_figures_once_they_are_known() -> None:
    scrape = Scrape(view())
    there = {"source": "alpha", "destination": "beta"}
    back = {"source": "beta", "destination": "alpha"}
    assert scrape.values("molink_link_bytes_total", **there) == [1000]
    assert scrape.values("molink_link_bytes_total", **back) == [2000]
    assert scrape.values("molink_link_frames_queued", **there) == [3]
    assert scrape.values("molink_link_round_trip_seconds", **there) == [0.002]
    assert scrape.values("molink_link_jitter_seconds", **there) == [0.001]
    assert scrape.values("molink_link_bytes_per_second", **there) == [1.25e6]
    assert scrape.values("molink_link_loss_ratio", **there) == [0.01]
    assert scrape.values("molink_link_bytes_in_flight", **there) == [300]
    assert scrape.values("molink_link_window_bytes", **there) == [400]
    prefill = there | {"class": "prefill"}
    assert scrape.values("molink_link_bytes_queued", **prefill) == [700]
    for name in ("round_trip_seconds", "bytes_per_second", "loss_ratio"):
        assert scrape.values(f"molink_link_{name}", **back) == []
