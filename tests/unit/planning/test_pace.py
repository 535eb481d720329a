"""What the next step holds."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from molink.planning.pace import MAX_STALL_S, Load, Pace, Share, rings_of
from molink.wire.to_agent import StageCounters, StepCost
from molink.wire.to_engine import Drafts, HopFigures, Pacing, PathMeasured

IDLE = Load(
    num_decoding=0, num_ready=0, pending=0, tokens_in_flight=0, decode_steps=0, prefill_steps=0
)


def path(
    bytes_per_s: float | None = 12.5e6,
    rtt_s: float = 0.03,
    num_stages: int = 2,
    fixed_s: float = 0.02,
) -> PathMeasured:
    """Stages of 20 ms and 0.4 ms a token, with 3 kB a token between them."""
    cost = StepCost(fixed_s, 0.0004)
    stage = StageCounters(decode=cost, prefill=cost, bytes_per_token=3072.0)
    return PathMeasured(1, [HopFigures(bytes_per_s, rtt_s)] * num_stages, [stage] * num_stages)


def pace(measured: PathMeasured | None = None, wanted: Pacing | None = None) -> Pace:
    made = Pace(2, 2048, 2 * 2048, wanted or Pacing())
    if measured is not None:
        made.take(measured)
    return made


def test_costs_come_from_stages_and_links() -> None:
    rings = rings_of(path())
    assert rings is not None
    decode, prefill = rings
    assert decode.delay_s == pytest.approx(0.03)  # half of each round trip
    assert len(decode.hops) == 1  # results are small
    assert prefill.hops[0](100) == pytest.approx(100 * 3072 / 12.5e6)


def test_nothing_is_decided_before_every_stage_has_run_both_kinds() -> None:
    unknown = replace_stage(path(), 1, StageCounters())
    assert rings_of(unknown) is None
    made = pace(unknown)
    made.next(replace(IDLE, num_decoding=8, num_ready=8))
    assert made.decision is not None
    assert made.decision.micro_batches == 2


@given(
    st.none() | st.floats(0, 1e15),
    st.floats(0, 1e12),
    st.floats(0, 1e12),
    st.none() | st.floats(0, 1e12),
    st.floats(0, 1e15),
    st.sampled_from(["auto", "on", "off"]),
)
def test_whatever_is_reported_something_is_decided(
    rate: float | None,
    fixed_s: float,
    per_token_s: float,
    rtt_s: float | None,
    size: float,
    apart: str,
) -> None:
    cost = StepCost(fixed_s, per_token_s)
    stage = StageCounters(decode=cost, prefill=cost, bytes_per_token=size)
    measured = PathMeasured(1, [HopFigures(rate, rtt_s)] * 2, [stage] * 2)
    for load in (replace(IDLE, num_decoding=8, num_ready=8, pending=500), replace(IDLE, pending=9)):
        assert pace(measured, Pacing(separate_prefill=apart)).next(load) != Share()


def test_what_fills_the_ring_are_steps_as_large_as_one_may_be() -> None:
    made = Pace(2, 256, 16 * 256, Pacing())
    made.take(path(1.25e6, rtt_s=0.3))
    made.next(replace(IDLE, pending=40_000))
    assert made.decision is not None
    assert made.decision.prefill_tokens == 256
    assert made.decision.prefill_steps * 256 * 3072 / 1.25e6 >= 0.3


def replace_stage(measured: PathMeasured, index: int, stage: StageCounters) -> PathMeasured:
    stages = [*measured.stages]
    stages[index] = stage
    return PathMeasured(measured.epoch, measured.hops, stages)


def test_where_stages_are_the_bottleneck_a_step_holds_both() -> None:
    share = pace(path(125e6)).next(replace(IDLE, num_decoding=8, num_ready=8, pending=500))
    assert share.num_decodes > 0
    assert share.num_prefill_tokens > 0


def test_where_a_link_is_decodes_go_first_and_alone() -> None:
    made = pace(path(1.25e6))
    load = replace(IDLE, num_decoding=8, num_ready=8, pending=500)
    first = made.next(load)
    assert (first.num_decodes > 0, first.num_prefill_tokens) == (True, 0)
    assert made.decision is not None
    full = replace(load, decode_steps=made.decision.micro_batches)
    then = made.next(full)
    assert (then.num_decodes, then.num_prefill_tokens > 0) == (0, True)
    assert made.next(replace(full, prefill_steps=made.decision.prefill_steps)) == Share()


def test_a_prompt_holds_decodes_up_for_a_bounded_time() -> None:
    made = pace(path(125e6))
    alone = made.next(replace(IDLE, pending=20_000)).num_prefill_tokens
    beside = made.next(replace(IDLE, num_decoding=8, num_ready=8, pending=20_000))
    assert 0.02 + 0.0004 * beside.num_prefill_tokens <= 1.1 * MAX_STALL_S < 0.0004 * alone


def test_delay_makes_more_micro_batches_and_they_follow_the_link() -> None:
    made = pace(path(1e9, rtt_s=0.0, fixed_s=0.0))
    load = replace(IDLE, num_decoding=32, num_ready=32)
    made.next(load)
    assert made.decision is not None
    near = made.decision.micro_batches
    made.take(path(1e9, rtt_s=0.02, fixed_s=0.0))
    made.next(load)
    assert made.decision.micro_batches > near


def test_while_prompts_come_there_are_fewer_micro_batches() -> None:
    """What decodes do not need of a stage feeds the link."""
    made = pace(path(rtt_s=0.06, fixed_s=0.005))
    decoding = replace(IDLE, num_decoding=20, num_ready=20)
    numbers = []
    for load in (decoding, replace(decoding, pending=4000), replace(decoding, prefill_steps=1)):
        made.next(load)
        assert made.decision is not None
        numbers.append(made.decision.micro_batches)
    assert numbers[0] > numbers[1] == numbers[2]


def test_a_fixed_number_stays() -> None:
    made = pace(path(), Pacing(micro_batches=7))
    made.next(replace(IDLE, num_decoding=32, num_ready=32))
    assert made.decision is not None
    assert made.decision.micro_batches == 7


def test_the_user_may_keep_prompts_apart_or_together() -> None:
    load = replace(IDLE, num_decoding=8, num_ready=8, pending=500)
    apart = pace(path(125e6), Pacing(separate_prefill="on")).next(load)
    assert (apart.num_decodes > 0, apart.num_prefill_tokens) == (True, 0)
    together = pace(path(1.25e6), Pacing(separate_prefill="off")).next(load)
    assert together.num_decodes > 0
    assert together.num_prefill_tokens > 0


loads = st.builds(
    lambda decoding, ready, pending, tokens, decodes, prefills: Load(
        max(decoding, ready), ready, pending, tokens, decodes, prefills
    ),
    st.integers(0, 100),
    st.integers(0, 100),
    st.integers(0, 100_000),
    st.integers(0, 10_000),
    st.integers(0, 16),
    st.integers(0, 16),
)
paths = st.builds(path, st.none() | st.floats(1e4, 1e10), st.floats(0, 1), st.integers(1, 5))


@pytest.mark.parametrize(("wanted", "drafts"), [("auto", 0), ("all", 4)])
def test_drafts_that_are_never_right_are_not_sent_unless_the_user_wants_all(
    wanted: Drafts, drafts: int
) -> None:
    made = Pace(2, 2048, 4096, Pacing(drafts=wanted), max_drafted=4)
    made.take(path())
    made.next(replace(IDLE, num_decoding=32, num_ready=32, draft_chance=0.0))
    assert made.decision is not None
    assert (made.decision.draft_chance, made.decision.drafts) == (0.0, drafts)


@given(st.none() | paths, loads, st.integers(1, 4096))
def test_a_share_is_never_more_than_there_is_or_may_be(
    measured: PathMeasured | None, load: Load, max_tokens: int
) -> None:
    made = Pace(2, max_tokens, 2 * max_tokens, Pacing())
    if measured is not None:
        made.take(measured)
    share = made.next(load)
    assert 0 <= share.num_decodes <= load.num_ready
    assert 0 <= share.num_prefill_tokens <= load.pending
    taken = share.num_decodes + share.num_prefill_tokens + share.max_drafted
    assert taken <= max_tokens
    assert not taken or taken + load.tokens_in_flight <= 2 * max_tokens


@given(st.none() | paths, loads)
def test_an_empty_pipeline_takes_whatever_there_is(
    measured: PathMeasured | None, load: Load
) -> None:
    made = pace(measured)
    share = made.next(replace(load, tokens_in_flight=0, decode_steps=0, prefill_steps=0))
    assert share != Share() or not (load.num_ready or load.pending)
