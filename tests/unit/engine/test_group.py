"""The pipeline group that vLLM's worker meets instead of torch.distributed."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.distributed.parallel_state import GroupCoordinator

from molink.core.errors import WireError
from molink.engine.activations import StepId
from molink.engine.group import StageGroup
from molink.engine.hop_format import HopFormat


class Recorder:
    """A sender that keeps what it is given."""

    def __init__(self) -> None:
        self.format = HopFormat()
        self.sent: list[tuple[StepId, dict[str, torch.Tensor]]] = []

    def __call__(self, step: StepId, tensors: dict[str, torch.Tensor]) -> None:
        self.sent.append((step, tensors))


def group(index: int = 1, size: int = 3, send: Recorder | None = None) -> StageGroup:
    return StageGroup(index, size, send or Recorder())


def activations() -> dict[str, torch.Tensor]:
    return {"hidden_states": torch.ones(2, 4), "residual": torch.zeros(2, 4)}


def test_input_is_taken_once() -> None:
    stage, arrived = group(), activations()
    stage.begin(StepId(1, 1), 2, arrived)
    tensors, handles, postprocess = stage.irecv_tensor_dict(all_gather_group=None)
    assert tensors is arrived
    assert handles == postprocess == []  # nothing is left to wait for
    with pytest.raises(RuntimeError, match="not arrived"):
        stage.irecv_tensor_dict()


def test_a_step_never_runs_on_the_input_of_another() -> None:
    stage = group()
    stage.begin(StepId(1, 1), 0, activations())  # a step without tokens takes no input
    stage.begin(StepId(1, 2), 2, None)
    with pytest.raises(RuntimeError, match="not arrived"):
        stage.irecv_tensor_dict()


@pytest.mark.parametrize("num_tokens", [1, 3])
def test_input_of_other_rows_than_the_step_has_tokens_is_refused(num_tokens: int) -> None:
    stage = group()
    stage.begin(StepId(1, 1), num_tokens, activations())
    with pytest.raises(WireError, match=f"2 rows of hidden_states came for {num_tokens} tokens"):
        stage.irecv_tensor_dict()


def test_output_is_sent_under_the_step_that_runs() -> None:
    send = Recorder()
    stage = group(send=send)
    outputs = [activations(), activations()]
    for number, output in enumerate(outputs):
        stage.begin(StepId(4, number), 2, activations())
        handles = stage.isend_tensor_dict(output, all_gather_group=None, all_gather_tensors={})
        assert handles == []  # nothing for vLLM to wait for
    assert [step for step, _ in send.sent] == [StepId(4, 0), StepId(4, 1)]
    for (_, tensors), output in zip(send.sent, outputs, strict=True):
        assert {name: t.data_ptr() for name, t in tensors.items()} == {
            name: t.data_ptr() for name, t in output.items()
        }


def test_rows_that_a_graph_computes_beyond_the_steps_tokens_stay_here() -> None:
    send = Recorder()
    stage = group(send=send)
    stage.begin(StepId(1, 1), 5, None)
    stage.isend_tensor_dict({"hidden_states": torch.arange(8.0).view(8, 1)})
    ((_, tensors),) = send.sent
    assert tensors["hidden_states"].flatten().tolist() == [0, 1, 2, 3, 4]


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
