"""Models from the hub: every stage downloads the files of its own layers, and what goes wrong."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.cluster import COMMAND, Cluster, Machine, eventually, free_port, tokens
from tests.e2e.conftest import PIPELINE, References
from tests.e2e.hub import Hub
from tests.e2e.models import NUM_LAYERS, TOKENIZER_FILES
from tests.factories import make_completion, make_prompts
from transformers import LlamaForCausalLM

from molink.checkpoint.weights import INDEX, Share, files_of, read_index
from molink.cluster.view import ClusterView, decode_view
from molink.core.plan import LayerRange

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

SHARDED = "maker/sharded"
Caches = Callable[[str], dict[str, Any]]


@pytest.fixture(scope="module")
def hub(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """Has the Llama of the tests in shards of 2 MB."""
    whole = models["llama"]
    sharded = tmp_path_factory.mktemp("hub") / "sharded"
    LlamaForCausalLM.from_pretrained(whole).save_pretrained(sharded, max_shard_size="2MB")
    for name in TOKENIZER_FILES:
        shutil.copy(whole / name, sharded)
    with Hub({SHARDED: sharded}) as hub:
        yield hub


@pytest.fixture(scope="module")
def on_hub(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Caches:
    """Options of a machine with a cache of its own, which stays through these tests."""
    root = tmp_path_factory.mktemp("caches")

    def options(machine: str) -> dict[str, Any]:
        environment = hub.environment(machine, root / machine)
        return {"environment": {**environment, "HF_HUB_DOWNLOAD_TIMEOUT": "1"}}  # seconds

    return options


def shards(hub: Hub, layers: str) -> set[str]:
    share = Share(LayerRange.parse(layers), NUM_LAYERS, is_tied=False)
    return set(files_of(read_index(hub.models[SHARDED] / INDEX), share))


def downloaded(hub: Hub, machine: str) -> list[str]:
    """Weights that a machine has asked for since this was asked last."""
    names = [request.file for request in hub.downloads(machine)]
    hub.requests = [request for request in hub.requests if request.machine != machine]
    return sorted(names)


def test_each_stage_downloads_its_own_files_and_a_lost_one_goes_on(
    hub: Hub, on_hub: Caches, references: References
) -> None:
    cluster = Cluster(Path(SHARDED), layers=("0:4", "4:8"), flags=PIPELINE)
    last = max(shards(hub, "4:8"))
    try:
        cluster.start_head(**on_hub("head"))
        with hub.misbehaving(hangs_after={last: 1 << 20}):
            stuck = cluster.add_member(layers="4:8", name="stuck", **on_hub("member"))
            assert stuck.wait(90) == 1
        words = f"cannot download {last} of {SHARDED}: the hub does not answer (ReadTimeout)"
        assert words in stuck.log
        cluster.head.wait_for(f"stuck is gone: {words}")
        assert set(downloaded(hub, "member")) == shards(hub, "4:8")

        cluster.add_member(layers="4:8", name="good", **on_hub("member"))
        cluster.wait_until_serving()
        assert [(r.file, r.start) for r in hub.downloads("member")] == [(last, 1 << 20)]
        assert downloaded(hub, "head") == sorted(shards(hub, "0:4"))
        requests = [make_completion(prompt) for prompt in make_prompts([5, 70, 130])]
        assert tokens(cluster.ask(requests)) == tokens(references["llama"].ask(requests))
        cluster.stop()
    finally:
        cluster.end()


def test_other_layers_bring_only_what_is_missing_and_ctrl_c_loses_nothing_of_it(
    hub: Hub, on_hub: Caches
) -> None:
    """Follows the test above: the head has layers 0:4 in its cache, the member 4:8."""
    for machine in ("head", "member"):
        downloaded(hub, machine)
    missing = sorted(shards(hub, "0:6") - shards(hub, "0:4"))
    cluster = start(on_hub)
    try:
        with hub.misbehaving(bytes_per_s=3e5):
            eventually(lambda: cluster.head.log.count("MB (") > 1, 60, "a part is there")
            downloads = {node.name: node.download for node in view_of(cluster.head).nodes}
            assert downloads["node1"] is None
            assert downloads["head"] is not None
            assert downloads["head"].file in missing
            cluster.head.signal(signal.SIGINT)
            assert [machine.wait(8) for machine in cluster.machines] == [0, 0]
        cluster.check_nothing_left()
    finally:
        cluster.end()
    before = downloaded(hub, "head")
    cluster = start(on_hub)
    try:
        for machine in cluster.machines:
            eventually(lambda m=machine: has_loaded(m), 60, f"{machine.name} has loaded")
        first, *others = hub.downloads("head")
        assert (first.file, first.start > 0) == (before[-1], True)
        assert before[:-1] + [first.file] + [request.file for request in others] == missing
        assert downloaded(hub, "member") == []
    finally:
        cluster.end()


def start(on_hub: Caches) -> Cluster:
    cluster = Cluster(Path(SHARDED), layers=("0:6", "6:8"), flags=PIPELINE)
    cluster.start_head(**on_hub("head"))
    cluster.add_member(layers="6:8", **on_hub("member"))
    return cluster


def has_loaded(machine: Machine) -> bool:
    logs = machine.home.glob("*/logs/stage-0.log")
    return any("Loading weights took" in log.read_text() for log in logs)


def view_of(head: Machine) -> ClusterView:
    """What `molink status` shows while the engine, and so `/cluster`, is not there yet."""
    ended = subprocess.run(
        [sys.executable, "-c", COMMAND, "status", "--json"],
        env=os.environ | {"MOLINK_HOME": str(head.home)},
        stdout=subprocess.PIPE,
        check=True,
    )
    return decode_view(ended.stdout)


def test_a_damaged_file_in_the_heads_folder_ends_it_at_once(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(hub.models[SHARDED], folder)
    shard = folder / max(shards(hub, "0:4"))
    shard.write_bytes(shard.read_bytes()[:-1])
    arguments = ["serve", str(folder), "--layers=0:4", f"--port={free_port()}"]
    machine = Machine(tmp_path / "head", arguments)
    assert machine.wait() == 2
    assert machine.log.count("\n") == 1
    assert f"{shard} is damaged or incomplete" in machine.log


def test_a_gated_model_ends_the_head_at_once(hub: Hub, on_hub: Caches, tmp_path: Path) -> None:
    arguments = ["serve", SHARDED, "--nodes=2", f"--port={free_port()}"]
    with hub.misbehaving(refuses=(403, "GatedRepo")):
        machine = Machine(tmp_path / "gated", arguments, **on_hub("gated"))
        assert machine.wait() == 2
    assert "it is gated: accept its terms on the hub, then set HF_TOKEN" in machine.log
    assert machine.log.count("\n") == 1
