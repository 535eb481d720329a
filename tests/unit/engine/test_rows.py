"""Rows of activations are in the order of vLLM's batch, which every stage must lay out alike."""

from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.sampling_params import SamplingParams
from vllm.v1.worker.gpu_input_batch import CachedRequestState, InputBatch

from molink.engine.compat import empty_batch

NAMES = [f"request-{number}" for number in range(6)]


def new_batch() -> InputBatch:
    return InputBatch(
        max_num_reqs=8,
        max_model_len=64,
        max_num_batched_tokens=64,
        device=torch.device("cpu"),
        vocab_size=100,
        block_sizes=[16],
        max_num_blocks_per_req=[4],
    )


def run(batch: InputBatch, names: list[str], *, afresh: bool) -> list[str]:
    """Lay out a step as the runner does (`_update_states`); whose row is which."""
    if afresh:
        runner = SimpleNamespace(input_batch=batch, prepare_inputs_event=None)
        worker: Any = SimpleNamespace(model_runner=runner)
        empty_batch(worker)
    for name in set(batch.req_id_to_index) - set(names):
        batch.remove_request(name)
    for name in names:
        if name not in batch.req_id_to_index:
            batch.add_request(
                CachedRequestState(name, [1, 2], [], SamplingParams(), None, ([3],), 0, [])
            )
    batch.condense()
    batch.refresh_metadata()
    return list(batch.req_ids)


steps = st.lists(st.sampled_from(NAMES), unique=True, min_size=1)


@settings(deadline=None)
@given(st.lists(steps, max_size=5), st.lists(steps, max_size=5), steps)
def test_a_step_has_the_same_rows_whatever_a_stage_ran_before(
    here: list[list[str]], there: list[list[str]], step: list[str]
) -> None:
    rows = []
    for before in (here, there):
        batch = new_batch()
        for names in before:
            run(batch, names, afresh=True)
        rows.append(run(batch, step, afresh=True))
    assert rows == [step, step]


def test_vllms_own_batch_remembers() -> None:
    """Otherwise nothing would have to be done."""
    batch = new_batch()
    run(batch, ["a", "b"], afresh=False)
    assert run(batch, ["b", "a"], afresh=False) == ["a", "b"]
    assert run(batch, ["b", "a"], afresh=True) == ["b", "a"]
