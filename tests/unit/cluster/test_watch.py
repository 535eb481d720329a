"""Stages that hang, and steps that nobody has."""

from collections.abc import Callable
from typing import Any

import pytest

from molink.cluster.watch import Patience, Progress, hung
from molink.core.ids import NodeId
from molink.wire.to_agent import StageCounters
from molink.wire.to_head import LinkCounters, NodeReport

PATIENCE = Patience(lost_s=4, hung_s=20)
ONE, TWO = NodeId(1), NodeId(2)


def report(age_s: float = 0.5, waits: int = 0, **counters: Any) -> NodeReport:
    link = LinkCounters(
        peer=0,
        bytes_sent=1,
        bytes_received=1,
        frames_queued=0,
        bytes_queued=[0, waits, 0, 0],
        bytes_in_flight=0,
        window=1,
        bytes_per_s=None,
        rtt_s=None,
        jitter_s=0.0,
        loss=None,
    )
    return NodeReport(StageCounters(**counters), [link], stage_age_s=age_s)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (report(), None),
        (report(age_s=19), None),
        (report(age_s=21), "said nothing for 21 s"),
        (report(busy_s=19, busy_cost_s=0.1), None),
        (report(busy_s=21, busy_cost_s=0.1), "one step for 21 s"),
        (report(busy_s=50, busy_cost_s=6.0), None),  # a long prompt on a slow machine
        (report(busy_s=61, busy_cost_s=6.0), "one step for 61 s"),
        (report(busy_s=100), None),  # its first steps
        (report(busy_s=121), "one step for 121 s"),
    ],
)
def test_a_stage_hangs_that_gives_no_sign_or_no_end(found: NodeReport, words: str | None) -> None:
    reason = hung(found, PATIENCE)
    assert reason == words if words is None else words in str(reason)


Ask = Callable[..., bool]


@pytest.fixture
def ask() -> Ask:
    progress = Progress()

    def ask(now: float, *reports: NodeReport, in_flight: int = 2) -> bool:
        found = dict(zip((ONE, TWO), reports, strict=False))
        return progress.is_stuck(found, (ONE, TWO), in_flight, now, PATIENCE)

    return ask


def test_steps_that_nobody_has_for_long_are_lost(ask: Ask) -> None:
    idle = report(steps=7)
    ask(0, idle, idle)
    assert [ask(now, idle, idle) for now in (1, 10, 20.5, 22)] == [False, False, False, True]


@pytest.mark.parametrize(
    "sign",
    [
        {"steps": 8},
        {"steps": 7, "busy_s": 0.1},
        {"steps": 7, "waits": 100},
    ],
)
def test_any_sign_of_work_begins_the_wait_anew(ask: Ask, sign: dict[str, Any]) -> None:
    idle = report(steps=7)
    ask(0, idle, idle)
    assert not ask(10, idle, idle)
    assert not ask(19, idle, report(**sign))
    after = report(steps=sign["steps"])
    ask(20, idle, after)
    assert [ask(now, idle, after) for now in (21, 30, 40, 42)] == [False, False, False, True]


def test_an_idle_pipeline_is_not_stuck(ask: Ask) -> None:
    idle = report(steps=7)
    assert not any(ask(now, idle, idle, in_flight=0) for now in range(0, 100, 5))
