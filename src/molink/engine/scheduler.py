"""PipelineScheduler: vLLM's scheduler, for a pipeline whose stages may be lost."""

import os
from collections.abc import Iterable
from itertools import chain
from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from molink.core.errors import WireError
from molink.engine import compat
from molink.engine.adapters import dropped
from molink.engine.delivered import take_delivered, told_again
from molink.engine.drafter import Drafter
from molink.engine.environment import PACING_VARIABLE
from molink.engine.footprint import StepTraits, footprint_of
from molink.engine.lost import LostStep, losses
from molink.engine.replay import Replay
from molink.engine.types import build_codec
from molink.planning.pace import Load, Pace, Share
from molink.wire.to_agent import PaceDecision
from molink.wire.to_engine import Pacing, PathMeasured

WIDTH_GAIN = 0.05  # what one step counts in the mean width of decodes


class PipelineScheduler(Scheduler):
    """Cuts work so that all stages have some; begins requests anew whose pipeline was lost."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._codec = build_codec()
        self._untold: list[tuple[int, EngineCoreOutput]] = []  # by client; not of a step
        self._losses = losses.count  # those after which all began anew
        self._replay = Replay()
        self.max_num_scheduled_tokens: int  # vLLM's; here of the next step
        self._max_tokens = self.max_num_scheduled_tokens
        wanted = Pacing.from_json(os.environ.get(PACING_VARIABLE, "{}"))
        num_stages = self.parallel_config.pipeline_parallel_size
        max_in_flight = self.vllm_config.max_in_flight_tokens
        self._drafter = Drafter(self.vllm_config) if self.num_spec_tokens else None
        self._pace = Pace(num_stages, self._max_tokens, max_in_flight, wanted, self.num_spec_tokens)
        self._path: PathMeasured | None = None
        self._in_flight = [0, 0]  # steps without and with prompt tokens
        self._tokens_in_flight = 0
        self._tokens_each = 1.0  # of a request in a decode step, a moving mean

    def add_request(self, request: Request) -> None:
        """Take a request, or end it at once if no step could carry it.

        Clients choose some parameters freely (`kv_transfer_params`), and an error while a step is
        encoded would end the engine. An adapter that a stage has lost would end that stage.
        """
        super().add_request(request)
        try:
            delivered = take_delivered(request, self.vllm_config.model_config.get_vocab_size())
            # As deep as a step holds them: the codec bounds nesting.
            self._codec.encode_plain([[[[[request.sampling_params, request.pooling_params]]]]])
        except WireError:
            self._end([request.request_id])
            return
        if self._adapter_of(request) in dropped:
            self._end([request.request_id])
        elif delivered:
            self._take_over(request, delivered)

    def _take_over(self, request: Request, delivered: list[int]) -> None:
        """Go on with a request of an engine that is gone."""
        request.append_output_token_ids(delivered)
        status = request.status
        told = told_again(request, self.max_model_len)
        self._untold.append((request.client_index, told))
        if request.is_finished():
            status, request.status = request.status, status
            self.finish_requests(request.request_id, status)
        else:
            self._replay.take_over(request)

    def _handle_blocked_waiting_request(self, request: Request) -> bool:
        """vLLM's; a grammar that is compiled only now takes the tokens its request has already."""
        lacked_grammar = request.status == RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR
        may_go: bool = super()._handle_blocked_waiting_request(request)
        if may_go and lacked_grammar and (delivered := list(request.output_token_ids)):
            if not self.structured_output_manager.accept_tokens(request, delivered):
                self.grammar_compile_error_reqs.add(request.request_id)  # how vLLM refuses one
                return False
            self._replay.take_over(request)
        return may_go

    def _adapter_of(self, request: Request) -> int | None:
        return request.lora_request.lora_int_id if request.lora_request else None

    def take_path(self, path: PathMeasured | None) -> None:
        """Learn what stages and links of the pipeline cost."""
        if path is not None and path is not self._path:
            self._path = path
            self._pace.take(path)

    @property
    def pace(self) -> PaceDecision | None:
        """The latest decision."""
        return self._pace.decision

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        if self._losses != losses.count:
            self._begin_anew()
        self._end_those_without_adapter()
        self._limit_adapters()
        decodes = [r for r in self._ready() if not r.is_prefill_chunk]
        load = self._load(len(decodes))
        share = self._pace.next(load)
        for request in decodes[share.num_decodes :]:
            self._hold_back(request)
        num_drafted = self._take_drafts(decodes[: share.num_decodes], load, share.max_drafted)
        is_decode_only = share.num_decodes > 0 and share.num_prefill_tokens == 0
        self.prefill_capacity_bound = False  # otherwise vLLM may not throttle
        self.max_num_scheduled_tokens = self._token_budget(share) + num_drafted
        self.running.sort(key=lambda r: r.is_prefill_chunk)  # no chunk takes a decode's share
        with compat.unpadded(self):
            output = super().schedule(throttle_prefills or is_decode_only)
        output.traits = self._traits(output)
        if self._drafter is not None:
            self._drafter.restored(self.requests[r.request.req_id] for r in output.traits.restored)
            self._drafter.scheduled(output, self.requests)
        self._count(output, 1)
        return output

    def _take_drafts(self, decodes: list[Request], load: Load, room: int) -> int:
        """Leave each request the drafted tokens that are worth sending; how many those are."""
        if self._drafter is None or not decodes:
            return 0
        taken = 0
        for request in decodes:
            worth = self._pace.drafts(load.num_decoding, self._drafter.chance_of(request))
            wanted = request.max_tokens - request.num_output_tokens - 1  # beside the next one
            most = max(0, min(worth, wanted, room - taken))
            request.spec_token_ids = request.spec_token_ids[:most]
            taken += len(request.spec_token_ids)
        self._tokens_each += WIDTH_GAIN * (1 + taken / len(decodes) - self._tokens_each)
        return taken

    def _count(self, output: SchedulerOutput, by: int) -> None:
        """Steps in flight, of each kind."""
        if output.total_num_scheduled_tokens:
            self._in_flight[output.traits.is_prefill] += by
            self._tokens_in_flight += by * output.total_num_scheduled_tokens

    def _load(self, num_ready: int) -> Load:
        return Load(
            num_decoding=sum(not r.is_prefill_chunk for r in self.running),
            num_ready=num_ready,
            pending=self._pending_prefill(),
            tokens_in_flight=self._tokens_in_flight,
            decode_steps=self._in_flight[False],
            prefill_steps=self._in_flight[True],
            tokens_each=round(self._tokens_each),
            draft_chance=self._drafter.chance if self._drafter else None,
        )

    def _traits(self, output: SchedulerOutput) -> StepTraits:
        requests = [self.requests[request_id] for request_id in output.num_scheduled_tokens]
        return StepTraits(
            is_prefill=any(_left_before(r, output) > 1 for r in requests),
            footprint=footprint_of(output, requests, self.kv_cache_manager),
            restored=list(self._replay.restored(output, self.requests)),
        )

    def _begin_anew(self) -> None:
        """Empty the caches of a pipeline that was lost; what ran is computed again from its tokens.

        What lies outside the caches of the engine ends: sessions that hold blocks while they wait
        for input, and scores that need what the last stage has kept of a query.
        """
        self._losses = losses.count
        self._end(r.request_id for r in self.requests.values() if self._cannot_begin_anew(r))
        self.reset_prefix_cache(reset_running_requests=True)
        self.reset_encoder_cache()
        self._replay.forget(self.requests)

    def _cannot_begin_anew(self, request: Request) -> bool:
        if request.pooling_params and request.pooling_params.late_interaction_params:
            return True
        is_running = request.status == RequestStatus.RUNNING
        is_idle = request.status == RequestStatus.WAITING_FOR_STREAMING_REQ
        return is_idle or (not is_running and self._holds_kv_blocks(request))

    def _end(self, request_ids: Iterable[str] | None) -> None:
        """End requests with an error; None: all of them."""
        for request in self.finish_requests(request_ids, RequestStatus.FINISHED_ERROR):
            self._untold.append((request.client_index, _error_output(request)))

    def give_up(self) -> None:
        """End all requests: their pipeline does not come back."""
        self._end(None)

    def take_ended(self) -> dict[int, EngineCoreOutputs]:
        """What tells the clients of requests that were ended here, by client."""
        outputs: dict[int, EngineCoreOutputs] = {}
        self._tell(outputs)
        return outputs

    def _tell(self, outputs: dict[int, EngineCoreOutputs]) -> None:
        """Put what no step has brought before what one did."""
        untold, self._untold = self._untold, []
        for client, output in reversed(untold):
            outputs.setdefault(client, EngineCoreOutputs()).outputs.insert(0, output)

    def _ready(self) -> list[Request]:
        """Running requests with something to compute; first those held back last time."""
        step = self.current_step + 1  # vLLM counts the step before it looks
        ready = [
            r
            for r in self.running
            if r.num_tokens > r.num_computed_tokens and r.next_decode_eligible_step <= step
        ]
        return sorted(ready, key=lambda r: -r.next_decode_eligible_step)

    def _hold_back(self, request: Request) -> None:
        """Leave a request out of this step, not of the next."""
        request.next_decode_eligible_step = self.current_step + 2

    def _end_those_without_adapter(self) -> None:
        """End requests for adapters that a replaced stage could not read any more."""
        if dropped:
            self._end(
                r.request_id for r in self.requests.values() if self._adapter_of(r) in dropped
            )

    def _limit_adapters(self) -> None:
        """Hold back requests that need more adapters than one step may have.

        vLLM counts them only where it admits a request, among those of the same step. Those it
        admitted to different steps meet later, and it ends with an assertion.
        """
        if self.lora_config is None:
            return
        adapters: set[int] = set()
        for request in self._ready():
            adapter = self._adapter_of(request)
            if adapter is None or adapter in adapters:
                continue
            if len(adapters) < self.lora_config.max_loras:
                adapters.add(adapter)
            else:
                self._hold_back(request)

    def _pending_prefill(self) -> int:
        """Prompt tokens that are in no step yet, counted as far as it matters."""
        pending = 0
        begun = (r for r in self.running if r.is_prefill_chunk)
        for request in chain(begun, self.kv_holding_waiting, self.waiting):
            pending += request.num_tokens - request.num_computed_tokens
            if pending > self._pace.max_pending:
                break
        return pending

    def _token_budget(self, share: Share) -> int:
        """Tokens of the next step; whole prompts if vLLM may not cut them."""
        if share.num_prefill_tokens and not self.scheduler_config.enable_chunked_prefill:
            return int(self._max_tokens)
        return share.num_decodes + share.num_prefill_tokens

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        self._count(scheduler_output, -1)
        if isinstance(model_runner_output, LostStep):
            if model_runner_output.is_broken:
                self.give_up()
            lost = scheduler_output.num_scheduled_tokens
            self._end(self._replay.hopeless(lost, self.requests, losses.count))
            self._begin_anew()
            model_runner_output = EMPTY_MODEL_RUNNER_OUTPUT
        outputs: dict[int, EngineCoreOutputs] = super().update_from_output(
            scheduler_output, model_runner_output
        )
        if self._drafter is not None:
            drafts = self._drafter.sampled(self._decoding_in(scheduler_output))
            self.update_draft_token_ids(drafts)
        self._tell(outputs)
        return outputs

    def _decoding_in(self, output: SchedulerOutput) -> list[Request]:
        """Requests of a step whose next token it brought."""
        found = (self.requests.get(request_id) for request_id in output.num_scheduled_tokens)
        return [r for r in found if r and r.status == RequestStatus.RUNNING and _decodes(r)]


def _decodes(request: Request) -> bool:
    """Whether nothing but its latest token is left to compute, and that is in no step yet."""
    return not request.is_prefill_chunk and request.num_tokens > request.num_computed_tokens


def _left_before(request: Request, output: SchedulerOutput) -> int:
    """Tokens of a request that were not computed when it was put into this step."""
    before = request.num_computed_tokens - output.num_scheduled_tokens[request.request_id]
    return int(request.num_tokens - before)


def _error_output(request: Request) -> EngineCoreOutput:
    return EngineCoreOutput(
        request_id=request.request_id,
        new_token_ids=[],
        finish_reason=request.get_finished_reason(),
        events=request.take_events(),
        trace_headers=request.trace_headers,
    )
