"""What a stage's output is turned into before it leaves its device, and back on the next one."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch

from molink.core.errors import UsageError, WireError
from molink.engine.eight_bits import DTYPES, PEAK, PLACE, SCALE, Tensors, quantise, restore
from molink.engine.exact_sum import HIDDEN, RESIDUAL, UPPER, put_together
from molink.engine.objections import one_line

SUM = "sum"
_COMPANIONS: Final = (SCALE, PEAK, PLACE)
_KINDS: Final = {dtype: kind for kind, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class HopFormat:
    """What both ends of a hop have agreed on.

    Args:
        eight_bits: "int8", "fp8" or None.
        has_sum: `hidden_states` and `residual` cross as their sum, because the next layer uses
            nothing else of them.
        may_code_sum: what is coded may be their sum without loss (`engine.exact_sum`).
    """

    eight_bits: str | None = None
    has_sum: bool = False
    may_code_sum: bool = False

    def shrink(self, tensors: Mapping[str, torch.Tensor]) -> Tensors:
        """What crosses instead of a stage's output; on its device, in new memory or its own."""
        crossing = self._summed(tensors) if self.has_sum else dict(tensors)
        if self.eight_bits is None:
            return crossing
        found: Tensors = {}
        for name, tensor in crossing.items():
            if _can_shrink(tensor):
                found |= quantise(name, tensor, self.eight_bits)
            else:
                found[name] = tensor
        return found

    def _summed(self, tensors: Mapping[str, torch.Tensor]) -> Tensors:
        hidden, residual = tensors[HIDDEN], tensors[RESIDUAL]
        if self.eight_bits is not None:  # which will round it anyway
            hidden, residual = hidden.float(), residual.float()
        others = {name: t for name, t in tensors.items() if name not in (HIDDEN, RESIDUAL)}
        return {SUM: hidden + residual, **others}

    def restore(self, crossed: Mapping[str, torch.Tensor], dtype: torch.dtype) -> Tensors:
        """The input of the next stage, `dtype` where it crossed in eight bits.

        Raises:
            WireError: what came is not in this format.
        """
        if UPPER in crossed and not self.may_code_sum:
            raise WireError("a coded sum came where none was agreed on")
        tensors: Tensors = {}
        for name, tensor in put_together(crossed, dtype).items():
            if name.endswith(_COMPANIONS):
                continue
            came_in = _KINDS.get(tensor.dtype)
            expected = self.eight_bits if came_in or _can_shrink(tensor) else None
            if came_in != expected:
                raise WireError(f"{name} came in {tensor.dtype}, expected in {expected}")
            tensors[name] = restore(name, crossed, dtype) if came_in else tensor
        if self.has_sum != (SUM in tensors):
            raise WireError(f"{', '.join(crossed)} came; with a sum: {self.has_sum}")
        if self.has_sum:
            total = tensors.pop(SUM)
            return {HIDDEN: torch.zeros_like(total), RESIDUAL: total, **tensors}
        return tensors


def _can_shrink(tensor: torch.Tensor) -> bool:
    return bool(tensor.is_floating_point() and tensor.dim() == 2)


def check_device(eight_bits: str | None, device: torch.device) -> None:
    """Have the device do it once. Raises UsageError if it cannot."""
    if eight_bits is None:
        return
    try:
        HopFormat(eight_bits).restore(
            HopFormat(eight_bits).shrink({HIDDEN: torch.ones(1, 1, device=device)}), torch.float32
        )
    except (RuntimeError, NotImplementedError, TypeError) as error:
        raise UsageError(
            f"--wire-dtype {eight_bits}: the {device.type} device of this node cannot do it "
            f"({one_line(error)}); leave it out, or use another node"
        ) from error
