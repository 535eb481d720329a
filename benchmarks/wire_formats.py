"""What each format of activations costs and loses, in this process, without engines.

The activations are a model's own, caught between two of its layers as vLLM's stages send them, and
made-up ones with a few channels far above the others, as large models have.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from models import Subject

from molink.engine.activations import Parts, pack, pack_coded, split, unpack
from molink.engine.eight_bits import BLOCK, Tensors
from molink.engine.exact_sum import HIDDEN, RESIDUAL, take_apart
from molink.engine.hop_format import HopFormat

CPU = torch.device("cpu")
PASSES = 7
DECODE, PREFILL = 32, 2048  # tokens of a message
WIDTH, LARGE = 4096, 6  # channels, and how many of them are far above the others
TIMES = (1, 100, 1000)


@dataclass(frozen=True, slots=True)
class Format:
    """A way across, as `molink serve` has it."""

    name: str
    hop: HopFormat
    is_coded: bool = False

    @property
    def flags(self) -> tuple[str, ...]:
        dtype, has_sum = self.hop.eight_bits or "auto", "on" if self.hop.has_sum else "off"
        if self.hop.may_code_sum:
            has_sum = "auto"
        coding = "on" if self.is_coded else "off"
        return (f"--wire-sum={has_sum}", f"--wire-dtype={dtype}", f"--wire-coding={coding}")


EXACT = Format("sum without loss, coded", HopFormat(may_code_sum=True), is_coded=True)
FORMATS = [
    Format(name + (", coded" if is_coded else ""), hop, is_coded)
    for name, hop in {
        "both": HopFormat(),
        "sum": HopFormat(has_sum=True),
        "sum, int8": HopFormat("int8", has_sum=True),
        "sum, fp8": HopFormat("fp8", has_sum=True),
    }.items()
    for is_coded in (False, True)
]
FORMATS.insert(2, EXACT)


def message(form: Format, tensors: Tensors) -> Parts:
    crossing = form.hop.shrink(tensors)
    if form.hop.may_code_sum:
        crossing = take_apart(crossing)
    return pack_coded(split(crossing)) if form.is_coded else pack(crossing)


def arrived(form: Format, payload: bytearray, dtype: torch.dtype) -> Tensors:
    return form.hop.restore(unpack(payload, CPU), dtype)


def costs(form: Format, tensors: Tensors) -> dict[str, float]:
    """Bytes and microseconds per token of a message, on one core."""
    tokens, dtype = len(tensors[HIDDEN]), tensors[HIDDEN].dtype
    payload = bytearray(b"".join(message(form, tensors)))
    return {
        "bytes": len(payload) / tokens,
        "encode_us": 1e6 * _seconds(lambda: message(form, tensors)) / tokens,
        "decode_us": 1e6 * _seconds(lambda: arrived(form, payload, dtype)) / tokens,
    }


def _seconds(work: Callable[[], object]) -> float:
    times = []
    for _ in range(PASSES):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)


def loss(form: Format, tensors: Tensors, channels: torch.Tensor | None = None) -> float:
    """Error of `hidden_states + residual` after the hop: root mean square, relative."""
    payload = bytearray(b"".join(message(form, tensors)))
    back = arrived(form, payload, tensors[HIDDEN].dtype)
    found, true = (t[HIDDEN].double() + t[RESIDUAL].double() for t in (back, tensors))
    if channels is not None:
        found, true = found[:, channels], true[:, channels]
    return float((found - true).norm() / true.norm())


def one_scale_a_token(values: torch.Tensor) -> torch.Tensor:
    """int8 with one scale for a whole token, for comparison: nothing in MoLink sends this."""
    scale = values.abs().amax(-1, keepdim=True) / 127
    return (values / scale).round() * scale


def outlier_losses(times: int) -> dict[str, float]:
    """Errors of the other channels where LARGE of WIDTH are `times` their size."""
    noise = torch.Generator().manual_seed(times)
    values = torch.randn(256, WIDTH, generator=noise)
    large = torch.randperm(WIDTH, generator=noise)[:LARGE]
    values[:, large] *= times
    others = torch.ones(WIDTH, dtype=torch.bool)
    others[large] = False
    tensors = {HIDDEN: torch.zeros_like(values), RESIDUAL: values}
    alone = values[:, others]
    whole = one_scale_a_token(values)[:, others]
    of_name = {form.name: form for form in FORMATS}
    return {
        "bfloat16": float((alone.bfloat16().float() - alone).norm() / alone.norm()),
        "int8, one scale a token": float((whole - alone).norm() / alone.norm()),
        f"int8, blocks of {BLOCK}": loss(of_name["sum, int8"], tensors, others),
        f"fp8, blocks of {BLOCK}": loss(of_name["sum, fp8"], tensors, others),
    }


def activations(subject: Subject, tokens: int) -> Tensors:
    """[tokens, hidden_size] each, of the middle of a Llama: what its MLP adds, and the rest."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(subject.path, dtype=torch.bfloat16)
    layer = model.model.layers[subject.num_layers // 2 - 1]
    caught: Tensors = {}

    def catch(name: str) -> Callable[..., None]:
        def hook(_module: object, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
            caught[name] = (inputs[0] if name == RESIDUAL else output).flatten(0, 1).clone()

        return hook

    layer.mlp.register_forward_hook(catch(HIDDEN))
    layer.post_attention_layernorm.register_forward_hook(catch(RESIDUAL))
    ids = torch.randint(16, subject.vocab_size, (tokens // 64, 64), generator=_seeded())
    with torch.inference_mode():
        model(input_ids=ids)
    return caught


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(20261121)


def formats_of(subject: Subject) -> Mapping[str, dict[str, float]]:
    """For each format: bytes and microseconds per token of both kinds of message, and the loss."""
    torch.set_num_threads(1)
    whole = activations(subject, PREFILL)
    few = {name: tensor[:: PREFILL // DECODE].contiguous() for name, tensor in whole.items()}
    found = {}
    for form in FORMATS:
        figures = {"loss": loss(form, whole)}
        for kind, tensors in (("decode", few), ("prefill", whole)):
            figures |= {f"{kind} {name}": v for name, v in costs(form, tensors).items()}
        found[form.name] = figures
    return found
