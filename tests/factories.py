"""What tests ask of a model: prompts and request bodies."""

import random
from collections.abc import Iterable
from typing import Any

FIRST_TOKEN = 260  # those below are special, or single bytes, which may be no whole character
VOCABULARY = 1_500  # token ids below it exist in every model of the tests


def make_prompt(length: int, seed: int) -> list[int]:
    """Random token ids."""
    source = random.Random(seed)
    return [source.randrange(FIRST_TOKEN, VOCABULARY) for _ in range(length)]


def make_prompts(lengths: Iterable[int], prefix: Iterable[int] = ()) -> list[list[int]]:
    """One prompt for each length; they share `prefix` and nothing else."""
    shared = list(prefix)
    return [[*shared, *make_prompt(length, seed)] for seed, length in enumerate(lengths)]


def make_completion(prompt: list[int], **changes: Any) -> dict[str, Any]:
    """Body of a greedy /v1/completions that answers with token ids."""
    request = {"prompt": prompt, "max_tokens": 16, "temperature": 0.0, "return_token_ids": True}
    return request | changes
