"""Activations cross the wire bit for bit, whatever their layout in memory."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from molink.core.errors import WireError
from molink.engine.activations import CpuSender, Parts, StepId, pack, sender_for, unpack

CPU = torch.device("cpu")
quick = settings(deadline=None, max_examples=60)


def bits(tensor: torch.Tensor) -> list[int]:
    """So that NaN equals NaN, and zero is not minus zero."""
    flat: list[int] = tensor.contiguous().view(torch.uint8).flatten().tolist()
    return flat


@st.composite
def tensors(draw: st.DrawFn, *, min_rows: int = 1) -> torch.Tensor:
    """[num_tokens, hidden_size] of any bits: a row range, a column range, turned, or whole."""
    rows, columns = draw(st.integers(min_rows, 5)), draw(st.integers(1, 9))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    noise = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    wide = torch.randint(0, 256, (rows + 2, 4 * (columns + 2)), dtype=torch.uint8, generator=noise)
    whole = wide.view(dtype)
    return draw(
        st.sampled_from(
            [
                whole[1 : 1 + rows, :columns],
                whole[:rows],
                whole[:rows, ::2],
                whole.t()[:rows],
                whole[:1, :columns].expand(rows, columns),
            ]
        )
    )


steps = st.dictionaries(
    st.sampled_from(["hidden_states", "residual", "scale"]), tensors(), max_size=3
)


def wire(parts: Parts) -> bytearray:
    return bytearray(b"".join(parts))


@quick
@given(steps)
def test_what_is_packed_is_unpacked(step: dict[str, torch.Tensor]) -> None:
    back = unpack(wire(pack(step)), CPU)
    assert list(back) == list(step)
    for name, tensor in step.items():
        assert (back[name].dtype, back[name].shape) == (tensor.dtype, tensor.shape)
        assert bits(back[name]) == bits(tensor)


@quick
@given(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), st.integers(1, 8))
def test_no_step_is_without_rows(dtype: torch.dtype, columns: int) -> None:
    payload = wire(pack({"hidden_states": torch.empty(0, columns, dtype=dtype)}))
    with pytest.raises(WireError, match="hidden_states of a step is empty"):
        unpack(payload, CPU)


def test_contiguous_tensors_are_copied_on_neither_side() -> None:
    tensor = torch.arange(6.0).reshape(2, 3)
    _, view = pack({"hidden_states": tensor})
    tensor.fill_(0)
    assert not any(view)
    payload = wire(pack({"hidden_states": tensor}))
    back = unpack(payload, CPU)["hidden_states"]
    payload[-12:] = b"\x01" * 12
    assert back[1].view(torch.uint8).tolist() == [1] * 12


@quick
@given(steps.filter(bool), st.data())
def test_a_truncated_payload_is_refused(step: dict[str, torch.Tensor], data: st.DataObject) -> None:
    payload = wire(pack(step))
    with pytest.raises(WireError):
        unpack(payload[: data.draw(st.integers(0, len(payload) - 1))], CPU)


def test_on_a_cpu_output_leaves_at_once_and_nothing_waits_for_it() -> None:
    sent: list[tuple[StepId, bytearray]] = []
    send = sender_for("cpu", lambda step, parts: sent.append((step, wire(parts))))
    assert isinstance(send, CpuSender)
    assert send(StepId(2, 7), {"hidden_states": torch.ones(2, 3)}) == []
    [(step, payload)] = sent
    assert step == (2, 7)
    assert torch.equal(unpack(payload, CPU)["hidden_states"], torch.ones(2, 3))
