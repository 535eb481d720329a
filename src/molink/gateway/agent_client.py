"""The HTTP server's connection to the head's agent: the pipeline, and a view of the cluster."""

import logging
import os
import threading
import time
from concurrent.futures import Future
from pathlib import Path

from molink.cluster.view import ClusterView, decode_view
from molink.core.errors import MolinkError
from molink.core.ids import HEAD, Address, Port
from molink.transport.local import LocalSocket
from molink.wire import to_agent, to_engine
from molink.wire.frames import Kind
from molink.wire.to_engine import PipelineAssigned, PipelineDown, PipelineRepaired

logger = logging.getLogger("molink.gateway")
AGENT = Address(HEAD, Port.AGENT)


class AgentClient:
    """Keeps the latest view the agent sent. Ends the process when the agent is gone.

    Args:
        max_outage_s: how long requests wait for a lost stage.
    """

    def __init__(self, socket_path: Path, max_outage_s: float) -> None:
        self._max_outage_s = max_outage_s
        self._down_at = 0.0  # by the monotonic clock
        self._has_served = False
        self._socket = LocalSocket(socket_path, Address(HEAD, Port.GATEWAY))
        self._assigned: Future[PipelineAssigned] = Future()
        self._epoch = 0
        self.view_json = b"{}"
        self.view: ClusterView | None = None
        self.down: str | None = None
        self._socket.send(Kind.CONTROL, AGENT, [to_agent.encode(to_agent.Attach())])
        threading.Thread(target=self._receive, name="agent-client", daemon=True).start()

    def wait_for_pipeline(self) -> PipelineAssigned:
        """Blocks until the nodes are there."""
        return self._assigned.result()

    @property
    def may_wait(self) -> bool:
        """Whether a request may wait for the pipeline, which is down, to come back."""
        return self._has_served and time.monotonic() - self._down_at < self._max_outage_s

    @property
    def trouble(self) -> str:
        """Why the pipeline is down, and whether requests have waited for it."""
        if self.may_wait or not self._has_served:
            return str(self.down)
        waited = f"nobody took its place within {self._max_outage_s:g} s (--max-outage)"
        return f"{self.down}; {waited}"

    def report_serving(self) -> None:
        """Tell the agent that the HTTP server answers."""
        state = to_agent.EngineState(self._epoch, None)
        self._socket.send(Kind.CONTROL, AGENT, [to_agent.encode(state)])

    def _receive(self) -> None:
        try:
            while True:
                message = self._socket.receive()
                if message.kind == Kind.CONTROL and message.source == AGENT:
                    self._handle(to_engine.decode(message.payload))
        except MolinkError:
            os._exit(1)
        except Exception:
            logger.exception("the agent said what nobody understands")
            os._exit(1)

    def _handle(self, message: to_engine.ToEngine) -> None:
        match message:
            case PipelineAssigned() | PipelineRepaired(pipeline=PipelineAssigned()):
                pipeline = message if isinstance(message, PipelineAssigned) else message.pipeline
                self._epoch = pipeline.epoch
                if not self._assigned.done():
                    self._assigned.set_result(pipeline)
            case PipelineDown(reason=reason):
                if self.down is None:
                    self._down_at = time.monotonic()
                self.down = reason
            case to_engine.ClusterView(view=view):
                self.view_json = view
                self.view = decode_view(view)
                if self.view.serving:
                    self.down = None
                    self._has_served = True
