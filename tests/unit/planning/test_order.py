"""Which steps may overtake which."""

from hypothesis import given
from hypothesis import strategies as st

from molink.planning.order import Footprint, StepsInFlight


def step(
    *requests: str, reads: set[int] | None = None, writes: set[int] | None = None
) -> Footprint:
    reads, writes = reads or set(), writes or set()
    return Footprint(frozenset(requests), frozenset(reads | writes), frozenset(writes))


def test_a_shared_prefix_that_both_read_binds_nobody() -> None:
    assert not step("a", reads={1, 2}, writes={3}).conflicts_with(
        step("b", reads={1, 2}, writes={4})
    )


def test_what_one_writes_the_other_neither_reads_nor_writes() -> None:
    writer = step("a", writes={1})
    for other in (step("b", reads={1}, writes={2}), step("b", writes={1})):
        assert writer.conflicts_with(other)
        assert other.conflicts_with(writer)


def test_a_request_is_in_order_with_itself() -> None:
    assert step("a", writes={1}).conflicts_with(step("a", "b", writes={2}))


def test_a_barrier_is_in_order_with_everything() -> None:
    barrier = Footprint(frozenset("a"), frozenset(), frozenset(), is_barrier=True)
    assert barrier.conflicts_with(step("b"))
    assert step("b").conflicts_with(barrier)


def test_steps_are_bound_until_the_last_stage_has_answered() -> None:
    steps = StepsInFlight()
    assert steps.start(1, step("a"), is_answered=True) == []
    assert steps.start(2, step("a"), is_answered=True) == [1]
    assert steps.start(3, step("b"), is_answered=True) == []
    steps.finish(1)
    assert steps.start(4, step("a", "b"), is_answered=True) == [2, 3]
    for number in (2, 3, 4):
        steps.finish(number)
    assert len(steps) == 0


def test_a_step_without_answer_is_forgotten_with_those_it_follows() -> None:
    steps = StepsInFlight()
    steps.start(1, step("a"), is_answered=True)
    assert steps.start(2, step("a"), is_answered=False) == [1]
    assert steps.start(3, step("a"), is_answered=False) == [1, 2]
    steps.finish(1)
    assert len(steps) == 0
    assert steps.start(4, step("a"), is_answered=False) == []
    assert len(steps) == 0


footprints = st.builds(
    lambda name, reads, writes: step(name, reads=reads, writes=writes),
    st.sampled_from("abcdef"),
    st.sets(st.integers(0, 9), max_size=4),
    st.sets(st.integers(0, 9), max_size=2),
)


@given(st.lists(st.tuples(footprints, st.booleans()), max_size=12), st.data())
def test_it_follows_exactly_those_that_conflict_and_are_not_known_to_have_run(
    steps: list[tuple[Footprint, bool]], data: st.DataObject
) -> None:
    open_: dict[int, Footprint]
    flight, open_ = StepsInFlight(), {}
    for number, (footprint, is_answered) in enumerate(steps):
        after = flight.start(number, footprint, is_answered=is_answered)
        must = {n for n, earlier in open_.items() if footprint.conflicts_with(earlier)}
        assert must <= set(after)
        if is_answered:
            open_[number] = footprint
        if open_ and data.draw(st.booleans()):
            done = data.draw(st.sampled_from(sorted(open_)))
            del open_[done]
            flight.finish(done)
    for number in list(open_):
        flight.finish(number)
    assert len(flight) == 0
