"""Who is next when requests of several tenants wait: the one that has been served least.

The virtual token counter of Sheng et al., «Fairness in Serving Large Language Models» (OSDI 2024):
each tenant has a counter of what it was served, over its weight. A tenant that comes back after a
pause is lifted to the least of those that wait, so that it can neither save up nor be punished.
"""

from collections import deque
from typing import Generic, TypeVar

Item = TypeVar("Item")


class FairQueue(Generic[Item]):
    """Owns what waits, in order for each tenant and priority, and what each tenant was served."""

    def __init__(self) -> None:
        self._waiting: dict[tuple[int, str], deque[Item]] = {}  # by priority and tenant; no empty
        self._served: dict[str, float] = {}
        self._last = 0.0  # counter of the tenant that was last to leave the queue

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def put(self, tenant: str, item: Item, priority: int = 0) -> None:
        """Have an item wait behind the tenant's others; smaller priorities go first."""
        if all(tenant != other for _, other in self._waiting):
            self._lift(tenant)
        self._waiting.setdefault((priority, tenant), deque()).append(item)

    def pass_by(self, tenant: str) -> None:
        """An item of a tenant need not wait: nobody does."""
        self._lift(tenant)
        self._last = self._served[tenant]

    def _lift(self, tenant: str) -> None:
        others = [self._served[name] for _, name in self._waiting]
        least = min(others, default=self._last)
        self._served[tenant] = max(self._served.get(tenant, 0.0), least)

    def take(self) -> Item:
        """The most urgent item, of the tenant that was served least; ValueError if none waits."""
        key = min(self._waiting, key=lambda key: (key[0], self._served[key[1]]))
        item = self._waiting[key].popleft()
        self._leave(key)
        return item

    def remove(self, tenant: str, item: Item, priority: int = 0) -> None:
        """Take out an item that waits no more. Raises ValueError if it does not wait."""
        self._waiting.get((priority, tenant), deque()).remove(item)
        self._leave((priority, tenant))

    def charge(self, tenant: str, cost: float) -> None:
        """Count what a tenant was served: cost over its weight."""
        self._served[tenant] = self._served.get(tenant, 0.0) + cost

    def _leave(self, key: tuple[int, str]) -> None:
        if not self._waiting[key]:
            del self._waiting[key]
            self._last = self._served[key[1]]
