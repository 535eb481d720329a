"""Drafts: what their acceptance says, and how many are worth their time."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from molink.planning.costs import Line
from molink.planning.micro_batches import HYSTERESIS, Ring, round_s
from molink.planning.speculation import Acceptance, drafts_worth, tokens_per_step

MOST = 6
chances = st.floats(0, 1)
LONG = Ring((Line(0.005, 0.0002),) * 3, (Line(0.0, 0.0001),) * 2, delay_s=0.2)
BUSY = Ring((Line(0.005, 0.001),) * 2)


@pytest.mark.parametrize("chance", [0.0, 0.3, 0.6, 0.9, 1.0])
@pytest.mark.parametrize("num_drafted", [0, 1, 4])
def test_tokens_of_a_step_are_those_of_the_paper(chance: float, num_drafted: int) -> None:
    ends = num_drafted + 1
    closed = ends if chance == 1.0 else (1 - chance**ends) / (1 - chance)
    assert tokens_per_step(chance, num_drafted) == pytest.approx(closed)


@given(chances, st.integers(1, 64), st.integers(1, 16))
def test_no_other_number_makes_more_tokens_a_second(
    chance: float, running: int, steps: int
) -> None:
    chance = round(chance * 20) / 20  # chances are told apart no further

    def tokens_per_s(ring: Ring, num_drafted: int) -> float:
        seconds = round_s(ring, running, steps, 1 + num_drafted)
        return tokens_per_step(chance, num_drafted) / seconds

    for ring in (LONG, BUSY):
        chosen = drafts_worth(ring, running, steps, chance, MOST)
        best = max(tokens_per_s(ring, number) for number in range(MOST + 1))
        none = tokens_per_s(ring, 0)
        assert tokens_per_s(ring, chosen) == pytest.approx(
            best if best > (1 + HYSTERESIS) * none else none
        )


def test_a_long_ring_takes_drafts_that_a_busy_stage_does_not() -> None:
    assert drafts_worth(LONG, 1, 1, 0.5, MOST) >= 3
    assert drafts_worth(BUSY, 64, 2, 0.5, MOST) == 0


def test_what_is_never_right_is_never_sent() -> None:
    assert drafts_worth(LONG, 1, 1, 0.0, MOST) == 0


@pytest.mark.parametrize(
    ("draft", "tokens", "right", "judged"),
    [
        ([], [1], 0, 0),
        ([1, 2], [], 0, 0),
        ([1, 2, 3], [1, 2, 9], 2, 3),  # the third was wrong
        ([1, 2, 3], [1, 2, 3, 4], 3, 3),
        ([1, 2, 3], [1], 1, 1),  # it was not sent along: the others are not known
        ([5, 2, 3], [1], 0, 1),
    ],
)
def test_a_draft_is_judged_as_far_as_tokens_tell(
    draft: list[int], tokens: list[int], right: int, judged: int
) -> None:
    acceptance = Acceptance()
    acceptance.observe(draft, tokens)
    assert (acceptance.right, acceptance.judged) == (right, judged)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("sent", [True, False])
def test_the_chance_is_found_whether_drafts_are_sent_or_not(share: float, *, sent: bool) -> None:
    numbers, acceptance = random.Random(3), Acceptance()
    found = []
    for _ in range(2000):
        draft = [1] * 4
        right = next((i for i in range(4) if numbers.random() > share), 4)
        tokens = [1] * right + [2]
        acceptance.observe(draft, tokens if sent else tokens[:1])
        found.append(acceptance.chance(0.5))
    assert sum(found[100:]) / len(found[100:]) == pytest.approx(share, abs=0.06)


def test_old_drafts_are_forgotten() -> None:
    acceptance = Acceptance()
    for _ in range(100):
        acceptance.observe([1], [2])
    for _ in range(60):
        acceptance.observe([1], [1])
    assert acceptance.chance(0.0) > 0.8
