"""Activations between a stage's device and the bytes of a message."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from molink.core.errors import WireError
from molink.engine.types import dtype_name
from molink.wire import planes
from molink.wire.frames import MAX_MESSAGE, Priority
from molink.wire.tensors import DTYPE_BYTES, TensorMeta, pack_header, unpack_header

MIN_CODED = 1024  # bytes of a tensor; the table of its codes takes about 60

Parts = list[bytes | bytearray | memoryview]
Emit = Callable[["StepId", Parts], None]
"""Hands the output of a step to the agent."""


class StepId(NamedTuple):
    """Names a step; a number is used once, whatever the epoch."""

    epoch: int
    sequence: int
    priority: Priority = Priority.DECODE  # of its output on a link


def unpack(
    payload: bytearray, device: torch.device, *, max_bytes: int = MAX_MESSAGE
) -> dict[str, torch.Tensor]:
    """Tensors of [num_tokens, hidden_size] over the received memory; on an accelerator, copies.

    Args:
        max_bytes: that the tensors may take; coded ones, which may grow, take no more.

    Raises:
        WireError: the payload is not what its header says, or too large.
    """
    metas, offset = unpack_header(payload, max_bytes=len(payload))
    if (total := sum(meta.num_bytes for meta in metas)) > max_bytes:
        raise WireError(f"a step of {total} bytes where {max_bytes} are expected")
    tensors = {}
    for meta in metas:
        if meta.num_elements == 0:
            raise WireError(f"tensor {meta.name} of a step is empty")
        data = memoryview(payload)[offset : offset + meta.wire_bytes]
        tensor = torch.frombuffer(
            data if meta.coded is None else _decoded(meta, data),
            dtype=getattr(torch, meta.dtype),
            count=meta.num_elements,
        ).view(meta.shape)
        tensors[meta.name] = tensor if device.type == "cpu" else _on(device, tensor)
        offset += meta.wire_bytes
    return tensors


def _on(device: torch.device, tensor: torch.Tensor) -> torch.Tensor:
    """A copy that the host does not wait for; torch keeps the pinned memory until it is made."""
    return tensor.pin_memory().to(device, non_blocking=True)


def _decoded(meta: TensorMeta, data: memoryview) -> planes.Bytes:
    word_bytes = DTYPE_BYTES[meta.dtype]
    if word_bytes not in planes.WORD_BYTES:
        raise WireError(f"tensor {meta.name} of {meta.dtype} cannot be coded")
    first = planes.inflate(data[: meta.coded], meta.num_elements)
    return planes.join(first, data[meta.coded :], word_bytes)


def pack(tensors: Mapping[str, torch.Tensor]) -> Parts:
    """Header and raw bytes of CPU tensors; nothing is copied that is contiguous."""
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    header = pack_header([_meta(name, tensor) for name, tensor in tensors.items()])
    return [header, *map(_bytes_of, tensors.values())]


class Planes(NamedTuple):
    """A tensor on its way to be coded: copies, which nobody writes."""

    meta: TensorMeta
    first: planes.Bytes
    others: planes.Bytes

    @property
    def is_worth_it(self) -> bool:
        return self.meta.num_bytes >= MIN_CODED and bool(self.first.size)

    @property
    def whole(self) -> memoryview:
        """The tensor's bytes again."""
        if not self.first.size:
            return self.others.data
        return planes.join(self.first.data, self.others.data, DTYPE_BYTES[self.meta.dtype]).data


def split(tensors: Mapping[str, torch.Tensor]) -> list[Planes]:
    """The planes of CPU tensors; of one that is not to be coded, its bytes as the others."""
    found = []
    for name, tensor in tensors.items():
        meta, data = _meta(name, tensor), _bytes_of(tensor.contiguous())
        if tensor.is_floating_point() or tensor.dtype in (torch.int8, torch.uint8):
            found.append(Planes(meta, *planes.split(data, tensor.element_size())))
        else:
            found.append(Planes(meta, *planes.split(data, 1)[::-1]))
    return found


def pack_coded(split_tensors: list[Planes]) -> Parts:
    """Header and coded bytes; tensors that coding does not shrink travel as they were."""
    metas: list[TensorMeta] = []
    parts: Parts = []
    for tensor in split_tensors:
        meta, first, others = tensor
        coded = planes.deflate(first.data) if tensor.is_worth_it else b""
        if 0 < len(coded) < meta.num_elements:
            metas.append(meta._replace(coded=len(coded)))
            parts += [coded, others.data]
        else:
            metas.append(meta)
            parts.append(tensor.whole)
    return [pack_header(metas), *parts]


def _meta(name: str, tensor: torch.Tensor) -> TensorMeta:
    return TensorMeta(name, dtype_name(tensor.dtype), tuple(tensor.shape))


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.flatten().view(torch.uint8).numpy())
