"""What a step of vLLM's scheduler touches; see `planning.order`."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)
from vllm.v1.request import Request

from molink.engine.replay import Restored
from molink.planning.order import Footprint

_BY_POSITION = (FullAttentionSpec, MLAAttentionSpec, SlidingWindowSpec, ChunkedLocalAttentionSpec)
"""Caches whose token at position p lies in block p // block_size of a request's table."""


class StepTraits(NamedTuple):
    """What the scheduler knows of a step and vLLM's output does not say."""

    is_prefill: bool  # some request computes more than its next token
    footprint: Footprint
    restored: Sequence[Restored] = ()  # requests that the stages have lost, as they need them


def traits_of(output: Any) -> StepTraits:
    """Those that the scheduler has put beside the output's fields."""
    traits: StepTraits = output.traits
    return traits


def footprint_of(
    output: SchedulerOutput, requests: Iterable[Request], manager: KVCacheManager
) -> Footprint:
    """The step's footprint, from full block tables: the output itself names only new blocks.

    Args:
        requests: those it runs, as the scheduler leaves them: its tokens counted as computed.
    """
    blocks: set[int] = set(output.new_block_ids_to_zero or ())
    written = set(blocks)
    for copy in output.kv_cache_block_copies or ():
        blocks.update((copy.src_block_id, copy.dst_block_id))
        written.add(copy.dst_block_id)
    groups = manager.kv_cache_config.kv_cache_groups
    for request in requests:
        tables = manager.get_block_ids(request.request_id)
        num_tokens = output.num_scheduled_tokens[request.request_id]
        for group, table in zip(groups, tables, strict=True):
            blocks.update(table)
            written.update(_written(group.kv_cache_spec, table, request, num_tokens))
    null = manager.block_pool.null_block.block_id  # stands where a window has passed
    return Footprint(
        requests=frozenset(output.num_scheduled_tokens) | output.finished_req_ids,
        blocks=frozenset(blocks - {null}),
        written=frozenset(written - {null}),
        is_barrier=bool(output.scheduled_encoder_inputs or output.free_encoder_mm_hashes),
    )


def _written(
    spec: KVCacheSpec, table: list[int], request: Request, num_tokens: int
) -> Iterator[int] | list[int]:
    """Blocks of one table that the step writes; all of them where a state is kept, not tokens."""
    if not _is_by_position(spec):
        return table
    end = request.num_computed_tokens
    first, last = (end - num_tokens) // spec.block_size, cdiv(end, spec.block_size)
    return table[first:last]


def _is_by_position(spec: KVCacheSpec) -> bool:
    if isinstance(spec, UniformTypeKVCacheSpecs):
        return all(map(_is_by_position, spec.kv_cache_specs.values()))
    return type(spec) in _BY_POSITION
