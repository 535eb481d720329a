"""The sum of two 16-bit tensors without loss: fewer bytes, once coded, than the two.

A layer that uses nothing but the sum adds in float32, and only then rounds, or does not. So any
pair with the same float32 sum gives it the same bits, and the sum itself is what must cross: its
upper half as a 16-bit number, whose exponents shrink, and two bytes of mantissa that are mostly
zeros, because both numbers had eight bits of their own. Where no pair of 16-bit numbers has just
that sum, which is rare, the two cross beside it.
"""

from collections.abc import Mapping
from typing import Final

import torch

from molink.core.errors import WireError
from molink.engine.eight_bits import Tensors

HIDDEN, RESIDUAL = "hidden_states", "residual"
UPPER, MIDDLE, LOWER = "sum.upper", "sum.middle", "sum.lower"
"""[num_tokens, width]: bits 31 to 16 of the float32 sum, 15 to 8, 7 to 0."""
PLACES, OF_HIDDEN, OF_RESIDUAL = "sum.places", "sum.of_hidden", "sum.of_residual"
"""[number of exceptions]: where in the flat tensors, and both numbers."""
_NAMES: Final = (UPPER, MIDDLE, LOWER, PLACES, OF_HIDDEN, OF_RESIDUAL)

MOST_EXCEPTIONS: Final = 1 / 16  # of the numbers; beyond, both tensors cross


def take_apart(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """The tensors that cross instead of `hidden_states` and `residual`; others are left alone."""
    hidden, residual = tensors[HIDDEN], tensors[RESIDUAL]
    total = hidden.float() + residual.float()
    pair = _pair(total, hidden.dtype)
    unlike = (pair[0].float() + pair[1].float()).view(torch.int32) != total.view(torch.int32)
    places = unlike.flatten().nonzero().flatten().to(torch.int32)
    if len(places) > MOST_EXCEPTIONS * total.numel():
        return dict(tensors)
    bits = total.view(torch.int32)
    found = {name: t for name, t in tensors.items() if name not in (HIDDEN, RESIDUAL)}
    found[UPPER] = (bits >> 16).to(torch.int16).view(torch.bfloat16)
    found[MIDDLE] = (bits >> 8).bitwise_and(0xFF).to(torch.uint8)
    found[LOWER] = bits.bitwise_and(0xFF).to(torch.uint8)
    if len(places):
        found[PLACES] = places
        found[OF_HIDDEN] = hidden.flatten()[places]
        found[OF_RESIDUAL] = residual.flatten()[places]
    return found


def put_together(crossed: Mapping[str, torch.Tensor], dtype: torch.dtype) -> Tensors:
    """A pair with the same sum, where `take_apart` has made one of it.

    Raises:
        WireError: a tensor is missing, or of another shape or dtype than `take_apart` gives it.
    """
    if UPPER not in crossed:
        return dict(crossed)
    shape = crossed[UPPER].shape
    upper, middle, lower = (
        _checked(crossed, name, kind, shape).contiguous()
        for name, kind in ((UPPER, torch.bfloat16), (MIDDLE, torch.uint8), (LOWER, torch.uint8))
    )
    bits = upper.view(torch.int16).int() << 16 | middle.int() << 8 | lower.int()
    hidden, residual = _pair(bits.view(torch.float32), dtype)
    if PLACES in crossed:
        number = crossed[PLACES].shape
        places = _checked(crossed, PLACES, torch.int32, number).long()
        if len(number) != 1 or not ((places >= 0) & (places < bits.numel())).all():
            raise WireError("exceptions of a sum lie beyond it")
        hidden.view(-1)[places] = _checked(crossed, OF_HIDDEN, dtype, number)
        residual.view(-1)[places] = _checked(crossed, OF_RESIDUAL, dtype, number)
    others = {name: tensor for name, tensor in crossed.items() if name not in _NAMES}
    return {HIDDEN: hidden, RESIDUAL: residual, **others}


def _pair(total: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Two tensors of `dtype` with this sum in float32, nearly everywhere."""
    residual = total.to(dtype)
    return (total - residual.float()).to(dtype), residual


def _checked(
    crossed: Mapping[str, torch.Tensor], name: str, dtype: torch.dtype, shape: torch.Size
) -> torch.Tensor:
    tensor = crossed.get(name)
    if tensor is None or tensor.dtype != dtype or tensor.shape != shape:
        raise WireError(f"{name} does not fit the rest of a sum")
    return tensor
