"""Activations between a stage's device and the bytes of a message."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch

from molink.core.errors import WireError
from molink.engine.types import dtype_name
from molink.wire.tensors import TensorMeta, pack_header, unpack_header

Parts = list[bytes | bytearray | memoryview]
Emit = Callable[["StepId", Parts], None]
"""Hands the output of a step to the agent."""
Sender = Callable[["StepId", dict[str, torch.Tensor]], list[Any]]
"""Sends a step's output; returns handles to wait for before its memory is written again."""


class StepId(NamedTuple):
    """Names a step; a number is used once, whatever the epoch."""

    epoch: int
    sequence: int


def unpack(payload: bytearray, device: torch.device) -> dict[str, torch.Tensor]:
    """Tensors of [num_tokens, hidden_size] over the received memory; on an accelerator, copies.

    Raises:
        WireError: the payload is not what its header says.
    """
    metas, offset = unpack_header(payload, max_bytes=len(payload))
    tensors = {}
    for meta in metas:
        if meta.num_elements == 0:
            raise WireError(f"tensor {meta.name} of a step is empty")
        tensor = torch.frombuffer(
            payload, dtype=getattr(torch, meta.dtype), count=meta.num_elements, offset=offset
        ).view(meta.shape)
        tensors[meta.name] = tensor if device.type == "cpu" else tensor.to(device)
        offset += meta.num_bytes
    return tensors


def pack(tensors: dict[str, torch.Tensor]) -> Parts:
    """Header and raw bytes of CPU tensors; nothing is copied that is contiguous."""
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    metas = [
        TensorMeta(name, dtype_name(tensor.dtype), tuple(tensor.shape))
        for name, tensor in tensors.items()
    ]
    views = [memoryview(tensor.flatten().view(torch.uint8).numpy()) for tensor in tensors.values()]
    return [pack_header(metas), *views]


def sender_for(device_type: str, emit: Emit) -> Sender:
    """How outputs leave this kind of device."""
    return CudaSender(emit) if device_type == "cuda" else CpuSender(emit)


class CpuSender:
    """Outputs already lie in host memory, and have left it, or were copied, when `emit` returns."""

    def __init__(self, emit: Emit) -> None:
        self._emit = emit

    def __call__(self, step: StepId, tensors: dict[str, torch.Tensor]) -> list[Any]:
        self._emit(step, pack(tensors))
        return []


class CudaSender:
    """Copies outputs to pinned memory on a side stream; a thread emits them when they are there.

    The next forward may overwrite the outputs (they can be a graph's static buffers), so it waits
    for the copy, through the returned handle, and never for the send.
    """

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self._stream = torch.cuda.Stream()
        self._copies = ThreadPoolExecutor(max_workers=1, thread_name_prefix="copies")

    def __call__(self, step: StepId, tensors: dict[str, torch.Tensor]) -> list[Any]:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            host = {
                name: torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(
                    tensor, non_blocking=True
                )
                for name, tensor in tensors.items()
            }
            copied = self._stream.record_event()
        self._copies.submit(self._emit_when, copied, step, host)
        return [_StreamWait(copied)]

    def _emit_when(
        self, copied: torch.cuda.Event, step: StepId, host: dict[str, torch.Tensor]
    ) -> None:
        copied.synchronize()
        self._emit(step, pack(host))


class _StreamWait:
    """Makes the compute stream, not the host, wait for a copy."""

    def __init__(self, copied: torch.cuda.Event) -> None:
        self._copied = copied

    def wait(self) -> None:
        torch.cuda.current_stream().wait_event(self._copied)
