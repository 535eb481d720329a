"""Flags of SGLang's server that `molink serve` and `molink join` take, put into vLLM's words."""

from collections.abc import Sequence
from typing import NamedTuple

from molink.cli.flags import value_of
from molink.engine.owned_flags import name_of

_VLLM_NAMES = {
    "--tp": "--tensor-parallel-size",
    "--tp-size": "--tensor-parallel-size",
    "--mem-fraction-static": "--gpu-memory-utilization",
    "--tokenizer-path": "--tokenizer",
    "--log-level": "--uvicorn-log-level",
}
_NEEDLESS = {
    "--attention-reduce-in-fp32": "vLLM's attention kernels keep scores and sums in float32",
}
_MODEL = ("--model-path", "--model")


class Worded(NamedTuple):
    """Flags as vLLM takes them, and what to tell about those that are gone."""

    flags: list[str]
    notes: list[str]


def in_vllms_words(flags: Sequence[str]) -> Worded:
    """Rename SGLang's flags, with or without `=`, and leave out those that vLLM has no use for."""
    kept, notes = [], []
    for flag in flags:
        name, equals, value = flag.partition("=")
        name = name_of(name)
        if name in _NEEDLESS:
            notes.append(f"{name} is not needed: {_NEEDLESS[name]}")
        elif name in _VLLM_NAMES:
            kept.append(f"{_VLLM_NAMES[name]}{equals}{value}")
        else:
            kept.append(flag)
    return Worded(kept, notes)


def take_model(flags: Sequence[str]) -> tuple[str | None, list[str]]:
    """The value of `--model-path`, if it is there, and the other flags."""
    rest = list(flags)
    model = value_of(rest, *_MODEL)
    while found := [index for index, flag in enumerate(rest) if name_of(flag) in _MODEL]:
        words = 1 if "=" in rest[found[0]] else 2
        del rest[found[0] : found[0] + words]
    return model, rest
