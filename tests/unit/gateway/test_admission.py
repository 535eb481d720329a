"""Who runs, who waits, and who is sent away."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from molink.gateway.admission import Admission, Limits
from molink.gateway.http import Refusal
from molink.gateway.keys import Tenant

ALICE, BOB = Tenant(name="alice"), Tenant(name="bob")


class Visitor:
    """One request: it runs until it is told to end."""

    def __init__(self, admission: Admission, tenant: Tenant) -> None:
        self.is_in = False
        self.ends = asyncio.Event()
        self.task = asyncio.create_task(self._visit(admission, tenant))

    async def _visit(self, admission: Admission, tenant: Tenant) -> None:
        async with admission.enter(tenant, 400):
            self.is_in = True
            await self.ends.wait()
            self.is_in = False


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


@asynccontextmanager
async def visiting(admission: Admission, *tenants: Tenant) -> AsyncIterator[list[Visitor]]:
    visitors = []
    for tenant in tenants:
        visitors.append(Visitor(admission, tenant))
        await settle()
    yield visitors
    for visitor in visitors:
        visitor.task.cancel()
    await asyncio.gather(*(v.task for v in visitors), return_exceptions=True)
    assert (admission.waiting, admission._running) == (0, 0)


def limited(running: int | None, waiting: int = 100, at_once: int | None = None) -> Admission:
    return Admission(Limits(running, waiting), lambda: at_once)


async def test_no_more_run_than_may_and_the_next_follows_at_once() -> None:
    async with visiting(limited(2), *[ALICE] * 4) as visitors:
        assert [v.is_in for v in visitors] == [True, True, False, False]
        visitors[0].ends.set()
        await settle()
        assert [v.is_in for v in visitors] == [False, True, True, False]


async def test_the_one_with_least_served_goes_first() -> None:
    admission = limited(1)
    async with visiting(admission, ALICE, ALICE, ALICE, BOB) as visitors:
        admission.charge(ALICE, 1000)
        admission.charge(BOB, 10)
        for leaving, following in ((0, 3), (3, 1), (1, 2)):
            visitors[leaving].ends.set()
            await settle()
            assert [v.is_in for v in visitors] == [i == following for i in range(4)]


async def test_who_used_what_nobody_wanted_is_not_made_to_pay() -> None:
    admission = limited(1)
    for _ in range(3):
        async with admission.enter(ALICE, 4_000_000):
            pass
    async with visiting(admission, ALICE, *[BOB, ALICE] * 3) as visitors:
        order = []
        for _ in range(6):
            (running,) = [v for v in visitors if v.is_in]
            running.ends.set()
            await settle()
            (following,) = [v for v in visitors if v.is_in]
            order.append(visitors.index(following))
            admission.charge(BOB if order[-1] % 2 else ALICE, 100)
        assert {order.index(i) // 2 for i in (1, 2)} == {0}
        visitors[order[-1]].ends.set()


async def test_too_many_are_told_when_to_come_back() -> None:
    admission = limited(1, waiting=2)
    async with visiting(admission, *[ALICE] * 3):
        with pytest.raises(Refusal, match="2 requests wait already; try again in") as caught:
            async with admission.enter(BOB, 1):
                pass
        assert caught.value.status == 429
        assert int(dict(caught.value.headers)[b"retry-after"]) >= 1


async def test_the_engine_says_how_many_suit_it() -> None:
    assert limited(None, at_once=8).most_running == 10
    assert limited(None).most_running > 100
    assert limited(3, at_once=8).most_running == 3


async def test_a_tenant_may_have_so_many_at_once() -> None:
    alone = Tenant(name="alone", at_once=1)
    admission = limited(5)
    async with visiting(admission, alone):
        with pytest.raises(Refusal, match="alone may have 1 requests at once"):
            async with admission.enter(alone, 1):
                pass
        async with admission.enter(BOB, 1):
            pass


async def test_a_tenant_may_make_so_many_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("molink.gateway.admission.MINUTE_S", 0.3)
    slow, admission = Tenant(name="slow", requests_per_minute=2), limited(5)
    for _ in range(2):
        async with admission.enter(slow, 1):
            pass
    with pytest.raises(Refusal, match="2 requests a minute"):
        async with admission.enter(slow, 1):
            pass
    await asyncio.sleep(0.35)
    async with admission.enter(slow, 1):
        pass


async def test_whoever_goes_away_leaves_no_trace() -> None:
    admission = limited(1)
    async with visiting(admission, *[ALICE] * 5) as visitors:
        for index in (3, 0, 1):  # one who waits, the one who runs, the one whose turn it is then
            visitors[index].task.cancel()
        await settle()
        assert [v.is_in for v in (visitors[2], visitors[4])] == [True, False]
        assert admission.waiting == 1
