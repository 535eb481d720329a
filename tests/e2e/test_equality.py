"""A pipeline gives the tokens of one process, whatever its stages, split, chunks and cache."""

from typing import Any

import pytest
from tests.e2e.cluster import Cluster, Request, eventually, tokens
from tests.e2e.conftest import MAX_NUM_SEQS, TIGHT
from tests.factories import make_completion, make_prompt, make_prompts

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

LENGTHS = [1, 2, 15, 31, 32, 33, 63, 64, 65, 90, 127, 128, 129, 150, 191, 193, 240, 257, 300, 340]
LENGTHS += [5, 40, 77, 100]

SAMPLING: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.8},
    {"temperature": 0.8, "top_p": 0.9, "top_k": 50},
    {"temperature": 1.2, "min_p": 0.02, "logit_bias": {"100": 3.0, "200": -100.0}},
    {"presence_penalty": 1.5, "frequency_penalty": 0.5, "repetition_penalty": 1.3},
    {"temperature": 0.8, "bad_words": ["the", " a"], "allowed_token_ids": list(range(4, 900))},
    {"temperature": 0.8, "min_tokens": 6, "stop_token_ids": list(range(4, 1500, 3))},
    {"temperature": 0.8, "n": 2},
]


def assert_equal(requests: list[Request], pipeline: Cluster, reference: Cluster) -> None:
    """Both give the same tokens, which say something: most of them differ."""
    expected = tokens(reference.ask(requests))
    assert tokens(pipeline.ask(requests)) == expected
    assert len({tuple(answer) for answer in expected}) > len(requests) / 2


def test_greedy(pipeline: Cluster, reference: Cluster) -> None:
    prompts = make_prompts(LENGTHS)
    requests = [make_completion(p, max_tokens=12 + i) for i, p in enumerate(prompts)]
    assert len(requests) > MAX_NUM_SEQS
    assert_equal(requests, pipeline, reference)


def test_seeded(pipeline: Cluster, reference: Cluster) -> None:
    """Seeds with prompts that are cut, which kill a plain vLLM on CPU; the reference cuts none."""
    requests = [
        make_completion(
            prompt, seed=1000 + i, **{"temperature": 0.8, **SAMPLING[i % len(SAMPLING)]}
        )
        for i, prompt in enumerate(make_prompts(LENGTHS))
    ]
    assert_equal(requests, pipeline, reference)


def test_prefix_cache(pipeline: Cluster, reference: Cluster) -> None:
    prefix = make_prompt(96, seed=7)
    requests = [
        make_completion(prompt, seed=5, temperature=0.5 * (i % 2))
        for i, prompt in enumerate(make_prompts([1, 20, 32, 70, 110], prefix))
    ]
    assert_equal(requests, pipeline, reference)
    hits = pipeline.metrics()["vllm:prefix_cache_hits_total"]
    assert_equal(requests, pipeline, reference)
    assert pipeline.metrics()["vllm:prefix_cache_hits_total"] >= hits + len(requests) * len(prefix)


@pytest.mark.parametrize("case", [TIGHT], indirect=True)
def test_preempted_requests(pipeline: Cluster, reference: Cluster) -> None:
    """Requests that lose their blocks while they run, and one step of theirs is in flight."""
    before = pipeline.metrics()["vllm:num_preemptions_total"]
    requests = [
        make_completion(prompt, max_tokens=100, ignore_eos=True, seed=i, temperature=0.8 * (i % 2))
        for i, prompt in enumerate(make_prompts([60, 90, 120, 70, 150, 30, 100, 80]))
    ]
    assert_equal(requests, pipeline, reference)
    assert pipeline.metrics()["vllm:num_preemptions_total"] > before


def test_every_machine_has_its_stage(pipeline: Cluster) -> None:
    """The stages cover the model once; the machines that should compute do."""
    pipeline.ask([make_completion(make_prompt(5, seed=2))])
    eventually(
        lambda: all(stage.counters.steps > 0 for stage in pipeline.view().stages),
        10,
        "every stage has reported steps",
    )
    stages = pipeline.view().stages
    ranges = [tuple(map(int, stage.layers.split(":"))) for stage in stages]
    assert [start for start, _ in ranges] == [0, *(end for _, end in ranges[:-1])]
    assert ranges[-1][1] == 8
