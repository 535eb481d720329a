"""What crosses in fewer bytes, and how near it comes back."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from molink.core.errors import UsageError, WireError
from molink.engine import hop_format
from molink.engine.eight_bits import BLOCK, Tensors
from molink.engine.exact_sum import take_apart
from molink.engine.hop_format import HopFormat, check_device

quick = settings(deadline=None, max_examples=60)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ERRORS = {"int8": 0.01, "fp8": 0.04}  # relative, root mean square
formats = st.builds(HopFormat, st.sampled_from([None, "int8", "fp8"]), st.booleans())


def output(rows: int, width: int, dtype: torch.dtype, seed: int = 0) -> Tensors:
    noise = torch.Generator().manual_seed(seed)
    names = ("hidden_states", "residual")
    return {name: torch.randn(rows, width, generator=noise).to(dtype) for name in names}


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square, relative to that of `expected`."""
    found, expected = found.double(), expected.double()
    return float((found - expected).norm() / expected.norm())


@quick
@given(formats, st.integers(1, 3), st.integers(1, 2 * BLOCK + 1), st.sampled_from(DTYPES))
def test_what_is_shrunk_is_restored(
    form: HopFormat, rows: int, width: int, dtype: torch.dtype
) -> None:
    sent = output(rows, width, dtype, seed=width)
    back = form.restore(form.shrink(sent), dtype)
    assert {(t.dtype, t.shape) for t in back.values()} == {(dtype, torch.Size((rows, width)))}
    assert back.keys() == sent.keys()
    total = sum(t.float() for t in sent.values())
    allowed = ERRORS.get(form.eight_bits or "", 0.0) + 8 * torch.finfo(dtype).eps
    assert error(sum(t.float() for t in back.values()), total) < allowed  # type: ignore[arg-type]


def test_a_sum_is_exact_in_float32_and_half_the_bytes() -> None:
    sent, form = output(5, 96, torch.float32), HopFormat(has_sum=True)
    crossed = form.shrink(sent)
    assert list(crossed) == ["sum"]
    back = form.restore(crossed, torch.float32)
    assert torch.equal(back["residual"], sent["hidden_states"] + sent["residual"])
    assert not back["hidden_states"].any()


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("times", [1, 100, 1000])
def test_a_few_channels_far_above_the_others_do_not_drown_them(kind: str, times: int) -> None:
    noise = torch.Generator().manual_seed(times)
    values = torch.randn(16, 4096, generator=noise)
    large = torch.randperm(4096, generator=noise)[:6]
    values[:, large] *= times
    others = torch.ones(4096, dtype=torch.bool)
    others[large] = False
    form = HopFormat(kind)
    back = form.restore(form.shrink({"hidden_states": values}), torch.float32)["hidden_states"]
    assert error(back[:, others], values[:, others]) < ERRORS[kind]
    assert error(back[:, large], values[:, large]) < ERRORS[kind]


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_zeros_and_what_is_no_number(kind: str) -> None:
    values = torch.zeros(3, 2 * BLOCK)
    values[1, 5] = torch.nan
    values[2, 5] = torch.inf
    form = HopFormat(kind)
    back = form.restore(form.shrink({"hidden_states": values}), torch.float32)["hidden_states"]
    assert not back[0].any()
    assert not back[1:, BLOCK:].any()  # other blocks are as they were
    assert not back[1:, 5].isfinite().any()


@quick
@given(formats, formats)
def test_a_format_that_was_not_agreed_on_is_refused(sent: HopFormat, expected: HopFormat) -> None:
    crossed = sent.shrink(output(2, 9, torch.bfloat16))
    if sent == expected:
        expected.restore(crossed, torch.bfloat16)
    else:
        with pytest.raises(WireError):
            expected.restore(crossed, torch.bfloat16)


@quick
@given(st.sampled_from(["int8", "fp8"]), st.data())
def test_parts_that_do_not_fit_are_refused(kind: str, data: st.DataObject) -> None:
    crossed = HopFormat(kind, has_sum=True).shrink(output(3, 2 * BLOCK, torch.bfloat16))
    name = data.draw(st.sampled_from(sorted(crossed.keys() - {"sum"})))
    change = data.draw(
        st.sampled_from([lambda t: t[:2], lambda t: t[:, :1], lambda t: t.double(), lambda _: None])
    )
    changed = change(crossed.pop(name))  # type: ignore[no-untyped-call]
    with pytest.raises(WireError):
        HopFormat(kind, has_sum=True).restore(
            crossed if changed is None else crossed | {name: changed}, torch.bfloat16
        )


def test_a_coded_sum_is_taken_only_where_it_was_agreed_on() -> None:
    sent = output(2, 64, torch.bfloat16)
    crossed = take_apart(sent)
    back = HopFormat(may_code_sum=True).restore(crossed, torch.bfloat16)
    assert back.keys() == sent.keys()
    HopFormat(may_code_sum=True).restore(sent, torch.bfloat16)  # what is not coded crosses so
    with pytest.raises(WireError, match="coded sum"):
        HopFormat().restore(crossed, torch.bfloat16)


@pytest.mark.parametrize("place", [-5, 30_000])
def test_a_place_beyond_the_channels_does_no_harm(place: int) -> None:
    form = HopFormat("int8")
    crossed = form.shrink({"hidden_states": torch.ones(1, BLOCK)})
    crossed["hidden_states.place"].fill_(place)
    assert form.restore(crossed, torch.float32)["hidden_states"].shape == (1, BLOCK)


def test_what_is_no_activation_crosses_as_it_is() -> None:
    form = HopFormat("fp8")
    ids = torch.arange(6).reshape(2, 3)
    assert torch.equal(form.restore(form.shrink({"ids": ids}), torch.float32)["ids"], ids)


def test_a_device_that_cannot_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (None, "int8", "fp8"):
        check_device(kind, torch.device("cpu"))

    def cannot(*_: Any) -> Tensors:
        raise RuntimeError('"abs" not implemented\nfor this device')

    monkeypatch.setattr(hop_format, "quantise", cannot)
    with pytest.raises(UsageError, match=r'--wire-dtype fp8: the cpu device .*"abs" not impl'):
        check_device("fp8", torch.device("cpu"))
