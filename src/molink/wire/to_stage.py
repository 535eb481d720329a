"""What a stage reads: calls of the engine, and its agent's figures.

Steps are in `wire.frames.Kind`.
"""

from typing import Literal

import msgspec

from molink.core.plan import LayerRange
from molink.wire import structs
from molink.wire.structs import Rate

WORKER_CALLS = frozenset(
    {
        "add_lora",
        "compile_or_warm_up_model",
        "determine_available_memory",
        "get_kv_cache_spec",
        "get_supported_kv_cache_layouts",
        "get_supported_tasks",
        "initialize_from_config",
        "list_loras",
        "pin_lora",
        "profile",
        "remove_lora",
        "reset_encoder_cache",
        "reset_mm_cache",
        "set_kv_cache_layout",
        "sleep",
        "supports_draft_weight_updates",
        "update_max_model_len",
        "wake_up",
    }
)
"""Methods of vLLM's worker that a stage answers, besides its own `load` and `reset`.

A closed list: callables are never sent.
"""

STARTUP_CALLS = frozenset(
    {
        "set_kv_cache_layout",
        "determine_available_memory",
        "update_max_model_len",
        "initialize_from_config",
        "compile_or_warm_up_model",
    }
)
"""Those that bring a stage from its layers to its first step; a replaced stage gets them again."""


class Resolved(msgspec.Struct, frozen=True, kw_only=True):
    """Values the head's vLLM resolved, whose defaults differ from device to device.

    A stage builds its own configuration from the user's engine flags and these, which win over the
    node's own defaults (limits of LoRA and speculation come from the flags alone); what the stage
    then resolves is compared with all of them.
    """

    dtype: str
    quantization: str | None
    kv_cache_dtype: str
    seed: int
    max_model_len: int  # tokens
    max_num_batched_tokens: int  # tokens of one step
    max_num_seqs: int  # requests of one step
    block_size: int | None  # tokens of one KV block
    enable_prefix_caching: bool
    enable_chunked_prefill: bool
    max_loras: int | None
    max_lora_rank: int | None
    num_speculative_tokens: int | None


WireSum = Literal["auto", "on", "off"]
WireDtype = Literal["auto", "int8", "fp8"]
WireCoding = Literal["auto", "on", "off"]


class WireFormat(msgspec.Struct, frozen=True, kw_only=True):
    """How stages write their activations: the head's user's choices, and what they are if he made
    none."""

    sum: WireSum = "auto"  # `hidden_states` and `residual` cross as one; auto: without loss
    dtype: WireDtype = "auto"  # auto: the model's own
    coding: WireCoding = "auto"  # lossless; auto: where the link is slow enough

    @property
    def eight_bits(self) -> str | None:
        return None if self.dtype == "auto" else self.dtype

    def wants_sum(self, dtype: str) -> bool:
        """Whether a model that computes in `dtype` should send a sum, if its layers allow it.

        By default where it is exact, and where eight bits round more than it does. In 16 bits some
        of vLLM's norms add without rounding, so there it is the user's choice.
        """
        if self.sum == "auto":
            return dtype == "float32" or self.eight_bits is not None
        return self.sum == "on"

    def may_code_sum(self, dtype: str) -> bool:
        """Whether what is coded should be the sum without loss, if the layers allow a sum."""
        has_16_bits = dtype in ("bfloat16", "float16")
        return self.sum == "auto" and has_16_bits and self.eight_bits is None

    @classmethod
    def from_json(cls, text: str) -> "WireFormat":
        return msgspec.json.decode(text, type=cls)

    def to_json(self) -> str:
        return msgspec.json.encode(self).decode()


class LoadStage(msgspec.Struct, frozen=True, kw_only=True):
    """Build the configuration and load one layer range."""

    stage_index: int
    nodes: list[int]  # of every stage, in order
    partition: list[int]  # layers of every stage, in order
    engine_flags: list[str]  # the user's vLLM engine flags, as typed on the head
    resolved: Resolved
    wire: WireFormat = WireFormat()

    @property
    def layers(self) -> LayerRange:
        """Those of this stage."""
        start = sum(self.partition[: self.stage_index])
        return LayerRange(start, start + self.partition[self.stage_index])


class LinkRates(msgspec.Struct, frozen=True, tag=True):
    """What leaves the node how fast, once a second from its own agent (`Kind.CONTROL`)."""

    bytes_per_s: dict[int, Rate]  # by linked node; others are reached through the head, node 0


_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[LinkRates] = msgspec.msgpack.Decoder(LinkRates)


def encode(message: LinkRates) -> bytes:
    return _encoder.encode(message)


def decode(payload: bytes | bytearray | memoryview) -> LinkRates:
    """Raises WireError for anything else."""
    return structs.decode(_decoder, payload)
