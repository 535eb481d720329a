"""A pipeline that loses its parts: requests wait, and end with the tokens they would have had.

All tests share one cluster, and each leaves it serving.
"""

import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.e2e.clock import Clock, why_no_clock
from tests.e2e.cluster import Cluster, eventually, free_port, tokens
from tests.e2e.conftest import BUNDLED, MAX_MODEL_LEN
from tests.e2e.running import Running, requests_in_flight
from tests.factories import make_completion, make_prompts

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

END_S = 10.0  # a lost head ends running requests within it
ANSWERED_S = 60.0  # of requests that run to their end, where reading the clock is slow
REPAIR_S = 60.0
NOTICED_S = 2.0  # the loss of a process
HUNG_S = 6
REQUESTS = [make_completion(prompt) for prompt in make_prompts([3, 40, 150])]


class Faulty(Cluster):
    """A cluster whose tokens are known from before the fault: of requests, and of a long one."""

    clocks: tuple[Clock, Clock]  # of the head that is started again, and of the spare

    def start(self) -> "Faulty":
        self.clocks = Clock(self._root / "clock"), Clock(self._root / "spares-clock")
        self.port = free_port()
        self._arguments += [f"--listen=127.0.0.1:{self.port}", f"--hung-after={HUNG_S}"]
        super().start()
        self.tokens = self.ask_tokens()
        undisturbed = Running(self, stream=False)
        undisturbed.wait(ANSWERED_S)
        self.long_tokens = undisturbed.tokens
        return self

    def ask_tokens(self) -> list[list[int]]:
        return tokens(self.ask(REQUESTS))

    def check_mended(self) -> None:
        """Raises unless it serves again, and as before."""
        eventually(lambda: self.has_status(200), REPAIR_S, "the pipeline serves again")
        assert self.ask_tokens() == self.tokens

    def check_undisturbed(self, running: tuple[Running, ...]) -> None:
        """Raises unless these requests end, and as if nothing had happened."""
        for request in running:
            request.wait(REPAIR_S + ANSWERED_S)
            assert request.status == 200
            assert request.tokens == self.long_tokens

    def expect(self, said: str, since: int) -> None:
        """Wait until the head says it after the first `since` characters of its log."""
        eventually(lambda: said in self.head.log[since:], REPAIR_S, f"the head says «{said}»")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Faulty]:
    with Faulty(BUNDLED, flags=[f"--max-model-len={MAX_MODEL_LEN}"]) as cluster:
        yield cluster


def test_a_killed_stage(cluster: Faulty) -> None:
    running = requests_in_flight(cluster)
    fault = time.monotonic()
    cluster.members[0].kill_stage()
    eventually(lambda: cluster.has_status(503), NOTICED_S, "the loss is noticed")
    assert time.monotonic() - fault < NOTICED_S
    refusal = cluster.http.get("/health")
    assert int(refusal.headers["retry-after"]) > 0
    assert "the pipeline is down: node1: killed by signal 9" in refusal.text
    assert not cluster.view().serving
    assert cluster.metrics()["molink_serving"] == 0
    assert cluster.ask_tokens() == cluster.tokens  # they are taken, and wait
    assert cluster.metrics()["molink_serving"] == 1
    cluster.check_undisturbed(running)
    cluster.check_mended()


def test_a_stage_that_hangs_is_started_again(cluster: Faulty) -> None:
    """Its agent and its machine answer as before."""
    running = requests_in_flight(cluster)
    (stage,) = cluster.members[0].processes("molink.entrypoints.stage")
    fault = time.monotonic()
    stage.suspend()
    eventually(lambda: cluster.has_status(503), HUNG_S + NOTICED_S, "it is noticed")
    assert time.monotonic() - fault > HUNG_S - NOTICED_S
    assert "its process has said nothing" in cluster.http.get("/health").text
    cluster.check_undisturbed(running)
    cluster.check_mended()
    assert not stage.is_running()


