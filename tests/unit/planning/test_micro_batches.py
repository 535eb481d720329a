"""Steps in flight and their sizes, on a grid of stages, links and loads."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from molink.planning.costs import Line
from molink.planning.micro_batches import (
    HYSTERESIS,
    MAX_PREFILL_SHARE,
    MAX_STEPS,
    SLACK,
    STEP_COST_TOKENS,
    Ring,
    decodes_per_step,
    micro_batches,
    prefill_tokens_per_step,
    round_s,
    steps_that_fill,
    unmeasured,
)

PENDING = st.integers(1, 1_000_000)
STAGES = st.integers(1, 16)
lines = st.builds(Line, st.floats(0, 0.1), st.floats(0, 1e-2))
hops = st.builds(lambda per_token: Line(0.0, per_token), st.floats(0, 1e-2))
rings = st.builds(
    lambda stages, hop, delay_s: Ring(tuple(stages), (hop,) * (len(stages) - 1), delay_s),
    st.lists(lines, min_size=1, max_size=5),
    hops,
    st.floats(0, 1),
)


def makespan(ring: Ring, pending: int, tokens: int) -> float:
    """Seconds of all steps of `tokens` through all stages and links."""
    steps = -(-pending // tokens)
    return ring.trip_s(tokens) + (steps - 1) * ring.busiest_s(tokens)


# --- decodes


def test_without_delay_as_many_steps_as_stages() -> None:
    for stages, running in itertools.product(range(1, 6), (6, 24, 96)):
        assert micro_batches(unmeasured(stages, 32), running, 0) == min(stages, running)


@pytest.mark.parametrize("delay_ms", [0, 10, 30, 100, 300])
@pytest.mark.parametrize("stages", [2, 3, 5])
@pytest.mark.parametrize("running", [1, 4, 16, 64])
@pytest.mark.parametrize("hop_us", [0, 100, 1000])
def test_no_other_number_makes_a_shorter_round(
    delay_ms: int, stages: int, running: int, hop_us: int
) -> None:
    ring = Ring(
        (Line(0.01, 0.001),) * stages, (Line(0.0, 1e-6 * hop_us),) * (stages - 1), 1e-3 * delay_ms
    )
    chosen = micro_batches(ring, running, 0)
    best = min(round_s(ring, running, m) for m in range(1, min(running, MAX_STEPS) + 1))
    assert round_s(ring, running, chosen) == pytest.approx(best)


def test_delay_asks_for_more_steps_and_fixed_costs_for_fewer() -> None:
    cheap, dear = Line(0.001, 0.001), Line(0.05, 0.001)
    assert micro_batches(Ring((cheap, cheap), (), 0.1), 32, 0) > 2
    assert micro_batches(Ring((dear, dear), (), 0.1), 32, 0) < micro_batches(
        Ring((cheap, cheap), (), 0.1), 32, 0
    )


@given(rings, st.integers(2, 200), st.floats(0, MAX_PREFILL_SHARE))
def test_beside_prompts_no_other_number_keeps_a_stage_less_busy_for_the_same_round(
    ring: Ring, running: int, share: float
) -> None:
    """A round lasts as long as the decodes of a stage and its share of prompts do."""
    chosen = micro_batches(ring, running, 0, prefill_share=share)
    for other in range(1, min(running, MAX_STEPS) + 1):
        assert round_s(ring, running, chosen, prefill_share=share) <= round_s(
            ring, running, other, prefill_share=share
        )


def test_prompts_that_a_link_waits_for_make_fewer_steps() -> None:
    """Three steps fill the ring by themselves, but then nobody feeds the link."""
    ring = Ring((Line(0.015, 0.0012),) * 2, (Line(0.0, 0.001),), 0.03)
    assert micro_batches(ring, 20, 0) == 3
    assert micro_batches(ring, 20, 0, prefill_share=0.45) == 2


@pytest.mark.parametrize(("hop_us", "share"), [(2000, 0.2), (400, 1.0), (100, 1.0)])
def test_a_stage_is_as_busy_as_the_slowest_link_lets_it(hop_us: int, share: float) -> None:
    ring = Ring((Line(0.01, 0.0004), Line(0.01, 0.0001)), (Line(0.0, 1e-6 * hop_us),))
    assert ring.stage_share == pytest.approx(share)
    assert ring.is_bound_by_links == (share < 1)


@given(rings, st.integers(1, 200), st.integers(1, MAX_STEPS))
def test_what_is_nearly_best_stays(ring: Ring, running: int, current: int) -> None:
    chosen = micro_batches(ring, running, current)
    assert 1 <= chosen <= min(running, MAX_STEPS)
    best = min(round_s(ring, running, m) for m in range(1, min(running, MAX_STEPS) + 1))
    assert round_s(ring, running, chosen) <= (1 + HYSTERESIS) * best * (1 + 1e-9)
    assert micro_batches(ring, running, chosen) == chosen


@given(st.integers(0, 4_096), STAGES)
def test_a_round_takes_every_decode_in_equal_steps(num_decoding: int, num_steps: int) -> None:
    share = decodes_per_step(num_decoding, num_steps)
    assert share * num_steps >= num_decoding
    assert (share - 1) * num_steps < num_decoding or share == 0


# --- prompts


@given(rings, PENDING, st.floats(0.01, 10))
def test_takes_something_and_never_more_than_there_is(
    ring: Ring, pending: int, max_stage_s: float
) -> None:
    assert 1 <= prefill_tokens_per_step(ring, pending, max_stage_s) <= pending


@given(PENDING)
def test_one_stage_takes_everything(pending: int) -> None:
    assert prefill_tokens_per_step(unmeasured(1, STEP_COST_TOKENS), pending) == pending


@given(PENDING, st.integers(2, 16))
def test_close_to_the_best_constant_size(pending: int, num_stages: int) -> None:
    ring = unmeasured(num_stages, STEP_COST_TOKENS)
    chosen = makespan(ring, pending, prefill_tokens_per_step(ring, pending))
    sizes = {max(1, pending // steps) for steps in range(1, 200)}
    best = min(makespan(ring, pending, size) for size in sizes)
    assert chosen <= 1.25 * best


def test_a_single_short_prompt_is_one_step() -> None:
    assert prefill_tokens_per_step(unmeasured(2, STEP_COST_TOKENS), 100) == 100


def test_the_workload_of_the_benchmark_is_cut() -> None:
    assert 512 <= prefill_tokens_per_step(unmeasured(2, STEP_COST_TOKENS), 32 * 128) <= 1024


def test_over_a_slow_link_a_transfer_is_no_shorter_than_one_stages_compute() -> None:
    stage, hop = Line(0.1, 0.0005), Line(0.0, 0.001)
    ring = Ring((stage, stage), (hop,), 0.03)
    tokens = prefill_tokens_per_step(ring, 4000)
    assert hop(tokens) >= stage(tokens)
    assert makespan(ring, 4000, tokens) <= (1 + SLACK) * makespan(ring, 4000, 200)  # as long as it


@given(st.integers(1_000, 100_000))
def test_prompts_without_end_leave_a_stage_to_decodes(pending: int) -> None:
    stage, hop = Line(0.0137, 0.00047), Line(0.0, 0.0011)
    tokens = prefill_tokens_per_step(Ring((stage, stage), (hop,), 0.03), pending, 0.2)
    assert stage(tokens) / hop(tokens) < 0.6  # tokens alone: 0.43


def test_no_chunk_is_mostly_fixed_cost() -> None:
    stage, hop = Line(0.02, 0.0004), Line(0.0, 0.0025)
    tokens = prefill_tokens_per_step(Ring((stage, stage), (hop,), 0.03), 4000)
    assert stage.per_token_s * tokens >= 0.99 * stage.fixed_s


@given(rings, PENDING)
def test_a_chunk_holds_up_no_stage_for_longer_than_it_may(ring: Ring, pending: int) -> None:
    tokens = prefill_tokens_per_step(ring, pending, 0.2)
    useful = max(1.0, *(line.fixed_s / max(line.per_token_s, 1e-9) for line in ring.stages))
    assert tokens - 2 <= 1.15 * useful or all(line(tokens - 2) <= 0.23 for line in ring.stages)


def test_the_stage_with_the_larger_fixed_cost_is_not_held_up_either() -> None:
    ring = Ring((Line(0.18, 0.0001), Line(0.01, 0.0002)))
    assert all(line(prefill_tokens_per_step(ring, 2000, 0.3)) <= 0.3 for line in ring.stages)


def test_a_dear_step_is_not_wasted_on_crumbs() -> None:
    stage = Line(0.3, 0.001)
    assert prefill_tokens_per_step(Ring((stage, stage)), 1000, 0.2) >= 250


def test_something_is_in_flight_whatever_is_reported() -> None:
    assert steps_that_fill(Ring((Line(0.0, 0.0),)), 100) == 1


def test_prompts_in_flight_keep_the_busiest_busy() -> None:
    stage = Line(0.0, 0.001)
    assert steps_that_fill(Ring((stage, stage)), 100) == 2
    assert steps_that_fill(Ring((stage, stage), (stage,), 0.2), 100) == 5
    assert steps_that_fill(Ring((stage,), (), 1e6), 100) == MAX_STEPS
