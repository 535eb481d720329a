"""vLLM's types over the codec: every registered type, and outputs as vLLM builds them."""

import copy
import dataclasses
import enum
import inspect
import struct
from contextlib import suppress
from fractions import Fraction
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats
from vllm.lora.request import LoRARequest
from vllm.multimodal import inputs as multimodal
from vllm.pooling_params import LateInteractionParams, PoolingParams
from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams
from vllm.v1 import kv_cache_interface as kv
from vllm.v1 import outputs
from vllm.v1.attention.backend import MultipleOf
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.core.kv_cache_utils import KVCacheBlockCopy
from vllm.v1.core.sched import output as scheduler
from vllm.v1.worker.worker_base import CompilationTimes

from molink.engine.types import (
    MULTIMODAL_TYPES,
    START_UP_TYPES,
    STEP_TYPES,
    TEMPLATES,
    TORCH_DTYPES,
    build_codec,
)
from molink.wire.codec import CodecError, UnregisteredType
from molink.wire.tensors import DTYPE_BYTES

CODEC = build_codec()
REGISTERED = [
    *(STEP_TYPES | START_UP_TYPES | MULTIMODAL_TYPES).values(),
    *map(type, TEMPLATES.values()),
]
quick = settings(deadline=None, max_examples=20)

LEFT_OUT = {
    scheduler.KVConnectorBlockState,  # the scheduler's own; None when a worker sees the output
    outputs.SamplerOutput,  # stays on the last stage
    outputs.AsyncModelRunnerOutput,  # resolved on the last stage
    kv.KVCacheSpecKind,  # no field holds one
}


def round_trip(value: Any) -> Any:
    return CODEC.decode(CODEC.encode(value))


