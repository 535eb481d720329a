"""PipelineExecutor: vLLM's engine over stages on other machines.

A step is two calls of the engine, `execute_model` and `sample_tokens`. The first encodes the
scheduler's output once and sends it to all stages at once; neither waits. Steps whose grammar is
known to be empty are sampled by the last stage without a second message.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from vllm.exceptions import LoRAAdapterNotFoundError
from vllm.lora.request import LoRARequest
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.executor.abstract import Executor
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput

from molink.core.errors import MolinkError, PipelineDownError, StageError, UsageError
from molink.engine import compat
from molink.engine.adapters import NoAdapterError, adapter_digest, dropped
from molink.engine.config import resolve
from molink.engine.environment import (
    OUTAGE_VARIABLE,
    SOCKET_VARIABLE,
    WIRE_VARIABLE,
    die_with_parent,
)
from molink.engine.footprint import traits_of
from molink.engine.grammar import pack_grammar
from molink.engine.inbox import Step
from molink.engine.lost import LostStep
from molink.engine.refusals import refuse_unsupported
from molink.engine.session import EngineSession
from molink.engine.types import build_codec
from molink.planning.order import StepsInFlight
from molink.wire.to_agent import PaceDecision
from molink.wire.to_engine import PathMeasured, PipelineRepaired, StagePlace, StandbyChosen
from molink.wire.to_stage import STARTUP_CALLS, WORKER_CALLS, LoadStage, WireFormat

logger = logging.getLogger("molink.engine")
REPORT_INTERVAL_S = 1.0
_Adapter = tuple[LoRARequest, str]  # with its digest
_Call = tuple[str, tuple[Any, ...], dict[str, Any]]  # method, arguments

LAST_STARTUP_CALL = "compile_or_warm_up_model"


class PipelineExecutor(Executor):
    """Runs steps on the pipeline of the local agent. Owns the steps in flight."""

    supports_pp = True

    def _init_executor(self) -> None:
        die_with_parent()
        compat.use_own_loop()
        self._codec = build_codec()
        self._wire = WireFormat.from_json(os.environ.get(WIRE_VARIABLE, "{}"))
        self._takes_sum: dict[int, bool] = {}  # by stage: of `hidden_states` and `residual`
        self._mending = threading.local()  # `epoch`: of the pipeline for which a thread makes calls
        self._standbys: dict[int, bool] = {}  # the same, by node that has loaded a stage ahead
        self._startup: list[_Call] = []
        self.pace: PaceDecision | None = None  # of the scheduler, for the report
        self._adapters: dict[int, _Adapter] = {}  # by id
        self._is_started = False  # all start-up calls were made and answered
        self._max_outage_s = float(os.environ.get(OUTAGE_VARIABLE, "0"))
        self.mended: Callable[[], None] = lambda: None  # called when steps may be taken again
        self._step: tuple[int, int, Future[Any], bool] | None = None
        self._in_flight = StepsInFlight()
        self._answers: dict[int, Future[Any]] = {}  # of those steps
        self._session = EngineSession(
            Path(os.environ[SOCKET_VARIABLE]),
            self._codec,
            repaired=self._repair,
            chosen=self._prepare,
            agent_lost=lambda: os._exit(1),
        )
        try:
            stages = self._session.pipeline.stages
            refuse_unsupported(self.vllm_config, [s.tensor_parallel_size for s in stages])
            self._load(range(len(stages)))
        except MolinkError as error:
            self._session.report_failure(error)
            raise
        threading.Thread(target=self._report, name="engine-state", daemon=True).start()

    def _report(self) -> None:
        while True:
            time.sleep(REPORT_INTERVAL_S)
            self._session.report(pace=self.pace)

    def _load(self, indices: Sequence[int]) -> None:
        """Load the layers of these stages, all at once; tell the ones before what they take."""
        self._takes_sum |= self._load_at({index: self._places[index] for index in indices})
        for index in self._all_stages[1:]:
            takes_sum = self._takes_sum[index]
            if takes_sum or index - 1 not in indices:
                self._ask("send_sum", (takes_sum,), {}, [index - 1])

    def _load_at(self, places: Mapping[int, StagePlace]) -> dict[int, bool]:
        """Load the layers of stages there; by stage, whether it takes a sum."""
        resolved = resolve(self.vllm_config)
        futures: dict[int, list[Future[Any]]] = {}
        for index, place in places.items():
            load = LoadStage(
                stage_index=index,
                nodes=self._nodes(),
                partition=[stage.end - stage.start for stage in self._places],
                engine_flags=compat.engine_flags(),
                resolved=resolved,
                wire=self._wire,
            )
            futures[index] = self._call_at(place, "load", (load,), None)
        answers = {i: [future.result() for future in ranks] for i, ranks in futures.items()}
        return {index: all(answer is True for answer in said) for index, said in answers.items()}

    @property
    def _places(self) -> list[StagePlace]:
        return self._session.pipeline.stages

    def _nodes(self) -> list[int]:
        return [stage.node for stage in self._places]

    # Steps

    @property
    def path(self) -> PathMeasured | None:
        """What stages and links cost, as last heard."""
        return self._session.path

    @property
    def is_down(self) -> bool:
        """Whether steps are not taken: a stage is lost and not replaced yet."""
        return self._session.down is not None

    @property
    def patience_s(self) -> float:
        """How long requests still wait for the pipeline to come back."""
        return max(0.0, self._max_outage_s - self._session.outage_s)

    def execute_model(self, scheduler_output: SchedulerOutput, non_block: bool = False) -> Any:
        epoch, down = self._session.pipeline.epoch, self._session.down
        if down is not None:
            return _answer(_done(LostStep.because(down)), non_block)
        compat.strip_for_wire(scheduler_output)
        if scheduler_output.total_num_scheduled_tokens == 0:
            if compat.says_something(scheduler_output):
                self._start(epoch, scheduler_output, False, None)
            return _answer(_done(EMPTY_MODEL_RUNNER_OUTPUT), non_block)
        future: Future[Any] = Future()
        sample_now = not scheduler_output.has_structured_output_requests
        sequence = self._start(epoch, scheduler_output, sample_now, future)
        if compat.is_pooling(self.vllm_config):
            return _answer(future, non_block)
        self._step = (epoch, sequence, future, sample_now)
        return _answer(_done(None), non_block)

    def sample_tokens(self, grammar_output: GrammarOutput | None, non_block: bool = False) -> Any:
        if self._step is None:
            return _answer(_done(LostStep.because(self._session.down or "no step")), non_block)
        epoch, sequence, future, sample_now = self._step
        self._step = None
        if not sample_now:
            packed = pack_grammar(self._codec.encode_plain(grammar_output))
            self._session.sample(epoch, sequence, packed)
        return _answer(future, non_block)

    def _start(
        self, epoch: int, output: SchedulerOutput, sample_now: bool, future: Future[Any] | None
    ) -> int:
        """Send a step to every stage, with the steps that it must not overtake."""
        sequence, traits = self._session.new_sequence(), traits_of(output)
        for earlier in [number for number, answer in self._answers.items() if answer.done()]:
            del self._answers[earlier]
            self._in_flight.finish(earlier)
        is_answered = future is not None
        after = self._in_flight.start(sequence, traits.footprint, is_answered=is_answered)
        restored = [tuple(request) for request in traits.restored]
        step = Step(sample_now, traits.is_prefill, after, output, restored)
        if future is not None:
            self._answers[sequence] = future
        payload = self._codec.encode(tuple(step))
        self._session.start_step(epoch, sequence, payload, future and _LostOnFailure(future))
        return sequence

    # Calls

    def collective_rpc(
        self,
        method: str | Callable[..., Any],
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        non_block: bool = False,
    ) -> Any:
        """One answer per worker.

        Raises:
            StageError: `method` is not on the closed list, or a stage failed.
        """
        if not isinstance(method, str) or method not in WORKER_CALLS:
            raise StageError(f"«{method}» cannot be called on the stages of a pipeline")
        if method in STARTUP_CALLS:
            self._startup.append((method, args, kwargs or {}))
        answers = self._ask(method, args, kwargs, self._all_stages, timeout)
        self._is_started = self._is_started or method == LAST_STARTUP_CALL
        return _done(answers) if non_block else answers

    @property
    def _all_stages(self) -> range:
        return range(len(self._places))

    def _ask(
        self,
        method: str,
        args: tuple[Any, ...],
        kwargs: Any,
        indices: Sequence[int],
        timeout: float | None = None,
    ) -> list[Any]:
        """Call a method of every worker of these stages at once, and wait for their answers."""
        futures = self._call(method, args, kwargs, {i: self._places[i] for i in indices})
        return [future.result(timeout) for future in futures]

    def _call(
        self,
        method: str,
        args: tuple[Any, ...],
        kwargs: Any,
        places: Mapping[int, StagePlace],
    ) -> list[Future[Any]]:
        """Send each worker its part: KV configurations come as one list for all workers.

        Args:
            places: by stage, where it is called.
        """
        futures: list[Future[Any]] = []
        first = 0
        for index, stage in enumerate(self._places):
            size = stage.tensor_parallel_size
            part = args
            if method == "initialize_from_config":
                part = (list(args[0][first : first + size]),)
            first += size
            if index in places:
                futures += self._call_at(places[index], method, part, kwargs)
        return futures

    def _call_at(
        self, place: StagePlace, method: str, args: tuple[Any, ...], kwargs: Any
    ) -> list[Future[Any]]:
        """Call a method of one stage; of an earlier pipeline's repair it fails."""
        epoch = getattr(self._mending, "epoch", None)
        return self._session.call(place, method, args, kwargs, epoch)

    def get_supported_kv_cache_layouts(self) -> list[list[str]]:
        """The layouts all workers support, in the first one's order, once per worker."""
        lists: list[list[str]] = self.collective_rpc("get_supported_kv_cache_layouts")
        common = [name for name in lists[0] if all(name in other for other in lists)]
        return [common] * len(lists)

    def add_lora(self, lora_request: LoRARequest) -> bool:
        """Load an adapter on every stage, or on none.

        Raises:
            LoRAAdapterNotFoundError: the head has no such adapter.
            StageError: a stage has none, or another one.
            UsageError: the head cannot read it, or it is to replace another in place: a failure
                would leave neither.
        """
        if lora_request.load_inplace:  # the gateway refuses it in better words
            raise UsageError("load_inplace does not work over stages: unload the adapter first")
        try:
            adapter = lora_request, adapter_digest(lora_request)
        except NoAdapterError as error:
            name, path = lora_request.lora_name, lora_request.lora_path
            raise LoRAAdapterNotFoundError(name, path) from error
        try:
            answers = self.collective_rpc("add_lora", args=adapter)
        except StageError:
            self.remove_lora(lora_request.lora_int_id)
            raise
        self._adapters[lora_request.lora_int_id] = adapter
        return all(answers)

    def remove_lora(self, lora_id: int) -> bool:
        self._adapters.pop(lora_id, None)
        return all(self.collective_rpc("remove_lora", args=(lora_id,)))

    def take_draft_token_ids(self) -> None:
        """None: the scheduler drafts (`engine.drafter`); the engine asks after every step."""

    def check_health(self) -> None:
        """The engine stays up while its pipeline is down; requests wait meanwhile."""

    def shutdown(self) -> None:
        self._session.close()

    # Repair

    def _repair(self, repaired: PipelineRepaired) -> None:
        """Bring replaced stages to where the others are, clear every stage, take steps again.

        An engine that was still starting cannot tell which calls reached which stage: it ends, and
        the agent starts another.
        """
        if not self._is_started:
            os._exit(1)
        epoch, failed = repaired.pipeline.epoch, None
        self._mending.epoch = epoch
        try:
            promoted = self._promote(repaired.replaced)
            self._load(repaired.replaced)
            for method, args, kwargs in self._startup:
                self._ask(method, args, kwargs, repaired.replaced)
            for lora_id, adapter in list(self._adapters.items()):
                self._load_adapter_again(lora_id, adapter, [*repaired.replaced, *promoted])
            self._ask("reset", (self._nodes(),), None, self._all_stages)
            for index in promoted:
                self._standbys.pop(self._places[index].node, None)
        except StageError as error:
            failed = error.node
            self._session.mended(epoch, str(error))
        except Exception as error:
            logger.exception("the pipeline cannot be repaired")
            self._session.mended(epoch, f"{type(error).__name__}: {error}")
        else:
            self._session.mended(epoch, None)
            self.mended()
        if epoch == self._session.pipeline.epoch:
            self._session.report(failed, self.pace)

    def _promote(self, replaced: Sequence[int]) -> list[int]:
        """The stages whose standbys have taken them over."""
        for index in replaced:  # whatever the node had loaded, its process is another one now
            self._standbys.pop(self._places[index].node, None)
        promoted = [i for i, place in enumerate(self._places) if place.node in self._standbys]
        self._takes_sum |= {i: self._standbys[self._places[i].node] for i in promoted}
        return promoted

    def _prepare(self, standby: StandbyChosen) -> None:
        """Bring a spare to where a stage is, but for requests and adapters."""
        index, place = standby.stage_index, standby.place
        self._mending.epoch = standby.epoch
        try:
            takes_sum = self._load_at({index: place})[index]
            for method, args, kwargs in self._startup:
                for future in self._call(method, args, kwargs, {index: place}):
                    future.result()
        except PipelineDownError:
            return  # it is gone, or begins anew
        except Exception as error:
            logger.exception("a standby cannot be prepared")
            self._session.report_standby(place.node, str(error))
        else:
            self._standbys[place.node] = takes_sum
            self._session.report_standby(place.node, None)

    def _load_adapter_again(self, lora_id: int, adapter: _Adapter, stages: Sequence[int]) -> None:
        """Load an adapter on replaced stages; one that is not there any more is taken from all."""
        try:
            self._ask("add_lora", adapter, {}, stages)
        except StageError as error:
            if error.node is None:  # the pipeline was lost again
                raise
            logger.warning("the adapter %s is dropped: %s", adapter[0].lora_name, error)
            dropped.add(lora_id)
            self.remove_lora(lora_id)


def _done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future


def _answer(future: Future[Any], non_block: bool) -> Any:
    return future if non_block else future.result()


class _LostOnFailure(Future[Any]):
    """Passes a step's output on; a failure becomes a LostStep, which the scheduler settles."""

    def __init__(self, target: Future[ModelRunnerOutput]) -> None:
        super().__init__()
        self._target = target

    def set_result(self, result: Any) -> None:
        if isinstance(result, ModelRunnerOutput):
            self._target.set_result(result)
        else:
            said = f"a stage answered {type(result).__name__}"
            self._target.set_result(LostStep.because(said, is_broken=True))

    def set_exception(self, exception: BaseException | None) -> None:
        is_broken = not isinstance(exception, PipelineDownError)
        self._target.set_result(LostStep.because(str(exception), is_broken=is_broken))
