"""Direct links between stages: who can dial whom, tried again while the head relays."""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

from molink.cluster.coordinator import Coordinator
from molink.core.ids import HEAD, NodeId
from molink.wire.to_agent import Dial

DIAL_ANSWER_S = 8.0
SEEK_S = 1.0
FIRST_RETRY_S, LAST_RETRY_S = 5.0, 300.0  # between attempts of one pair, doubled each time

Pair = frozenset[NodeId]


class Voice(Protocol):
    """Whom this can speak to: nodes, and the person at the terminal."""

    def tell(self, node: NodeId, message: Dial) -> None: ...

    def say(self, text: str) -> None: ...


@dataclass(slots=True)
class _Retry:
    """When a pair is to dial again."""

    first: NodeId
    second: NodeId
    due_at: float
    wait_s: float


class Paths:
    """Owns the dials under way, and the pairs that are relayed until they can dial each other."""

    def __init__(self, coordinator: Coordinator, voice: Voice) -> None:
        self._coordinator = coordinator
        self._voice = voice
        self._dials: dict[tuple[NodeId, NodeId], asyncio.Future[bool]] = {}
        self._retries: dict[Pair, _Retry] = {}

    @property
    def relayed(self) -> frozenset[Pair]:
        """Pairs that tried, and could not dial each other."""
        return frozenset(self._retries)

    async def link(self, nodes: Iterable[NodeId]) -> None:
        """Let neighbours dial each other; where neither can, the head relays."""
        pairs = [pair for pair in pairwise(nodes) if HEAD not in pair]
        await asyncio.gather(*(self._link_pair(*pair) for pair in pairs))

    async def _link_pair(self, first: NodeId, second: NodeId) -> None:
        if frozenset((first, second)) in self._retries:  # relayed, and tried again on its own
            return
        if await self._can_dial(first, second):
            self._retries.pop(frozenset((first, second)), None)
            return
        self._voice.say(f"{self._names(first, second)} cannot dial each other; the head relays")
        self._retry_later(first, second)

    async def seek(self) -> None:
        """For ever: let relayed pairs dial again, ever more seldom."""
        while True:
            await asyncio.sleep(SEEK_S)
            now = asyncio.get_running_loop().time()
            for retry in [retry for retry in self._retries.values() if retry.due_at <= now]:
                await self._try_again(retry)

    async def _try_again(self, retry: _Retry) -> None:
        pair = frozenset((retry.first, retry.second))
        state = self._coordinator.state
        if not all(state.knows(node) and state.node(node).is_connected for node in pair):
            self._retries.pop(pair, None)  # the next pipeline links its own
        elif await self._can_dial(retry.first, retry.second):
            self._retries.pop(pair, None)
            self._voice.say(f"{self._names(*pair)} are linked directly now")
        else:
            retry.wait_s = min(2 * retry.wait_s, LAST_RETRY_S)
            retry.due_at = asyncio.get_running_loop().time() + retry.wait_s

    def forget(self, node: NodeId) -> None:
        """A node is there anew, perhaps elsewhere: whom it can dial is not known."""
        self._retries = {pair: r for pair, r in self._retries.items() if node not in pair}

    def broke(self, one: NodeId, other: NodeId, reason: str) -> None:
        """A direct link is gone and nothing was lost with it: the head relays meanwhile."""
        if frozenset((one, other)) not in self._retries:
            names = self._names(one, other)
            self._voice.say(f"the link between {names} broke ({reason}); the head relays")
            self._retry_later(one, other)

    def _retry_later(self, first: NodeId, second: NodeId) -> None:
        due_at = asyncio.get_running_loop().time() + FIRST_RETRY_S
        retry = _Retry(first, second, due_at, FIRST_RETRY_S)
        self._retries[frozenset((first, second))] = retry

    async def _can_dial(self, first: NodeId, second: NodeId) -> bool:
        for dialler, other in ((first, second), (second, first)):
            address = self._coordinator.state.node(other).address
            if address is not None and await self._ask_to_dial(dialler, other, address):
                return True
        return False

    async def _ask_to_dial(self, dialler: NodeId, other: NodeId, address: str) -> bool:
        answer: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._dials[dialler, other] = answer
        self._voice.tell(dialler, Dial(other, address))
        try:
            return await asyncio.wait_for(answer, DIAL_ANSWER_S)
        except TimeoutError:
            return False

    def dialled(self, dialler: NodeId, other: NodeId, ok: bool) -> None:
        """A node says whether it has a direct link to another one."""
        waiting = self._dials.pop((dialler, other), None)
        if waiting is not None and not waiting.done():
            waiting.set_result(ok)

    def _names(self, *nodes: NodeId) -> str:
        return " and ".join(self._coordinator.state.node(node).name for node in sorted(nodes))
