"""What an operator does to a running cluster: lets nodes in, takes them out, while requests run."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
from tests.e2e.cluster import COMMAND, Cluster, eventually
from tests.e2e.conftest import BUNDLED, MAX_MODEL_LEN
from tests.e2e.running import Running, requests_in_flight

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

END_S = 60.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(BUNDLED, flags=[f"--max-model-len={MAX_MODEL_LEN}"]) as cluster:
        yield cluster


def order(cluster: Cluster, *arguments: str) -> subprocess.CompletedProcess[str]:
    """One command on the head's machine."""
    return subprocess.run(
        [sys.executable, "-c", COMMAND, *arguments],
        env=os.environ | {"MOLINK_HOME": str(cluster.head.home), "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_nodes_join_with_a_token_of_their_own_and_are_used_for_what_comes(
    cluster: Cluster,
) -> None:
    made = order(cluster, "token", "create", "--node=spare", "--uses=1")
    assert made.returncode == 0, made.stderr
    token = made.stdout.strip()
    (listed,) = [
        one
        for one in json.loads(order(cluster, "token", "list", "--json").stdout)
        if one["node"] == "spare"
    ]
    assert listed["uses_left"] == 1
    assert "spare" in order(cluster, "token", "list").stdout
    cluster.token_file.write_text(token)
    stranger = cluster.add_member(name="stranger")
    assert stranger.wait(END_S) != 0
    assert "the token is for a node named spare, not stranger" in stranger.log
    cluster.members.remove(stranger)
    stranger.end()
    spare = cluster.add_member(name="spare")
    spare.wait_for("this node stands by")
    left = json.loads(order(cluster, "token", "list", "--json").stdout)
    assert listed["id"] not in [one["id"] for one in left]  # it is used up
    revoked = order(cluster, "token", "revoke", left[0]["id"])
    assert "lets nobody in any more" in revoked.stdout
    assert json.loads(order(cluster, "token", "list", "--json").stdout) == []
    refused = order(cluster, "token", "revoke", left[0]["id"])
    assert refused.returncode == 1
    assert "there is no token" in refused.stderr


def test_a_drained_node_goes_and_no_request_fails(cluster: Cluster) -> None:
    undisturbed = Running(cluster, stream=False)
    undisturbed.wait(END_S)
    running = requests_in_flight(cluster)
    drained = order(cluster, "node", "drain", "node1")
    assert "node1 may go: spare computes its layers" in drained.stdout, drained.stderr
    for request in running:
        request.wait(END_S)
        assert request.tokens == undisturbed.tokens
    assert [stage.node for stage in cluster.view().stages] == ["head", "spare"]
    refused = order(cluster, "node", "drain", "spare")
    assert refused.returncode == 1
    assert "nobody could compute the layers of spare" in refused.stderr
    epoch = cluster.view().epoch
    (node1,) = [m for m in cluster.members if m.name == "node1"]
    cluster.members.remove(node1)
    node1.end()
    eventually(lambda: "node1 is gone" in cluster.head.log, END_S, "it has left")
    assert cluster.view().epoch == epoch
    assert cluster.has_status(200)


def test_a_revoked_node_is_out_and_stays_out(cluster: Cluster) -> None:
    (spare,) = [m for m in cluster.members if m.name == "spare"]
    done = order(cluster, "node", "revoke", "spare")
    assert "spare is shut out" in done.stdout
    assert spare.wait(END_S) == 1
    assert "was revoked" in spare.log
    again = cluster.add_member(name="again", environment={"MOLINK_HOME": str(spare.home)})
    assert again.wait(END_S) == 1
    assert "revoked" in again.log
    for machine in (spare, again):
        cluster.members.remove(machine)
        machine.end()


def test_the_doctor_says_what_is_wrong_and_its_class(cluster: Cluster) -> None:
    address = cluster.head.log.split("works at ")[1].split(";")[0]
    token = order(cluster, "token", "create").stdout.strip()
    well = order(cluster, "doctor", address, "--token", token, "--model", cluster.model)
    assert well.returncode == 0, well.stdout
    assert "the head accepts it" in well.stdout
    own = order(cluster, "doctor", address, "--json")  # as the head itself, which knows more
    checks = {found["check"]: found for found in json.loads(own.stdout)}
    assert checks["versions"]["mend"] is checks["clock"]["mend"] is None
    assert own.returncode == 0
    for arguments, status, words in (
        (["127.0.0.1:1"], 10, "start molink serve there"),
        ([address, "--token", token, "--model", "/nowhere"], 14, "--model"),
        ([address, "--token", "nonsense"], 2, "not a join token"),
    ):
        found = order(cluster, "doctor", *arguments)
        assert found.returncode == status, found.stdout + found.stderr
        assert words in " ".join((found.stdout + found.stderr).split())
    listed = json.loads(order(cluster, "token", "list", "--json").stdout)
    order(cluster, "token", "revoke", listed[-1]["id"])
    revoked = order(cluster, "doctor", address, "--token", token)
    assert revoked.returncode == 11
    assert "molink token create" in " ".join(revoked.stdout.split())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["node", "revoke", "nobody"], "there is no node nobody; there are: node1, spare"),
        (["node", "drain", "head"], "head is the head"),
        (["token", "create", "--uses=0"], "--uses"),
        (["token", "create", "--node=a b"], "a b"),
        (["token", "list", "--cluster=other"], "no head runs on this machine"),
    ],
)
def test_orders_that_cannot_be_carried_out(
    cluster: Cluster, arguments: list[str], words: str
) -> None:
    done = order(cluster, *arguments)
    assert done.returncode != 0
    assert words in done.stderr
