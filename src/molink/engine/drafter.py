"""Speculation over a pipeline: the engine drafts, from the tokens that it has anyway.

In vLLM the last stage drafts, and the engine asks it for the drafts before it makes the next step.
Across a network that is another trip, or bytes. A draft of n-grams needs nothing but a request's
tokens; so no stage drafts, and the last one only verifies.
"""

from collections.abc import Iterable, Mapping

import numpy as np
from vllm.config import VllmConfig
from vllm.sampling_params import SamplingType
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import DraftTokenIds
from vllm.v1.request import Request

from molink.engine import compat
from molink.engine.compat import Tokens
from molink.planning.speculation import FIRST_CHANCE, Acceptance


class _History:
    """A request's tokens, what is drafted to follow them, and how good its drafts have been."""

    def __init__(self) -> None:
        self.num_known = 0  # tokens that every stage knows
        self.num_tokens = 0
        self.draft: list[int] = []
        self.acceptance = Acceptance()
        self._tokens = np.empty(0, np.int32)

    @property
    def text(self) -> Tokens:
        return self._tokens[: self.num_tokens]

    def extend(self, tokens: list[int], max_model_len: int) -> None:
        if not len(self._tokens):
            self._tokens = np.empty(max_model_len, np.int32)  # pages are taken when written
        end = self.num_tokens + len(tokens)
        self._tokens[self.num_tokens : end] = tokens
        self.num_tokens = end


class Drafter:
    """Drafts tokens for requests, as vLLM's n-gram drafter does. Owns drafts and their acceptance.

    Requests with a seed get no drafts: how many are sent along depends on what else runs, and
    verifying draws random numbers for each.
    """

    def __init__(self, config: VllmConfig) -> None:
        self._max_model_len = config.model_config.max_model_len
        self._draft = compat.ngram_search(config)
        self._histories: dict[str, _History] = {}
        self._acceptance = Acceptance()  # of all requests

    @property
    def chance(self) -> float:
        """That a drafted token is accepted, over all requests."""
        return self._acceptance.chance(FIRST_CHANCE)

    def chance_of(self, request: Request) -> float:
        history = self._histories.get(request.request_id)
        return history.acceptance.chance(self.chance) if history else self.chance

    def scheduled(self, output: SchedulerOutput, requests: Mapping[str, Request]) -> None:
        """Note what the stages learn of each request, and let them learn all of it.

        A step brings early stages the tokens that it computes, and the last one knows those that it
        sampled: drafts that were accepted would be missing on the others. The runner appends as
        many of a request's new tokens as it lacks by its own count, from the end. Here it counts
        more than there are, and appends all: for requests that are not in its batch, which is so
        because each step's batch is laid out afresh (`compat.empty_batch`).
        """
        for request_id in output.finished_req_ids:
            self._histories.pop(request_id, None)
        for new in output.scheduled_new_reqs:
            history = self._histories[new.req_id] = _History()
            history.num_known = requests[new.req_id].num_prompt_tokens
        cached = output.scheduled_cached_reqs
        if not cached.new_token_ids:  # the only stage has sampled all that there are
            return
        for index, request_id in enumerate(cached.req_ids):
            history, computed = self._histories[request_id], cached.num_computed_tokens[index]
            new_tokens = cached.new_token_ids[index]
            if history.num_known < computed:
                missing = requests[request_id].all_token_ids[history.num_known : computed]
                cached.new_token_ids[index] = [*missing, *new_tokens]
            history.num_known = max(history.num_known, computed + len(new_tokens))

    def restored(self, requests: Iterable[Request]) -> None:
        """Stages that had lost these requests get all their tokens with the step being made."""
        for request in requests:
            self._histories[request.request_id].num_known = request.num_tokens

    def sampled(self, requests: Iterable[Request]) -> DraftTokenIds:
        """Judge the latest drafts of requests by the tokens that have come, and draft again."""
        ids, drafts = [], []
        for request in filter(_may_draft, requests):
            history = self._histories[request.request_id]
            tokens = request.all_token_ids[history.num_tokens :]
            self._acceptance.observe(history.draft, tokens)
            history.acceptance.observe(history.draft, tokens)
            history.extend(tokens, self._max_model_len)
            history.draft = self._draft(history.text)
            ids.append(request.request_id)
            drafts.append(history.draft)
        return DraftTokenIds(ids, drafts)


def _may_draft(request: Request) -> bool:
    params = request.sampling_params
    is_seeded = params is None or params.sampling_type == SamplingType.RANDOM_SEED
    return not (is_seeded or request.resumable)
