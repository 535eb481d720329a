"""Whether a layer uses nothing of `hidden_states` and `residual` but their sum.

Most of vLLM's models put off an addition: a layer returns both, and the next one begins with a norm
that adds them. Some return both and mean something else (Exaone 4), and nothing in a model says
which. So the stage's first layer is tried: once with both, once with zeros and the sum, of numbers
whose sum is exact in every floating dtype. If all that it computes is equal bit for bit, it cannot
tell the two apart.
"""

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

from molink.engine.exact_sum import HIDDEN, RESIDUAL

logger = logging.getLogger("molink.stage")
ROWS = 8
STEPS = 60  # 1/16 each: sums have 7 bits and a sign, as many as bfloat16 keeps


def uses_only_the_sum(
    model: torch.nn.Module, config: VllmConfig, one_row: Mapping[str, torch.Tensor]
) -> bool:
    """Whether the first layer of a later stage does.

    Breaks towards False: if layers stop taking `positions`, `hidden_states` and `residual` by
    name, or cannot run without a step's context.

    Args:
        one_row: the stage's input for one token.
    """
    layer = _first_layer(model)
    pair = one_row.get(HIDDEN), one_row.get(RESIDUAL)
    if layer is None or pair[0] is None or pair[1] is None or not _are_alike(*pair):
        return False
    hidden, residual = (_exact_numbers(row, seed) for seed, row in enumerate(pair))
    try:
        with torch.inference_mode(), set_forward_context(None, config, num_tokens=ROWS):
            both = _outputs(layer, hidden.clone(), residual.clone())
            one = _outputs(layer, torch.zeros_like(hidden), hidden + residual)
    except Exception:  # whatever a layer of someone else's raises
        logger.info("whether a sum would do cannot be tried", exc_info=True)
        return False
    return len(both) == len(one) and all(map(torch.equal, both, one))


def _are_alike(first: torch.Tensor, second: torch.Tensor) -> bool:
    return (first.shape, first.dtype) == (second.shape, second.dtype)


def _exact_numbers(row: torch.Tensor, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (ROWS, row.shape[-1])
    return torch.randint(-STEPS, STEPS + 1, shape, generator=generator).div(16).to(row)


def _first_layer(model: torch.nn.Module) -> torch.nn.Module | None:
    """The first module that takes what the stage before sends."""
    taken = {"positions", HIDDEN, RESIDUAL}
    return next((m for m in model.modules() if _parameters(m.forward) >= taken), None)


def _parameters(function: Callable[..., object]) -> set[str]:
    return set(inspect.signature(function).parameters)


def _outputs(
    layer: torch.nn.Module, hidden: torch.Tensor, residual: torch.Tensor
) -> list[torch.Tensor]:
    """Copies of what the layer and each of its modules return.

    Modules too: without a step's context attention computes nothing, and what enters it would be
    lost. What leaves it is then any memory; here it is zeros.
    """
    found: list[torch.Tensor] = []
    with _watching(layer, found):
        layer(
            positions=torch.arange(len(hidden), device=hidden.device),
            hidden_states=hidden,
            residual=residual,
        )
    return found


@contextmanager
def _watching(layer: torch.nn.Module, found: list[torch.Tensor]) -> Iterator[None]:
    def note(module: object, _inputs: object, output: Any) -> Any:
        if isinstance(module, AttentionLayerBase):
            return torch.zeros_like(output)
        several = output if isinstance(output, tuple | list) else (output,)
        found.extend(part.clone() for part in several if isinstance(part, torch.Tensor))
        return None

    hooks = [module.register_forward_hook(note) for module in layer.modules()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
