"""Speculation over stages: drafts change how fast tokens come, never which."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from tests.e2e.cluster import Cluster, Request, eventually, tokens
from tests.e2e.conftest import BUNDLED, COMMON, WHOLE
from tests.factories import make_completion, make_prompt, make_prompts

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

DRAFTED = 4
NGRAM = {"method": "ngram", "num_speculative_tokens": DRAFTED}
NGRAM |= {"prompt_lookup_min": 1, "prompt_lookup_max": 3}
FLAGS = (*COMMON, "--max-num-batched-tokens=64", "--max-num-seqs=8", "--num-gpu-blocks-override=24")


@pytest.fixture(scope="module")
def speculating() -> Iterator[Cluster]:
    """Three stages, so little memory that requests preempt one another, drafts always sent.

    The bundled model has learnt to speak, and repeats itself; those with random weights never do.
    """
    flags = (*FLAGS, f"--speculative-config={json.dumps(NGRAM)}")
    layers = ("0:2", "2:5", "5:-1")
    with Cluster(BUNDLED, layers=layers, flags=flags, head_arguments=("--drafts=all",)) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def plain() -> Iterator[Cluster]:
    with Cluster(BUNDLED, nodes=1, flags=WHOLE) as cluster:
        yield cluster


def accepted(cluster: Cluster) -> float:
    return cluster.metrics()["vllm:spec_decode_num_accepted_tokens_total"]


def assert_equal(requests: list[Request], speculating: Cluster, plain: Cluster) -> None:
    """The same tokens, some of which were drafted."""
    before = accepted(speculating)
    expected = tokens(plain.ask(requests))
    assert tokens(speculating.ask(requests)) == expected
    assert accepted(speculating) > before


def repeating(length: int, seed: int) -> list[int]:
    """A prompt in which n-grams come again."""
    part = make_prompt(max(3, length // 4), seed=seed)
    return (part * 5)[:length]


def test_greedy_with_preemption(speculating: Cluster, plain: Cluster) -> None:
    requests = [
        make_completion(repeating(length, seed), max_tokens=90, ignore_eos=True)
        for seed, length in enumerate([1, 2, 20, 33, 64, 90, 100, 130, 150, 170, 31, 65])
    ]
    preemptions = speculating.metrics()["vllm:num_preemptions_total"]
    assert_equal(requests, speculating, plain)
    assert speculating.metrics()["vllm:num_preemptions_total"] > preemptions
    assert_equal(requests, speculating, plain)  # out of the prefix cache


@pytest.mark.parametrize(
    "extra",
    [
        {"logprobs": 2},
        {"presence_penalty": 1.5, "repetition_penalty": 1.1},
        {"stop_token_ids": list(range(4, 1500, 61))},
        {"structured_outputs": {"regex": "(red green blue ){12}"}, "ignore_eos": False},
    ],
    ids=lambda extra: next(iter(extra)),
)
def test_features(extra: dict[str, Any], speculating: Cluster, plain: Cluster) -> None:
    prompts = [repeating(length, seed) for seed, length in enumerate([7, 30, 63, 80, 110])]
    body = {"max_tokens": 60, "ignore_eos": True, **extra}
    requests = [make_completion(prompt, **body) for prompt in prompts]
    assert_equal(requests, speculating, plain)


def test_a_stage_that_is_lost_meanwhile(speculating: Cluster, plain: Cluster) -> None:
    lengths = enumerate([5, 20, 40, 60, 80, 100])
    prompts = [repeating(length, seed) for seed, length in lengths]
    requests = [make_completion(prompt, max_tokens=120, ignore_eos=True) for prompt in prompts]
    expected = tokens(plain.ask(requests))
    before = accepted(speculating)
    with ThreadPoolExecutor(max_workers=1) as threads:
        asked = threads.submit(speculating.ask, requests)
        eventually(lambda: accepted(speculating) > before + 20, 30, "drafts are accepted")
        speculating.members[0].kill_stage()
        assert tokens(asked.result()) == expected


def test_seeds_beside_drafts(speculating: Cluster, plain: Cluster) -> None:
    """Nothing is drafted for them: what they draw would depend on what else runs."""
    seeded = [
        make_completion(prompt, max_tokens=40, temperature=0.9, seed=seed)
        for seed, prompt in enumerate(make_prompts([3, 40, 70, 100]))
    ]
    greedy = [make_completion(repeating(40, s), max_tokens=60, ignore_eos=True) for s in range(4)]
    assert_equal(seeded + greedy, speculating, plain)
