"""How many bytes may be in flight on a link.

A window after BBR, without its pacing: what the link delivers in its shortest round trip, a little
more to find out when it can do more, and what arrives in bursts. TCP below it may hold back more;
this keeps short the queue in front of the bottleneck, where priority means nothing any more.

Cardwell et al., «BBR: Congestion-Based Congestion Control», ACM Queue 14 (5), 2016. Rate samples:
draft-cheng-iccrg-delivery-rate-estimation. Bursts: `extra_acked` of draft-ietf-ccwg-bbr. Jitter:
RFC 3550, section 6.4.1. Time is an argument; nothing here reads a clock.
"""

from collections import deque
from typing import NamedTuple

from molink.core.errors import WireError
from molink.wire.frames import HEADER_SIZE, MAX_PAYLOAD

RECEIPT_INTERVAL_S = 0.005  # from a message's arrival to its receipt, at most
FEW_BYTES = 2 * 1024  # less than a full link's message, and no window is so small:
FEW_BYTES_INTERVAL_S = 0.05  # a receipt for fewer waits for a message that it may leave with
GAIN = 1.25
PROBING_GAIN = 0.5  # while the queue is emptied to see the shortest round trip
RATE_MEMORY_S = 2.0  # of a full link, and at least so many round trips:
RATE_MEMORY_ROUND_TRIPS = 10
RTT_MEMORY_S = 5.0  # then the shortest round trip is looked for again
GROWTH = 1.25  # of the rate from round to round, below which the link is taken for full
FULL_ROUNDS = 3  # one, if round trips have grown too
STARTUP_GAIN = 2.9
COLLAPSE = 2.0  # round trips so many times as long as the rate explains: it may have fallen
LATE_RECEIPTS = 4  # in a row, none of which is a late burst, so it has
UNSURE_S = 5.0  # after so long with less than half a window in flight, only a part of it is sure
UNSURE_PART = 4
FIRST_WINDOW = 16 * 1024  # bytes
LEAST_WINDOW = 4 * 1024
LARGEST_WINDOW = 64 * 1024 * 1024
PIECE_S = 0.004  # of the link's time that one message takes
LEAST_PIECE, FIRST_PIECE, LARGEST_PIECE = 2 * 1024, 4 * 1024, MAX_PAYLOAD + HEADER_SIZE  # bytes


class Receipt(NamedTuple):
    """What the receiver says of a link: all bytes so far, and when the last of them came."""

    received: int
    arrived_s: float  # the receiver's monotonic clock
    held_s: float  # from then until the receipt left


class _Sent(NamedTuple):
    """A message in flight, and how things stood when it left."""

    end: int  # bytes sent, with it
    at: float
    delivered: int  # bytes acknowledged by then
    arrived_s: float | None  # of the receipt that acknowledged them; None: nothing was in flight
    first_at: float  # when the newest message acknowledged by then had left
    is_limited: bool  # by the application, which had too little to send


class _Max:
    """The largest value of a while."""

    def __init__(self) -> None:
        self._values: deque[tuple[float, float]] = deque()  # newer ones are smaller

    @property
    def value(self) -> float:
        return self._values[0][1] if self._values else 0.0

    def clear(self) -> None:
        self._values.clear()

    def add(self, value: float, now: float, memory_s: float) -> None:
        while self._values and self._values[-1][1] <= value:
            self._values.pop()
        self._values.append((now, value))
        while self._values[0][0] < now - memory_s:
            self._values.popleft()


