"""The window against a simulated bottleneck: full links, short queues, rates that change."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.simulated_link import Path, Simulation

from molink.core.errors import WireError
from molink.transport.window import (
    FIRST_WINDOW,
    LARGEST_PIECE,
    LARGEST_WINDOW,
    LEAST_PIECE,
    LEAST_WINDOW,
    RECEIPT_INTERVAL_S,
    Receipt,
    Window,
)

MBIT = 125e3  # bytes a second
RATES = (1, 10, 100, 1000)
RTTS_S = (0.001, 0.01, 0.03, 0.1)
LINES = [
    (mbit, rtt_s, loss)
    for mbit in RATES
    for rtt_s in RTTS_S
    for loss in (0.0, 0.01)
    if not loss or mbit * rtt_s < 10  # with several losses in a round trip TCP is the bottleneck
]
END_S = 12.0
AFTER_START_S = 3.0


@pytest.mark.parametrize(("mbit", "rtt_s", "loss"), LINES)
@pytest.mark.parametrize("jitter_s", [0.0, 0.02])
def test_a_link_is_full_and_its_queue_short(
    mbit: float, rtt_s: float, jitter_s: float, loss: float
) -> None:
    rate = mbit * MBIT
    run = Simulation(Path(lambda _: rate, rtt_s, jitter_s, loss)).until(END_S)
    assert run.rate(AFTER_START_S, END_S) >= 0.9 * rate
    # A quarter of a round trip, twice a receipt's interval, two pieces; bursts of late arrivals,
    # each as long as the jitter of both directions or the repair of a loss.
    allowed_s = rtt_s / 4 + 2 * RECEIPT_INTERVAL_S + 2 * max(LEAST_PIECE / rate, 0.004)
    allowed_s += 4 * jitter_s + (1.2 * rtt_s if loss else 0.0) + (0.03 if mbit == 1 else 0.0)
    assert run.queue_s(AFTER_START_S, END_S) <= allowed_s
    assert run.window.bytes_per_s == pytest.approx(rate, rel=0.35 if jitter_s or loss else 0.02)


@pytest.mark.parametrize("mbit", [10, 100])
@pytest.mark.parametrize("rtt_s", RTTS_S[1:])
@pytest.mark.parametrize("jitter_s", [0.0, 0.02])
@pytest.mark.parametrize("factor", [10, 0.1])
def test_it_follows_a_rate_within_five_seconds(
    mbit: float, rtt_s: float, jitter_s: float, factor: float
) -> None:
    before, after = mbit * MBIT, mbit * MBIT * factor
    simulation = Simulation(Path(lambda now: before if now < 5 else after, rtt_s, jitter_s))
    run = simulation.until(15)
    assert run.rate(10, 15) >= 0.9 * after
    assert run.queue_s(10, 15) <= rtt_s / 4 + 0.05 + 4 * jitter_s
    assert run.window.bytes_per_s == pytest.approx(after, rel=0.35 if jitter_s else 0.02)


@pytest.mark.parametrize("stall_s", [1.0, 5.0])
def test_a_stall_costs_little_more_than_its_time(stall_s: float) -> None:
    rate = 100 * MBIT
    path = Path(lambda _: rate, 0.03, stalls=[(3.0, 3.0 + stall_s)])
    run = Simulation(path).until(12)
    assert run.rate(3 + stall_s + 1, 12) >= 0.9 * rate


@pytest.mark.parametrize(("before", "after"), [(20, 0.4), (100, 1), (100, 10)])
def test_a_link_that_slowed_down_while_little_crossed_it_is_not_filled_as_before(
    before: float, after: float
) -> None:
    slower_at, full_at, rtt_s, found, little = 14.0, 30.0, 0.03, 5e6, 6e3  # bytes a second
    simulation = Simulation(
        Path(lambda now: (before if now < slower_at else after) * MBIT, rtt_s),
        lambda now: found + little * now if now < full_at else 1e18,
    )
    run = simulation.until(full_at + 8)
    as_before_s = (before * rtt_s + FIRST_WINDOW / MBIT) / after  # in front of what comes then
    assert max(s for at, s in run.queued if at > full_at) < as_before_s / 2
    assert run.rate(full_at, full_at + 8) >= 0.9 * after * MBIT


@pytest.mark.parametrize(
    ("size", "every_s"), [(100e3, 0.2), (4e3, 0.1), (40e3, 0.1), (300, 0.05), (1e6, 2.0)]
)
def test_a_sender_with_little_to_send_keeps_its_window(size: float, every_s: float) -> None:
    rate, end = 10 * MBIT, 20.0
    simulation = Simulation(
        Path(lambda _: rate, 0.03),
        lambda now: size * (1 + now // every_s) if now < end else 1e18,
    )
    run = simulation.until(end + 10)
    assert run.rate(end, end + 1) >= 0.85 * rate
    assert run.rate(end + 1, end + 10) >= 0.95 * rate
    assert run.queue_s(end + 1, end + 10) < 0.03


@pytest.mark.parametrize(("size", "every_s"), [(100e3, 0.2), (4e3, 0.1), (40e3, 1.0), (150e3, 3.0)])
@pytest.mark.parametrize("jitter_s", [0.0, 0.005])
def test_the_rate_that_was_found_is_kept_by_a_sender_with_little_to_send(
    size: float, every_s: float, jitter_s: float
) -> None:
    rate, found = 20 * MBIT, 1e6
    path = Path(lambda _: rate, 0.02, jitter_s)
    run = Simulation(path, lambda now: found + size * (now // every_s)).until(40)
    assert run.window.bytes_per_s == pytest.approx(rate, rel=0.3 if jitter_s else 0.05)


@pytest.mark.parametrize("stall_s", [0.2, 1.0])
def test_a_stall_is_not_taken_for_a_slower_link(stall_s: float) -> None:
    rate = 20 * MBIT
    path = Path(lambda _: rate, 0.02, stalls=[(1.0, 1.0 + stall_s)])
    run = Simulation(path, lambda now: 1e18 if now < 1.5 + stall_s else 0.0).until(10)
    assert run.window.bytes_per_s == pytest.approx(rate, rel=0.1)


def test_what_it_says_of_a_link() -> None:
    run = Simulation(Path(lambda _: 10 * MBIT, 0.03)).until(2)
    assert run.window.rtt_s == pytest.approx(0.03, abs=0.01)
    assert run.window.jitter_s < 0.005
    assert LEAST_PIECE <= run.window.piece <= 10 * MBIT * 0.005
    shaky = Simulation(Path(lambda _: 10 * MBIT, 0.03, 0.02)).until(2)
    assert shaky.window.jitter_s > 2 * run.window.jitter_s


def test_it_says_nothing_of_what_it_has_not_seen() -> None:
    window = Window()
    assert window.bytes_per_s is None
    assert window.rtt_s is None
    assert window.size == FIRST_WINDOW
    window.on_starved()
    window.on_sent(100, 1.0)
    window.on_starved()
    window.on_receipt(Receipt(100, 77.0, 0.005), 1.035)
    assert window.bytes_per_s is None  # the link was not asked for more
    assert window.rtt_s == pytest.approx(0.03)
    assert window.in_flight == 0


@pytest.mark.parametrize("received", [-1, 49, 101])
def test_a_receipt_for_what_was_not_sent_is_refused(received: int) -> None:
    window = Window()
    window.on_sent(50, 1.0)
    window.on_receipt(Receipt(50, 1.0, 0.0), 1.1)
    window.on_sent(50, 1.2)
    with pytest.raises(WireError):
        window.on_receipt(Receipt(received, 1.3, 0.0), 1.4)


@given(
    steps=st.lists(
        st.tuples(
            st.integers(1, 300_000),  # bytes of a message
            st.floats(0, 10),  # seconds until the next step
            st.none() | st.tuples(st.floats(0, 1), st.floats(-1e12, 1e12), st.floats(0, 1e9)),
        ),
        max_size=60,
    )
)
def test_no_receipt_takes_it_out_of_bounds(
    steps: list[tuple[int, float, tuple[float, float, float] | None]],
) -> None:
    window, now = Window(), 0.0
    for size, later_s, receipt in steps:
        window.on_sent(size, now)
        now += later_s
        if receipt is not None:
            share, arrived_s, held_s = receipt
            received = window.delivered + int(share * window.in_flight)
            window.on_receipt(Receipt(received, arrived_s, held_s), now)
            assert window.delivered <= received
        assert LEAST_WINDOW <= window.size <= LARGEST_WINDOW
        assert LEAST_PIECE <= window.piece <= LARGEST_PIECE
        assert window.in_flight == window.sent - window.delivered >= 0
        assert window.jitter_s >= 0
        assert window.bytes_per_s is None or window.bytes_per_s >= 0
