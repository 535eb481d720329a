"""The gateway's connection to the head's agent: what the cluster looks like, and what is lost."""

import asyncio
import contextlib
import logging
from pathlib import Path

from molink.cluster.view import ClusterView, decode_view
from molink.core.ids import HEAD, Address, Port
from molink.transport.local import LocalSocket
from molink.wire import to_agent, to_gateway
from molink.wire.frames import Kind
from molink.wire.to_agent import GatewayDrains
from molink.wire.to_gateway import Drain, EngineGone, PipelineDown, ToGateway

logger = logging.getLogger("molink.gateway")
AGENT = Address(HEAD, Port.AGENT)
STARTING = "it is being started; `molink status` shows how far it is"


class AgentClient:
    """Owns what the gateway knows of the cluster. Ends the process when the agent is gone.

    To be made, and read, in a running event loop.

    Args:
        max_outage_s: how long requests wait for what is lost.
    """

    def __init__(self, socket_path: Path, max_outage_s: float) -> None:
        self._max_outage_s = max_outage_s
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        self._down_at = self._loop.time()
        self._has_served = False
        self.view_json = b"{}"
        self.view: ClusterView | None = None
        self.down: str | None = STARTING
        self.engines_lost = 0
        self.drains = asyncio.Event()  # nothing more is to be taken
        self.knows = asyncio.Event()  # what the cluster looks like
        self._socket = LocalSocket(socket_path, Address(HEAD, Port.GATEWAY))
        self._socket.send(Kind.CONTROL, AGENT, [to_agent.encode(to_agent.Attach())])
        self._socket.follow(self._take)

    @property
    def waits_for_s(self) -> float:
        """How much longer a request may wait for what is lost; 0: not any more."""
        if not self._has_served:
            return 0.0
        return max(0.0, self._max_outage_s - (self._loop.time() - self._down_at))

    @property
    def trouble(self) -> str:
        """Why there are no answers, and whether requests have waited for them."""
        reason = f"the pipeline is down: {self.down}"
        if self.waits_for_s or not self._has_served:
            return reason
        return f"{reason}; nobody took its place within {self._max_outage_s:g} s (--max-outage)"

    def report_drained(self, requests: int) -> None:
        """Say how many requests there are still to be answered."""
        self._socket.send(Kind.CONTROL, AGENT, [to_agent.encode(GatewayDrains(requests))])

    async def change(self, timeout_s: float) -> None:
        """Wait until something is lost or back, but no longer than so many seconds."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), timeout_s)

    def _take(self, payload: bytes | bytearray) -> None:
        self._loop.call_soon_threadsafe(self._handle, to_gateway.decode(payload))

    def _handle(self, message: ToGateway) -> None:
        before = self.down, self.engines_lost
        match message:
            case PipelineDown(reason=reason):
                self._goes_down(reason)
            case Drain():
                self.drains.set()
            case EngineGone(reason=reason):
                self._goes_down(reason)
                self.engines_lost += 1
            case to_gateway.ClusterView(view=view):
                self.view_json, self.view = view, decode_view(view)
                self._has_served = self.view.has_served
                self.knows.set()
                if self.view.serving:
                    self.down = None
        if (self.down, self.engines_lost) != before:
            self._changed.set()
            self._changed = asyncio.Event()

    def _goes_down(self, reason: str) -> None:
        if self.down is None:
            self._down_at = self._loop.time()
        self.down = reason
