"""Tiny checkpoints in the formats of quantizers, whose answers differ from prompt to prompt.

Each is the same random Llama, rounded to what the format can hold and packed as published
checkpoints are.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tests.e2e.models import copy_tokenizer, sizes
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

NUM_LAYERS = 4
GROUP = 64  # input channels that share a scale
BLOCK = 128  # side of a square that shares a scale
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which channel lies at which 4 bits of an int32
FP8 = torch.float8_e4m3fn

Parts = dict[str, Tensor]
"""What a format stores instead of a layer's `weight`, by the last part of the name."""


def pack_awq(weight: Tensor) -> Parts:
    """4 bits with zero points; eight output channels to an int32, in AWQ's order."""
    grouped = _groups(weight)
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    scale = (high - low) / 15
    zero = (-low / scale).round()
    levels = ((grouped / scale).round() + zero).clamp(0, 15)
    return {
        "qweight": _pack(_awq_order(levels.flatten(1).T), 4),
        "qzeros": _pack(_awq_order(zero.squeeze(-1).T), 4),
        "scales": scale.squeeze(-1).T.half(),
    }


def pack_gptq(bits: int) -> Callable[[Tensor], Parts]:
    """Symmetric; the input channels of an int32 are neighbours."""

    def pack(weight: Tensor) -> Parts:
        num_outputs, num_inputs = weight.shape
        levels, scale = _round(_groups(weight), bits)
        zero = 2 ** (bits - 1)
        return {
            "qweight": _pack(levels.flatten(1) + zero, bits).T,
            "qzeros": _pack(torch.full((num_inputs // GROUP, num_outputs), zero - 1), bits),
            "scales": scale.T.half(),
            "g_idx": (torch.arange(num_inputs) // GROUP).int(),
        }

    return pack


def pack_int4(weight: Tensor) -> Parts:
    """compressed-tensors' `pack-quantized`."""
    levels, scale = _round(_groups(weight), 4)
    return {
        "weight_packed": _pack(levels.flatten(1) + 8, 4),
        "weight_scale": scale.bfloat16(),
        "weight_shape": torch.tensor(weight.shape),
    }


def pack_int8(weight: Tensor) -> Parts:
    """One scale for each output channel."""
    levels, scale = _round(weight, 8)
    return {"weight": levels.to(torch.int8), "weight_scale": scale.unsqueeze(-1).bfloat16()}


def pack_fp8_channels(weight: Tensor) -> Parts:
    """One scale for each output channel."""
    scale = weight.abs().amax(-1, keepdim=True) / torch.finfo(FP8).max
    return {"weight": (weight / scale).to(FP8), "weight_scale": scale.bfloat16()}


def pack_fp8_tensor(weight: Tensor) -> Parts:
    """One scale for all."""
    scale = weight.abs().amax() / torch.finfo(FP8).max
    return {"weight": (weight / scale).to(FP8), "weight_scale": scale}


def pack_fp8_static(weight: Tensor) -> Parts:
    """One scale for all, and one for the activations."""
    return {**pack_fp8_tensor(weight), "input_scale": torch.tensor(0.05)}


def pack_fp8_blocks(weight: Tensor) -> Parts:
    """One scale for each square, as DeepSeek publishes."""
    rows, columns = (size // BLOCK for size in weight.shape)
    squares = weight.view(rows, BLOCK, columns, BLOCK)
    scale = squares.abs().amax((1, 3), keepdim=True) / torch.finfo(FP8).max
    levels = (squares / scale).view_as(weight).to(FP8)
    return {"weight": levels, "weight_scale_inv": scale.view(rows, columns)}


def keep(weight: Tensor) -> Parts:
    """Not quantized: vLLM does it while it loads."""
    return {"weight": weight.bfloat16()}


@dataclass(frozen=True, slots=True)
class Method:
    """A format: how a layer is packed, and what `config.json` says about it."""

    pack: Callable[[Tensor], Parts]
    config: dict[str, Any] = field(default_factory=dict)
    dtype: str = "bfloat16"  # of the activations
    flags: tuple[str, ...] = ()


def _compressed_tensors(
    storage: str, weights: dict[str, Any], activations: dict[str, Any] | None
) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return {
        "quant_method": "compressed-tensors",
        "format": storage,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def _rounding(bits: int, kind: str, strategy: str, **more: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": True, **more}


def _gptq(bits: int, *, desc_act: bool) -> dict[str, Any]:
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": GROUP,
        "desc_act": desc_act,
        "sym": True,
    }


_INT4 = _rounding(4, "int", "group", group_size=GROUP)
_INT8 = _rounding(8, "int", "channel")
_INT8_TOKENS = _rounding(8, "int", "token", dynamic=True)
_FP8 = _rounding(8, "float", "channel")
_FP8_TOKENS = _rounding(8, "float", "token", dynamic=True)
_FP8_SERIALIZED = {"quant_method": "fp8", "activation_scheme": "dynamic"}
_AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True}

METHODS = {
    "awq": Method(pack_awq, {**_AWQ, "version": "gemm"}, "float16"),
    "gptq-4": Method(pack_gptq(4), _gptq(4, desc_act=False), "float16"),
    "gptq-4-desc-act": Method(pack_gptq(4), _gptq(4, desc_act=True), "float16"),
    "gptq-8": Method(pack_gptq(8), _gptq(8, desc_act=False), "float16"),
    "auto-round": Method(
        pack_gptq(4),
        {
            "quant_method": "auto-round",
            "packing_format": "auto_round:auto_gptq",
            "bits": 4,
            "group_size": GROUP,
            "sym": True,
        },
    ),
    "compressed-tensors-w4a16": Method(
        pack_int4, _compressed_tensors("pack-quantized", _INT4, None)
    ),
    "compressed-tensors-w8a8": Method(
        pack_int8, _compressed_tensors("int-quantized", _INT8, _INT8_TOKENS)
    ),
    "compressed-tensors-fp8": Method(
        pack_fp8_channels, _compressed_tensors("float-quantized", _FP8, _FP8_TOKENS)
    ),
    "fp8": Method(pack_fp8_tensor, _FP8_SERIALIZED),
    "fp8-static": Method(pack_fp8_static, {**_FP8_SERIALIZED, "activation_scheme": "static"}),
    "fp8-blocks": Method(pack_fp8_blocks, {**_FP8_SERIALIZED, "weight_block_size": [BLOCK, BLOCK]}),
    "modelopt-fp8": Method(
        pack_fp8_static,
        {"quant_method": "modelopt", "quantization": {"quant_algo": "FP8"}, "quant_algo": "FP8"},
    ),
    "online-fp8": Method(keep, flags=("--quantization=fp8_per_tensor",)),
    "online-int8": Method(keep, flags=("--quantization=int8_per_channel_weight_only",)),
    "bitsandbytes": Method(keep, {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    "torchao": Method(keep, {"quant_method": "torchao", "quant_type": {"default": "int8wo"}}),
}


def make_quantized(method: Method, tokenizer: Path, folder: Path) -> Path:
    """Save a model into `folder`, which is made: half of the layers in each of two files."""
    config = LlamaConfig(
        **sizes(tokenizer) | {"num_hidden_layers": NUM_LAYERS},
        dtype=method.dtype,
        architectures=["LlamaForCausalLM"],
        **({"quantization_config": method.config} if method.config else {}),
    )
    torch.manual_seed(20)
    weights = LlamaForCausalLM(_plain(config)).state_dict()
    config.save_pretrained(folder)
    _save(_pack_layers(weights, method), folder)
    copy_tokenizer(tokenizer, folder)
    return folder


def _plain(config: LlamaConfig) -> LlamaConfig:
    plain = LlamaConfig(**config.to_dict())
    plain.quantization_config = None
    plain.dtype = torch.float32
    return plain


def _pack_layers(weights: Parts, method: Method) -> Parts:
    dtype = getattr(torch, method.dtype)
    packed: Parts = {}
    for name, tensor in weights.items():
        if name.endswith("_proj.weight"):
            layer = name.removesuffix("weight")
            packed |= {layer + part: value for part, value in method.pack(tensor).items()}
        else:
            packed[name] = tensor.to(dtype)
    return {name: tensor.contiguous() for name, tensor in packed.items()}


def _save(tensors: Parts, folder: Path) -> None:
    last = tuple(f"model.layers.{i}." for i in range(NUM_LAYERS // 2, NUM_LAYERS))
    ends = ("model.norm", "lm_head")
    files = {
        name: f"model-0000{1 + name.startswith((*last, *ends))}-of-00002.safetensors"
        for name in tensors
    }
    for file in set(files.values()):
        part = {name: tensors[name] for name in tensors if files[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _groups(weight: Tensor) -> Tensor:
    """[outputs, inputs] → [outputs, inputs / GROUP, GROUP]."""
    return weight.unflatten(1, (-1, GROUP))


def _round(values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Whole numbers of `bits` with a sign, and the scale of each last axis."""
    top = 2 ** (bits - 1) - 1
    scale = values.abs().amax(-1, keepdim=True) / top
    return (values / scale).round(), scale.squeeze(-1)


def _pack(levels: Tensor, bits: int) -> Tensor:
    """Put neighbours of the last axis into one int32, the first into its lowest bits."""
    count = 32 // bits
    shifts = torch.arange(count) * bits
    words = (levels.long().unflatten(-1, (-1, count)) << shifts).sum(-1)
    return torch.where(words < 2**31, words, words - 2**32).int()


def _awq_order(levels: Tensor) -> Tensor:
    return levels.unflatten(-1, (-1, 8))[..., AWQ_ORDER].flatten(-2)
