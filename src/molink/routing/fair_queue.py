"""Who is next when requests of several tenants wait: the one that has been served least.

The virtual token counter of Sheng et al., «Fairness in Serving Large Language Models» (OSDI 2024):
each tenant has a counter of what it was served, over its weight. A tenant that comes back after a
pause is lifted to the least of those that wait, so that it can neither save up nor be punished.
"""

from collections import deque
from typing import Generic, TypeVar

Item = TypeVar("Item")


class FairQueue(Generic[Item]):
    """Owns what waits, in order for each tenant, and what each was served."""

    def __init__(self) -> None:
        self._waiting: dict[str, deque[Item]] = {}  # no tenant with nothing
        self._served: dict[str, float] = {}
        self._last = 0.0  # counter of the tenant that was last to leave the queue

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def put(self, tenant: str, item: Item) -> None:
        """Have an item wait behind the tenant's others."""
        if tenant not in self._waiting:
            self._lift(tenant)
            self._waiting[tenant] = deque()
        self._waiting[tenant].append(item)

    def pass_by(self, tenant: str) -> None:
        """An item of a tenant need not wait: nobody does."""
        self._lift(tenant)
        self._last = self._served[tenant]

    def _lift(self, tenant: str) -> None:
        others = [self._served[name] for name in self._waiting]
        least = min(others, default=self._last)
        self._served[tenant] = max(self._served.get(tenant, 0.0), least)

    def take(self) -> Item:
        """The first item of the tenant that was served least. Raises ValueError if none waits."""
        tenant = min(self._waiting, key=self._served.__getitem__)
        item = self._waiting[tenant].popleft()
        self._leave(tenant)
        return item

    def remove(self, tenant: str, item: Item) -> None:
        """Take out an item that waits no more. Raises ValueError if it does not wait."""
        self._waiting.get(tenant, deque()).remove(item)
        self._leave(tenant)

    def charge(self, tenant: str, cost: float) -> None:
        """Count what a tenant was served: cost over its weight."""
        self._served[tenant] = self._served.get(tenant, 0.0) + cost

    def _leave(self, tenant: str) -> None:
        if not self._waiting[tenant]:
            del self._waiting[tenant]
            self._last = self._served[tenant]
