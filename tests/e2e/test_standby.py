"""A machine that has loaded a stage's layers ahead takes the stage over at once."""

import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from tests.e2e.cluster import Cluster, eventually, tokens
from tests.e2e.conftest import BUNDLED, COMMON
from tests.factories import make_completion, make_prompts

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

FLAGS = (*COMMON, "--max-num-batched-tokens=64")
LONG = {"max_tokens": 150, "ignore_eos": True}
REQUESTS = [
    *(make_completion(prompt, **LONG) for prompt in make_prompts([3, 40, 150])),
    *(make_completion(p, **LONG, temperature=0.9, seed=7) for p in make_prompts([5, 100])),
]
READY_S = 60.0
TAKEN_OVER_S = 5.0  # about 1 s on an idle machine; to load takes more than 8


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(BUNDLED, flags=FLAGS) as cluster:
        yield cluster


def roles(cluster: Cluster) -> dict[str, str | None]:
    return {node.name: node.role for node in cluster.view().nodes}


def generated(cluster: Cluster) -> float:
    return cluster.metrics()["vllm:generation_tokens_total"]


def take_over(cluster: Cluster, lost: str, heir: str, undisturbed: list[list[int]]) -> float:
    """Kill a stage while requests run; how long the pipeline was down."""
    machine = next(m for m in cluster.machines if m.name == lost)
    before = generated(cluster)
    with ThreadPoolExecutor(max_workers=1) as threads:
        asked = threads.submit(cluster.ask, REQUESTS)
        eventually(lambda: generated(cluster) > before + 100, READY_S, "tokens come")
        machine.kill_stage()
        killed_at = time.monotonic()
        eventually(lambda: roles(cluster)[heir] == "stage", READY_S, f"{heir} takes over")
        eventually(lambda: cluster.has_status(200), READY_S, "it serves again")
        down_s = time.monotonic() - killed_at
        assert tokens(asked.result()) == undisturbed
    return down_s


def test_a_standby_takes_over_at_once_and_who_comes_back_stands_by(cluster: Cluster) -> None:
    undisturbed = tokens(cluster.ask(REQUESTS))
    standby = cluster.add_member(name="standby", arguments=["--standby"])
    standby.wait_for("this node stands by")
    assert roles(cluster) == {"head": "stage", "node1": "stage", "standby": "standby"}
    assert take_over(cluster, "node1", "standby", undisturbed) < TAKEN_OVER_S
    eventually(lambda: roles(cluster)["node1"] == "standby", READY_S, "who was lost stands by")
    assert take_over(cluster, "standby", "node1", undisturbed) < TAKEN_OVER_S
    eventually(lambda: roles(cluster)["standby"] == "standby", READY_S, "it stands by again")


def test_a_standby_of_another_stage_gives_up_what_it_holds(cluster: Cluster) -> None:
    """When the node of a stage and its standby are lost together."""
    undisturbed = tokens(cluster.ask(REQUESTS))
    other = cluster.add_member(name="other")
    other.wait_for("layers 0:")
    other.wait_for("this node stands by")
    gone, cluster.members = cluster.members[:2], [other]
    for machine in gone:
        machine.signal(signal.SIGTERM)
        assert machine.wait() == 0
    eventually(lambda: roles(cluster)["other"] == "stage", READY_S, "it takes the other stage")
    eventually(lambda: cluster.has_status(200), READY_S, "it serves again")
    assert tokens(cluster.ask(REQUESTS)) == undisturbed
    for machine in gone:
        machine.end()
