"""The process of a stage (one per tensor-parallel rank): inbox → run → answer.

Everything it reads comes from its agent's local socket. Steps run in the order in which the engine
made them; while a step's input has not arrived, calls of a newer epoch interrupt the wait before
any state is touched.
"""

import logging
import threading
import time
from collections import deque
from typing import Any

import torch

from molink.core.errors import HubError, MolinkError, StageError, UsageError
from molink.core.ids import HEAD, Address, NodeId, Port
from molink.engine.activations import Parts, StepId
from molink.engine.grammar import unpack_grammar
from molink.engine.objections import one_line
from molink.engine.worker import StageOptions, StageWorker
from molink.transport.local import LocalSocket
from molink.wire import to_agent, to_stage
from molink.wire.assembly import Message
from molink.wire.codec import Codec
from molink.wire.frames import Kind, Priority
from molink.wire.to_stage import WORKER_CALLS, LoadStage

logger = logging.getLogger("molink.stage")
REPORT_INTERVAL_S = 1.0
MAX_PARTS = 1024  # that wait for their steps; a pipeline has a few steps in flight
ENGINE = Address(HEAD, Port.ENGINE)


class StepAbandonedError(Exception):
    """A newer epoch began while a step waited for its input."""


class Inbox:
    """Sorts what the agent delivers: steps and calls in order, activations and grammars by step.

    Only the engine orders steps and begins epochs; activations come from `previous` alone.
    """

    def __init__(self, socket: LocalSocket) -> None:
        self._socket = socket
        self._agent = Address(socket.address.node, Port.AGENT)
        self._ordered: deque[Message] = deque()
        self._parts: dict[tuple[Kind, int], Message] = {}
        self.epoch = 0
        self.previous: Address | None = None  # the stage before this one
        self.link_rates: dict[int, float] = {}  # bytes a second, by node

    def next(self) -> Message:
        """The next step or call."""
        while not self._ordered:
            self._receive()
        return self._ordered.popleft()

    def part(self, kind: Kind, sequence: int) -> Message:
        """The activations or grammar of a step.

        Raises:
            StepAbandonedError: a newer epoch began.
        """
        epoch = self.epoch
        while (kind, sequence) not in self._parts:
            self._receive()
            if self.epoch != epoch:
                raise StepAbandonedError
        return self._parts.pop((kind, sequence))

    def _receive(self) -> None:
        message = self._socket.receive()
        if message.kind == Kind.CONTROL and message.source == self._agent:
            self.link_rates = to_stage.decode(message.payload).bytes_per_s
        if message.source == ENGINE and message.epoch > self.epoch:
            self.epoch = message.epoch
            self._parts.clear()
            self._ordered.clear()
        if message.epoch != self.epoch:
            return
        expected = self.previous if message.kind == Kind.ACTIVATIONS else ENGINE
        if message.source != expected:
            return
        if message.kind in (Kind.STEP, Kind.CALL):
            self._ordered.append(message)
        elif message.kind in (Kind.ACTIVATIONS, Kind.SAMPLE) and len(self._parts) < MAX_PARTS:
            self._parts[message.kind, message.sequence] = message


