"""What links, stages and cores allow, and runs as JSON."""

import json
from dataclasses import replace

import pytest
from benchmarks.wan_results import Occupancy, Run

UP, DOWN = "head → far-1", "far-1 → head"


def run(**changes: object) -> Run:
    made = Run(
        seed=1,
        num_tokens=100,
        seconds=10.0,
        ttft_p50_s=1.0,
        ttft_p99_s=2.0,
        tpot_p50_s=0.1,
        tpot_p99_s=0.2,
        longest_gap_s=0.5,
        answers=["a", "b"],
        link_bytes={UP: 1_000_000, DOWN: 100_000},
        link_rates={UP: 1e6, DOWN: 1e5},
        compute_s=[4.0, 5.0],
        cpu_s={"stage 0": 4.0},
    )
    return replace(made, **changes)


def test_the_busiest_direction_bounds() -> None:
    assert run().link_bound == pytest.approx(100 / 8)
    assert run(link_rates={UP: 1e6, DOWN: 5e4}).link_bound == pytest.approx(100 / 16)


def test_without_links_nothing_of_them_bounds() -> None:
    assert run(link_bytes={}, link_rates={}).link_bound is None


def test_the_slowest_stage_bounds() -> None:
    assert run().stage_bound == pytest.approx(100 / 5)


def test_a_server_that_does_not_tell_its_compute_has_no_such_bound() -> None:
    assert run(compute_s=[]).stage_bound is None


def test_cores_bound_by_all_that_they_do() -> None:
    work = {"stage 0": 4.0, "stage 1": 3.0, "client": 1.0}
    assert run(cpu_s=work, elsewhere_s=2.0).core_bound(2) == pytest.approx(100 * 2 / 10)


def test_a_run_is_the_same_after_json() -> None:
    seen = Occupancy(0.5, (0.25, None), {UP: 0.5}, 3)
    again = Run.from_json(json.loads(json.dumps(run(occupancy=[seen]).as_json())))
    assert again == run(occupancy=[replace(seen, stages=[0.25, None])])


def test_json_holds_four_digits() -> None:
    figures = run(seconds=12.345678).as_json()
    assert figures["seconds"] == 12.35
    assert figures["link_bytes"][UP] == 1_000_000