class Window:
    """The sender's books of one link. Bytes are those of whole messages on the link."""

    def __init__(self) -> None:
        self.sent = 0
        self.delivered = 0
        self.size = FIRST_WINDOW
        self.jitter_s = 0.0
        self._rtt = _ShortestRoundTrip()
        self._in_flight: deque[_Sent] = deque()
        self._rate = _Max()
        self._bursts = _Bursts()
        self._limited_until = -1  # bytes delivered: what is sent until then says too little
        self._full_s = 0.0  # for how long, in all, there was enough to send
        self._receipt_at = 0.0
        self._is_measured = False
        self._startup: _Startup | None = _Startup()
        self._latest_rate = 0.0
        self._late = 0
        self._sure = _Sure()
        self._arrived_s: float | None = None
        self._newest_at = 0.0

    @property
    def in_flight(self) -> int:
        return self.sent - self.delivered

    @property
    def has_room(self) -> bool:
        return self.in_flight < self.size

    @property
    def rtt_s(self) -> float | None:
        """The shortest round trip of late; None: not known yet."""
        return self._rtt.shortest_s

    @property
    def bytes_per_s(self) -> float | None:
        """What the link delivers; None while it has never had enough to do."""
        return self._rate.value if self._is_measured else None

    @property
    def piece(self) -> int:
        """Bytes of a message that hold the link for a few milliseconds."""
        if not self._rate.value:
            return FIRST_PIECE
        return int(min(max(self._rate.value * PIECE_S, LEAST_PIECE), LARGEST_PIECE))

    def on_sent(self, size: int, now: float) -> None:
        is_first = self.in_flight == 0
        self.sent += size
        self._in_flight.append(
            _Sent(
                self.sent,
                now,
                self.delivered,
                None if is_first else self._arrived_s,
                now if is_first else self._newest_at,
                is_first or self._limited_until >= self.delivered,
            )
        )
        if is_first:
            self._newest_at, self._arrived_s = now, None

    def on_starved(self) -> None:
        """There is room, and nothing to send."""
        self._limited_until = self.sent

    def on_receipt(self, receipt: Receipt, now: float) -> None:
        """Take the receiver's word for what has arrived.

        Raises:
            WireError: it cannot have received that.
        """
        if not self.delivered <= receipt.received <= self.sent:
            raise WireError(f"{self.sent} bytes were sent, and {receipt.received} acknowledged")
        newest, acknowledged = None, receipt.received - self.delivered
        used = self.in_flight
        while self._in_flight and self._in_flight[0].end <= receipt.received:
            newest = self._in_flight.popleft()
        if newest is None:
            return
        self._measure_jitter(newest, receipt)
        self.delivered = receipt.received
        rtt_s = max(now - newest.at - receipt.held_s, 1e-6)
        self._rtt.add(rtt_s, self, now)
        rate = self._measure_rate(newest, receipt, now)
        is_late = rtt_s > COLLAPSE * self._explained_s(newest)
        if self._has_fallen(newest, receipt, is_late, acknowledged):
            self._start_again(rate, now)
        self._bursts.add(acknowledged, self._rate.value, self._memory_s, now)
        if self._startup is not None and self._startup.is_over(self, newest, rtt_s):
            self._startup = None
        self._arrived_s, self._newest_at = receipt.arrived_s, newest.at
        self._sure.add(used, self.size, None if is_late else acknowledged, now)
        self._resize(acknowledged)

    def _measure_jitter(self, newest: _Sent, receipt: Receipt) -> None:
        if self._arrived_s is not None and newest.arrived_s is not None:
            apart = receipt.arrived_s - self._arrived_s - (newest.at - self._newest_at)
            self.jitter_s += (min(abs(apart), 10.0) - self.jitter_s) / 16

    def _measure_rate(self, newest: _Sent, receipt: Receipt, now: float) -> float:
        """One sample over about a round trip; of a limited sender only what raises the rate."""
        if newest.arrived_s is None:
            took_s = now - receipt.held_s - newest.first_at
        else:
            took_s = max(receipt.arrived_s - newest.arrived_s, newest.at - newest.first_at)
        rate = (receipt.received - newest.delivered) / max(took_s, 1e-6)
        if not newest.is_limited:
            self._full_s += min(now - self._receipt_at, took_s)
        self._receipt_at = now
        if rate >= self._rate.value or not newest.is_limited:
            self._rate.add(rate, self._full_s, self._memory_s)
        self._is_measured |= not newest.is_limited
        self._latest_rate = rate
        return rate

    def _has_fallen(
        self, newest: _Sent, receipt: Receipt, is_late: bool, acknowledged: int
    ) -> bool:
        """Whether the link is slower for good, rather than late for once: then a burst follows."""
        since_s = receipt.arrived_s - (self._arrived_s or receipt.arrived_s)
        is_slow = acknowledged * COLLAPSE < self._rate.value * since_s
        counts = is_late and is_slow and not newest.is_limited
        self._late = self._late + 1 if counts else 0
        return self._late >= LATE_RECEIPTS

    def _explained_s(self, newest: _Sent) -> float:
        """The round trip of a message, if the link is as fast as it is taken to be."""
        in_flight = newest.end - newest.delivered
        bursts_s = self._bursts.value / self._rate.value if self._rate.value else 0.0
        return max(in_flight / max(self._rate.value, 1.0), self.rtt_s or 0.0) + bursts_s

    def _start_again(self, rate: float, now: float) -> None:
        self._rate.clear()
        self._rate.add(rate, self._full_s, 0.0)
        self._bursts, self._startup, self._late = _Bursts(now), _Startup(), 0

    @property
    def _memory_s(self) -> float:
        return max(RATE_MEMORY_S, RATE_MEMORY_ROUND_TRIPS * (self.rtt_s or 0.0))

    def _resize(self, acknowledged: int) -> None:
        if self._startup is not None:  # doubles in every round trip
            most = max(STARTUP_GAIN * self._path_bytes, FIRST_WINDOW) + self._burst_bytes
            wanted = min(self.size + acknowledged, self._sure.part(int(most)))
        else:
            wanted = self._sure.part(int(GAIN * self._path_bytes + self._burst_bytes))
        if self._rtt.is_probing:
            wanted = min(wanted, int(PROBING_GAIN * self._latest_rate * (self.rtt_s or 0.0)))
        self.size = min(max(wanted, LEAST_WINDOW, 2 * self.piece), LARGEST_WINDOW)

    @property
    def rate(self) -> float:
        """Bytes a second, also of a sender that had too little to send."""
        return self._rate.value

    @property
    def _path_bytes(self) -> float:
        """What is under way when the link is full and no queue stands: bandwidth times delay."""
        return self._rate.value * ((self.rtt_s or 0.0) + RECEIPT_INTERVAL_S)

    @property
    def _burst_bytes(self) -> float:
        """Beyond those of one receipt's interval."""
        return max(self._bursts.value - self._rate.value * RECEIPT_INTERVAL_S, 0.0)


