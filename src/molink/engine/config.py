"""A stage's vLLM configuration: the user's flags, the node's own flags, the head's values."""

import os
from typing import Any

import psutil
from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.platforms import current_platform
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser

from molink.core.errors import AdmissionError, UsageError
from molink.engine.types import dtype_name
from molink.wire.to_stage import LoadStage, Resolved


def resolve(config: VllmConfig) -> Resolved:
    """The values of `config` that all stages must share."""
    lora, speculative = config.lora_config, config.speculative_config
    return Resolved(
        dtype=dtype_name(config.model_config.dtype),
        quantization=config.model_config.quantization,
        kv_cache_dtype=config.cache_config.cache_dtype,
        seed=config.model_config.seed,
        max_model_len=config.model_config.max_model_len,
        max_num_batched_tokens=config.scheduler_config.max_num_batched_tokens,
        max_num_seqs=config.scheduler_config.max_num_seqs,
        block_size=config.cache_config.block_size,
        enable_prefix_caching=bool(config.cache_config.enable_prefix_caching),
        enable_chunked_prefill=bool(config.scheduler_config.enable_chunked_prefill),
        max_loras=lora.max_loras if lora else None,
        max_lora_rank=lora.max_lora_rank if lora else None,
        num_speculative_tokens=speculative.num_speculative_tokens if speculative else None,
    )


class FlagParser(FlexibleArgumentParser):
    """vLLM's parser, which also keeps the flags as argparse gets them: in one spelling each, those
    of `--config` files among them."""

    normalised: list[str]

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self.normalised = list(args or [])
        return super().parse_known_args(args, namespace)


def engine_parser(prog: str = "molink") -> FlexibleArgumentParser:
    """vLLM's parser for engine flags alone, without those of its HTTP server."""
    parser = FlexibleArgumentParser(prog=prog, allow_abbrev=False)
    return AsyncEngineArgs.add_cli_args(parser)


def engine_flags_of(flags: list[str]) -> list[str]:
    """Those of the user's flags, as FlagParser has them, that are engine flags: only these leave
    the head.

    An HTTP flag may hold a secret (`--api-key`), and other nodes have no use for it.
    """
    _, others = engine_parser().parse_known_args(flags)
    kept, rest = [], list(others)
    for flag in flags:
        if rest and flag == rest[0]:
            rest.pop(0)
        else:
            kept.append(flag)
    return kept


def stage_config(
    load: LoadStage, *, model: str, node_flags: list[str], tensor_parallel_size: int
) -> VllmConfig:
    """Build the configuration of one stage.

    Raises:
        UsageError: vLLM refuses the flags.
        AdmissionError: what vLLM resolved here differs from what the head resolved.
    """
    args = AsyncEngineArgs.from_cli_args(
        _parse([f"--model={model}", *load.engine_flags, *node_flags])
    )
    args.tensor_parallel_size = tensor_parallel_size
    args.pipeline_parallel_size = len(load.partition)
    args.distributed_executor_backend = "mp"  # never started: the stage is driven by its agent
    _bound_cpu_cache(args)
    _impose(args, load.resolved)
    config = args.create_engine_config(UsageContext.OPENAI_API_SERVER)
    _check(load.resolved, resolve(config))
    return config


def _bound_cpu_cache(args: AsyncEngineArgs) -> None:
    """On a CPU, take an eighth of the free memory for KV unless the user has said how much.

    vLLM would take nearly all of the machine's, and refuse to start beside a second stage.
    """
    has_said = (
        args.kv_cache_memory_bytes is not None
        or "VLLM_CPU_KVCACHE_SPACE" in os.environ
        or args.gpu_memory_utilization != AsyncEngineArgs.gpu_memory_utilization
    )
    if current_platform.is_cpu() and not has_said:
        args.kv_cache_memory_bytes = psutil.virtual_memory().available // 8


def _parse(flags: list[str]) -> Any:
    try:
        return engine_parser().parse_args(flags)
    except SystemExit:
        raise UsageError(f"vLLM on this node does not accept the flags {flags}") from None


def _impose(args: AsyncEngineArgs, resolved: Resolved) -> None:
    args.dtype = resolved.dtype
    args.quantization = resolved.quantization
    args.kv_cache_dtype = resolved.kv_cache_dtype
    args.seed = resolved.seed
    args.max_model_len = resolved.max_model_len
    args.max_num_batched_tokens = resolved.max_num_batched_tokens
    args.max_num_seqs = resolved.max_num_seqs
    args.block_size = resolved.block_size
    args.enable_prefix_caching = resolved.enable_prefix_caching
    args.enable_chunked_prefill = resolved.enable_chunked_prefill
    args.async_scheduling = False


def _check(head: Resolved, here: Resolved) -> None:
    for field in Resolved.__struct_fields__:
        expected, found = getattr(head, field), getattr(here, field)
        if expected != found:
            raise AdmissionError(f"{field} is {expected} on the head and {found} on this node")
