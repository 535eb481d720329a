"""PipelineScheduler: vLLM's scheduler, which also settles steps that were lost."""

from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput
from vllm.v1.request import RequestStatus

from molink.engine.lost import LostStep


class PipelineScheduler(Scheduler):
    """While the pipeline is down, every request ends with an error instead of the engine."""

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        if isinstance(model_runner_output, LostStep):
            return self._fail_all()
        outputs: dict[int, EngineCoreOutputs] = super().update_from_output(
            scheduler_output, model_runner_output
        )
        return outputs

    def _fail_all(self) -> dict[int, EngineCoreOutputs]:
        """End every request; the KV cache of a lost stage is gone, so cached prefixes go too."""
        failed: dict[int, list[Any]] = {}
        for request in self.finish_requests(None, RequestStatus.FINISHED_ERROR):
            failed.setdefault(request.client_index, []).append(
                EngineCoreOutput(
                    request_id=request.request_id,
                    new_token_ids=[],
                    finish_reason=request.get_finished_reason(),
                    events=request.take_events(),
                    trace_headers=request.trace_headers,
                )
            )
        self.reset_prefix_cache()
        outputs: dict[int, EngineCoreOutputs] = super().update_from_output(
            SchedulerOutput.make_empty(), EMPTY_MODEL_RUNNER_OUTPUT
        )
        for client, ended in failed.items():
            outputs.setdefault(client, EngineCoreOutputs()).outputs.extend(ended)
        return outputs
