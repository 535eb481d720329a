"""Who is let through to the engine, who waits, and who is told to come back later."""

import asyncio
import contextlib
import math
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import msgspec

from molink.gateway.http import Refusal
from molink.gateway.keys import Tenant
from molink.routing.fair_queue import FairQueue

MINUTE_S = 60.0
SURPLUS = 1.25
UNKNOWN = 256
BYTES_PER_TOKEN = 4  # of a prompt, roughly
LONGEST_RETRY_S = 60


class Limits(msgspec.Struct, frozen=True):
    """What the head's user allows."""

    running: int | None = None  # requests at the engine; None: as many as suit it
    waiting: int = 1024  # more are told to come back
    seconds: float | None = None  # that a request may take, waiting counted


class Admission:
    """Owns the requests that wait, and how many run; fair among tenants, see `FairQueue`.

    Args:
        at_once: how many requests the engine computes at once; None: not known.
    """

    def __init__(self, limits: Limits, at_once: Callable[[], int | None]) -> None:
        self._limits = limits
        self._at_once = at_once
        self._running = 0
        self._present: Counter[str] = Counter()  # requests that run or wait, by tenant
        self._recent: dict[str, deque[float]] = {}  # when a tenant's requests of a minute came
        self._queue: FairQueue[asyncio.Future[None]] = FairQueue()
        self._seconds_each = 1.0  # a moving mean of what a request took

    @property
    def most_running(self) -> int:
        """Requests that may be at the engine: what it computes at once, and some to choose from."""
        if self._limits.running is not None:
            return self._limits.running
        return math.ceil(SURPLUS * (self._at_once() or UNKNOWN))

    @property
    def present(self) -> int:
        """Requests that run or wait."""
        return self._present.total()

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return len(self._queue)

    @asynccontextmanager
    async def enter(self, tenant: Tenant, size: int, priority: int = 0) -> AsyncIterator[None]:
        """Wait for a place at the engine, and hold it. Raises Refusal if there is no room to wait.

        Args:
            size: bytes of the request.
            priority: smaller ones go first, as vLLM has it.
        """
        self._check_room(tenant)
        self._present[tenant.name] += 1
        try:
            await self._wait(tenant, priority)
            began = time.monotonic()
            self.charge(tenant, size / BYTES_PER_TOKEN)
            try:
                yield
            finally:
                self._seconds_each += 0.1 * (time.monotonic() - began - self._seconds_each)
                self._running -= 1
                self._let_in()
        finally:
            self._present[tenant.name] -= 1

    def charge(self, tenant: Tenant, tokens: float) -> None:
        """Count tokens that a tenant was served."""
        self._queue.charge(tenant.name, tokens / tenant.weight)

    def _check_room(self, tenant: Tenant) -> None:
        if self._running >= self.most_running and self.waiting >= self._limits.waiting:
            wait_s = self._seconds_each * (self.waiting + 1) / self.most_running
            raise _later(f"{self.waiting} requests wait already", wait_s)
        self.check(tenant)

    def check(self, tenant: Tenant) -> None:
        """Raises Refusal for a request beyond what its tenant may make."""
        if tenant.at_once is not None and self._present[tenant.name] >= tenant.at_once:
            text = f"{tenant.name} may have {tenant.at_once} requests at once"
            raise _later(text, self._seconds_each)
        if tenant.requests_per_minute is not None:
            self._check_rate(tenant, tenant.requests_per_minute)

    def _check_rate(self, tenant: Tenant, most: int) -> None:
        now, recent = time.monotonic(), self._recent.setdefault(tenant.name, deque())
        while recent and recent[0] <= now - MINUTE_S:
            recent.popleft()
        if len(recent) >= most:
            text = f"{tenant.name} may make {most} requests a minute"
            raise _later(text, recent[0] + MINUTE_S - now)
        recent.append(now)

    async def _wait(self, tenant: Tenant, priority: int) -> None:
        """Return once there is a place, which is taken then."""
        if self._running < self.most_running and not self.waiting:
            self._running += 1
            self._queue.pass_by(tenant.name)
            return
        turn = asyncio.get_running_loop().create_future()
        self._queue.put(tenant.name, turn, priority)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                with contextlib.suppress(ValueError):
                    self._queue.remove(tenant.name, turn, priority)
            else:  # its turn came at the same moment
                self._running -= 1
                self._let_in()
            raise

    def _let_in(self) -> None:
        while self.waiting and self._running < self.most_running:
            turn = self._queue.take()
            if not turn.cancelled():
                self._running += 1
                turn.set_result(None)


def _later(reason: str, seconds: float) -> Refusal:
    retry = min(max(1, math.ceil(seconds)), LONGEST_RETRY_S)
    return Refusal(429, "RateLimitError", f"{reason}; try again in {retry} s", retry)
