"""The engine's HTTP server and its agent: for which pipeline it is, and that it answers."""

import logging
from concurrent.futures import Future
from pathlib import Path

from molink.core.ids import HEAD, Address, Port
from molink.transport.local import LocalSocket
from molink.wire import to_agent, to_engine
from molink.wire.frames import Kind
from molink.wire.to_engine import PipelineAssigned

logger = logging.getLogger("molink.engine")
AGENT = Address(HEAD, Port.AGENT)


class AgentClient:
    """Ends the process when the agent is gone."""

    def __init__(self, socket_path: Path) -> None:
        self._socket = LocalSocket(socket_path, Address(HEAD, Port.SERVER))
        self._assigned: Future[PipelineAssigned] = Future()
        self._socket.send(Kind.CONTROL, AGENT, [to_agent.encode(to_agent.Attach())])
        self._socket.follow(self._handle)

    def wait_for_pipeline(self) -> PipelineAssigned:
        """Blocks until the nodes are there."""
        return self._assigned.result()

    def report_serving(self, at_once: int) -> None:
        """Tell the agent that the HTTP server answers.

        Args:
            at_once: requests that the engine computes at once.
        """
        epoch = self._assigned.result().epoch
        state = to_agent.EngineState(epoch, None, at_once=at_once)
        self._socket.send(Kind.CONTROL, AGENT, [to_agent.encode(state)])

    def _handle(self, payload: bytes | bytearray) -> None:
        message = to_engine.decode(payload)
        if isinstance(message, PipelineAssigned) and not self._assigned.done():
            self._assigned.set_result(message)