def plain(value: Any) -> Any:
    """A tree that is equal for equal values only: types, every field and bytes of tensors count."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [field.name for field in dataclasses.fields(value)]
        return type(value), [plain(getattr(value, name)) for name in fields]
    match value:
        case msgspec.Struct():
            return type(value), [plain(getattr(value, n)) for n in value.__struct_fields__]
        case torch.Tensor():
            data = value.reshape(-1).view(torch.uint8)
            return value.dtype, value.shape, bytes(data.tolist())
        case np.ndarray():
            return value.dtype, value.shape, value.tobytes()
        case multimodal.MultiModalKwargsItem():
            return type(value), plain(value.data)
        case dict():
            return dict, [(plain(k), plain(v)) for k, v in value.items()]
        case set():
            return set, sorted(map(repr, map(plain, value)))
        case list() | tuple():
            return type(value), [plain(item) for item in value]
        case float():
            return float, struct.pack("<d", value)
    return type(value), value


def make(cls: type, values: Any) -> Any:
    """An instance with these values in its fields, whatever its constructor thinks of them."""
    if issubclass(cls, msgspec.Struct):
        template = next((t for t in TEMPLATES.values() if type(t) is cls), None)
        made = copy.copy(template) if template else cls(**dict.fromkeys(cls.__struct_fields__))
        for name in cls.__struct_fields__:
            msgspec.structs.force_setattr(made, name, values())
        return made
    if issubclass(cls, tuple):
        return cls(*(values() for _ in cls._fields))
    made = object.__new__(cls)
    for field in dataclasses.fields(cls):
        object.__setattr__(made, field.name, values())
    return made


shapes = st.lists(st.integers(0, 4), max_size=3)
tensors = st.builds(
    lambda name, shape: torch.ones(shape).to(TORCH_DTYPES[name]),
    st.sampled_from(sorted(DTYPE_BYTES)),
    shapes,
)
ints = st.integers(-(2**63), 2**64 - 1)
leaves = st.one_of(
    st.none(),
    st.booleans(),
    ints,
    st.floats(),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    st.binary(max_size=8),
    tensors,
    st.sampled_from(list(TORCH_DTYPES.values())),
    st.sampled_from([Fraction(1, 3), RequestOutputKind.DELTA, kv.KVQuantMode.NVFP4]),
    st.builds(np.zeros, shapes, st.sampled_from([np.int32, np.float32])),
)
field_values = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.sets(ints, max_size=3),
        st.dictionaries(st.one_of(ints, st.text("ab", max_size=3)), inner, max_size=3),
    ),
    max_leaves=4,
)


@pytest.mark.parametrize("cls", REGISTERED, ids=lambda cls: cls.__qualname__)
def test_every_registered_type_comes_back(cls: type) -> None:
    if issubclass(cls, enum.Enum):
        for member in cls:
            assert round_trip(member) is member
        return

    @quick
    @given(st.data())
    def check(data: st.DataObject) -> None:
        value = make(cls, lambda: data.draw(field_values))
        assert plain(round_trip(value)) == plain(value)

    check()


def test_vllms_modules_hold_no_type_that_was_forgotten() -> None:
    def wanted(cls: Any, module: Any) -> bool:
        return inspect.isclass(cls) and cls.__module__ == module.__name__ and cls not in LEFT_OUT

    for module in (scheduler, outputs, kv):
        found = {cls for cls in vars(module).values() if wanted(cls, module)}
        assert found <= set(REGISTERED)
    assert set(all_subclasses(kv.KVCacheSpec)) <= set(REGISTERED)


def all_subclasses(cls: type) -> list[type]:
    below = cls.__subclasses__()
    return below + [deeper for sub in below for deeper in all_subclasses(sub)]


def cached(num_reqs: int = 16) -> scheduler.CachedRequestData:
    return scheduler.CachedRequestData(
        req_ids=[f"cmpl-{i}" for i in range(num_reqs)],
        resumed_req_ids={"cmpl-3"},
        new_token_ids=[[i] for i in range(num_reqs)],
        all_token_ids={"cmpl-3": [1, 2, 3]},
        new_block_ids=[([i], [i + 1]) if i % 3 else None for i in range(num_reqs)],
        num_computed_tokens=list(range(num_reqs)),
        num_output_tokens=[7] * num_reqs,
    )


def sampling_params() -> SamplingParams:
    params = SamplingParams(
        temperature=0.7,
        seed=2**40,
        stop=["\n\n"],
        stop_token_ids=[5, 6],
        logit_bias={3: -1.5},
        bad_words=["no"],
        extra_args={"kv": {"deep": [1, None, 2.5, "x"]}},
        structured_outputs=StructuredOutputsParams(json={"type": "object"}),
        output_kind=RequestOutputKind.DELTA,
        prompt_logprob_token_ids=np.array([[1, 2], [3, -1]]),
    )
    params._all_stop_token_ids.add(2)
    params._bad_words_token_ids = [[9, 8], [7]]
    params._eos_token_id = 2
    params.structured_outputs._backend = "xgrammar"
    return params


def feature() -> multimodal.MultiModalFeatureSpec:
    fields = {
        "pixels": multimodal.MultiModalFlatField(slices=[slice(0, 2), (slice(None), slice(3))]),
        "grid": multimodal.MultiModalBatchedField(keep_on_cpu=True),
        "shared": multimodal.MultiModalSharedField(batch_size=2),
    }
    item = multimodal.MultiModalKwargsItem(
        {
            name: multimodal.MultiModalFieldElem(torch.ones(2, 3), field)
            for name, field in fields.items()
        }
    )
    place = multimodal.PlaceholderRange(1, 4, torch.tensor([True, False, True, True]))
    return multimodal.MultiModalFeatureSpec(item, "image", "hash", place)


def scheduler_output() -> scheduler.SchedulerOutput:
    new = scheduler.NewRequestData(
        req_id="cmpl-new",
        prompt_token_ids=list(range(300)),
        mm_features=[feature()],
        sampling_params=sampling_params(),
        pooling_params=PoolingParams(
            task="embed", late_interaction_params=LateInteractionParams("score_doc", "key")
        ),
        block_ids=([1, 2], [3]),
        num_computed_tokens=128,
        lora_request=LoRARequest("adapter", 1, "/adapters/one"),
        prompt_embeds=torch.randn(3, 4).to(torch.bfloat16),
    )
    output = scheduler.SchedulerOutput.make_empty()
    output.scheduled_new_reqs = [new]
    output.scheduled_cached_reqs = cached()
    output.num_scheduled_tokens = {"cmpl-new": 172} | dict.fromkeys(cached().req_ids, 1)
    output.total_num_scheduled_tokens = 188
    output.finished_req_ids = {"cmpl-old"}
    output.kv_cache_block_copies = [KVCacheBlockCopy(4, 5)]
    output.scheduled_encoder_input_stats = scheduler.ScheduledEncoderInputStats(1, 2)
    return output


def model_runner_output() -> outputs.ModelRunnerOutput:
    prompt = outputs.LogprobsTensors.empty_cpu(5, 3)
    for tensor in prompt[:3]:
        tensor.fill_(1)
    return outputs.ModelRunnerOutput(
        req_ids=["a", "b"],
        req_id_to_index={"a": 0, "b": 1},
        sampled_token_ids=[[4], []],
        logprobs=outputs.LogprobsLists(
            np.arange(6, dtype=np.int32).reshape(2, 3),
            np.array([[-0.5, -np.inf, np.nan]] * 2, dtype=np.float32),
            np.array([1, 2]),
            [0, 1],
        ),
        prompt_logprobs_dict={"a": prompt, "b": None},
        pooler_output=[torch.randn(8), None],
        kv_connector_output=outputs.KVConnectorOutput({"a"}, None, invalid_block_ids={3}),
        num_nans_in_logits={"a": 0},
        sampling_masks=outputs.SamplingMaskLists(np.arange(3)),
    )


def kv_cache_config() -> kv.KVCacheConfig:
    full = kv.FullAttentionSpec(
        block_size=16,
        num_kv_heads=8,
        head_size=128,
        dtype=torch.bfloat16,
        tokens_per_state=Fraction(1, 4),
        block_stride_alignment=MultipleOf(64),
    )
    mla = kv.MLAAttentionSpec(
        block_size=64, num_kv_heads=1, head_size=576, dtype=torch.uint8, alignment=512
    )
    mamba = kv.MambaSpec(
        block_size=16,
        shapes=((4, 3), (2,)),
        dtypes=(torch.float32, torch.int8),
        mamba_type=MambaAttentionBackendEnum.GDN_ATTN,
    )
    sliding = kv.SlidingWindowSpec(
        block_size=16, num_kv_heads=2, head_size=64, dtype=torch.float8_e4m3fn, sliding_window=1024
    )
    uniform = kv.UniformTypeKVCacheSpecs(block_size=16, kv_cache_specs={"0": full, "1": sliding})
    return kv.KVCacheConfig(
        num_blocks=1000,
        kv_cache_tensors=[kv.KVCacheTensor(2**35, ["model.layers.0"], 4096, 64)],
        kv_cache_groups=[
            kv.KVCacheGroupSpec([f"model.layers.{i}"], spec)
            for i, spec in enumerate([full, mla, mamba, sliding, uniform])
        ],
        kv_cache_layout="LBHNC",
    )


REAL = {
    "scheduler output": scheduler_output(),
    "empty scheduler output": scheduler.SchedulerOutput.make_empty(),
    "grammar": scheduler.GrammarOutput(["a"], np.full((2, 99), -1, np.int32), [1]),
    "no grammar": None,
    "runner output": model_runner_output(),
    "drafts": outputs.DraftTokenIds(["a"], [[1, 2]]),
    "call": ("initialize_from_config", ([kv_cache_config()],), {}),
    "specs": [{"layer": kv_cache_config().kv_cache_groups[0].kv_cache_spec}],
    "compilation": CompilationTimes(1.5, 0.0),
    "tasks": ("generate", "embed"),
}


@pytest.mark.parametrize("value", REAL.values(), ids=REAL)
def test_what_vllm_builds_comes_back(value: Any) -> None:
    assert plain(round_trip(value)) == plain(value)


@pytest.mark.parametrize("value", REAL.values(), ids=REAL)
def test_damaged_bytes_are_a_value_or_a_codec_error(value: Any) -> None:
    data = CODEC.encode(value)
    rng = np.random.default_rng(0)
    for at in rng.integers(len(data), size=300):
        damaged = bytearray(data)
        damaged[at] ^= 1 << rng.integers(8)
        with suppress(CodecError):
            CODEC.decode(damaged)
        with pytest.raises(CodecError):
            CODEC.decode(data[:at])


def test_received_params_work() -> None:
    """vLLM keeps cached properties in a struct's `__dict__`: the copy makes its own."""
    params = sampling_params()
    kind = params.sampling_type
    back = round_trip(params)
    assert not back.__dict__
    assert back.sampling_type is kind
    assert back.all_stop_token_ids == {2, 5, 6}
    assert back.bad_words_token_ids == [[9, 8], [7]]
    assert back.clone().all_stop_token_ids == {2, 5, 6}


