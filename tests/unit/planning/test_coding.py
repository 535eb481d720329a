"""Coding is worth its seconds, or it is not."""

import pytest

from molink.planning.coding import CodingFigures, pays

MBIT = 1e6 / 8
HERE = CodingFigures(ratio=0.69, encode_s=3e-9, decode_s=1.5e-9)


@pytest.mark.parametrize(
    ("rate", "expected"),
    [(10 * MBIT, True), (100 * MBIT, True), (300 * MBIT, True), (1000 * MBIT, False)],
)
def test_slow_links_are_worth_it(rate: float, expected: bool) -> None:
    assert pays(HERE, rate) == expected


@pytest.mark.parametrize("rate", [None, 0.0])
def test_an_unknown_link_is_not(rate: float | None) -> None:
    assert not pays(HERE, rate)


def test_without_figures_nothing_pays() -> None:
    assert not pays(None, MBIT)


def test_what_does_not_shrink_never_pays() -> None:
    assert not pays(CodingFigures(ratio=1.0, encode_s=1e-12, decode_s=1e-12), MBIT)


def test_figures_follow_what_changes() -> None:
    figures = HERE
    slow = CodingFigures(ratio=1.0, encode_s=3e-8, decode_s=3e-8)
    assert pays(figures, 100 * MBIT)
    for _ in range(10):
        figures = figures.followed_by(slow)
    assert not pays(figures, 100 * MBIT)
    assert figures.ratio == pytest.approx(1.0, abs=0.05)