class _Sure:
    """How much of a window a link that had little to do may use at once, until it is seen to
    carry that still: it may have become slower (after RFC 7661).
    """

    def __init__(self) -> None:
        self._most: int | None = None  # bytes; None: all
        self._wanted = 0
        self._used_at = 0.0

    def add(self, used: int, size: int, in_time: int | None, now: float) -> None:
        """Of a window of `size`, `used` bytes were in flight; so many arrived, None: late."""
        if in_time is not None and 2 * used >= self._wanted:
            self._most, self._used_at = None, now
        elif self._most is None and now - self._used_at > UNSURE_S:
            self._most = max(size // UNSURE_PART, FIRST_WINDOW)
        elif self._most is not None and 2 * used >= size:
            self._most += in_time or 0

    def part(self, wanted: int) -> int:
        self._wanted = wanted
        return wanted if self._most is None else min(wanted, self._most)


class _ShortestRoundTrip:
    """Remembers it, and when it is old empties the queue for a round trip to see it again."""

    def __init__(self) -> None:
        self.shortest_s: float | None = None
        self.is_probing = False
        self._seen_at = 0.0
        self._probed_s = 0.0
        self._empty_at: int | None = None  # bytes sent when the queue had gone

    def add(self, rtt_s: float, window: Window, now: float) -> None:
        if self.is_probing:
            self._probe(rtt_s, window, now)
        elif self.shortest_s is None or rtt_s <= self.shortest_s:
            self.shortest_s, self._seen_at = rtt_s, now
        elif now - self._seen_at > RTT_MEMORY_S:
            self.is_probing, self._probed_s, self._empty_at = True, rtt_s, None

    def _probe(self, rtt_s: float, window: Window, now: float) -> None:
        self._probed_s = min(self._probed_s, rtt_s)
        if self._empty_at is None:
            if window.in_flight <= window.size:
                self._empty_at = window.sent
        elif window.delivered > self._empty_at:
            self.is_probing = False
            self.shortest_s, self._seen_at = self._probed_s, now


class _Bursts:
    """Bytes acknowledged at once beyond what the rate explains, as jitter and repairs cause."""

    def __init__(self, now: float = 0.0) -> None:
        self._max = _Max()
        self._since = now
        self._acknowledged = 0

    @property
    def value(self) -> float:
        return self._max.value

    def add(self, acknowledged: int, rate: float, memory_s: float, now: float) -> None:
        expected = rate * (now - self._since)
        if self._acknowledged <= expected:
            self._acknowledged, self._since, expected = 0, now, 0.0
        self._acknowledged += acknowledged
        self._max.add(self._acknowledged - expected, now, memory_s)


class _Startup:
    """Until the rate has stopped to grow for some rounds, the window doubles."""

    def __init__(self) -> None:
        self._round_ends = 0  # bytes delivered
        self._rate = 0.0
        self._full_rounds = 0

    def is_over(self, window: Window, newest: _Sent, rtt_s: float) -> bool:
        if newest.delivered < self._round_ends or newest.is_limited:
            return False
        self._round_ends = window.delivered
        if window.rate >= self._rate * GROWTH:
            self._rate, self._full_rounds = window.rate, 0
        else:
            self._full_rounds += 1
        is_queued = rtt_s > 1.5 * (window.rtt_s or 0.0) + RECEIPT_INTERVAL_S
        return self._full_rounds >= (1 if is_queued else FULL_ROUNDS)
