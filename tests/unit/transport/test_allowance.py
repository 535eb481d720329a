"""An allowance: over any while it lets through its rate, and a short burst."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from molink.transport.allowance import BURST_S, Allowance

RATE = 1e6


@given(sizes=st.lists(st.integers(1, 300_000), min_size=1, max_size=50), idle_s=st.floats(0, 10))
def test_who_waits_as_told_stays_within_the_rate(sizes: list[int], idle_s: float) -> None:
    allowance, start = Allowance(RATE), 1000.0
    allowance.take(1, start)
    now = start = start + idle_s
    for size in sizes:
        now += allowance.take(size, now)
        # A taker may be one message early: what it took is what it waits for.
    assert sum(sizes) <= RATE * (now - start + BURST_S) + 1
    assert sum(sizes) >= RATE * (now - start) - RATE * BURST_S


def test_what_was_not_used_is_not_saved_for_long() -> None:
    allowance = Allowance(RATE)
    assert allowance.take(int(RATE * BURST_S), 1000.0) == 0.0
    assert allowance.take(int(RATE), 1000.0) == pytest.approx(1.0)
    assert allowance.take(int(RATE), 9000.0) == pytest.approx(1.0 - BURST_S)


def test_what_is_urgent_does_not_wait_for_what_is_not() -> None:
    allowance, now = Allowance(RATE), 1000.0
    assert allowance.take(int(RATE), now) > 0.5
    assert allowance.take(int(RATE * BURST_S), now, is_urgent=True) == 0.0
    assert allowance.take(int(RATE), now, is_urgent=True) == pytest.approx(1.0)


@given(st.lists(st.tuples(st.integers(1, 300_000), st.booleans()), min_size=1, max_size=50))
def test_both_kinds_together_stay_within_the_rate(takes: list[tuple[int, bool]]) -> None:
    allowance, taken = Allowance(RATE), 0
    now = start = 1000.0
    free_at = {True: start, False: start}
    for size, is_urgent in takes:
        now = max(now, free_at[is_urgent])
        free_at[is_urgent] = now + allowance.take(size, now, is_urgent=is_urgent)
        taken += size
    # Each kind may be one message early, and has a burst.
    assert taken <= RATE * (max(free_at.values()) - start + 2 * BURST_S) + 300_000 + 2
