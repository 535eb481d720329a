"""LoRA adapters over two stages: each machine reads its own copy."""

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.e2e.adapters import make_adapter
from tests.e2e.cluster import Cluster, ClusterError, Machine, Request, eventually, tokens
from tests.e2e.models import MAX_MODEL_LEN
from tests.factories import make_completion, make_prompts

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

FLAGS = (
    f"--max-model-len={MAX_MODEL_LEN}",
    "--block-size=32",
    "--enable-lora",
    "--max-loras=2",
    "--max-cpu-loras=2",  # fewer than there are: they are dropped and read again
    "--max-lora-rank=8",
)
CUT = "--max-num-batched-tokens=64"
NAMES = ("first", "second", "third")


@pytest.fixture(scope="module")
def adapters(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {
        name: make_adapter(models["llama"], folder / name, seed) for seed, name in enumerate(NAMES)
    }


@pytest.fixture(scope="module")
def flags(adapters: dict[str, Path]) -> list[str]:
    """Two adapters at start; the third is for later."""
    return [*FLAGS, "--lora-modules", *(f"{name}={adapters[name]}" for name in NAMES[:2])]


@pytest.fixture(scope="module", autouse=True)
def _may_load_adapters() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
        yield


@pytest.fixture(scope="module")
def pipeline(models: dict[str, Path], flags: list[str]) -> Iterator[Cluster]:
    with Cluster(models["llama"], nodes=2, flags=[*flags, CUT]) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def expected(
    models: dict[str, Path], flags: list[str], adapters: dict[str, Path]
) -> dict[str, list[list[int]]]:
    """What one process answers for every adapter, asked one after the other: on a CPU, plain vLLM
    gives requests without an adapter that of others in the same step."""
    with Cluster(models["llama"], nodes=1, flags=flags) as cluster:
        load(cluster, "third", adapters["third"])
        names = (*NAMES, cluster.model)
        return {name: tokens(cluster.ask(requests_for(name))) for name in names}


def requests_for(name: str) -> list[Request]:
    prompts = make_prompts([5, 63, 64, 90, 200])
    return [
        make_completion(prompt, model=name, max_tokens=20, seed=i, temperature=0.7 * (i % 2))
        for i, prompt in enumerate(prompts)
    ]


def load(cluster: Cluster, name: str, path: Path) -> None:
    body = {"lora_name": name, "lora_path": str(path)}
    response = cluster.http.post("/v1/load_lora_adapter", json=body)
    assert response.status_code == 200, response.text


def assert_all_equal(pipeline: Cluster, expected: dict[str, list[list[int]]]) -> None:
    """All at the same time, more adapters than fit into one step, and some with none."""
    found = tokens(pipeline.ask([r for name in expected for r in requests_for(name)]))
    assert found == [answer for answers in expected.values() for answer in answers]


def test_several_adapters(
    pipeline: Cluster, expected: dict[str, list[list[int]]], adapters: dict[str, Path]
) -> None:
    """Loaded at start and at run time; each changes the answers in its own way."""
    firsts = [answers[0] for answers in expected.values()]
    assert all(answer not in firsts[:i] for i, answer in enumerate(firsts))
    load(pipeline, "third", adapters["third"])
    assert_all_equal(pipeline, expected)
    listed = {model.id for model in pipeline.client.models.list()}
    assert set(NAMES) < listed


def test_a_stage_without_the_adapter(pipeline: Cluster, adapters: dict[str, Path]) -> None:
    """A relative path is each machine's own folder: here one lacks it, or has another."""
    head, node = pipeline.machines
    shutil.copytree(adapters["first"], head.folder / "own")
    body = {"lora_name": "own", "lora_path": "own"}
    response = pipeline.http.post("/v1/load_lora_adapter", json=body)
    assert response.status_code == 500
    assert "node1: there is no LoRA adapter own" in response.json()["error"]["message"]
    shutil.copytree(adapters["second"], node.folder / "own")
    response = pipeline.http.post("/v1/load_lora_adapter", json=body)
    assert response.status_code == 500
    assert "node1: the LoRA adapter own differs from the head's" in response.text
    shutil.copytree(adapters["first"], node.folder / "own", dirs_exist_ok=True)
    load(pipeline, "own", Path("own"))
    own, first = (tokens(pipeline.ask(requests_for(name))) for name in ("own", "first"))
    assert own == first


def test_no_such_adapter(pipeline: Cluster) -> None:
    body = {"lora_name": "missing", "lora_path": "/nowhere"}
    response = pipeline.http.post("/v1/load_lora_adapter", json=body)
    assert response.status_code == 404
    assert "No adapter found for /nowhere" in response.json()["error"]["message"]


def test_unloaded_adapter(pipeline: Cluster, adapters: dict[str, Path]) -> None:
    load(pipeline, "fourth", adapters["second"])
    response = pipeline.http.post("/v1/unload_lora_adapter", json={"lora_name": "fourth"})
    assert response.status_code == 200
    body = make_completion([5, 6, 7], model="fourth")
    assert pipeline.http.post("/v1/completions", json=body).status_code == 404


def test_a_replaced_stage_has_the_adapters(
    pipeline: Cluster, expected: dict[str, list[list[int]]]
) -> None:
    pipeline.members[0].kill_stage()
    eventually(lambda: pipeline.has_status(503), 10, "the pipeline is down")
    eventually(lambda: pipeline.has_status(200), 60, "the pipeline serves again")
    assert_all_equal(pipeline, expected)


def test_a_standby_that_takes_over_has_the_adapters(
    pipeline: Cluster, expected: dict[str, list[list[int]]]
) -> None:
    standby = pipeline.add_member(name="standby", arguments=["--standby"])
    standby.wait_for("this node stands by")
    pipeline.members[0].kill_stage()
    eventually(lambda: pipeline.view().stages[1].node == "standby", 60, "it takes over")
    assert_all_equal(pipeline, expected)
    standby.signal(signal.SIGTERM)
    assert standby.wait() == 0
    pipeline.members.remove(standby)
    standby.end()
    eventually(lambda: pipeline.has_status(200), 60, "the first node's stage is back")
    assert_all_equal(pipeline, expected)


def test_an_adapter_whose_folder_has_gone_is_lost_alone(
    pipeline: Cluster, expected: dict[str, list[list[int]]], adapters: dict[str, Path]
) -> None:
    gone = pipeline.head.folder / "gone"
    shutil.copytree(adapters["first"], gone)
    load(pipeline, "gone", gone)
    shutil.rmtree(gone)
    test_a_replaced_stage_has_the_adapters(pipeline, expected)
    for _ in range(2):
        body = make_completion([5, 6, 7], model="gone")
        assert pipeline.http.post("/v1/completions", json=body).status_code == 500
    assert_all_equal(pipeline, expected)


def test_an_adapter_that_is_missing_at_start(
    models: dict[str, Path], adapters: dict[str, Path]
) -> None:
    flags = [*FLAGS, "--lora-modules", "own=own"]
    cluster = Cluster(models["llama"], nodes=2, flags=flags)
    try:
        head = cluster.start_head()
        shutil.copytree(adapters["first"], head.folder / "own")
        cluster.add_member()
        assert head.wait(90) == 1
        assert "node1: there is no LoRA adapter own on this machine" in last_line(head)
        cluster.members[0].wait()
    finally:
        cluster.end()


def last_line(machine: Machine) -> str:
    lines = machine.log.splitlines()
    if not lines:
        raise ClusterError(f"{machine.name} said nothing")
    return lines[-1]
