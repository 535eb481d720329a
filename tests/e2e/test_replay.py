"""Stages that are killed in mid-generation: every request ends with the tokens it would have had.

All kinds of requests run at once, and each test leaves the cluster serving.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from tests.e2e.cluster import Cluster, eventually, tokens
from tests.e2e.conftest import BUNDLED, COMMON
from tests.factories import make_completion, make_prompt, make_prompts

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

FLAGS = (*COMMON, "--max-num-batched-tokens=64", "--max-num-seqs=16")
LONG = {"max_tokens": 120, "ignore_eos": True}
NOISY = {**LONG, "temperature": 0.9}
REPAIR_S = 60.0
BEGUN = 200  # tokens after which all have begun, and none has ended

REQUESTS = [
    *(make_completion(prompt, **LONG) for prompt in make_prompts([3, 40, 90, 150])),
    *(make_completion(prompt, **NOISY, seed=7) for prompt in make_prompts([5, 64, 100])),
    make_completion(make_prompt(30, 8), **NOISY, seed=8, top_p=0.8, top_k=40),
    make_completion(make_prompt(20, 9), **NOISY, seed=9, n=2),
    make_completion(make_prompt(33, 10), **LONG, presence_penalty=1.5, repetition_penalty=1.1),
    make_completion(make_prompt(12, 11), **LONG, logprobs=2),
    make_completion(make_prompt(70, 12), **LONG, prompt_logprobs=1),
    make_completion(make_prompt(15, 13), **LONG, min_tokens=100, stop_token_ids=[300, 301]),
    make_completion(
        make_prompt(8, 14), max_tokens=150, structured_outputs={"regex": "(red green blue ){14}"}
    ),
    *(make_completion(prompt, **LONG) for prompt in make_prompts([1, 30], make_prompt(96, 15))),
]


def kill_last(cluster: Cluster) -> None:
    cluster.members[0].kill_stage()


def kill_first(cluster: Cluster) -> None:
    cluster.head.kill_stage()


def kill_both(cluster: Cluster) -> None:
    kill_first(cluster)
    kill_last(cluster)


def kill_twice(cluster: Cluster) -> None:
    """Again while the first repair is under way."""
    since = len(cluster.head.log)
    kill_last(cluster)
    eventually(lambda: "stage 2 of 2" in cluster.head.log[since:], REPAIR_S, "it is repaired")
    kill_last(cluster)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(BUNDLED, flags=FLAGS) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster) -> list[list[int]]:
    return tokens(cluster.ask(REQUESTS))


def generated(cluster: Cluster) -> float:
    return cluster.metrics()["vllm:generation_tokens_total"]


@pytest.mark.parametrize("fault", [kill_last, kill_first, kill_both, kill_twice])
def test_every_request_ends_as_if_nothing_had_happened(
    fault: Callable[[Cluster], None], cluster: Cluster, undisturbed: list[list[int]]
) -> None:
    before = generated(cluster)
    with ThreadPoolExecutor(max_workers=1) as threads:
        asked = threads.submit(cluster.ask, REQUESTS)
        eventually(lambda: generated(cluster) > before + BEGUN, REPAIR_S, "tokens come")
        fault(cluster)
        assert tokens(asked.result()) == undisturbed
    assert len({tuple(answer) for answer in undisturbed}) > len(undisturbed) / 2


def test_who_goes_away_meanwhile_leaves_nothing(cluster: Cluster) -> None:
    body = {"model": cluster.model, **make_completion(make_prompt(20, 1), **LONG)}
    kill_last(cluster)
    eventually(lambda: cluster.has_status(503), REPAIR_S, "the loss is noticed")
    with pytest.raises(httpx.ReadTimeout):
        cluster.http.post("/v1/completions", json=body, timeout=1.0)
    eventually(lambda: cluster.has_status(200), REPAIR_S, "it serves again")

    def is_empty() -> bool:
        found = cluster.metrics()
        left = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        return not any(found[f"vllm:{name}"] for name in left)

    eventually(is_empty, REPAIR_S, "no request is left, and no block of one")
