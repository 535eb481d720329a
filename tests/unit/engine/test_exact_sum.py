"""The pair that arrives has the sum of the pair that was sent, to the last bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm

from molink.core.errors import WireError
from molink.engine.activations import pack, pack_coded, split, unpack
from molink.engine.eight_bits import Tensors
from molink.engine.exact_sum import LOWER, PLACES, UPPER, put_together, take_apart

CPU = torch.device("cpu")
quick = settings(deadline=None, max_examples=80)
dtypes = st.sampled_from([torch.bfloat16, torch.float16])
NAMES = ("hidden_states", "residual")


def total_bits(tensors: Tensors) -> torch.Tensor:
    """Of the float32 sum; of what is no number, one value."""
    total = tensors["hidden_states"].float() + tensors["residual"].float()
    return torch.where(total.isnan(), torch.nan, total).view(torch.int32)


def pair(
    rows: int, width: int, dtype: torch.dtype, *, ratio: float = 0.3, seed: int = 0
) -> Tensors:
    noise = torch.Generator().manual_seed(seed)
    hidden, residual = (torch.randn(rows, width, generator=noise) for _ in NAMES)
    return {"hidden_states": (ratio * hidden).to(dtype), "residual": residual.to(dtype)}


@st.composite
def any_bits(draw: st.DrawFn) -> Tensors:
    """Infinities, NaN and denormals among them."""
    shape = draw(st.integers(1, 4)), 2 * draw(st.integers(1, 60))
    noise = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    raw = [torch.randint(0, 256, shape, dtype=torch.uint8, generator=noise) for _ in NAMES]
    dtype = draw(dtypes)
    return {name: bits.view(dtype) for name, bits in zip(NAMES, raw, strict=True)}


def cross(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    message = bytearray(b"".join(pack_coded(split(take_apart(tensors)))))
    return put_together(unpack(message, CPU), dtype)


@quick
@given(any_bits())
def test_numbers_of_any_kind(tensors: Tensors) -> None:
    dtype = tensors["residual"].dtype
    assert torch.equal(total_bits(cross(tensors, dtype)), total_bits(tensors))


@quick
@given(dtypes, st.sampled_from([0.0, 1e-4, 0.01, 0.3, 1.0, 30.0]), st.integers(0, 1000))
def test_numbers_as_activations_are(dtype: torch.dtype, ratio: float, seed: int) -> None:
    tensors = pair(3, 200, dtype, ratio=ratio, seed=seed)
    back = cross(tensors, dtype)
    assert list(back) == list(NAMES)
    assert {tensor.dtype for tensor in back.values()} == {dtype}
    assert torch.equal(total_bits(back), total_bits(tensors))


@pytest.mark.parametrize("norm", [RMSNorm, GemmaRMSNorm])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_vllms_own_norms_cannot_tell(
    norm: type[RMSNorm | GemmaRMSNorm], dtype: torch.dtype, head_config: VllmConfig
) -> None:
    """Of the rounded sum they can."""
    tensors = pair(64, 96, dtype)
    with set_current_vllm_config(head_config), torch.inference_mode():
        add_and_norm = norm(96).to(dtype)
        add_and_norm.weight.normal_()

        def normed(hidden: torch.Tensor, residual: torch.Tensor) -> list[torch.Tensor]:
            return list(add_and_norm(hidden.clone(), residual.clone()))

        expected = normed(tensors["hidden_states"], tensors["residual"])
        back = cross(tensors, dtype)
        found = normed(back["hidden_states"], back["residual"])
        rounded = normed(torch.zeros_like(found[1]), tensors["hidden_states"] + tensors["residual"])
    assert all(map(torch.equal, found, expected))
    assert not torch.equal(rounded[0], expected[0])


def test_exceptions_cross_beside_the_sum() -> None:
    """A number of eight bits, and one far below it of eight bits: no other pair has their sum."""
    tensors = pair(4, 100, torch.bfloat16)
    tensors["residual"][1, 7], tensors["hidden_states"][1, 7] = 1.0 + 2**-7, 2**-15 + 2**-22
    crossed = take_apart(tensors)
    back = put_together(crossed, torch.bfloat16)
    assert torch.equal(total_bits(back), total_bits(tensors))


def test_a_negative_zero_stays_one() -> None:
    tensors = {name: torch.full((1, 64), 1.0).bfloat16() for name in NAMES}
    for tensor in tensors.values():
        tensor[0, 3] = -0.0
    crossed = take_apart(tensors)
    assert crossed[PLACES].tolist() == [3]
    assert torch.equal(total_bits(put_together(crossed, torch.bfloat16)), total_bits(tensors))


def test_a_pair_that_is_mostly_exceptions_crosses_as_it_is() -> None:
    tensors = {name: torch.full((2, 64), -0.0).bfloat16() for name in NAMES}
    assert take_apart(tensors).keys() == tensors.keys()


def test_other_tensors_are_left_alone() -> None:
    tensors = pair(2, 8, torch.bfloat16) | {"other": torch.ones(2, 8)}
    assert torch.equal(put_together(take_apart(tensors), torch.bfloat16)["other"], torch.ones(2, 8))


def test_it_is_less_than_half_of_both() -> None:
    tensors = pair(64, 768, torch.bfloat16)
    both = sum(len(memoryview(part)) for part in pack(tensors))
    assert sum(len(memoryview(part)) for part in pack_coded(split(take_apart(tensors)))) < both / 2


@pytest.mark.parametrize(
    "change",
    [
        {LOWER: None},
        {LOWER: torch.zeros(2, 3, dtype=torch.uint8)},
        {UPPER: torch.zeros(1, 64)},
        {PLACES: torch.tensor([64], dtype=torch.int32)},
        {PLACES: torch.tensor([-1], dtype=torch.int32)},
        {PLACES: torch.tensor([[3]], dtype=torch.int32)},
        {PLACES: torch.tensor([3])},
        {"sum.of_hidden": torch.zeros(2).bfloat16()},
        {"sum.of_residual": torch.zeros(1)},
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, torch.Tensor | None]) -> None:
    tensors = {name: torch.ones(1, 64).bfloat16() for name in NAMES}
    for tensor in tensors.values():
        tensor[0, 3] = -0.0
    crossed = take_apart(tensors) | change
    with pytest.raises(WireError):
        put_together({k: v for k, v in crossed.items() if v is not None}, torch.bfloat16)
