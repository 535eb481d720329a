"""What an operator may change: tokens, nodes that are shut out, nodes that are to go."""

from collections.abc import Callable
from typing import Any

import pytest

from molink.cluster.assignment import Waiting
from molink.core.errors import AdmissionError, UsageError
from molink.core.plan import LayerRange

MakeCluster = Callable[..., Any]
FOR_EVER = 1e12


def test_a_token_for_one_name_lets_nobody_else_in(make_cluster: MakeCluster) -> None:
    coordinator = make_cluster(2).coordinator
    coordinator.add_token(b"root", FOR_EVER, "beta")
    with pytest.raises(AdmissionError, match="for a node named beta, not gamma"):
        coordinator.enrol("gamma", b"root")
    assert coordinator.enrol("beta", b"root") == 1


def test_a_token_is_used_up(make_cluster: MakeCluster) -> None:
    coordinator = make_cluster(2).coordinator
    coordinator.add_token(b"twice", FOR_EVER, uses=2)
    coordinator.add_token(b"often", FOR_EVER)
    coordinator.enrol("beta", b"twice")
    assert [token.uses_left for token in coordinator.live_tokens] == [1, None]
    coordinator.enrol("gamma", b"twice")
    assert coordinator.live_roots == [b"often"]


def test_a_revoked_token_is_gone(make_cluster: MakeCluster) -> None:
    coordinator = make_cluster(2).coordinator
    for root in (b"one", b"two"):
        coordinator.add_token(root, FOR_EVER)
    first = coordinator.live_tokens[0]
    coordinator.revoke_token(first.id)
    assert coordinator.live_roots == [b"two"]
    with pytest.raises(UsageError, match=f"no token {first.id}"):
        coordinator.revoke_token(first.id)


def test_a_revoked_node_never_comes_back(make_cluster: MakeCluster, store: Any) -> None:
    cluster = make_cluster(2)
    beta = cluster.ready("beta")
    cluster.coordinator.plan()
    assert cluster.coordinator.revoke_node("beta") == [beta]
    assert isinstance(cluster.coordinator.plan(), Waiting)
    assert cluster.coordinator.is_revoked(beta)
    with pytest.raises(AdmissionError, match="was revoked"):
        cluster.rejoin(beta, "beta")
    again = make_cluster(2, state=store.load())
    assert again.coordinator.is_revoked(beta)
    other = again.ready("beta")  # the same machine, with another token
    assert not again.coordinator.is_revoked(other)
    with pytest.raises(UsageError, match="no node zeta; there are: beta"):
        again.coordinator.revoke_node("zeta")
    with pytest.raises(UsageError, match="alpha is the head"):
        again.coordinator.revoke_node("alpha")


def test_a_drained_nodes_layers_go_to_whoever_has_loaded_them(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(2)
    beta, gamma, delta = (cluster.ready(name) for name in ("beta", "gamma", "delta"))
    coordinator = cluster.coordinator
    coordinator.plan()
    coordinator.standby_loaded(delta, LayerRange(4, 8))
    assert coordinator.drain("beta") == "delta"
    mended = coordinator.plan()
    assert [stage.node for stage in mended.stages] == [0, delta]
    coordinator.node_lost(delta, "gone")
    assert [stage.node for stage in coordinator.plan().stages] == [0, gamma]
    coordinator.node_lost(gamma, "gone")
    assert isinstance(coordinator.plan(), Waiting)  # beta is on its way out
    cluster.rejoin(beta, "beta")
    cluster.measure(beta)
    assert [stage.node for stage in coordinator.plan().stages] == [0, beta]


def test_a_node_that_nobody_could_replace_stays(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(2)
    cluster.ready("beta")
    cluster.coordinator.plan()
    cluster.ready("small", free_bytes=1)
    cluster.join("late")
    with pytest.raises(UsageError, match="nobody could compute the layers of beta"):
        cluster.coordinator.drain("beta")
    assert not cluster.state.is_down
    for name, words in (("alpha", "is the head"), ("nobody", "no node nobody")):
        with pytest.raises(UsageError, match=words):
            cluster.coordinator.drain(name)


def test_a_drained_spare_takes_nothing(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(2)
    beta = cluster.ready("beta")
    cluster.coordinator.plan()
    cluster.ready("gamma")
    assert cluster.coordinator.drain("gamma") is None
    assert cluster.coordinator.next_standby({}, set()) is None
    cluster.coordinator.node_lost(beta, "gone")
    assert isinstance(cluster.coordinator.plan(), Waiting)


def test_revoking_a_node_ends_all_its_identities_and_its_token(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(2)
    coordinator = cluster.coordinator
    coordinator.add_token(b"root", FOR_EVER)
    coordinator.add_token(b"other", FOR_EVER)
    old = coordinator.enrol("beta", b"root")
    cluster.rejoin(old, "beta")
    coordinator.node_lost(old, "gone")
    new = coordinator.enrol("beta", b"root")
    assert coordinator.revoke_node("beta") == [old, new]
    assert coordinator.live_roots == [b"other"]
    with pytest.raises(AdmissionError, match="was revoked"):
        cluster.rejoin(old, "beta")


def test_a_node_keeps_the_name_for_which_it_was_let_in(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(2)
    cluster.coordinator.add_token(b"root", FOR_EVER, "beta")
    beta = cluster.coordinator.enrol("beta", b"root")
    with pytest.raises(AdmissionError, match="evil was let in as beta, and as no other"):
        cluster.rejoin(beta, "evil")
    cluster.rejoin(beta, "beta")
    with pytest.raises(AdmissionError, match="as no other"):
        cluster.rejoin(beta, "evil")
