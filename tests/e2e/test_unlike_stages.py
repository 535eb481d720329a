"""Stages that differ: in their number of devices, their memory, where they keep weights."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.e2e.cluster import START_S, Cluster
from tests.e2e.conftest import PIPELINE, References
from tests.e2e.test_equality import assert_equal
from tests.factories import make_completion, make_prompts

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

MEMBER_KV_BYTES = 64 << 20
BLOCK_BYTES = 2 * 2 * 64 * 4 * 32  # keys and values, heads, their width, float32, tokens
MEMBER_LAYERS = 4
OWN_MEMORY = {"VLLM_CPU_KVCACHE_SPACE": ""}  # which would overrule the flag


def test_a_node_whose_own_flags_do_not_do_ends_and_the_next_one_serves(
    models: dict[str, Path],
) -> None:
    words = "gpu_memory_utilization: Input should be less than or equal to 1"
    cluster = Cluster(models["llama"], layers=["0:4", "4:8"], flags=PIPELINE)
    try:
        cluster.start_head()
        wrong = ["--gpu-memory-utilization=1.5", "--tensor-parallel-size=2"]
        unfit = cluster.add_member(layers="4:8", arguments=wrong)
        assert unfit.wait(START_S) == 2
        assert words in unfit.log.splitlines()[-1]
        cluster.head.wait_for("waiting for layers 4:8")
        assert words in cluster.head.log
        cluster.add_member(layers="4:8")
        cluster.wait_until_serving()
        assert "Traceback" not in cluster.head.log + unfit.log
        cluster.stop()
    finally:
        cluster.end()


@pytest.fixture(scope="module")
def unlike(models: dict[str, Path]) -> Iterator[Cluster]:
    """Tensor parallel 2 with 1 GiB for KV feeds one process with 64 MiB, told to offload."""
    cluster = Cluster(
        models["llama"], layers=["0:4", "4:8"], flags=(*PIPELINE, "--tensor-parallel-size=2")
    )
    try:
        cluster.start_head()
        own = (f"--kv-cache-memory-bytes={MEMBER_KV_BYTES}", "--cpu-offload-gb=1")
        cluster.add_member(layers="4:8", arguments=own, environment=OWN_MEMORY)
        cluster.wait_until_serving()
        yield cluster
        cluster.stop()
    finally:
        cluster.end()


def test_they_give_the_tokens_of_one_process(unlike: Cluster, references: References) -> None:
    """On a CPU nothing is offloaded; the flag reaches one node alone, and does no harm."""
    prompts = make_prompts([1, 31, 64, 65, 130, 200, 300, 17])
    requests = [make_completion(prompt, max_tokens=24) for prompt in prompts] + [
        make_completion(prompt, max_tokens=24, temperature=0.8, seed=seed)
        for seed, prompt in enumerate(prompts)
    ]
    assert_equal(requests, unlike, references["llama"])


def test_the_smaller_memory_decides_how_many_blocks_there_are(unlike: Cluster) -> None:
    """Each rank of the head has half of the heads and 1 GiB: it could hold far more."""
    expected = MEMBER_KV_BYTES // (BLOCK_BYTES * MEMBER_LAYERS)
    assert f'num_gpu_blocks="{expected}"' in unlike.http.get("/metrics").text
