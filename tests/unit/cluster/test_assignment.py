"""Who takes a lost stage."""

from collections.abc import Callable
from typing import Any

import pytest

from molink.cluster.assignment import Waiting
from molink.cluster.state import Role
from molink.core.plan import Pipeline

from .conftest import GIB

MakeCluster = Callable[..., Any]


def layout(pipeline: Pipeline | Waiting) -> list[tuple[int, str]]:
    assert isinstance(pipeline, Pipeline), pipeline
    return [(stage.node, str(stage.layers)) for stage in pipeline.stages]


def waiting(planned: Pipeline | Waiting) -> str:
    assert isinstance(planned, Waiting), planned
    return planned.text


def test_a_lost_stage_waits_for_its_node_and_comes_back_in_the_next_epoch(
    make_cluster: MakeCluster,
) -> None:
    cluster = make_cluster(2)
    beta = cluster.ready("beta")
    assert cluster.coordinator.plan().epoch == 1
    cluster.coordinator.node_lost(beta, "no heartbeat for 10 s")
    text = waiting(cluster.coordinator.plan())
    assert "beta with layers 4:8 is lost (no heartbeat for 10 s)" in text
    cluster.rejoin(beta, "beta")
    assert "beta with layers 4:8 is joined" in waiting(cluster.coordinator.plan())
    cluster.measure(beta)
    mended = cluster.coordinator.plan()
    assert layout(mended) == [(0, "0:4"), (beta, "4:8")]
    assert mended.epoch == 2


