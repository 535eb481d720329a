"""Prefill is cut so that the pipeline fills, and never into crumbs; steps share decodes evenly."""

from hypothesis import given
from hypothesis import strategies as st

from molink.planning.micro_batches import (
    STEP_COST_TOKENS,
    decodes_per_step,
    pending_that_fills,
    prefill_tokens_per_step,
)

PENDING = st.integers(1, 1_000_000)
STAGES = st.integers(1, 16)


def makespan(pending: int, tokens: int, num_stages: int) -> float:
    """Time of all steps of `tokens` through all stages, in units of one token on one stage."""
    steps = -(-pending // tokens)
    return (steps + num_stages - 1) * (tokens + STEP_COST_TOKENS)


@given(PENDING, STAGES)
def test_takes_something_and_never_more_than_there_is(pending: int, num_stages: int) -> None:
    assert 1 <= prefill_tokens_per_step(pending, num_stages) <= pending


@given(PENDING)
def test_one_stage_takes_everything(pending: int) -> None:
    assert prefill_tokens_per_step(pending, 1) == pending


@given(PENDING, st.integers(2, 16))
def test_close_to_the_best_constant_size(pending: int, num_stages: int) -> None:
    chosen = makespan(pending, prefill_tokens_per_step(pending, num_stages), num_stages)
    sizes = {max(1, pending // steps) for steps in range(1, 200)}
    best = min(makespan(pending, size, num_stages) for size in sizes)
    assert chosen <= 1.25 * best


def test_a_single_short_prompt_is_one_step() -> None:
    assert prefill_tokens_per_step(100, 2) == 100


def test_the_workload_of_the_benchmark_is_cut() -> None:
    assert 512 <= prefill_tokens_per_step(32 * 128, 2) <= 1024


@given(st.integers(1, 65_536), STAGES)
def test_counting_may_stop_where_a_step_is_full(max_tokens: int, num_stages: int) -> None:
    enough = pending_that_fills(max_tokens, num_stages)
    assert prefill_tokens_per_step(enough, num_stages) >= max_tokens


@given(st.integers(0, 4_096), STAGES)
def test_a_round_takes_every_decode_in_equal_steps(num_decoding: int, num_stages: int) -> None:
    share = decodes_per_step(num_decoding, num_stages)
    assert share * num_stages >= num_decoding
    assert (share - 1) * num_stages < num_decoding or share == 0
