"""The process of a stage (one per tensor-parallel rank): inbox → run → answer.

Everything it reads comes from its agent's local socket, in the order of `engine.inbox`. A step
begins when its input is there, so nothing that waits has touched any state.
"""

import logging
import threading
import time
from typing import Any, NamedTuple

from molink.core.errors import HubError, MolinkError, StageError, UsageError
from molink.core.ids import HEAD, Address, NodeId, Port
from molink.engine.activations import Parts, StepId
from molink.engine.grammar import unpack_grammar
from molink.engine.inbox import Inbox, StepAbandonedError, Turn
from molink.engine.kept import Kept, StaleStageError
from molink.engine.objections import one_line
from molink.engine.step_timer import StepKind, StepTimer, timer_for
from molink.engine.worker import StageOptions, StageWorker
from molink.planning.costs import LineFit
from molink.planning.micro_batches import DECODE_COST_TOKENS, STEP_COST_TOKENS
from molink.transport.local import LocalSocket
from molink.wire import to_agent
from molink.wire.assembly import Message
from molink.wire.codec import Codec
from molink.wire.frames import Kind, Priority
from molink.wire.to_agent import StepCost
from molink.wire.to_stage import STARTUP_CALLS, WORKER_CALLS, LoadStage

logger = logging.getLogger("molink.stage")
REPORT_INTERVAL_S = 1.0


class _Began(NamedTuple):
    """The step that runs."""

    at: float  # seconds
    num_tokens: int
    is_prefill: bool


