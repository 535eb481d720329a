"""The engine's HTTP server and its agent: for which pipeline it is, and that it answers."""

import logging
import os
import threading
from concurrent.futures import Future
from pathlib import Path

from molink.core.errors import MolinkError
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
        threading.Thread(target=self._receive, name="agent-client", daemon=True).start()

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
        if isinstance(message, PipelineAssigned) and not self._assigned.done():
            self._assigned.set_result(message)
