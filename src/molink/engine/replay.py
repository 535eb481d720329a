"""Requests whose pipeline was lost: what its next stages must be told, and which are hopeless."""

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
from vllm.v1.request import Request, RequestStatus

MOST_SETBACKS = 3  # fewer than the restarts of a stage that never comes to a step


class Restored(NamedTuple):
    """A request in mid-generation, for stages that know nothing of it."""

    request: NewRequestData
    output: list[int]  # tokens it has


class _Setback(NamedTuple):
    loss: int  # its number
    num_tokens: int  # that the request had then
    times: int  # losses in a row with so many


class Replay:
    """Owns which requests no stage knows any more, and how often each was lost without a token."""

    def __init__(self) -> None:
        self._forgotten: set[str] = set()
        self._setbacks: dict[str, _Setback] = {}

    def forget(self, requests: Mapping[str, Request]) -> None:
        """No stage knows these requests any more; vLLM has preempted those that ran.

        Without a token they are new again. Outputs that are still under way are dropped: they are
        sampled again, and are the same.
        """
        for request in requests.values():
            if request.status == RequestStatus.PREEMPTED:
                request.drop_stale_output = True
                if request.num_output_tokens:
                    self._forgotten.add(request.request_id)
                else:
                    request.status = RequestStatus.WAITING
        self._setbacks = {name: s for name, s in self._setbacks.items() if name in requests}

    def take_over(self, request: Request) -> None:
        """Go on with a request that has tokens already; if its grammar is compiled."""
        if request.status == RequestStatus.WAITING:
            request.status = RequestStatus.PREEMPTED
            self._forgotten.add(request.request_id)

    def restored(
        self, output: SchedulerOutput, requests: Mapping[str, Request]
    ) -> Iterator[Restored]:
        """Those requests of a step that were forgotten, which get their tokens anew."""
        self._forgotten.difference_update(output.finished_req_ids)
        cached = output.scheduled_cached_reqs
        for index, name in enumerate(cached.req_ids):
            if name in self._forgotten:
                self._forgotten.discard(name)
                request = requests[name]
                new = NewRequestData.from_request(request, cached.new_block_ids[index])
                new.mm_features, new.num_computed_tokens = request.mm_features, 0
                yield Restored(new, list(request.output_token_ids))

    def hopeless(
        self, lost: Iterable[str], requests: Mapping[str, Request], loss: int
    ) -> list[str]:
        """Those of a lost step that may have caused the loss, by number: again, without a token."""
        found = []
        for name in lost:
            request, before = requests.get(name), self._setbacks.get(name)
            if request is None or (before is not None and before.loss == loss):
                continue
            is_stuck = before is not None and before.num_tokens == request.num_tokens
            times = 1 + (before.times if before is not None and is_stuck else 0)
            self._setbacks[name] = _Setback(loss, request.num_tokens, times)
            if times == MOST_SETBACKS:
                found.append(name)
        return found
