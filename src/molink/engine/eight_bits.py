"""Activations in eight bits a channel, with one scale for each block of a token's channels.

A scale for a whole token would not do: in large models a few channels are hundreds of times the
median, and the others would round to zero. fp8 (e4m3) has an exponent of its own. In int8 the
largest channels of each token are sent apart, so that they cost their neighbours nothing. Plain
torch, on the device where the tensor lies.
"""

import math
from collections.abc import Mapping
from typing import Final

import torch
from torch.nn.functional import pad

from molink.core.errors import WireError
from molink.engine.types import dtype_name

Tensors = dict[str, torch.Tensor]

BLOCK: Final = 128  # channels; measured with benchmarks/wire.py
DTYPES: Final = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
LARGEST: Final = {"int8": 127.0, "fp8": 448.0}
SMALLEST_SCALE: Final = 1e-30  # of a block of zeros

SCALE, PEAK, PLACE = ".scale", ".peak", ".place"
"""What follows a tensor's name, all of [num_tokens, num_blocks]: the blocks' scales in bfloat16,
and in int8 as many of the largest channels, also in bfloat16, and their numbers."""


def num_blocks(width: int) -> int:
    return math.ceil(width / BLOCK)


def quantise(name: str, values: torch.Tensor, kind: str) -> Tensors:
    """The tensors that cross instead of `values`, [num_tokens, width] of any floating dtype.

    Args:
        kind: "int8" or "fp8".
    """
    width, largest = values.shape[-1], LARGEST[kind]
    values, found = values.float(), {}
    if kind == "int8":
        place = values.abs().topk(num_blocks(width), dim=-1, sorted=False).indices
        found[name + PEAK] = values.gather(-1, place).bfloat16()
        found[name + PLACE] = place.to(_place_dtype(width))
        values = values.scatter(-1, place, 0.0)
    blocks = _blocks(values)
    scale = blocks.abs().amax(-1).div(largest).clamp_min(SMALLEST_SCALE).bfloat16()
    scaled = (blocks / scale.float().unsqueeze(-1)).clamp(-largest, largest)
    whole = scaled.round() if kind == "int8" else scaled
    eight = whole.to(DTYPES[kind]).flatten(-2)[:, :width]
    return {name: eight, name + SCALE: scale, **found}


def restore(name: str, crossed: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """The inverse of `quantise`, up to rounding: [num_tokens, width] of `dtype`.

    Raises:
        WireError: a tensor is missing, or has another shape or dtype than `quantise` gives it.
    """
    eight = crossed[name]
    if eight.dim() != 2:
        raise WireError(f"{name} in eight bits has {eight.dim()} dimensions")
    rows, width = eight.shape
    size = (rows, num_blocks(width))
    scale = _part(crossed, name + SCALE, size, torch.bfloat16)
    values = (_blocks(eight.float()) * scale.float().unsqueeze(-1)).flatten(-2)[:, :width]
    if eight.dtype == torch.int8:
        peak = _part(crossed, name + PEAK, size, torch.bfloat16).float()
        place = _part(crossed, name + PLACE, size, _place_dtype(width)).long()
        values = values.scatter(-1, place.clamp(0, width - 1), peak)
    return values.to(dtype)


def _blocks(values: torch.Tensor) -> torch.Tensor:
    """[num_tokens, num_blocks, BLOCK], with zeros at the end."""
    return pad(values, (0, -values.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))


def _place_dtype(width: int) -> torch.dtype:
    return torch.int16 if width <= 1 << 15 else torch.int32


def _part(
    crossed: Mapping[str, torch.Tensor], name: str, size: tuple[int, int], dtype: torch.dtype
) -> torch.Tensor:
    part = crossed.get(name)
    if part is None or part.shape != size or part.dtype != dtype:
        found = "nothing" if part is None else f"{dtype_name(part.dtype)} {tuple(part.shape)}"
        raise WireError(f"{name} should be {dtype_name(dtype)} {size}; there is {found}")
    return part
