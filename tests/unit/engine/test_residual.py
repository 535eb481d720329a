"""Which layers use nothing but the sum of what they get, found out by trying."""

import pytest
import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

from molink.engine.residual import uses_only_the_sum

WIDTH = 16
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Norm(nn.Module):
    """Adds in float32 and normalises the sum before it is rounded, as vLLM's does on a CPU."""

    def forward(
        self, hidden: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        total = hidden.float() + residual.float()
        return (total / total.norm(dim=-1, keepdim=True)).to(hidden), total.to(hidden)


class Attention(nn.Module, AttentionLayerBase):
    """Without a step's context what it gives is any memory."""

    def get_attn_backend(self) -> None: ...

    def get_kv_cache_spec(self, _config: VllmConfig) -> None: ...

    def forward(self, query: torch.Tensor) -> torch.Tensor:
        return torch.rand_like(query.float()).to(query)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = Norm()
        self.project = nn.Linear(WIDTH, WIDTH)
        self.attention = Attention()


class Usual(Layer):
    """Begins with a norm that adds."""

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        hidden_states, residual = self.norm(hidden_states, residual)
        return self.attention(self.project(hidden_states)), residual


class IgnoresResidual(Layer):
    """As Exaone 4: what it is given as the residual, it does not read."""

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        residual = hidden_states
        return self.attention(self.project(hidden_states)) + residual, residual


class AttendsToOne(Layer):
    """Only what enters attention depends on more than the sum."""

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        total, _ = self.norm(hidden_states, residual)
        return self.attention(self.project(hidden_states)), total


class Fails(Layer):
    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        raise RuntimeError("there is no step")


class OtherNames(Layer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def row(dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(1, WIDTH, dtype=dtype)


def tried(layer: Layer, config: VllmConfig, dtype: torch.dtype = torch.float32) -> bool:
    one_row = {"hidden_states": row(dtype), "residual": row(dtype)}
    return uses_only_the_sum(nn.Sequential(nn.Identity(), layer.to(dtype)), config, one_row)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_layer_that_begins_with_an_addition(dtype: torch.dtype, head_config: VllmConfig) -> None:
    assert tried(Usual(), head_config, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layer", [IgnoresResidual, AttendsToOne])
def test_a_layer_that_uses_more(
    layer: type[Layer], dtype: torch.dtype, head_config: VllmConfig
) -> None:
    assert not tried(layer(), head_config, dtype)


@pytest.mark.parametrize("layer", [Fails, OtherNames])
def test_a_layer_that_cannot_be_tried(layer: type[Layer], head_config: VllmConfig) -> None:
    assert not tried(layer(), head_config)


@pytest.mark.parametrize(
    "one_row",
    [
        {"hidden_states": row(torch.float32)},
        {"hidden_states": row(torch.float32), "residual": row(torch.bfloat16)},
        {"hidden_states": row(torch.float32), "residual": torch.zeros(1, 2 * WIDTH)},
    ],
)
def test_input_that_has_no_sum(one_row: dict[str, torch.Tensor], head_config: VllmConfig) -> None:
    assert not uses_only_the_sum(Usual(), head_config, one_row)
