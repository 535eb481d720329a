"""A signal at any moment: everything ends, and nothing stays.

What happens to a cluster that serves is in `test_faults` and at the end of `test_bad_input`.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from tests.e2e.cluster import Cluster, eventually
from tests.e2e.conftest import BUNDLED

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]


def end_both(cluster: Cluster, number: signal.Signals) -> None:
    """Signal the head; a member ends with a head that says goodbye, and else by its own signal."""
    (member,) = cluster.members
    cluster.head.signal(number)
    if number is signal.SIGKILL:
        assert cluster.head.wait() == -signal.SIGKILL
        member.wait_for("lost the head")
        member.signal(signal.SIGINT)
        assert member.wait() == 0
    else:
        assert cluster.head.wait() == 0
        assert cluster.head.log.endswith("stopped\n")
        assert member.wait() == 0
        assert member.log.endswith("the head has ended\n")
    for machine in cluster.machines:
        eventually(lambda m=machine: not m.left_over(), 10, f"nothing is left of {machine.name}")
        assert "Traceback" not in machine.log


@contextmanager
def head_and_member(nodes: int) -> Iterator[Cluster]:
    """A head that wants `nodes`, and a member that has just been started; ended for certain."""
    cluster = Cluster(BUNDLED, nodes=nodes)
    try:
        cluster.start_head()
        cluster.add_member()
        yield cluster
    finally:
        cluster.end()


@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL], ids=lambda n: n.name
)
def test_while_the_head_waits(number: signal.Signals) -> None:
    with head_and_member(nodes=3) as cluster:
        cluster.head.wait_for("node1 has joined")
        end_both(cluster, number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda n: n.name)
def test_while_the_engine_starts(number: signal.Signals) -> None:
    with head_and_member(nodes=2) as cluster:
        cluster.head.wait_for("stage 2 of 2 is")
        eventually(
            lambda: bool(cluster.head.processes("spawn_main")), 60, "the engine's core starts"
        )
        end_both(cluster, number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_a_node_leaves_while_the_head_waits(number: signal.Signals) -> None:
    with head_and_member(nodes=3) as cluster:
        (member,) = cluster.members
        cluster.head.wait_for("node1 has joined")
        member.signal(number)
        assert member.wait() == 0
        assert member.left_over() == []
        cluster.head.wait_for("node1 is gone: the node was stopped")
        assert cluster.head.process.poll() is None
