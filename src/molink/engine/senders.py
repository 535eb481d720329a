"""How a step's output leaves the stage's device."""

from collections.abc import Callable, Mapping
from typing import Protocol

import torch

from molink.engine.activations import StepId
from molink.engine.coder import InOrder
from molink.engine.hop_format import HopFormat

SendHost = Callable[[StepId, Mapping[str, torch.Tensor]], None]
"""Sends tensors in host memory, which may be written again when it returns."""


class Sender(Protocol):
    """Sends outputs, in the format that the next stage has agreed on."""

    format: HopFormat

    def __call__(self, step: StepId, tensors: dict[str, torch.Tensor]) -> None:
        """The output's memory may be written again by whatever its device does next."""
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

    def __call__(self, step: StepId, tensors: dict[str, torch.Tensor]) -> None:
        return


class CpuSender:
    """Outputs already lie in host memory."""

    def __init__(self, send: SendHost) -> None:
        self._send = send
        self.format = HopFormat()

    def __call__(self, step: StepId, tensors: dict[str, torch.Tensor]) -> None:
        self._send(step, self.format.shrink(tensors))


class CudaSender:
    """Copies outputs to pinned memory; a thread sends them when they are there.

    The copy is queued behind the forward, on its own stream: so nothing that is queued later can
    write what is still to be copied, be it a graph's static buffers or memory that was freed. It
    takes microseconds, and the host waits for neither.
    """

    def __init__(self, send: SendHost) -> None:
        self._send = send
        self.format = HopFormat()
        self._copies = InOrder("copies")

    def __call__(self, step: StepId, tensors: dict[str, torch.Tensor]) -> None:
        host = {
            name: torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(
                tensor, non_blocking=True
            )
            for name, tensor in self.format.shrink(tensors).items()
        }
        copied = torch.cuda.Event()
        copied.record()
        self._copies.submit(self._send_when, copied, step, host)

    def _send_when(
        self, copied: torch.cuda.Event, step: StepId, host: dict[str, torch.Tensor]
    ) -> None:
        copied.synchronize()
        self._send(step, host)