def test_a_lost_stage_process_is_loaded_again_on_its_node(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(2)
    beta = cluster.ready("beta")
    cluster.coordinator.plan()
    cluster.coordinator.stage_lost(beta, "killed by signal 9")
    assert isinstance(cluster.coordinator.plan(), Waiting)
    cluster.measure(beta)  # its next process
    mended = cluster.coordinator.plan()
    assert (layout(mended)[1], mended.epoch) == ((beta, "4:8"), 2)


def test_a_spare_takes_a_lost_stage_and_the_lost_node_returns_as_spare(
    make_cluster: MakeCluster,
) -> None:
    cluster = make_cluster(2)
    beta, gamma = cluster.ready("beta"), cluster.ready("gamma")
    cluster.coordinator.plan()
    cluster.coordinator.node_lost(beta, "gone")
    assert layout(cluster.coordinator.plan()) == [(0, "0:4"), (gamma, "4:8")]
    cluster.rejoin(beta, "beta")
    assert cluster.state.role(beta) is Role.SPARE
    assert cluster.coordinator.plan().epoch == 2


@pytest.mark.parametrize(("layers", "takes"), [("4:8", True), ("4:7", False), ("0:8", False)])
def test_a_pinned_spare_takes_only_its_own_layers(
    make_cluster: MakeCluster, layers: str, takes: bool
) -> None:
    cluster = make_cluster(2)
    beta = cluster.ready("beta")
    cluster.coordinator.plan()
    gamma = cluster.ready("gamma", layers)
    cluster.coordinator.node_lost(beta, "gone")
    planned = cluster.coordinator.plan()
    assert isinstance(planned, Pipeline) == takes
    assert (cluster.state.role(gamma) is Role.STAGE) == takes


def test_a_spare_without_the_memory_is_not_taken(
    make_cluster: MakeCluster,
) -> None:
    cluster = make_cluster(2)
    beta, gamma = cluster.ready("beta"), cluster.join("gamma")
    cluster.coordinator.plan()
    cluster.measure(gamma, free_bytes=5 << 20)  # 4 layers and the edge are 5 MiB, without cache
    cluster.coordinator.node_lost(beta, "gone")
    assert "a node with 6 MiB free" in waiting(cluster.coordinator.plan())


def test_a_spare_of_another_tensor_parallel_size_is_not_taken(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(2)
    beta, gamma = cluster.ready("beta"), cluster.join("gamma")
    cluster.coordinator.plan()
    cluster.rejoin(gamma, "gamma", tensor_parallel_size=2)
    cluster.measure(gamma)
    cluster.coordinator.node_lost(beta, "test")
    assert "the pipeline is down: beta" in waiting(cluster.coordinator.plan())


def test_after_a_pipeline_that_never_served_another_may_be_quite_different(
    make_cluster: MakeCluster,
) -> None:
    cluster = make_cluster(2)
    beta = cluster.ready("beta")
    cluster.coordinator.plan()
    cluster.coordinator.node_lost(beta, "test")
    cluster.coordinator.drop_pipeline()
    assert waiting(cluster.coordinator.plan()) == "1 of 2 nodes are ready; alpha ready"
    gamma = cluster.join("gamma")
    cluster.rejoin(gamma, "gamma", tensor_parallel_size=2)
    cluster.measure(gamma)
    planned = cluster.coordinator.plan()
    assert isinstance(planned, Pipeline)
    assert planned.epoch == 2
    assert (planned.stages[1].node, planned.stages[1].tensor_parallel_size) == (gamma, 2)


def test_who_cannot_take_the_place_of_a_node_that_could_waits_for_it(
    make_cluster: MakeCluster,
) -> None:
    cluster = make_cluster(2)
    beta, gamma = cluster.ready("beta"), cluster.join("gamma")
    cluster.coordinator.plan()
    cluster.measure(gamma, free_bytes=1)
    cluster.coordinator.node_lost(beta, "test")
    cluster.coordinator.drop_pipeline()
    assert "gamma" in waiting(cluster.coordinator.plan())
    cluster.rejoin(beta, "beta")
    cluster.measure(beta)
    assert layout(cluster.coordinator.plan())[1] == (beta, "4:8")


def test_a_larger_node_takes_the_place_of_one_that_is_too_small(
    make_cluster: MakeCluster,
) -> None:
    cluster = make_cluster(2)
    cluster.ready("beta", free_bytes=1)
    gamma = cluster.ready("gamma")
    assert layout(cluster.coordinator.plan()) == [(0, "0:4"), (gamma, "4:8")]


def test_a_node_that_returns_with_other_layers_is_not_taken(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(head_layers="0:4")
    beta = cluster.ready("beta", "4:8")
    cluster.coordinator.plan()
    cluster.rejoin(beta, "beta", "5:8")
    cluster.measure(beta)
    assert "beta came back with other layers than 4:8" in waiting(cluster.coordinator.plan())


def test_an_engine_that_is_lost_finds_the_same_stages_in_a_new_epoch(
    make_cluster: MakeCluster,
) -> None:
    cluster = make_cluster(2)
    beta, gamma = cluster.ready("beta"), cluster.ready("gamma")
    before = cluster.coordinator.plan()
    cluster.coordinator.standby_loaded(gamma, before.stages[1].layers)
    cluster.coordinator.engine_lost()
    assert cluster.state.node(gamma).loaded is None  # as far as the next engine knows
    after = cluster.coordinator.plan()
    assert (after.stages, after.epoch) == (before.stages, 2)
    cluster.coordinator.engine_lost()
    cluster.coordinator.node_lost(beta, "gone")
    assert layout(cluster.coordinator.plan()) == [(0, "0:4"), (gamma, "4:8")]


def test_a_head_that_starts_again_finds_the_layers_where_they_were(
    make_cluster: MakeCluster, store: Any
) -> None:
    cluster = make_cluster(3)
    for name in ("beta", "gamma"):
        cluster.ready(name, free_bytes=GIB // 4)
    before = layout(cluster.coordinator.plan())
    again = make_cluster(3, state=store.load())
    for node in (2, 1):
        assert isinstance(again.coordinator.plan(), Waiting)
        again.rejoin(node, f"n{node}")
        again.measure(node, free_bytes=GIB)
    assert layout(again.coordinator.plan()) == before
    assert again.state.pipeline.epoch == 2


@pytest.mark.parametrize("wanted", [2, None])
def test_other_wishes_make_another_plan(
    make_cluster: MakeCluster, store: Any, wanted: int | None
) -> None:
    cluster = make_cluster(3)
    for name in ("beta", "gamma"):
        cluster.ready(name)
    assert len(cluster.coordinator.plan().stages) == 3
    again = make_cluster(wanted, "0:4" if wanted is None else None, state=store.load())
    again.rejoin(1, "beta", "4:8" if wanted is None else None)
    again.measure(1)
    assert layout(again.coordinator.plan()) == [(0, "0:4"), (1, "4:8")]


def test_a_plan_that_never_served_does_not_come_again(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(2)
    cluster.ready("beta", free_bytes=GIB // 64)
    cluster.coordinator.plan()
    cluster.coordinator.drop_pipeline()
    assert cluster.state.last_stages == ()


# --- those who are left


def test_those_who_are_here_share_the_layers_anew(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(3)
    beta, gamma = cluster.ready("beta"), cluster.ready("gamma")
    assert len(cluster.coordinator.plan().stages) == 3
    cluster.coordinator.node_lost(beta, "gone")
    assert isinstance(cluster.coordinator.plan(), Waiting)
    assert cluster.coordinator.split_anew()
    for node in (0, gamma):  # they must give up what they hold
        cluster.coordinator.stage_lost(node, "its engine starts anew")
        assert isinstance(cluster.coordinator.plan(), Waiting)
    for node in (gamma, 0):
        cluster.measure(node)
    assert layout(cluster.coordinator.plan()) == [(0, "0:4"), (gamma, "4:8")]
    cluster.rejoin(beta, "beta")
    cluster.measure(beta)
    assert cluster.state.role(beta) is Role.SPARE


def test_who_only_stands_by_is_better_than_nothing(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(2)
    beta = cluster.ready("beta")
    cluster.coordinator.plan()
    gamma = cluster.ready("gamma", "0:4", stands_by=True)
    cluster.coordinator.node_lost(beta, "gone")
    assert isinstance(cluster.coordinator.plan(), Waiting)
    assert cluster.coordinator.split_anew()
    assert layout(cluster.coordinator.plan()) == [(gamma, "0:4"), (0, "4:8")]


def test_too_few_cannot_share(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(2, "0:4")
    beta = cluster.ready("beta")
    assert not cluster.coordinator.split_anew()  # nothing was planned yet
    cluster.coordinator.plan()
    cluster.coordinator.node_lost(beta, "gone")
    assert isinstance(cluster.coordinator.plan(), Waiting)
    assert not cluster.coordinator.split_anew()
    assert cluster.state.pipeline is not None


def test_one_after_the_other_may_go(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(3)
    beta, gamma = cluster.ready("beta"), cluster.ready("gamma")
    cluster.coordinator.plan()
    for node in (beta, gamma):
        cluster.coordinator.node_lost(node, "gone")
        assert isinstance(cluster.coordinator.plan(), Waiting)
        assert cluster.coordinator.split_anew()
    assert layout(cluster.coordinator.plan()) == [(0, "0:8")]