def test_received_specs_equal_the_sent_ones() -> None:
    config = kv_cache_config()
    back = round_trip(config)
    assert back == config
    assert back.kv_cache_groups[0].kv_cache_spec.page_size_bytes > 0
    assert hash(back.kv_cache_groups[0].kv_cache_spec) == hash(
        config.kv_cache_groups[0].kv_cache_spec
    )


def test_tensors_are_contiguous_copies_in_host_memory() -> None:
    tensor = torch.arange(12.0, requires_grad=True).reshape(3, 4).t()
    back = round_trip(tensor)
    assert torch.equal(back, tensor)
    assert back.is_contiguous()
    assert not back.requires_grad
    back[0, 0] = 5
    assert tensor[0, 0] == 0


def test_the_table_of_sizes_is_torchs() -> None:
    for name, size in DTYPE_BYTES.items():
        assert TORCH_DTYPES[name].itemsize == size


@pytest.mark.parametrize(
    "parts",
    [
        ["float32", [2**40], b"abcd"],
        ["float32", [0, 2**62, 2**62], b""],
        ["float32", [-1], b"abcd"],
        ["float32", [2], b"abcd"],
        ["float64", [1], b"abcdefgh"],
        ["float8_e5m2", [1], b"a"],
        ["float32", [1], 10**12],
        [["float32"], [1], b"abcd"],
    ],
)
def test_a_tensor_that_lies_is_refused(parts: Any) -> None:
    with pytest.raises(CodecError):
        CODEC.decode(msgspec.msgpack.encode({40: parts}))


def test_what_connectors_add_is_refused_by_name() -> None:
    output = model_runner_output()
    output.kv_connector_output.kv_connector_stats = KVConnectorStats()
    with pytest.raises(UnregisteredType, match=r"\$\.kv_connector_output\.kv_connector_stats: .*"):
        CODEC.encode(output)
    scheduled = scheduler_output()
    scheduled.scheduled_new_reqs[0].sampling_params.extra_args["plugin"] = range(3)
    with pytest.raises(UnregisteredType, match=r"sampling_params\.extra_args\['plugin'\].*range"):
        CODEC.encode(scheduled)
    with pytest.raises(CodecError, match=r"\$\[0\]: .*complex64"):
        CODEC.encode([torch.zeros(1, dtype=torch.complex64)])
