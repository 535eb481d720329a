"""What a stage need not do twice."""

from collections.abc import Callable

import pytest
from msgspec.structs import replace

from molink.engine.kept import Kept, StaleStageError
from molink.wire.to_stage import LoadStage, Resolved, WireFormat

RESOLVED = Resolved(
    dtype="float32",
    quantization=None,
    kv_cache_dtype="auto",
    seed=0,
    max_model_len=512,
    max_num_batched_tokens=64,
    max_num_seqs=8,
    block_size=16,
    enable_prefix_caching=True,
    enable_chunked_prefill=True,
    max_loras=None,
    max_lora_rank=None,
    num_speculative_tokens=None,
)
LOAD = LoadStage(
    stage_index=1, nodes=[0, 1], partition=[4, 4], engine_flags=["--x"], resolved=RESOLVED
)


def counting() -> tuple[list[int], Callable[[], int]]:
    calls: list[int] = []

    def call() -> int:
        calls.append(len(calls))
        return 7

    return calls, call


def test_layers_are_loaded_once_whoever_else_is_there() -> None:
    kept = Kept()
    assert not kept.has(LOAD)
    assert kept.has(LOAD)
    assert kept.has(replace(LOAD, nodes=[3, 4]))


@pytest.mark.parametrize(
    "other",
    [
        replace(LOAD, partition=[3, 5]),
        replace(LOAD, stage_index=0),
        replace(LOAD, engine_flags=[]),
        replace(LOAD, resolved=replace(RESOLVED, dtype="bfloat16")),
        replace(LOAD, wire=WireFormat(dtype="fp8")),
    ],
)
def test_a_stage_that_holds_something_else_is_stale(other: LoadStage) -> None:
    kept = Kept()
    kept.has(LOAD)
    with pytest.raises(StaleStageError):
        kept.has(other)


def test_a_call_that_was_made_is_answered_and_not_made() -> None:
    kept = Kept()
    calls, call = counting()
    assert [kept.answer("initialize_from_config", b"blocks", call) for _ in range(3)] == [7] * 3
    assert calls == [0]


def test_a_call_with_other_arguments_is_not_made_a_second_time() -> None:
    kept = Kept()
    calls, call = counting()
    kept.answer("initialize_from_config", b"blocks", call)
    with pytest.raises(StaleStageError):
        kept.answer("initialize_from_config", b"more blocks", call)
    assert calls == [0]


def test_what_an_engine_had_no_time_to_ask_is_done_for_the_next() -> None:
    kept = Kept()
    calls, call = counting()
    kept.answer("determine_available_memory", b"", call)
    kept.answer("compile_or_warm_up_model", b"", call)
    assert calls == [0, 1]
