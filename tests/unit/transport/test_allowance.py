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