def test_the_heads_own_stage_is_killed_while_another_is_loaded(cluster: Faulty) -> None:
    running = requests_in_flight(cluster)
    since = len(cluster.head.log)
    cluster.members[0].kill_stage()
    cluster.expect("stage 2 of 2", since)
    cluster.head.kill_stage()
    cluster.expect("the stage's process on this machine is gone", since)
    cluster.check_undisturbed(running)
    cluster.check_mended()


def test_a_node_is_killed_and_joins_again(cluster: Faulty) -> None:
    running = requests_in_flight(cluster)
    member = cluster.members.pop()
    member.signal(signal.SIGKILL)
    eventually(lambda: not member.left_over(), END_S, "nothing is left of the node")
    eventually(lambda: cluster.has_status(503), NOTICED_S, "the loss is noticed")
    home = {"MOLINK_HOME": str(member.home)}
    again = cluster.add_member(name="again", environment=home)
    again.wait_for("joined cluster")
    assert "as node 1;" in again.log  # the identity it had
    cluster.check_undisturbed(running)
    cluster.check_mended()
    member.end()


def test_a_spare_takes_over_and_one_that_cannot_is_sent_away(
    cluster: Faulty, tmp_path: Path
) -> None:
    no_weights = tmp_path / "no-weights"
    shutil.copytree(BUNDLED, no_weights, ignore=shutil.ignore_patterns("*.safetensors"))
    weak = cluster.add_member(name="weak", arguments=["--model", str(no_weights)])
    assert weak.wait(REPAIR_S) == 2
    assert "no-weights holds no weights" in weak.log
    assert weak.left_over() == []
    spare = cluster.add_member(name="spare", environment=cluster.clocks[1].environment)
    spare.wait_for("this node stands by")
    assert cluster.view().nodes[-1].role == "standby"
    running = requests_in_flight(cluster)
    leaving = cluster.members.pop(0)
    leaving.signal(signal.SIGTERM)
    assert leaving.wait() == 0
    assert leaving.left_over() == []
    cluster.check_undisturbed(running)
    cluster.check_mended()
    assert [stage.node for stage in cluster.view().stages] == ["head", "spare"]
    for gone in (leaving, weak):
        cluster.members = [member for member in cluster.members if member is not gone]
        gone.end()


def test_the_head_is_killed_and_started_again(cluster: Faulty) -> None:
    """Its node keeps its layers and asks for it, and is a stage again without a new token."""
    running = requests_in_flight(cluster)
    old = cluster.head
    old.signal(signal.SIGKILL)
    assert old.wait() == -signal.SIGKILL
    for request in running:
        request.wait(END_S)
    eventually(lambda: not old.left_over(), END_S, "nothing is left of the head")
    (member,) = cluster.members
    member.wait_for("lost the head")
    (stage,) = member.processes("molink.entrypoints.stage")
    home = {"MOLINK_HOME": str(old.home)}
    cluster.start_head(name="head2", environment=home | cluster.clocks[0].environment)
    cluster.wait_until_serving()
    cluster.check_mended()
    assert member.processes("molink.entrypoints.stage") == [stage]
    old.end()


@pytest.mark.skipif(bool(why_no_clock()), reason=why_no_clock())
def test_clocks_that_jump_change_nothing(cluster: Faulty) -> None:
    """Forward on one machine and back on the other, at once, and right again."""
    epoch = cluster.view().epoch
    for hours in (1, -1, 0):
        stream, whole = requests_in_flight(cluster)
        for clock, sign in zip(cluster.clocks, (1, -1), strict=True):
            clock.jump(sign * hours * 3600)
        assert cluster.ask_tokens() == cluster.tokens
        for request in (stream, whole):
            request.wait(ANSWERED_S)
            assert request.status == 200
        assert "error" not in stream.events[-1]
    assert cluster.view().epoch == epoch