class StageLoop:
    """Runs one rank of one stage until its agent is gone."""

    def __init__(self, socket: LocalSocket, codec: Codec, options: StageOptions) -> None:
        self._socket = socket
        self._codec = codec
        self._options = options
        self._inbox = Inbox(socket, codec)
        self._kept = Kept()
        self._worker: StageWorker | None = None
        self._timer: StepTimer | None = None
        self._began: _Began | None = None
        self.counters = to_agent.StageCounters()
        self._bytes_out = self._tokens = 0  # since the last report
        self._costs = {False: LineFit(DECODE_COST_TOKENS), True: LineFit(STEP_COST_TOKENS)}

    def run(self) -> None:
        """Serve until the agent's socket closes.

        Raises:
            LinkError: it has closed.
            UsageError: the layers cannot be loaded with this node's flags and files.
            StaleStageError: an engine wants something else than is loaded.
            HubError: the files cannot be downloaded now.
            Exception: a step failed; whatever vLLM raised, or StageError for a lost adapter.
        """
        threading.Thread(target=self._report, name="stage-counters", daemon=True).start()
        while True:
            waiting_since = time.perf_counter()
            turn = self._inbox.next()
            self.counters.waiting_s += time.perf_counter() - waiting_since
            if turn.message.kind == Kind.CALL:
                self._call(turn)
                continue
            try:
                self._step(turn)
            except StepAbandonedError:
                continue
            except UsageError as error:  # of an adapter: the node served well until now
                raise StageError(str(error)) from error

    def _report(self) -> None:
        agent = Address(self._socket.address.node, Port.AGENT)
        while True:
            self.counters.decode, self.counters.prefill = map(_cost, self._costs.values())
            self._count_present()
            if self._tokens:
                self.counters.bytes_per_token = self._bytes_out / self._tokens
                self._bytes_out = self._tokens = 0
            self._socket.send(Kind.CONTROL, agent, [to_agent.encode(self.counters)])
            time.sleep(REPORT_INTERVAL_S)

    # Steps

    def _step(self, turn: Turn) -> None:
        worker, timer, message = self._worker, self._timer, turn.message
        if worker is None or timer is None:  # of a pipeline lost before this stage was in one
            return
        sample_now, is_prefill, _, output, restored = turn.content
        num_tokens = output.total_num_scheduled_tokens
        has_tokens = num_tokens > 0
        priority = Priority.PREFILL if is_prefill else Priority.DECODE
        worker.group.begin(
            StepId(message.epoch, message.sequence, priority),
            num_tokens,
            turn.activations and worker.unpack(turn.activations.payload),
        )
        timer.start()
        self._began = _Began(time.perf_counter(), num_tokens, is_prefill)
        worker.restore(restored)
        result = worker.execute_model(output)
        if has_tokens and worker.group.is_last_rank:
            if result is None:
                result = worker.sample(output, self._grammar(sample_now, message.sequence))
            self._reply(Kind.RESULT, message, result)
        elif has_tokens:
            worker.sample(output, None)
        self._began = None
        if has_tokens:
            timer.stop(StepKind(num_tokens, is_prefill))
        for kind, seconds in timer.finished():
            self._count(*kind, seconds)

    def _count(self, tokens: int, is_prefill: bool, seconds: float) -> None:
        self.counters.steps += 1
        self.counters.compute_s += seconds
        self._tokens += tokens
        self._costs[is_prefill].add(tokens, seconds)

    def _count_present(self) -> None:
        """How long the step has taken that runs now."""
        began = self._began
        self.counters.busy_s, self.counters.busy_cost_s = 0.0, None
        if began is not None:
            self.counters.busy_s = time.perf_counter() - began.at
            line = self._costs[began.is_prefill].line
            self.counters.busy_cost_s = line(began.num_tokens) if line else None

    def _grammar(self, sample_now: bool, sequence: int) -> Any:
        if sample_now:
            return None
        return self._codec.decode(unpack_grammar(self._inbox.grammar(sequence).payload))

    def _emit(self, step: StepId, parts: Parts) -> None:
        """Hand a step's output to the agent for the next stage; rank 0 has whole tensors."""
        if self._socket.rank == 0:
            self._bytes_out += sum(map(len, parts))
            self._socket.send(
                Kind.ACTIVATIONS,
                Address(NodeId(self._loaded().next_node), Port.STAGE),
                parts,
                priority=step.priority,
                epoch=step.epoch,
                sequence=step.sequence,
            )

    # Calls

    def _call(self, turn: Turn) -> None:
        message, (method, args, kwargs) = turn.message, turn.content
        try:
            answer = self._answer(message, method, args, kwargs)
        except StaleStageError:
            raise
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

    def _answer(
        self, message: Message, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if method == "load":
            return self._load(*args)
        worker = self._loaded()
        if method == "send_sum":
            return worker.send_sum(*args)
        if method == "reset":
            worker.nodes = args[0]
            self._inbox.previous = _stage_of(worker.previous_node)
            return worker.forget_requests()
        if method not in WORKER_CALLS:
            raise StageError(f"«{method}» is not a method of a stage")
        if method in STARTUP_CALLS:
            asked = bytes(message.payload)
            return self._kept.answer(method, asked, lambda: worker.call(method, args, kwargs))
        return worker.call(method, args, kwargs)

    def _load(self, load: LoadStage) -> bool:
        """Have the layers; whether they take a sum."""
        if self._kept.has(load):
            self._loaded().serve_another(load.nodes)
        else:
            self._worker = StageWorker(load, self._options, self._emit, self._link_rate)
        worker = self._loaded()
        self._timer = timer_for(worker.device)
        self._inbox.previous = _stage_of(worker.previous_node)
        self._inbox.max_input_bytes = worker.max_waiting_input
        return worker.takes_sum

    def _link_rate(self) -> float | None:
        rates = self._inbox.link_rates  # without a link of its own, the head relays
        return rates.get(self._loaded().next_node, rates.get(HEAD))

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


def _cost(fit: LineFit) -> StepCost | None:
    line = fit.line
    return StepCost(line.fixed_s, line.per_token_s) if line else None


def _stage_of(node: int | None) -> Address | None:
    return None if node is None else Address(NodeId(node), Port.STAGE)
