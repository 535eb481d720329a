"""A link with one bottleneck and a virtual clock, and a sender that obeys a window."""

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count

from molink.transport.window import (
    FEW_BYTES,
    FEW_BYTES_INTERVAL_S,
    RECEIPT_INTERVAL_S,
    Receipt,
    Window,
)

HOLD_S = 0.04  # one draw of jitter


@dataclass
class Path:
    """Rates are bytes a second and may change in time; times are of a whole round trip."""

    rate: Callable[[float], float]
    rtt_s: float
    jitter_s: float = 0.0  # most that each direction adds
    loss: float = 0.0  # share of packets, each of which holds what follows for a round trip
    offset_s: float = 1e6  # between the two clocks
    stalls: list[tuple[float, float]] = field(default_factory=list)  # when nothing passes


@dataclass
class Run:
    """What happened, for checks."""

    window: Window
    delivered: list[tuple[float, int]] = field(default_factory=list)  # time, bytes
    queued: list[tuple[float, float]] = field(default_factory=list)  # time, seconds before leaving
    sizes: list[tuple[float, int]] = field(default_factory=list)

    def rate(self, start: float, end: float) -> float:
        return sum(size for at, size in self.delivered if start <= at < end) / (end - start)

    def queue_s(self, start: float, end: float, share: float = 0.5) -> float:
        found = sorted(s for at, s in self.queued if start <= at < end)
        return found[int(share * len(found))]


class Simulation:
    """Runs a sender with `demand` (bytes it has had to send by a time) over a path."""

    def __init__(self, path: Path, demand: Callable[[float], float] = lambda _: 1e18) -> None:
        self.path = path
        self.demand = demand
        self.run = Run(Window())
        self._random = random.Random(1)
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._order = count()
        self._free_at = self._blocked_until = 0.0
        self._last = {"there": 0.0, "back": 0.0}
        self._jitter = {"there": (0.0, 0.0), "back": (0.0, 0.0)}
        self._received = 0
        self._arrived = 0.0
        self._first = 0.0  # of what no receipt was sent for
        self._unacknowledged = 0

    def until(self, end: float) -> Run:
        self._at(0.0, self._tick)
        while self._events and self._events[0][0] <= end:
            now, _, action = heapq.heappop(self._events)
            action(now)
        return self.run

    def _at(self, time: float, action: Callable[[float], None]) -> None:
        heapq.heappush(self._events, (time, next(self._order), action))

    def _tick(self, now: float) -> None:
        """New demand is noticed."""
        self._send(now)
        self._at(now + 0.005, self._tick)

    def _send(self, now: float) -> None:
        window = self.run.window
        while window.has_room:
            waiting = self.demand(now) - window.sent
            if waiting < 1:
                window.on_starved()
                break
            size = int(min(window.piece, waiting))
            window.on_sent(size, now)
            self._carry(size, now)
        self.run.sizes.append((now, window.size))

    def _carry(self, size: int, now: float) -> None:
        self.run.queued.append((now, max(self._free_at - now, 0.0)))
        self._free_at = max(self._free_at, now) + size / self.path.rate(now)
        packets = max(size / 1448, 1)
        if self._random.random() < 1 - (1 - self.path.loss) ** packets:
            self._blocked_until = self._free_at + self.path.rtt_s
        leaves = max(self._free_at, self._blocked_until)
        for start, end in self.path.stalls:
            if start <= leaves < end:
                self._free_at = leaves = end
        self._at(self._delayed("there", leaves), lambda at: self._arrive(size, at))

    def _delayed(self, way: str, leaves: float) -> float:
        until, extra = self._jitter[way]
        if leaves >= until:
            extra = self._random.uniform(0, self.path.jitter_s)
            self._jitter[way] = (leaves + HOLD_S, extra)
        self._last[way] = max(self._last[way], leaves + self.path.rtt_s / 2 + extra)
        return self._last[way]

    def _arrive(self, size: int, now: float) -> None:
        self._received += size
        self._arrived = now
        self.run.delivered.append((now, size))
        if not self._unacknowledged:
            self._first = now
            self._at(now + RECEIPT_INTERVAL_S, self._acknowledge)
            self._at(now + FEW_BYTES_INTERVAL_S, self._acknowledge)
        self._unacknowledged += size
        if now >= self._first + RECEIPT_INTERVAL_S:
            self._acknowledge(now)

    def _acknowledge(self, now: float) -> None:
        """A receipt, if one is due."""
        is_few = self._unacknowledged < FEW_BYTES
        interval_s = FEW_BYTES_INTERVAL_S if is_few else RECEIPT_INTERVAL_S
        is_due = now - self._first >= interval_s - 1e-9
        if not self._unacknowledged or not is_due:
            return
        self._unacknowledged = 0
        receipt = Receipt(self._received, self._arrived + self.path.offset_s, now - self._arrived)
        self._at(self._delayed("back", now), lambda at: self._take(receipt, at))

    def _take(self, receipt: Receipt, now: float) -> None:
        self.run.window.on_receipt(receipt, now)
        self._send(now)
