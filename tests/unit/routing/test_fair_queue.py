"""Shares of tenants, whatever they ask for."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from molink.routing.fair_queue import FairQueue


def test_a_tenant_with_many_requests_does_not_hold_up_another() -> None:
    queue: FairQueue[int] = FairQueue()
    for item in range(100):
        queue.put("greedy", item)
    queue.put("modest", 1000)
    taken = []
    for _ in range(3):
        item = queue.take()
        queue.charge("modest" if item == 1000 else "greedy", 10)
        taken.append(item)
    assert 1000 in taken


def test_shares_follow_weights() -> None:
    queue: FairQueue[str] = FairQueue()
    weights = {"one": 1.0, "three": 3.0}
    for name in weights:
        for _ in range(400):
            queue.put(name, name)
    served = Counter()
    for _ in range(400):
        name = queue.take()
        served[name] += 1
        queue.charge(name, 1 / weights[name])
    assert served["three"] == pytest.approx(300, abs=2)


def test_nobody_saves_up_while_away() -> None:
    queue: FairQueue[str] = FairQueue()
    for _ in range(50):
        queue.put("busy", "busy")
    for _ in range(40):
        queue.charge(queue.take(), 1)
    for _ in range(10):
        queue.put("new", "new")
    taken = []
    for _ in range(8):
        taken.append(queue.take())
        queue.charge(taken[-1], 1)
    assert Counter(taken) == {"busy": 4, "new": 4}


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("put"), st.sampled_from("abc"), st.just(0.0)),
            st.tuples(st.just("take"), st.just(""), st.floats(0.1, 100)),
            st.tuples(st.just("remove"), st.sampled_from("abc"), st.just(0.0)),
        ),
        max_size=60,
    )
)
def test_what_is_put_in_comes_out_once_and_in_order(
    moves: list[tuple[str, str, float]],
) -> None:
    queue: FairQueue[tuple[str, int]] = FairQueue()
    waiting: dict[str, list[tuple[str, int]]] = {name: [] for name in "abc"}
    for number, (move, name, cost) in enumerate(moves):
        if move == "put":
            queue.put(name, (name, number))
            waiting[name].append((name, number))
        elif move == "take" and any(waiting.values()):
            item = queue.take()
            assert item == waiting[item[0]].pop(0)
            queue.charge(item[0], cost)
        elif move == "remove" and waiting[name]:
            queue.remove(name, waiting[name].pop())
        assert len(queue) == sum(map(len, waiting.values()))
    with pytest.raises(ValueError, match="not in deque"):
        queue.remove("a", ("a", -1))


@given(st.lists(st.floats(1, 10), max_size=100))
def test_those_who_wait_are_served_alike_to_within_one_request(costs: list[float]) -> None:
    """The bound of the paper, with requests that cost at most 10."""
    queue: FairQueue[str] = FairQueue()
    for name in "abc" * len(costs):
        queue.put(name, name)
    served = dict.fromkeys("abc", 0.0)
    for cost in costs:
        name = queue.take()
        served[name] += cost
        queue.charge(name, cost)
        assert max(served.values()) - min(served.values()) <= 10


def test_the_most_urgent_goes_first_whoever_asks() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.charge("greedy", 1000)
    for name, item, priority in (
        ("modest", "later", 5),
        ("modest", "usual", 0),
        ("greedy", "urgent", -5),
        ("greedy", "usual too", 0),
    ):
        queue.put(name, item, priority)
    assert [queue.take() for _ in range(4)] == ["urgent", "usual", "usual too", "later"]
    queue.put("modest", "gone", 3)
    queue.remove("modest", "gone", 3)
    assert len(queue) == 0
