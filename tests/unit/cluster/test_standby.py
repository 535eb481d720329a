"""Spares that load a stage's layers ahead: which, and who takes over."""

from collections.abc import Callable
from typing import Any

import pytest

from molink.cluster.assignment import Waiting
from molink.cluster.state import Role
from molink.core.errors import AdmissionError
from molink.core.ids import HEAD, NodeId
from molink.core.plan import LayerRange

MakeCluster = Callable[..., Any]


def load_next(cluster: Any) -> tuple[int, str] | None:
    """Have the next standby load what it should; who, and what."""
    found = cluster.coordinator.next_standby({}, set())
    if found is None:
        return None
    node, stage = found
    cluster.coordinator.standby_loaded(node.id, stage.layers)
    return node.id, str(stage.layers)


def test_the_stage_with_fewest_standbys_gets_the_next_and_the_heads_comes_last(
    make_cluster: MakeCluster,
) -> None:
    cluster = make_cluster(2)
    cluster.ready("beta")
    assert load_next(cluster) is None  # there is no pipeline yet
    cluster.coordinator.plan()
    spares = [cluster.ready(name) for name in ("gamma", "delta", "epsilon")]
    loaded = [load_next(cluster) for _ in spares]
    assert loaded == list(zip(spares, ["4:8", "0:4", "4:8"], strict=True))
    assert load_next(cluster) is None
    assert {cluster.state.role(spare) for spare in spares} == {Role.STANDBY}


def test_a_node_too_small_for_any_stage_loads_nothing(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(2)
    cluster.ready("beta")
    cluster.coordinator.plan()
    cluster.ready("gamma", free_bytes=1 << 20)
    assert load_next(cluster) is None


def test_what_is_being_loaded_counts_and_what_failed_is_not_tried_again(
    make_cluster: MakeCluster,
) -> None:
    cluster = make_cluster(2)
    cluster.ready("beta")
    cluster.coordinator.plan()
    gamma, delta = cluster.ready("gamma"), cluster.ready("delta")
    first, second = LayerRange(0, 4), LayerRange(4, 8)
    node, stage = cluster.coordinator.next_standby({gamma: second}, set())
    assert (node.id, stage.layers) == (delta, first)
    assert cluster.coordinator.next_standby({gamma: second, delta: first}, set()) is None
    node, stage = cluster.coordinator.next_standby({}, {(gamma, second)})
    assert (node.id, stage.layers) == (gamma, first)
    unable = {(n, layers) for n in (gamma, delta) for layers in (first, second)}
    assert cluster.coordinator.next_standby({}, unable) is None


def test_the_heads_own_idle_stage_loads_nothing(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(2)
    cluster.ready("beta")
    cluster.coordinator.plan()
    gamma = cluster.ready("gamma")
    cluster.coordinator.stage_lost(HEAD, "killed")
    assert cluster.coordinator.plan().nodes[0] == gamma
    cluster.measure(HEAD)
    assert cluster.state.role(HEAD) is Role.SPARE
    assert load_next(cluster) is None


def test_a_standby_of_the_lost_stage_comes_before_other_spares(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(2)
    beta = cluster.ready("beta")
    cluster.coordinator.plan()
    gamma, delta, _ = (cluster.ready(name) for name in ("gamma", "delta", "epsilon"))
    assert [load_next(cluster), load_next(cluster)] == [(gamma, "4:8"), (delta, "0:4")]
    cluster.coordinator.stage_lost(HEAD, "killed")
    mended = cluster.coordinator.plan()
    assert [stage.node for stage in mended.stages] == [delta, beta]
    assert cluster.state.node(delta).loaded is None


def standbys(cluster: Any) -> tuple[NodeId, NodeId, NodeId]:
    """A node with the second stage, and standbys of that and of the head's."""
    beta = cluster.ready("beta")
    cluster.coordinator.plan()
    gamma, delta = cluster.ready("gamma"), cluster.ready("delta")
    assert [load_next(cluster), load_next(cluster)] == [(gamma, "4:8"), (delta, "0:4")]
    return beta, gamma, delta


def test_a_standby_of_another_stage_gives_up_what_it_holds_if_nobody_else_is_there(
    make_cluster: MakeCluster,
) -> None:
    cluster = make_cluster(2)
    beta, gamma, delta = standbys(cluster)
    cluster.coordinator.node_lost(gamma, "gone")
    cluster.coordinator.node_lost(beta, "gone")
    assert isinstance(cluster.coordinator.plan(), Waiting)
    assert cluster.coordinator.misplaced() == [delta]
    cluster.coordinator.stage_lost(delta, "another stage is lost")
    assert cluster.coordinator.misplaced() == []  # it is on its way
    cluster.measure(delta)
    assert [stage.node for stage in cluster.coordinator.plan().stages] == [HEAD, delta]


def test_nobody_gives_up_for_a_stage_that_has_an_heir_or_a_node(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(2)
    beta, gamma, _ = standbys(cluster)
    cluster.coordinator.node_lost(beta, "gone")
    assert cluster.coordinator.misplaced() == []
    cluster.coordinator.node_lost(gamma, "gone")
    cluster.rejoin(beta, "beta")
    assert cluster.coordinator.misplaced() == []


def test_who_joins_to_stand_by_takes_no_stage(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(2)
    beta = cluster.ready("beta", stands_by=True)
    assert isinstance(cluster.coordinator.plan(), Waiting)
    gamma = cluster.ready("gamma")
    assert [stage.node for stage in cluster.coordinator.plan().stages] == [HEAD, gamma]
    assert load_next(cluster) == (beta, "4:8")


def test_a_standby_may_be_pinned_to_layers_that_are_taken(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(head_layers="0:4")
    beta = cluster.ready("beta", "4:8")
    assert [stage.node for stage in cluster.coordinator.plan().stages] == [HEAD, beta]
    with pytest.raises(AdmissionError):
        cluster.join("gamma", "4:8")
    delta = cluster.ready("delta", "4:8", stands_by=True)
    assert load_next(cluster) == (delta, "4:8")


def test_what_was_loaded_is_forgotten_with_the_process(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(2)
    cluster.ready("beta")
    cluster.coordinator.plan()
    gamma = cluster.ready("gamma")
    load_next(cluster)
    cluster.coordinator.stage_lost(gamma, "killed")
    cluster.coordinator.standby_loaded(gamma, LayerRange(4, 8))  # too late
    cluster.measure(gamma)
    assert load_next(cluster) == (gamma, "4:8")
