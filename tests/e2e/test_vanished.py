"""A machine that vanishes without a word while another one stands by for it."""

import pytest
from benchmarks.netlab import Lab, Line
from tests.e2e.cluster import Cluster, eventually
from tests.e2e.conftest import BUNDLED, MAX_MODEL_LEN
from tests.e2e.running import Running, requests_in_flight

pytestmark = [pytest.mark.e2e, pytest.mark.netns, pytest.mark.timeout(240)]

LINE = Line(50e6, 50e6, delay_s=0.005)
NOTICED_S = 5.0
TAKEN_OVER_S = 5.0  # where two cores do everything
END_S = 60.0


def test_a_standby_takes_over_within_seconds(two_hosts: Lab) -> None:
    two_hosts.call("head", lambda: cut_and_heal(two_hosts))


def cut_and_heal(lab: Lab) -> None:
    flags = [f"--max-model-len={MAX_MODEL_LEN}"]
    cluster = Cluster(
        BUNDLED, layers=["0:4", None], flags=flags, head_arguments=["--listen=0.0.0.0:0"]
    )
    try:
        cluster.start_head()
        far = cluster.add_member(name="a", arguments=["--listen=0.0.0.0:0"], prefix=lab.prefix("a"))
        cluster.wait_until_serving()
        undisturbed = Running(cluster, stream=False)
        undisturbed.wait(END_S)
        near = cluster.add_member(name="near", arguments=["--standby"])
        near.wait_for("this node stands by")
        running = requests_in_flight(cluster)
        epoch = cluster.view().epoch
        lab.cut("head", "a")
        eventually(lambda: cluster.view().epoch > epoch, NOTICED_S, "the loss is noticed")
        eventually(lambda: cluster.view().serving, TAKEN_OVER_S, "the standby takes over")
        assert [stage.node for stage in cluster.view().stages] == ["head", "near"]
        lab.restore("head", "a")
        for request in running:
            request.wait(END_S)
            assert request.tokens == undisturbed.tokens
        eventually(lambda: far.log.count("joined cluster") == 2, END_S, "it comes back")
        eventually(
            lambda: [n.role for n in cluster.view().nodes] == ["stage", "standby", "stage"],
            END_S,
            "it stands by in its turn",
        )
        cluster.stop()
    finally:
        cluster.end()
