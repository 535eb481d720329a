"""vLLM's types that cross the wire, each under its tag.

What connectors to other KV stores and encoders put into the scheduler's and the runner's output
(`KVConnectorMetadata`, `KVConnectorStats` and their kin) is not here: every connector brings types
of its own, and the codec refuses them by name at the sender.
"""

from typing import Final

import torch
from vllm.compilation.cuda_graph import CUDAGraphStat
from vllm.distributed.aux_output_connector.connector import (
    AuxOutputConnectorMetadata,
    AuxRequestOutput,
    PackedBlockHashes,
)
from vllm.lora.request import LoRARequest
from vllm.multimodal import inputs as multimodal
from vllm.pooling_params import LateInteractionParams, PoolingParams
from vllm.sampling_params import (
    RepetitionDetectionParams,
    RequestOutputKind,
    SamplingParams,
    StructuredOutputsParams,
)
from vllm.v1 import kv_cache_interface as kv
from vllm.v1 import outputs
from vllm.v1.attention.backend import MultipleOf
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.core.kv_cache_utils import KVCacheBlockCopy
from vllm.v1.core.sched import output as scheduler
from vllm.v1.worker.worker_base import CompilationTimes

from molink.wire.codec import Codec, CodecError, Parts, Registry
from molink.wire.tensors import DTYPE_BYTES, num_bytes
from molink.wire.to_stage import LoadStage, Resolved, WireFormat

STEP_TYPES: Final = {
    16: scheduler.SchedulerOutput,
    17: scheduler.NewRequestData,
    18: scheduler.CachedRequestData,
    19: scheduler.ScheduledEncoderInputStats,
    20: scheduler.GrammarOutput,
    21: KVCacheBlockCopy,
    22: AuxOutputConnectorMetadata,
    23: PackedBlockHashes,
    26: StructuredOutputsParams,
    27: RepetitionDetectionParams,
    28: RequestOutputKind,
    30: LateInteractionParams,
    31: outputs.ModelRunnerOutput,
    32: outputs.LogprobsLists,
    33: outputs.LogprobsTensors,
    34: outputs.SamplingMaskLists,
    35: outputs.KVConnectorOutput,
    36: outputs.ECConnectorOutput,
    37: outputs.DraftTokenIds,
    38: CUDAGraphStat,
    39: AuxRequestOutput,
}

TEMPLATES: Final = {
    24: SamplingParams(),
    25: LoRARequest("name", 1, "path"),
    29: PoolingParams(),
}
"""Structs with a `__post_init__`, which must not run again on receipt: they are copied."""

START_UP_TYPES: Final = {
    50: kv.KVCacheConfig,
    51: kv.KVCacheTensor,
    52: kv.KVCacheGroupSpec,
    53: kv.KVCacheGroupRole,
    54: kv.KVQuantMode,
    55: kv.SparseCacheRole,
    56: MambaAttentionBackendEnum,
    57: MultipleOf,
    58: CompilationTimes,
    60: kv.KVCacheSpec,
    61: kv.AttentionSpec,
    62: kv.FullAttentionSpec,
    63: kv.MLAAttentionSpec,
    64: kv.HiddenStateCacheSpec,
    65: kv.RSWASpec,
    66: kv.ChunkedLocalAttentionSpec,
    67: kv.SlidingWindowSpec,
    68: kv.SlidingWindowMLASpec,
    69: kv.CircularBufferSpec,
    70: kv.MambaSpec,
    71: kv.EncoderOnlyAttentionSpec,
    72: kv.CrossAttentionSpec,
    73: kv.SinkFullAttentionSpec,
    74: kv.UniformTypeKVCacheSpecs,
    75: kv.HiSparseHotSpec,
    76: kv.HiSparseResidentSpec,
    80: LoadStage,
    81: Resolved,
    82: WireFormat,
}

MULTIMODAL_TYPES: Final = {
    90: multimodal.MultiModalFeatureSpec,
    91: multimodal.MultiModalFieldElem,
    92: multimodal.MultiModalBatchedField,
    93: multimodal.MultiModalFlatField,
    94: multimodal.MultiModalSharedField,
    95: multimodal.PlaceholderRange,
}

TORCH_DTYPES: Final = {name: getattr(torch, name) for name in (*DTYPE_BYTES, "int8", "float8_e5m2")}
"""The dtypes that may be named. A tensor travels only in one of DTYPE_BYTES."""


def build_codec() -> Codec:
    """The codec of engine and stages."""
    registry = Registry()
    for table in (STEP_TYPES, START_UP_TYPES, MULTIMODAL_TYPES):
        for tag, cls in table.items():
            registry.add(tag, cls)
    for tag, template in TEMPLATES.items():
        registry.add(tag, type(template), template=template)
    registry.add_hook(40, torch.Tensor, _tensor_parts, _tensor_from, (str, list, bytes))
    registry.add_hook(41, torch.dtype, _dtype_parts, _dtype_from, (str,))
    registry.add_hook(96, slice, _slice_parts, lambda parts: slice(*parts), (object,) * 3)
    item = multimodal.MultiModalKwargsItem
    registry.add_hook(97, item, lambda value: [value.data], lambda parts: item(*parts), (dict,))
    return Codec(registry)


def dtype_name(dtype: torch.dtype) -> str:
    """As configurations and the wire have it: «bfloat16»."""
    return str(dtype).removeprefix("torch.")


def _dtype_parts(dtype: torch.dtype) -> Parts:
    name = dtype_name(dtype)
    if name not in TORCH_DTYPES:
        raise CodecError(f"{dtype} does not cross the wire")
    return [name]


def _dtype_from(parts: Parts) -> torch.dtype:
    return TORCH_DTYPES[parts[0]]


def _tensor_parts(tensor: torch.Tensor) -> Parts:
    """Values alone: device, strides and gradient stay behind."""
    name, shape = dtype_name(tensor.dtype), list(tensor.shape)
    num_bytes(name, shape)
    data = tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
    return [name, shape, data]


def _tensor_from(parts: Parts) -> torch.Tensor:
    """A tensor in host memory of its own."""
    name, shape, data = parts
    if num_bytes(name, shape) != len(data):
        raise CodecError(f"{len(data)} bytes for a {name} tensor of shape {shape}")
    if not data:
        return torch.empty(shape, dtype=TORCH_DTYPES[name])
    return torch.frombuffer(bytearray(data), dtype=TORCH_DTYPES[name]).view(shape)


def _slice_parts(value: slice) -> Parts:
    return [value.start, value.stop, value.step]
