"""The engine's loop over a pipeline: many steps in flight, results in the order of their coming.

vLLM's own loop waits for the oldest step, and new requests wait with it. This one takes whichever
result is there, and starts a step whenever one can be made.
"""

import queue
import time
from collections import deque
from concurrent.futures import Future
from typing import Any, NamedTuple

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequestType
from vllm.v1.outputs import ModelRunnerOutput

Outputs = dict[int, EngineCoreOutputs] | None


class _Done(NamedTuple):
    output: SchedulerOutput
    future: Future[ModelRunnerOutput]
    started_at: float  # seconds


class StepLoop:
    """One turn of an `EngineCore` at a time; stands where vLLM keeps its batch queue.

    Owns which steps are in flight. Their futures are resolved in other threads, which wake the
    engine through its input queue: so it waits for results and for requests at once.
    """

    def __init__(self, core: Any) -> None:
        self._core = core
        core.model_executor.mended = self._wake
        self._in_flight = 0  # steps started whose results have not been taken
        self._done: deque[_Done] = deque()

    def __len__(self) -> int:
        """The engine has work while this is not 0."""
        return self._in_flight

    def turn(self) -> tuple[Outputs, bool]:
        """Take one result, or start one step, or wait for something to happen.

        While the pipeline is down, requests come and go, and none is computed.

        Returns:
            Outputs by client, and whether to come back at once.
        """
        core = self._core
        if self._done:
            return self._take(self._done.popleft()), True
        if core.model_executor.is_down and core.scheduler.has_unfinished_requests():
            return self._wait_for_repair(), True
        if core.scheduler.has_requests() and self._start():
            return None, True
        if self._in_flight:
            core._handle_client_request(*core.input_queue.get())
        return None, self._in_flight > 0  # otherwise vLLM polls

    def _start(self) -> bool:
        """Whether there was a step to start."""
        core = self._core
        core.scheduler.take_path(core.model_executor.path)
        output = core.scheduler.schedule(core._should_throttle_prefills())
        core.model_executor.pace = core.scheduler.pace
        with core.log_error_detail(output):
            future = core.model_executor.execute_model(output, non_block=True)
        if output.total_num_scheduled_tokens == 0:
            for of_client in core.scheduler.update_from_output(output, future.result()).items():
                core.output_queue.put_nowait(of_client)
            return False
        if not core.is_pooling_model:
            grammar = core.scheduler.get_grammar_bitmask(output)
            future = core.model_executor.sample_tokens(grammar, non_block=True)
        self._in_flight += 1
        started_at = time.monotonic()
        future.add_done_callback(lambda done: self._finished(_Done(output, done, started_at)))
        return True

    def _finished(self, done: _Done) -> None:
        self._done.append(done)
        self._wake()

    def _wake(self) -> None:
        self._core.input_queue.put_nowait((EngineCoreRequestType.WAKEUP, None))

    def _wait_for_repair(self) -> dict[int, EngineCoreOutputs]:
        """Handle the next message; end all requests once they have waited for too long."""
        core = self._core
        ended: dict[int, EngineCoreOutputs] = core.scheduler.take_ended()
        if ended:
            return ended
        try:
            request = core.input_queue.get(timeout=core.model_executor.patience_s)
            core._handle_client_request(*request)
        except queue.Empty:
            core.scheduler.give_up()
        ended = core.scheduler.take_ended()
        return ended

    def _take(self, done: _Done) -> dict[int, EngineCoreOutputs]:
        core, output = self._core, done.output
        self._in_flight -= 1
        with (
            core.capture_iteration_details(output) as details,
            core.log_error_detail(output),
        ):
            result = done.future.result()
        core._process_aborts_queue()  # of what was aborted meanwhile
        outputs: dict[int, EngineCoreOutputs] = core.scheduler.update_from_output(output, result)
        if details is not None:
            details.elapsed_ms = 1e3 * (time.monotonic() - done.started_at)
        core._attach_iteration_details(outputs, details)
        core._attach_weight_version(outputs)
        return outputs
