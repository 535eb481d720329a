"""Shares of time from counters that only grow."""

import pytest
from benchmarks.wan_results import Occupancy, Reading, occupancies

WAY = "head → far-1"


def reading(at_s: float, *stages: tuple[float, float], sent: int = 0, m: int | None = 2) -> Reading:
    return Reading(at_s, stages, {WAY: sent}, m)


def test_a_stage_is_busy_for_its_share_of_what_it_counted() -> None:
    found = occupancies([reading(0, (1, 1)), reading(1, (1.75, 1.25))], {WAY: 1e6})
    assert found == [Occupancy(1, (0.75,), {WAY: 0}, 2)]


def test_a_report_that_came_late_changes_no_share() -> None:
    """Two seconds of work seen within half a second are not more than all of the time."""
    found = occupancies([reading(0, (0, 0)), reading(0.5, (1.5, 0.5))], {WAY: 1e6})
    assert found[0].stages == (0.75,)


def test_between_two_reports_the_last_share_holds() -> None:
    readings = [reading(0, (0, 0)), reading(0.5, (0, 0)), reading(1, (1, 3)), reading(1.5, (1, 3))]
    assert [seen.stages for seen in occupancies(readings, {WAY: 1e6})] == [
        (None,),
        (0.25,),
        (0.25,),
    ]


def test_a_server_that_did_not_answer_once_has_no_share_there() -> None:
    readings = [reading(0, (0, 0)), reading(1, m=None), reading(2, (3, 1)), reading(3, (4, 2))]
    found = occupancies(readings, {WAY: 1e6})
    assert [seen.stages for seen in found] == [(), (None,), (0.5,)]


def test_a_link_is_full_when_its_rate_has_left() -> None:
    found = occupancies([reading(2, sent=1_000), reading(4, sent=251_000)], {WAY: 2e6})
    assert found[0].links == {WAY: pytest.approx(0.5)}
    assert found[0].at_s == 2
