"""Requests that an engine before this one began: their clients have tokens of them."""

import re
from typing import NamedTuple

import numpy as np
from vllm.v1.core.sched.utils import check_stop
from vllm.v1.engine import EngineCoreOutput
from vllm.v1.outputs import LogprobsLists
from vllm.v1.request import Request

from molink.core.errors import WireError
from molink.wire import delivered

_NAME = re.compile(r"(?:(\d+)_)?(?:chatcmpl-.*|cmpl-.*-(\d+)-\w+)", re.DOTALL)
"""How vLLM names a choice: [choice_]kind-client's name[-prompt]-random characters."""


class Choice(NamedTuple):
    """Which of a client's choices a request of the engine is."""

    prompt: int
    choice: int

    @classmethod
    def of(cls, request_id: str) -> "Choice":
        found = _NAME.fullmatch(request_id)
        return cls(int(found[2] or 0), int(found[1] or 0)) if found else cls(0, 0)


def take_delivered(request: Request, vocab_size: int) -> list[int]:
    """The tokens that the client of a request has; they leave its parameters.

    Raises:
        WireError: they are no tokens of the model, or more than the request may have.
    """
    params = request.sampling_params
    given = (params and params.extra_args) or {}
    if not any(delivered.is_key(name) for name in given):
        return []
    assert params is not None
    params.extra_args = {k: v for k, v in given.items() if not delivered.is_key(k)} or None
    tokens = given.get(delivered.key_of(*Choice.of(request.request_id)), [])
    if not isinstance(tokens, list) or not all(_is_token(t, vocab_size) for t in tokens):
        raise WireError("what was delivered are no tokens of this model")
    if len(tokens) > request.max_tokens:
        raise WireError("more was delivered than the request may have")
    return tokens


def _is_token(value: object, vocab_size: int) -> bool:
    return type(value) is int and 0 <= value < vocab_size


def told_again(request: Request, max_model_len: int) -> EngineCoreOutput:
    """A request's output so far, as the first that its client's server hears of it.

    Ends the request if its last token does. Log probabilities are not known any more: they are 0,
    and the gateway leaves them out with the tokens.
    """
    is_finished = check_stop(request, max_model_len)
    tokens = list(request.output_token_ids)
    return EngineCoreOutput(
        request_id=request.request_id,
        new_token_ids=tokens,
        new_logprobs=_no_logprobs(request, tokens),
        finish_reason=request.get_finished_reason() if is_finished else None,
        stop_reason=request.stop_reason,
        trace_headers=request.trace_headers,
    )


def _no_logprobs(request: Request, tokens: list[int]) -> LogprobsLists | None:
    assert request.sampling_params is not None
    if request.sampling_params.num_logprobs is None:
        return None
    ids = np.array(tokens, dtype=np.int32)[:, None]
    return LogprobsLists(ids, np.zeros_like(ids, dtype=np.float32), np.ones_like(ids[:, 0]))