class StageLoop:
    """Runs one rank of one stage until its agent is gone."""

    def __init__(self, socket: LocalSocket, codec: Codec, options: StageOptions) -> None:
        self._socket = socket
        self._codec = codec
        self._options = options
        self._inbox = Inbox(socket)
        self._worker: StageWorker | None = None
        self.counters = to_agent.StageCounters()

    def run(self) -> None:
        """Serve until the agent's socket closes.

        Raises:
            LinkError: it has closed.
            UsageError: the layers cannot be loaded with this node's flags and files.
            HubError: the files cannot be downloaded now.
            Exception: a step failed; whatever vLLM raised, or StageError for a lost adapter.
        """
        threading.Thread(target=self._report, name="stage-counters", daemon=True).start()
        while True:
            waiting_since = time.perf_counter()
            message = self._inbox.next()
            self.counters.waiting_s += time.perf_counter() - waiting_since
            if message.kind == Kind.CALL:
                self._call(message)
            elif message.kind == Kind.STEP:
                try:
                    self._step(message)
                except StepAbandonedError:
                    continue
                except UsageError as error:  # of an adapter: the node served well until now
                    raise StageError(str(error)) from error

    def _report(self) -> None:
        agent = Address(self._socket.address.node, Port.AGENT)
        while True:
            self._socket.send(Kind.CONTROL, agent, [to_agent.encode(self.counters)])
            time.sleep(REPORT_INTERVAL_S)

    # Steps

    def _step(self, message: Message) -> None:
        worker = self._loaded()
        sample_now, output = self._codec.decode(message.payload)
        has_tokens = output.total_num_scheduled_tokens > 0
        step = StepId(message.epoch, message.sequence)
        needs_input = has_tokens and not worker.group.is_first_rank
        worker.group.begin(step, self._input(worker, message) if needs_input else None)
        started = time.perf_counter()
        result = worker.execute_model(output)
        if has_tokens and worker.group.is_last_rank:
            if result is None:
                result = worker.sample(output, self._grammar(sample_now, message.sequence))
            self._reply(Kind.RESULT, message, result)
        elif has_tokens:
            worker.sample(output, None)
        self.counters.compute_s += time.perf_counter() - started
        self.counters.steps += 1

    def _input(self, worker: StageWorker, step: Message) -> dict[str, torch.Tensor]:
        waiting_since = time.perf_counter()
        message = self._inbox.part(Kind.ACTIVATIONS, step.sequence)
        self.counters.waiting_s += time.perf_counter() - waiting_since
        return worker.unpack(message.payload)

    def _grammar(self, sample_now: bool, sequence: int) -> Any:
        if sample_now:
            return None
        payload = self._inbox.part(Kind.SAMPLE, sequence).payload
        return self._codec.decode(unpack_grammar(payload))

    def _emit(self, step: StepId, parts: Parts) -> None:
        """Hand a step's output to the agent for the next stage; rank 0 has whole tensors."""
        if self._socket.rank == 0:
            self._socket.send(
                Kind.ACTIVATIONS,
                Address(NodeId(self._loaded().next_node), Port.STAGE),
                parts,
                priority=Priority.DECODE,
                epoch=step.epoch,
                sequence=step.sequence,
            )

    # Calls

    def _call(self, message: Message) -> None:
        method, args, kwargs = self._codec.decode(message.payload)
        try:
            answer = self._answer(method, args, kwargs)
        except MolinkError as error:
            if method == "load" and isinstance(error, UsageError | HubError):
                raise  # another node may do better
            self._reply(Kind.FAILURE, message, str(error))
        except Exception as error:
            logger.exception("%s failed", method)
            words = f"{method} failed: {type(error).__name__}: {one_line(error)}"
            self._reply(Kind.FAILURE, message, words)
        else:
            self._reply(Kind.REPLY, message, answer)

    def _answer(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if method == "load":
            self._worker = self._load(*args)
            self._inbox.previous = _stage_of(self._worker.previous_node)
            return self._worker.takes_sum
        worker = self._loaded()
        if method == "send_sum":
            return worker.send_sum(*args)
        if method == "reset":
            worker.nodes = args[0]
            self._inbox.previous = _stage_of(worker.previous_node)
            return worker.forget_requests()
        if method not in WORKER_CALLS:
            raise StageError(f"«{method}» is not a method of a stage")
        return worker.call(method, args, kwargs)

    def _load(self, load: LoadStage) -> StageWorker:
        return StageWorker(load, self._options, self._emit, self._link_rate)

    def _link_rate(self) -> float | None:
        return self._inbox.link_rates.get(self._loaded().next_node)

    def _loaded(self) -> StageWorker:
        if self._worker is None:
            raise StageError("this stage has no layers yet")
        return self._worker

    def _reply(self, kind: Kind, message: Message, answer: Any) -> None:
        if kind == Kind.RESULT and self._socket.rank != 0:
            return
        self._socket.send(
            kind,
            message.source,
            [self._codec.encode(answer)],
            priority=Priority.DECODE,
            epoch=message.epoch,
            sequence=message.sequence,
        )


def _stage_of(node: int | None) -> Address | None:
    return None if node is None else Address(NodeId(node), Port.STAGE)
