"""Outputs leave a CPU at once, in the format of the hop."""

from collections.abc import Mapping

import torch

from molink.engine.activations import StepId
from molink.engine.hop_format import HopFormat
from molink.engine.senders import CpuSender, sender_for


def test_on_a_cpu_output_leaves_at_once() -> None:
    sent: list[tuple[StepId, Mapping[str, torch.Tensor]]] = []
    send = sender_for("cpu", lambda step, tensors: sent.append((step, tensors)))
    assert isinstance(send, CpuSender)
    send(StepId(2, 7), {"hidden_states": torch.ones(2, 3)})
    [(step, tensors)] = sent
    assert step == StepId(2, 7)
    assert torch.equal(tensors["hidden_states"], torch.ones(2, 3))


def test_the_format_of_the_hop_is_used_from_when_it_is_set() -> None:
    sent: list[list[str]] = []
    send = sender_for("cpu", lambda step, tensors: sent.append(list(tensors)))
    output = {"hidden_states": torch.ones(2, 3), "residual": torch.ones(2, 3)}
    send(StepId(1, 1), output)
    send.format = HopFormat(has_sum=True)
    send(StepId(1, 2), output)
    assert sent == [["hidden_states", "residual"], ["sum"]]


def test_other_ranks_send_nothing() -> None:
    sent: list[StepId] = []
    send = sender_for("cpu", lambda step, tensors: sent.append(step), rank=1)
    send(StepId(2, 7), {"hidden_states": torch.ones(2, 3)})
    assert sent == []
