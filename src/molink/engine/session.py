"""The engine's connection to its agent: steps out, results in.

Owns the steps and calls that wait for an answer, and whether the pipeline takes any. A thread
receives; it resolves futures and never computes, so the engine's own thread only ever waits for
what it asked for.
"""

import itertools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from molink.core.errors import (
    MolinkError,
    PipelineDownError,
    StageError,
    UsageError,
    WireError,
)
from molink.core.ids import EVERY_STAGE, HEAD, Address, NodeId, Port
from molink.engine.lost import losses
from molink.transport.local import LocalSocket
from molink.wire import to_agent, to_engine
from molink.wire.assembly import Message
from molink.wire.codec import Codec
from molink.wire.frames import Kind, Priority
from molink.wire.to_engine import (
    PathMeasured,
    PipelineAssigned,
    PipelineDown,
    PipelineRepaired,
    StagePlace,
    StandbyChosen,
    StandbyDropped,
)

logger = logging.getLogger("molink.engine")
_Key = tuple[Kind, int, int, int]  # kind, sequence, node, rank
AGENT = Address(HEAD, Port.AGENT)


class EngineSession:
    """One engine's side of one pipeline.

    Args:
        socket_path: of the local agent.
        codec: with the engine's types registered.
        repaired: called in a thread of its own when every stage has a process again.
        chosen: called in a thread of its own when a spare is to load layers ahead.
        agent_lost: called when the agent is gone; the process should end.
    """

    def __init__(
        self,
        socket_path: Path,
        codec: Codec,
        *,
        repaired: Callable[[PipelineRepaired], None],
        chosen: Callable[[StandbyChosen], None],
        agent_lost: Callable[[], None],
    ) -> None:
        self._codec = codec
        self._repaired = repaired
        self._chosen = chosen
        self._names: dict[int, str] = {}  # of nodes that were called
        self._dropped: set[int] = set()  # standbys that are gone
        self._agent_lost = agent_lost
        self._socket = LocalSocket(socket_path, Address(HEAD, Port.ENGINE))
        self._sequence = itertools.count(1)
        self._waiting: dict[_Key, Future[Any]] = {}
        self._lock = threading.Lock()  # of what follows
        self._lost: str | None = None  # why calls are not answered either
        self.down: str | None = None  # why steps are not taken
        self._down_at = 0.0  # since when, by the monotonic clock
        self.path: PathMeasured | None = None  # the latest
        self._assigned: Future[PipelineAssigned] = Future()
        self._socket.send(Kind.CONTROL, AGENT, [to_agent.encode(to_agent.Attach())])
        threading.Thread(target=self._receive, name="engine-session", daemon=True).start()
        self.pipeline = self._assigned.result()

    def new_sequence(self) -> int:
        """A number for a step; those of later steps and calls are larger."""
        return next(self._sequence)

    def start_step(
        self, epoch: int, sequence: int, payload: bytes, future: Future[Any] | None
    ) -> None:
        """Send one step to every stage; `future` gets the last stage's output. None: no answer.

        It fails with PipelineDownError if the pipeline of `epoch` is not there any more.
        """
        with self._lock:
            trouble = self.down if epoch == self.pipeline.epoch else "another pipeline serves now"
            if trouble is None and future is not None:
                last = self.pipeline.stages[-1].node
                self._waiting[Kind.RESULT, sequence, last, 0] = future
        if trouble is None:
            self._send(Kind.STEP, EVERY_STAGE, payload, sequence, epoch)
        elif future is not None:
            future.set_exception(PipelineDownError(trouble))

    def sample(self, epoch: int, sequence: int, payload: bytes) -> None:
        """Send the grammar of a step that waits for it."""
        last = NodeId(self.pipeline.stages[-1].node)
        self._send(Kind.SAMPLE, last, payload, sequence, epoch)

    def call(
        self,
        place: StagePlace,
        method: str,
        args: Sequence[Any],
        kwargs: Any,
        epoch: int | None = None,
    ) -> list[Future[Any]]:
        """Call a method of every rank of a node's stage; futures in order of rank.

        Args:
            epoch: of the pipeline for which it is meant; the present one if not given.
        """
        payload = self._codec.encode((method, tuple(args), dict(kwargs or {})))
        sequence, node = next(self._sequence), NodeId(place.node)
        futures: list[Future[Any]] = [Future() for _ in range(place.tensor_parallel_size)]
        with self._lock:
            trouble, now = self._lost, self.pipeline.epoch
            self._names[node] = place.name
            if trouble is None and epoch not in (None, now):
                trouble = "another pipeline serves now"
            if trouble is None and node in self._dropped:
                trouble = f"{place.name} is gone"
            if trouble is None:
                for rank, future in enumerate(futures):
                    self._waiting[Kind.REPLY, sequence, node, rank] = future
        if trouble is None:
            self._send(Kind.CALL, node, payload, sequence, now)
        else:
            for future in futures:
                future.set_exception(PipelineDownError(trouble))
        return futures

    def _send(self, kind: Kind, node: NodeId, payload: bytes, sequence: int, epoch: int) -> None:
        """One priority for all: on a busy link, none may overtake another."""
        self._socket.send(
            kind,
            Address(node, Port.STAGE),
            [payload],
            priority=Priority.DECODE,
            epoch=epoch,
            sequence=sequence,
        )

    def _receive(self) -> None:
        try:
            while True:
                self._handle(self._socket.receive())
        except MolinkError as error:  # after bytes that make no sense nothing else can either
            self._fail_all(str(error))
            self._agent_lost()
        except Exception:
            logger.exception("the agent said what nobody understands")
            self._agent_lost()

    def _handle(self, message: Message) -> None:
        if message.kind == Kind.CONTROL and message.source == AGENT:
            self._control(message)
        elif message.kind in (Kind.RESULT, Kind.REPLY, Kind.FAILURE):
            self._answered(message)

    def _answered(self, message: Message) -> None:
        kind = Kind.RESULT if message.kind == Kind.RESULT else Kind.REPLY
        node = message.source.node
        future = self._take((kind, message.sequence, node, message.rank))
        if future is None:
            return
        try:
            answer = self._codec.decode(message.payload)
        except WireError as error:
            future.set_exception(StageError(f"{self._name_of(node)}: {error}", node))
            return
        if message.kind == Kind.FAILURE:
            future.set_exception(StageError(f"{self._name_of(node)}: {answer}", node))
        else:
            future.set_result(answer)

    def _name_of(self, node: NodeId) -> str:
        names = {stage.node: stage.name for stage in self.pipeline.stages}
        return names.get(node) or self._names[node]

    def _take(self, key: _Key) -> Future[Any] | None:
        with self._lock:
            return self._waiting.pop(key, None)

    def _control(self, message: Message) -> None:
        match to_engine.decode(message.payload):
            case PipelineAssigned() as pipeline:
                self._assigned.set_result(pipeline)
            case PathMeasured() as path:
                self.path = path
            case PipelineDown(reason=reason):
                self._fail_all(reason)
                if not self._assigned.done():
                    self._assigned.set_exception(StageError(reason))
            case PipelineRepaired() as repaired:
                with self._lock:
                    self.pipeline, self._lost = repaired.pipeline, None
                    self._dropped.clear()
                threading.Thread(target=self._repaired, args=(repaired,), daemon=True).start()
            case StandbyChosen() as standby:
                with self._lock:
                    self._dropped.discard(standby.place.node)
                threading.Thread(target=self._chosen, args=(standby,), daemon=True).start()
            case StandbyDropped(node=node):
                self._fail_calls_of(node)
            case _:
                pass

    def _fail_calls_of(self, node: int) -> None:
        with self._lock:
            self._dropped.add(node)
            keys = [key for key in self._waiting if key[0] == Kind.REPLY and key[2] == node]
            futures = [self._waiting.pop(key) for key in keys]
        for future in futures:
            future.set_exception(PipelineDownError(f"{self._names[node]} is gone"))

    def mended(self, epoch: int, trouble: str | None) -> None:
        """Take steps again, or say why not; nothing if `epoch` has been lost meanwhile."""
        with self._lock:
            if self._lost is None and epoch == self.pipeline.epoch:
                self.down = trouble

    def _fail_all(self, reason: str) -> None:
        with self._lock:
            if self.down is None:
                self._down_at = time.monotonic()
            self._lost = self.down = reason
            losses.count += 1
            waiting, self._waiting = self._waiting, {}
        for future in waiting.values():
            future.set_exception(PipelineDownError(reason))

    @property
    def outage_s(self) -> float:
        """How long steps have not been taken."""
        with self._lock:
            return 0.0 if self.down is None else time.monotonic() - self._down_at

    def report(self, failed: int | None = None, pace: to_agent.PaceDecision | None = None) -> None:
        """Tell the agent whether the engine serves, and how many steps are in flight.

        Args:
            failed: the node that could not be brought to where the others are.
            pace: how the pipeline is kept busy.
        """
        with self._lock:
            steps = sum(kind == Kind.RESULT for kind, *_ in self._waiting)
            state = to_agent.EngineState(self.pipeline.epoch, self.down, steps, failed, pace)
        self._socket.send(Kind.CONTROL, AGENT, [to_agent.encode(state)])

    def report_standby(self, node: int, error: str | None) -> None:
        """Tell the agent whether a spare has loaded what it was to load."""
        prepared = to_agent.StandbyPrepared(node, error)
        self._socket.send(Kind.CONTROL, AGENT, [to_agent.encode(prepared)])

    def report_failure(self, error: MolinkError) -> None:
        """Tell the agent why the engine is about to end."""
        failure = to_agent.EngineFailed(str(error), isinstance(error, UsageError))
        self._socket.send(Kind.CONTROL, AGENT, [to_agent.encode(failure)])

    def close(self) -> None:
        self._socket.close()
