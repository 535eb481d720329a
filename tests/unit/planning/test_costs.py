"""Lines through what steps cost."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from molink.planning.costs import Line, LineFit

PRIOR = 32.0


def fitted(line: Line, sizes: list[int]) -> Line:
    fit = LineFit(PRIOR)
    fit.add(1, 1e9)  # cold
    for tokens in sizes:
        fit.add(tokens, line(tokens))
    assert fit.line is not None
    return fit.line


def test_nothing_is_known_before_the_second_sample() -> None:
    fit = LineFit(PRIOR)
    fit.add(1, 1e9)
    assert fit.line is None


@given(st.lists(st.tuples(st.integers(1, 4096), st.floats(0, 10)), min_size=2))
def test_neither_part_is_ever_less_than_nothing(samples: list[tuple[int, float]]) -> None:
    """Attention makes steps superlinear, and machines are noisy."""
    fit = LineFit(PRIOR)
    for tokens, seconds in samples:
        fit.add(tokens, seconds)
    assert fit.line is not None
    assert fit.line.fixed_s >= 0
    assert fit.line.per_token_s >= 0


lines = st.builds(Line, st.floats(0.001, 0.1), st.floats(1e-5, 1e-2))


@given(lines, st.integers(1, 512))
def test_what_was_seen_lies_on_the_line(line: Line, size: int) -> None:
    found = fitted(line, [size] * 10)
    assert found(size) == pytest.approx(line(size), rel=1e-6)


@given(lines, st.integers(1, 100))
def test_steps_of_two_sizes_tell_the_slope(line: Line, size: int) -> None:
    found = fitted(line, [size, 4 * size] * 50)
    for tokens in (size, 2 * size, 4 * size):
        assert found(tokens) == pytest.approx(line(tokens), rel=0.1)


def test_equal_steps_leave_the_slope_to_the_prior() -> None:
    found = fitted(Line(0.0, 1.0), [8] * 20)
    assert found.fixed_s / found.per_token_s == pytest.approx(PRIOR)


def test_a_machine_that_stood_still_bends_no_line() -> None:
    fit, line = LineFit(PRIOR), Line(0.01, 0.0005)
    for number in range(60):
        fit.add(8 + number % 5, 30.0 if number == 50 else line(8 + number % 5))
    assert fit.line is not None
    assert fit.line(10) == pytest.approx(line(10), rel=0.1)


def test_a_stage_that_becomes_slower_is_noticed() -> None:
    fit = LineFit(PRIOR)
    for cost in [0.001] * 200 + [0.01] * 200:
        fit.add(16, 16 * cost)
    assert fit.line is not None
    assert fit.line(16) == pytest.approx(0.16, rel=0.05)
