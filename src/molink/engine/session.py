"""The engine's connection to its agent: steps out, results in.

Owns the steps and calls that wait for an answer. A thread receives; it resolves futures and never
computes, so the engine's own thread only ever waits for what it asked for.
"""

import itertools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from molink.core.errors import MolinkError, StageError, WireError
from molink.core.ids import EVERY_STAGE, HEAD, Address, NodeId, Port
from molink.transport.local import LocalSocket
from molink.wire import to_agent, to_engine
from molink.wire.assembly import Message
from molink.wire.codec import Codec
from molink.wire.frames import Kind, Priority
from molink.wire.to_engine import PipelineAssigned, PipelineDown, PipelineRepaired

_Key = tuple[Kind, int, int, int]  # kind, sequence, node, rank
AGENT = Address(HEAD, Port.AGENT)


class EngineSession:
    """One engine's side of one pipeline.

    Args:
        socket_path: of the local agent.
        codec: with the engine's types registered.
        lost: called when the pipeline went down, before waiting calls fail.
        repaired: called in a thread of its own when every stage has a process again.
        agent_lost: called when the agent is gone; the process should end.
    """

    def __init__(
        self,
        socket_path: Path,
        codec: Codec,
        *,
        lost: Callable[[str], None],
        repaired: Callable[[PipelineRepaired], None],
        agent_lost: Callable[[], None],
    ) -> None:
        self._codec = codec
        self._lost = lost
        self._repaired = repaired
        self._agent_lost = agent_lost
        self._socket = LocalSocket(socket_path, Address(HEAD, Port.ENGINE))
        self._sequence = itertools.count(1)
        self._waiting: dict[_Key, Future[Any]] = {}
        self._lock = threading.Lock()
        self._assigned: Future[PipelineAssigned] = Future()
        self._socket.send(Kind.CONTROL, AGENT, [to_agent.encode(to_agent.Attach())])
        threading.Thread(target=self._receive, name="engine-session", daemon=True).start()
        self.pipeline = self._assigned.result()

    def start_step(self, payload: bytes, future: Future[Any] | None) -> int:
        """Send one step to every stage; `future` gets the last stage's output. None: no answer."""
        sequence = next(self._sequence)
        if future is not None:
            self._expect((Kind.RESULT, sequence, self.pipeline.stages[-1].node, 0), future)
        self._send(Kind.STEP, EVERY_STAGE, payload, sequence)
        return sequence

    def sample(self, sequence: int, payload: bytes) -> None:
        """Send the grammar of a step that waits for it."""
        last = NodeId(self.pipeline.stages[-1].node)
        self._send(Kind.SAMPLE, last, payload, sequence)

    def call(
        self, node: NodeId, method: str, args: Sequence[Any], kwargs: Any
    ) -> list[Future[Any]]:
        """Call a method of every rank of a node's stage; futures in order of rank."""
        sequence = next(self._sequence)
        stage = next(stage for stage in self.pipeline.stages if stage.node == node)
        futures: list[Future[Any]] = [Future() for _ in range(stage.tensor_parallel_size)]
        for rank, future in enumerate(futures):
            self._expect((Kind.REPLY, sequence, node, rank), future)
        payload = self._codec.encode((method, tuple(args), dict(kwargs or {})))
        self._send(Kind.CALL, node, payload, sequence)
        return futures

    def _expect(self, key: _Key, future: Future[Any]) -> None:
        with self._lock:
            self._waiting[key] = future

    def _send(self, kind: Kind, node: NodeId, payload: bytes, sequence: int) -> None:
        """One priority for all: on a busy link, none may overtake another."""
        self._socket.send(
            kind,
            Address(node, Port.STAGE),
            [payload],
            priority=Priority.DECODE,
            epoch=self.pipeline.epoch,
            sequence=sequence,
        )

    def _receive(self) -> None:
        try:
            while True:
                self._handle(self._socket.receive())
        except MolinkError as error:  # after bytes that make no sense nothing else can either
            self._fail_all(str(error))
            self._agent_lost()

    def _handle(self, message: Message) -> None:
        if message.kind == Kind.CONTROL:
            self._control(message)
            return
        kind = Kind.RESULT if message.kind == Kind.RESULT else Kind.REPLY
        if message.kind == Kind.FAILURE:
            self._fail_call(message)
            return
        future = self._take((kind, message.sequence, message.source.node, message.rank))
        if future is not None:
            try:
                answer = self._codec.decode(message.payload)
            except WireError as error:
                future.set_exception(error)
            else:
                future.set_result(answer)

    def _fail_call(self, message: Message) -> None:
        text = self._codec.decode(message.payload)
        future = self._take((Kind.REPLY, message.sequence, message.source.node, message.rank))
        if future is not None:
            future.set_exception(StageError(f"{self._name_of(message.source.node)}: {text}"))

    def _name_of(self, node: NodeId) -> str:
        return next(stage.name for stage in self.pipeline.stages if stage.node == node)

    def _take(self, key: _Key) -> Future[Any] | None:
        with self._lock:
            return self._waiting.pop(key, None)

    def _control(self, message: Message) -> None:
        match to_engine.decode(message.payload):
            case PipelineAssigned() as pipeline:
                self._assigned.set_result(pipeline)
            case PipelineDown(reason=reason):
                self._lost(reason)
                self._fail_all(reason)
            case PipelineRepaired(pipeline=pipeline) if not self._assigned.done():
                self._assigned.set_result(pipeline)  # this engine has loaded nothing yet
            case PipelineRepaired() as repaired:
                self.pipeline = repaired.pipeline
                threading.Thread(target=self._repaired, args=(repaired,), daemon=True).start()
            case _:
                pass

    def _fail_all(self, reason: str) -> None:
        with self._lock:
            waiting, self._waiting = self._waiting, {}
        for future in waiting.values():
            future.set_exception(StageError(reason))

    def report(self, error: str | None) -> None:
        """Tell the agent whether the engine serves, and how many steps are in flight."""
        with self._lock:
            steps = sum(kind == Kind.RESULT for kind, *_ in self._waiting)
        state = to_agent.EngineState(self.pipeline.epoch, error, steps)
        self._socket.send(Kind.CONTROL, AGENT, [to_agent.encode(state)])

    def report_failure(self, reason: str) -> None:
        """Tell the agent why the engine is about to end."""
        self._socket.send(Kind.CONTROL, AGENT, [to_agent.encode(to_agent.EngineFailed(reason))])

    def close(self) -> None:
        self._socket.close()
