"""Tables of runs."""

import pytest
from benchmarks.wan_results import Run
from benchmarks.wan_results.tables import (
    DEFAULTS,
    FIXED,
    HEAD,
    LOOPBACK,
    VLLM,
    merged,
    paired,
    proof_rows,
    rows,
    same_answers,
)

Figures = dict[str, object]


def run(seed: int, tokens_per_s: float, *answers: str, gap_s: float = 0.1) -> Run:
    return Run(
        seed=seed,
        num_tokens=1000,
        seconds=1000 / tokens_per_s,
        ttft_p50_s=1.0,
        ttft_p99_s=2.0,
        tpot_p50_s=0.1,
        tpot_p99_s=0.2,
        longest_gap_s=gap_s,
        answers=list(answers),
        link_bytes={},
        link_rates={},
        compute_s=[],
        cpu_s={"stage 0": 5.0},
    )


def test_ratios_are_of_runs_with_the_same_requests() -> None:
    runs = {VLLM: [run(1, 10), run(2, 100)], DEFAULTS: [run(2, 300), run(1, 20), run(3, 1)]}
    assert paired(runs, DEFAULTS, VLLM) == 2.5
    assert paired(runs, DEFAULTS, LOOPBACK) is None
    assert paired(runs, VLLM, VLLM) is None


def test_answers_are_compared_with_those_that_crossed_no_link() -> None:
    runs = {LOOPBACK: [run(1, 1, "a", "b")], DEFAULTS: [run(1, 1, "a", "c"), run(2, 1, "a", "b")]}
    assert same_answers(runs, DEFAULTS) == "1 of 2"
    assert same_answers(runs, LOOPBACK) == ""


def test_a_row_has_medians_but_the_worst_gap() -> None:
    gaps = {VLLM: [run(seed, 10.0 * seed, gap_s=seed) for seed in (1, 2, 3)]}
    row = dict(zip(HEAD, next(rows("20", gaps, 2)), strict=True))
    assert row["tokens/s (least to most)"] == "20.0 (10.0 to 30.0)"
    assert row["longest gap, s"] == "3.00"
    assert row["links allow"] == row["cores allow"] == ""  # vLLM's workers spin


def test_the_proof_is_against_the_best_fixed_one() -> None:
    runs = {DEFAULTS: [run(1, 95)], f"{FIXED}1": [run(1, 50)], f"{FIXED}3": [run(1, 100)]}
    assert list(proof_rows({"20": runs})) == [["20", "95.0", "1: 50.0, 3: 100.0", "3", "0.950"]]


def test_without_fixed_ones_there_is_nothing_to_prove() -> None:
    assert list(proof_rows({"20": {DEFAULTS: [run(1, 95)], VLLM: [run(1, 10)]}})) == []


def file(profile: str, rate: str, server: str, seed: int) -> Figures:
    runs = {server: [run(seed, 10).as_json()]}
    return {"machine": {"cores": 2}, "links": {profile: {"link": None, "rates": {rate: runs}}}}


def test_files_of_several_invocations_are_put_together() -> None:
    whole = merged(
        [
            file("a", "2", VLLM, 1),
            file("a", "2", VLLM, 2),
            file("a", "20", DEFAULTS, 1),
            file("b", "2", VLLM, 1),
        ]
    )
    assert [each["seed"] for each in whole["links"]["a"]["rates"]["2"][VLLM]] == [1, 2]
    assert list(whole["links"]["a"]["rates"]) == ["2", "20"]
    assert list(whole["links"]["b"]["rates"]["2"]) == [VLLM]


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (file("a", "2", VLLM, 1), "runs of one seed"),
        (file("a", "2", VLLM, 2) | {"workload": {"prompt_tokens": 8}}, "workload"),
        (file("a", "2", VLLM, 2) | {"stages": 3}, "stages"),
    ],
)
def test_runs_that_cannot_stand_side_by_side_are_refused(other: Figures, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        merged([file("a", "2", VLLM, 1), other])
