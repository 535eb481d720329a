"""Machines that cannot dial one another: the head relays between them, until they can."""

import time
from collections.abc import Iterator

import pytest
from benchmarks.netlab import Lab, Line, why_not
from tests.e2e.cluster import Cluster, eventually, tokens
from tests.e2e.conftest import BUNDLED, MAX_MODEL_LEN
from tests.e2e.test_sockets import check_sockets
from tests.factories import make_completion, make_prompts

from molink.transport.link import SILENCE_S

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.netns,
    pytest.mark.timeout(300),
]

CABLE = Line(1e9, 1e9)
REDIALLED_S = 60.0  # attempts of a pair are ever more seldom
REPORTS_S = 4.0  # within it every agent has told the head its counters
TOKENS = 32
PROMPTS = make_prompts([20, 150])
REQUESTS = [make_completion(prompt, max_tokens=TOKENS, ignore_eos=True) for prompt in PROMPTS]
# What two stages exchange for them: hidden states and residual of 128 bfloat16 values each.
ACTIVATIONS = sum(len(prompt) + TOKENS - 1 for prompt in PROMPTS) * 2 * 128 * 2

Traffic = dict[tuple[str, str], int]
"""Bytes sent over every link, by the names of its ends."""


@pytest.fixture
def lab() -> Iterator[Lab]:
    """Two hosts that reach the head and not each other."""
    if reason := why_not():
        pytest.skip(reason)
    with Lab() as lab:
        for host in ("head", "a", "b"):
            lab.add_host(host)
        for host in ("a", "b"):
            lab.link("head", host, CABLE)
            assert lab.can_reach(host, "head")
        assert not lab.can_reach("a", "b")
        yield lab


def traffic(cluster: Cluster) -> Traffic:
    time.sleep(REPORTS_S)
    return {(link.source, link.destination): link.bytes_sent for link in cluster.view().links}


def ask(cluster: Cluster) -> tuple[list[list[int]], Traffic]:
    """The answers' tokens, and what they cost."""
    before = traffic(cluster)
    answers = cluster.ask(REQUESTS)
    after = traffic(cluster)
    return tokens(answers), {link: after[link] - before.get(link, 0) for link in after}


def relayed_bytes(cluster: Cluster) -> int:
    """What the head has passed on; its links also carry its own messages, and probes."""
    return sum(relay.bytes_relayed for relay in cluster.view().relays)


def test_the_head_relays_between_nodes_that_cannot_dial(lab: Lab) -> None:
    lab.call("head", lambda: relay_then_link(lab))


def relay_then_link(lab: Lab) -> None:
    flags = [f"--max-model-len={MAX_MODEL_LEN}", "--no-enable-prefix-caching"]
    cluster = Cluster(BUNDLED, nodes=3, flags=flags, head_arguments=["--listen=0.0.0.0:0"])
    try:
        start(cluster, lab)
        check_sockets(cluster.head, ("127.0.0.1", int(cluster.url.rpartition(":")[2])))
        for member in cluster.members:
            check_sockets(member, None)
        passed_on = relayed_bytes(cluster)
        first, relayed = ask(cluster)
        assert relayed_bytes(cluster) > passed_on + ACTIVATIONS
        ways = {frozenset(link) for link in relayed}
        assert ways == {frozenset({"head", "a"}), frozenset({"head", "b"})}
        assert relayed["a", "head"] > ACTIVATIONS
        assert relayed["head", "b"] > ACTIVATIONS
        assert "a and b cannot dial each other; the head relays" in cluster.head.log
        assert way(cluster) == "relayed"

        lab.link("a", "b", CABLE)
        eventually(lambda: way(cluster) == "direct", REDIALLED_S, "the direct path is taken up")
        passed_on = relayed_bytes(cluster)
        again, direct = ask(cluster)
        assert again == first
        assert direct["a", "b"] > ACTIVATIONS
        assert relayed_bytes(cluster) == passed_on

        lab.cut("a", "b")
        eventually(lambda: way(cluster) == "relayed", SILENCE_S + REPORTS_S, "the head relays")
        after, relayed_again = ask(cluster)
        assert after == first
        assert relayed_again["head", "b"] > ACTIVATIONS
        assert cluster.view().epoch == 1  # no step was lost
        cluster.stop()
    finally:
        cluster.end()


def start(cluster: Cluster, lab: Lab) -> None:
    """The head, then `a`, then `b`: stages in this order, each on its own host."""
    cluster.start_head()
    for host in ("a", "b"):
        there = {"arguments": ["--listen=0.0.0.0:0"], "prefix": lab.prefix(host)}
        cluster.add_member(name=host, **there)
        cluster.head.wait_for(f"{host} has joined")
    cluster.wait_until_serving()
    assert [stage.node for stage in cluster.view().stages] == ["head", "a", "b"]


def way(cluster: Cluster) -> str:
    """How `a` and `b` reach each other."""
    return {path.nodes: path.way for path in cluster.view().paths}["a", "b"]
