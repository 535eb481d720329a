"""How long a step keeps its device: the stage's share of a pipeline's round.

On an accelerator a call returns when the work is queued, so the device notes itself when a step
begins and when it is over.
"""

import time
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch


class StepKind(NamedTuple):
    """What a step's cost depends on."""

    tokens: int
    is_prefill: bool


class StepTimer(Protocol):
    """Measures one step after the other."""

    def start(self) -> None: ...

    def stop(self, kind: StepKind) -> None:
        """All work of the step has been queued."""
        ...

    def finished(self) -> Iterator[tuple[StepKind, float]]:
        """Steps that are over and their seconds, each once, in their order."""
        ...


def timer_for(device: torch.device) -> StepTimer:
    return CudaTimer() if device.type == "cuda" else HostTimer()


class HostTimer:
    """For devices on which a step is over when the call returns."""

    def __init__(self) -> None:
        self._started = 0.0
        self._done: deque[tuple[StepKind, float]] = deque()

    def start(self) -> None:
        self._started = time.perf_counter()

    def stop(self, kind: StepKind) -> None:
        self._done.append((kind, time.perf_counter() - self._started))

    def finished(self) -> Iterator[tuple[StepKind, float]]:
        while self._done:
            yield self._done.popleft()


class CudaTimer:
    """Events on the stream that computes: a step that waits for the one before has not begun."""

    def __init__(self) -> None:
        self._started: torch.cuda.Event | None = None
        self._queued: deque[tuple[StepKind, torch.cuda.Event, torch.cuda.Event]] = deque()

    def start(self) -> None:
        self._started = _event_now()

    def stop(self, kind: StepKind) -> None:
        assert self._started is not None
        self._queued.append((kind, self._started, _event_now()))

    def finished(self) -> Iterator[tuple[StepKind, float]]:
        while self._queued and self._queued[0][2].query():
            kind, started, ended = self._queued.popleft()
            yield kind, started.elapsed_time(ended) / 1e3


def _event_now() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
