"""How a step's output leaves the stage's device."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

from molink.engine.activations import StepId
from molink.engine.coder import InOrder
from molink.engine.hop_format import HopFormat

SendHost = Callable[[StepId, Mapping[str, torch.Tensor]], None]
"""Sends tensors in host memory, which may be written again when it returns."""


class Sender(Protocol):
    """Sends outputs, in the format that the next stage has agreed on."""

    format: HopFormat

    def __call__(self, step: StepId, tensors: dict[str, torch.Tensor]) -> list[Any]:
        """Returns handles to wait for before the output's memory is written again."""
        ...


def sender_for(device_type: str, send: SendHost, *, rank: int = 0) -> Sender:
    """How outputs leave this kind of device; rank 0 has whole tensors, so the others send none."""
    if rank != 0:
        return NoSender()
    return CudaSender(send) if device_type == "cuda" else CpuSender(send)


class NoSender:
    """For ranks whose outputs nobody needs."""

    def __init__(self) -> None:
        self.format = HopFormat()

    def __call__(self, step: StepId, tensors: dict[str, torch.Tensor]) -> list[Any]:
        return []


class CpuSender:
    """Outputs already lie in host memory."""

    def __init__(self, send: SendHost) -> None:
        self._send = send
        self.format = HopFormat()

    def __call__(self, step: StepId, tensors: dict[str, torch.Tensor]) -> list[Any]:
        self._send(step, self.format.shrink(tensors))
        return []


class CudaSender:
    """Copies outputs to pinned memory on a side stream; a thread sends them when they are there.

    They are brought into the hop's format on that stream, before they are copied. The next forward
    may overwrite the outputs (they can be a graph's static buffers), so it waits for the copy,
    through the returned handle, and never for the send.
    """

    def __init__(self, send: SendHost) -> None:
        self._send = send
        self.format = HopFormat()
        self._stream = torch.cuda.Stream()
        self._copies = InOrder("copies")

    def __call__(self, step: StepId, tensors: dict[str, torch.Tensor]) -> list[Any]:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            host = {
                name: torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(
                    tensor, non_blocking=True
                )
                for name, tensor in self.format.shrink(tensors).items()
            }
            copied = self._stream.record_event()
        self._copies.submit(self._send_when, copied, step, host)
        return [_StreamWait(copied)]

    def _send_when(
        self, copied: torch.cuda.Event, step: StepId, host: dict[str, torch.Tensor]
    ) -> None:
        copied.synchronize()
        self._send(step, host)


class _StreamWait:
    """Makes the compute stream, not the host, wait for a copy."""

    def __init__(self, copied: torch.cuda.Event) -> None:
        self._copied = copied

    def wait(self) -> None:
        torch.cuda.current_stream().wait_event(self._copied)
