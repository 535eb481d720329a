"""The pipeline group that vLLM's worker meets instead of torch.distributed."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.distributed.parallel_state import GroupCoordinator

from molink.engine.activations import StepId
from molink.engine.group import StageGroup

Sent = list[tuple[StepId, dict[str, torch.Tensor]]]


def group(index: int = 1, size: int = 3, sent: Sent | None = None, handles: Any = ()) -> StageGroup:
    sent = [] if sent is None else sent

    def send(step: StepId, tensors: dict[str, torch.Tensor]) -> list[Any]:
        sent.append((step, tensors))
        return list(handles)

    return StageGroup(index, size, send)


def activations() -> dict[str, torch.Tensor]:
    return {"hidden_states": torch.ones(2, 4), "residual": torch.zeros(2, 4)}


def test_input_is_taken_once() -> None:
    stage, arrived = group(), activations()
    stage.begin(StepId(1, 1), arrived)
    tensors, handles, postprocess = stage.irecv_tensor_dict(all_gather_group=None)
    assert tensors is arrived
    assert handles == postprocess == []  # nothing is left to wait for
    with pytest.raises(RuntimeError, match="not arrived"):
        stage.irecv_tensor_dict()


def test_a_step_never_runs_on_the_input_of_another() -> None:
    stage = group()
    stage.begin(StepId(1, 1), activations())  # a step without tokens takes no input
    stage.begin(StepId(1, 2), None)
    with pytest.raises(RuntimeError, match="not arrived"):
        stage.irecv_tensor_dict()


def test_output_is_sent_under_the_step_that_runs() -> None:
    sent: Sent = []
    stage = group(sent=sent)
    outputs = [activations(), activations()]
    for number, output in enumerate(outputs):
        stage.begin(StepId(4, number), activations())
        stage.isend_tensor_dict(output, all_gather_group=None, all_gather_tensors={})
    assert [step for step, _ in sent] == [StepId(4, 0), StepId(4, 1)]
    assert all(tensors is output for (_, tensors), output in zip(sent, outputs, strict=True))


def test_vllm_waits_for_all_handles_but_the_first() -> None:
    copied = object()
    assert group(handles=[copied]).isend_tensor_dict(activations()) == [None, copied]
    assert group().isend_tensor_dict(activations()) == [None]


@given(st.integers(1, 8).flatmap(lambda n: st.tuples(st.integers(0, n - 1), st.just(n))))
def test_places_in_the_pipeline_are_those_of_vllms_own_group(place: tuple[int, int]) -> None:
    index, size = place
    ours = group(index, size)
    vllms = GroupCoordinator.__new__(GroupCoordinator)
    vllms.rank, vllms.rank_in_group = index, index
    vllms.world_size, vllms.ranks = size, list(range(size))
    for name in (
        *("rank", "rank_in_group", "world_size", "ranks", "first_rank", "last_rank"),
        *("is_first_rank", "is_last_rank", "next_rank", "prev_rank"),
    ):
        assert getattr(ours, name) == getattr(vllms, name), name


def test_graph_capture_keeps_the_context_of_the_tensor_parallel_group() -> None:
    context = object()
    with group().graph_capture(context) as captured:
        assert captured is context


def test_every_stage_keeps_its_own_state_of_kv_transfer() -> None:
    state = object()
    assert group().broadcast_object(state, src=0) is state
    assert group().broadcast_object(src=2) is None
