"""Activations cross the wire bit for bit, whatever their layout in memory."""

import tracemalloc
import zlib
from contextlib import suppress

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from molink.core.errors import WireError
from molink.engine.activations import Parts, pack, pack_coded, split, unpack
from molink.wire.tensors import TensorMeta, pack_header

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


@st.composite
def eight_bit_tensors(draw: st.DrawFn) -> torch.Tensor:
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 700))
    noise = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    whole = torch.randint(0, 256, (rows, columns), dtype=torch.uint8, generator=noise)
    return whole.view(draw(st.sampled_from([torch.int8, torch.uint8, torch.float8_e4m3fn])))


@st.composite
def floats(draw: st.DrawFn) -> torch.Tensor:
    """As activations are, so that coding shrinks them, with what is rare among them."""
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 700))
    noise = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    values = torch.randn(rows, columns, generator=noise).to(dtype)
    rare = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, torch.finfo(dtype).tiny / 4, -1e-40]
    for place, value in enumerate(draw(st.lists(st.sampled_from(rare), max_size=7))):
        values.view(-1)[place % values.numel()] = value
    return values


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


@quick
@given(
    st.dictionaries(
        st.sampled_from(["sum", "residual", "scale"]),
        st.one_of(tensors(), floats(), eight_bit_tensors()),
        max_size=3,
    )
)
def test_what_is_coded_comes_back_bit_for_bit(step: dict[str, torch.Tensor]) -> None:
    parts = pack_coded(split(step))
    back = unpack(wire(parts), CPU)
    assert list(back) == list(step)
    for name, tensor in step.items():
        assert (back[name].dtype, back[name].shape) == (tensor.dtype, tensor.shape)
        assert bits(back[name]) == bits(tensor)
    assert len(wire(parts)) <= len(wire(pack(step))) + 64  # of the header, beyond its alignment


@pytest.mark.parametrize(
    ("dtype", "most"), [(torch.bfloat16, 0.72), (torch.float16, 0.92), (torch.float32, 0.86)]
)
def test_coding_shrinks_the_exponents(dtype: torch.dtype, most: float) -> None:
    values = torch.randn(64, 512, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert len(wire(pack_coded(split({"sum": values})))) < most * values.nbytes


def test_what_is_split_does_not_change_with_its_source() -> None:
    values = torch.randn(4, 512)
    parts = split({"sum": values})
    expected = bits(values)
    values.fill_(7)
    assert bits(unpack(wire(pack_coded(parts)), CPU)["sum"]) == expected


@quick
@given(floats(), st.data())
def test_a_damaged_payload_is_refused_or_has_its_shape(
    values: torch.Tensor, data: st.DataObject
) -> None:
    payload = wire(pack_coded(split({"sum": values})))
    at = data.draw(st.integers(0, len(payload) - 1))
    with pytest.raises(WireError):
        unpack(payload[:at], CPU)
    payload[at] ^= 1 << data.draw(st.integers(0, 7))
    with suppress(WireError):
        for tensor in unpack(payload, CPU, max_bytes=1 << 20).values():
            assert tensor.nbytes <= 1 << 20


def test_a_small_payload_cannot_become_a_large_tensor() -> None:
    """A hostile stage may deflate better than any of ours: matches make 1 byte of 1,000."""
    coder = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = coder.compress(bytes(1 << 24)) + coder.flush()
    meta = TensorMeta("sum", "int8", (1 << 12, 1 << 12), coded=len(bomb))
    payload = bytearray(pack_header([meta]) + bomb)
    assert unpack(payload, CPU)["sum"].shape == (1 << 12, 1 << 12)
    with pytest.raises(WireError, match="16777216 bytes where 8000000 are expected"):
        unpack(payload, CPU, max_bytes=8_000_000)
    small = TensorMeta("sum", "int8", (1 << 8, 1 << 8), coded=len(bomb))
    tracemalloc.start()
    with pytest.raises(WireError, match="or too large"):
        unpack(bytearray(pack_header([small]) + bomb), CPU)
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()
