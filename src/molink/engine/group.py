"""The pipeline group of a stage: what vLLM's worker thinks is torch.distributed."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from molink.core.errors import WireError
from molink.engine.activations import StepId
from molink.engine.senders import Sender


class StageGroup:
    """Stands where vLLM keeps the GroupCoordinator of pipeline parallelism.

    The stage loop puts a step's input in before it calls the worker, so nothing here ever blocks on
    a network. `send` hands the step's output to the agent.
    """

    def __init__(self, index: int, size: int, send: Sender) -> None:
        self.rank_in_group = index
        self.rank = index
        self.world_size = size
        self.ranks = list(range(size))
        self._step = StepId(0, 0)
        self._num_rows = 0
        self._input: dict[str, torch.Tensor] | None = None
        self._send = send

    def begin(
        self, step: StepId, num_rows: int, step_input: dict[str, torch.Tensor] | None
    ) -> None:
        """Set the step that is about to run, and what came from the stage before.

        Args:
            num_rows: tokens of the step; CUDA graphs compute more rows, which nobody needs.
        """
        self._step, self._num_rows, self._input = step, num_rows, step_input

    @property
    def first_rank(self) -> int:
        return 0

    @property
    def last_rank(self) -> int:
        return self.world_size - 1

    @property
    def is_first_rank(self) -> bool:
        return self.rank_in_group == 0

    @property
    def is_last_rank(self) -> bool:
        return self.rank_in_group == self.world_size - 1

    @property
    def next_rank(self) -> int:
        return (self.rank_in_group + 1) % self.world_size

    @property
    def prev_rank(self) -> int:
        return (self.rank_in_group - 1) % self.world_size

    def irecv_tensor_dict(
        self, *_: Any, **__: Any
    ) -> tuple[dict[str, torch.Tensor], list[Any], list[Any]]:
        """The input of the step that is about to run: tensors of [num_tokens, hidden_size].

        Raises:
            WireError: it has more or fewer rows than the step has tokens.
        """
        step_input, self._input = self._input, None
        if step_input is None:
            raise RuntimeError("a step runs whose input has not arrived")
        for name, tensor in step_input.items():
            if len(tensor) != self._num_rows:
                raise WireError(f"{len(tensor)} rows of {name} came for {self._num_rows} tokens")
        return step_input, [], []

    def isend_tensor_dict(
        self, tensor_dict: dict[str, torch.Tensor], *_: Any, **__: Any
    ) -> list[Any]:
        """Send a step's output. There is nothing to wait for."""
        self._send(self._step, {name: t[: self._num_rows] for name, t in tensor_dict.items()})
        return []

    @contextmanager
    def graph_capture(self, graph_capture_context: Any = None) -> Iterator[Any]:
        """A pipeline group has no collective to capture."""
        yield graph_capture_context

    def broadcast_object(self, obj: Any = None, src: int = 0) -> Any:
        """Used for the state of KV transfer, which every stage owns for itself."""
        return obj

    def barrier(self) -> None:
        """Stages are ordered by their input."""

    def destroy(self) -> None:
        """Owns no group of torch."""
