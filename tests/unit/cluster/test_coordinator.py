"""The rules by which nodes come, make a pipeline, and are replaced in it."""

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from molink.cluster.admission import HeldModel, Hello
from molink.cluster.assignment import Waiting
from molink.cluster.coordinator import Coordinator
from molink.cluster.state import ClusterState, NodeStatus, Role
from molink.cluster.store import MemoryStore
from molink.core.cluster import Resources, Versions
from molink.core.errors import AdmissionError, PlanError, UsageError
from molink.core.ids import HEAD, MAX_NODE_ID, NodeId
from molink.core.model import ModelFacts
from molink.core.plan import Pipeline

MakeCluster = Callable[..., Any]


def layout(pipeline: Pipeline | Waiting) -> list[tuple[int, str]]:
    assert isinstance(pipeline, Pipeline), pipeline
    return [(stage.node, str(stage.layers)) for stage in pipeline.stages]


def waiting(planned: Pipeline | Waiting) -> str:
    assert isinstance(planned, Waiting), planned
    return planned.text


def test_the_head_is_node_0_and_others_follow(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(2)
    assert cluster.state.node(HEAD).name == "alpha"
    assert [cluster.join("beta"), cluster.join("gamma")] == [1, 2]


def test_n_ready_nodes_share_the_layers(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(2)
    text = "1 of 2 nodes are ready; alpha ready"
    assert waiting(cluster.coordinator.plan()) == text
    beta = cluster.join("beta")
    assert waiting(cluster.coordinator.plan()) == f"{text}, beta joined"
    cluster.measure(beta)
    pipeline = cluster.coordinator.plan()
    assert layout(pipeline) == [(0, "0:4"), (1, "4:8")]
    assert cluster.coordinator.plan() is cluster.state.pipeline is pipeline


def test_a_node_beyond_n_is_a_spare(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(2)
    nodes = [cluster.ready("beta"), cluster.ready("gamma")]
    assert layout(cluster.coordinator.plan()) == [(0, "0:4"), (1, "4:8")]
    assert [cluster.state.role(node) for node in nodes] == [Role.STAGE, Role.SPARE]


def test_a_head_that_computes_nothing_counts(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(2, head_layers="none")
    cluster.ready("beta")
    assert layout(cluster.coordinator.plan()) == [(1, "0:8")]
    assert cluster.state.role(HEAD) is Role.SPARE


def test_nobody_to_compute_is_an_error(make_cluster: MakeCluster) -> None:
    with pytest.raises(PlanError, match="no node is left to compute the 8 layers"):
        make_cluster(1, head_layers="none").coordinator.plan()


def test_pinned_ranges_are_awaited(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(head_layers="0:3")
    joined = cluster.join("beta", "3:-1")
    text = "waiting for layers 3:8; alpha ready (0:3), beta joined (3:8)"
    assert waiting(cluster.coordinator.plan()) == text
    cluster.measure(joined)
    assert layout(cluster.coordinator.plan()) == [(0, "0:3"), (joined, "3:8")]


def test_what_pinned_nodes_leave_goes_to_the_others(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(head_layers="2:4")
    beta = cluster.ready("beta")
    text = "waiting for layers 0:2, 4:8; alpha ready (2:4), beta ready"
    assert waiting(cluster.coordinator.plan()) == text
    gamma = cluster.ready("gamma")
    planned = layout(cluster.coordinator.plan())
    assert planned == [(beta, "0:2"), (0, "2:4"), (gamma, "4:8")]


def test_a_gap_is_left_to_as_many_as_can_hold_it(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(head_layers="0:2")
    cluster.ready("beta", free_bytes=5 << 20)
    assert "not enough memory" in waiting(cluster.coordinator.plan())
    cluster.ready("gamma", free_bytes=5 << 20)
    planned = layout(cluster.coordinator.plan())
    assert [node for node, _ in planned] == [0, 1, 2]


def test_pins_and_n_leave_the_gaps_to_others(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(3)
    cluster.ready("beta", "2:6")
    cluster.ready("gamma")
    assert layout(cluster.coordinator.plan()) == [(0, "0:2"), (1, "2:6"), (2, "6:8")]


def test_a_gap_among_n_nodes_is_refused(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(2, head_layers="0:3")
    cluster.ready("beta", "4:8")
    with pytest.raises(PlanError, match=r"layers 3:4 \(alpha has 0:3, beta has 4:8\)"):
        cluster.coordinator.plan()


@pytest.mark.parametrize(
    ("layers", "text"),
    [
        ("4:8", r"layers 4:6 are claimed by both alpha \(0:6\) and beta \(4:8\)"),
        ("0:6", r"layers 0:6 are claimed by both alpha \(0:6\) and beta \(0:6\)"),
        ("6:9", "beta: layers 6:9 lie outside the model, which has 8 layers"),
        ("6-8", "beta: layers «6-8»: expected START:END"),
        ("none", "beta: only the head may compute no layers"),
    ],
)
def test_impossible_layers_are_refused_at_the_door(
    make_cluster: MakeCluster, layers: str, text: str
) -> None:
    cluster = make_cluster(head_layers="0:6")
    with pytest.raises((PlanError, AdmissionError), match=text) as raised:
        cluster.join("beta", layers)
    assert isinstance(raised.value, AdmissionError) == ("claimed" in text)  # the other may leave
    assert cluster.state.node(NodeId(1)).status is NodeStatus.ENROLLED


def test_a_lost_nodes_layers_are_free_again(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(head_layers="0:4")
    cluster.coordinator.node_lost(cluster.ready("beta", "4:8"), "gone")
    gamma = cluster.ready("gamma", "4:8")
    assert layout(cluster.coordinator.plan()) == [(0, "0:4"), (gamma, "4:8")]


def test_a_node_that_dies_before_it_is_ready_does_not_count(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(2)
    cluster.coordinator.node_lost(cluster.join("beta"), "gone")
    assert waiting(cluster.coordinator.plan()) == "1 of 2 nodes are ready; alpha ready"
    gamma = cluster.ready("gamma")
    assert layout(cluster.coordinator.plan()) == [(0, "0:4"), (gamma, "4:8")]


def test_other_versions_and_models_are_refused(
    make_cluster: MakeCluster, versions: Versions, resources: Resources
) -> None:
    cluster = make_cluster(2)
    beta = cluster.coordinator.enrol("beta")
    with pytest.raises(AdmissionError, match=r"vLLM: head 0\.32\.0, beta 9"):
        cluster.coordinator.admit(beta, Hello("beta", replace(versions, vllm="9")))
    cluster.rejoin(beta, "beta")
    with pytest.raises(AdmissionError, match="beta bbb"):
        cluster.coordinator.measured(beta, resources, HeldModel("bbb", None))


@pytest.mark.parametrize(
    "nonsense",
    [{"free_bytes": -1}, {"bytes_per_s": 0.0}, {"bytes_per_s": math.nan}, {"flop_per_s": math.inf}],
)
def test_impossible_measurements_are_refused(
    make_cluster: MakeCluster, model: ModelFacts, resources: Resources, nonsense: dict[str, Any]
) -> None:
    cluster = make_cluster(2)
    beta = cluster.join("beta")
    with pytest.raises(AdmissionError, match="beta reports impossible measurements"):
        cluster.coordinator.measured(beta, replace(resources, **nonsense), HeldModel.of(model))


def test_a_head_that_computes_nothing_may_report_zeros(
    make_cluster: MakeCluster, model: ModelFacts
) -> None:
    cluster = make_cluster(2, head_layers="none")
    nothing = Resources("none", 0, 0, 0.0, 0.0)
    cluster.coordinator.measured(HEAD, nothing, HeldModel.of(model))
    assert cluster.state.node(HEAD).resources == nothing


def test_strangers_and_the_unprepared_are_refused(
    make_cluster: MakeCluster, versions: Versions
) -> None:
    cluster = make_cluster(2)
    with pytest.raises(AdmissionError, match=r"node 7 is not known .* join again with a token"):
        cluster.coordinator.admit(NodeId(7), Hello("eve", versions))
    with pytest.raises(AdmissionError, match="beta was measured before it joined"):
        cluster.measure(cluster.coordinator.enrol("beta"))
    with pytest.raises(UsageError, match="tensor parallel size 0"):
        cluster.coordinator.admit(HEAD, Hello("alpha", versions, tensor_parallel_size=0))


@pytest.mark.parametrize("name", ["", "-rf", "a b", "\x1b[31mred", "a" * 64, "ünï"])
def test_names_that_could_upset_a_terminal_are_refused(
    make_cluster: MakeCluster, name: str
) -> None:
    with pytest.raises(UsageError, match="node name"):
        make_cluster(2).coordinator.enrol(name)


def test_two_nodes_of_one_name_are_told_apart_until_one_is_lost(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(4)
    first, second = cluster.join("box"), cluster.join("box")
    assert [cluster.state.node(n).name for n in (first, second)] == ["box", "box-2"]
    cluster.coordinator.node_lost(first, "gone")
    third = cluster.join("box")
    cluster.rejoin(first, "box")
    assert [cluster.state.node(n).name for n in (first, second, third)] == [
        "box-3",
        "box-2",
        "box",
    ]


def test_a_full_cluster_is_refused(
    store: MemoryStore, versions: Versions, model: ModelFacts
) -> None:
    coordinator = Coordinator(ClusterState("c"), store, lambda: 1.0, versions)
    coordinator.start(model, "alpha")
    full = replace(coordinator.state, nodes=coordinator.state.nodes * (MAX_NODE_ID + 1))
    with pytest.raises(AdmissionError, match="all its 65535 identities"):
        Coordinator(full, store, lambda: 1.0, versions).enrol("beta")


def test_a_restarted_head_knows_its_nodes_and_goes_on_counting(
    make_cluster: MakeCluster, store: MemoryStore
) -> None:
    cluster = make_cluster(2)
    beta = cluster.ready("beta")
    cluster.coordinator.add_token(b"root", expires_at=1e12)
    cluster.coordinator.plan()
    again = make_cluster(2, state=store.load())
    assert again.coordinator.live_roots == [b"root"]
    assert waiting(again.coordinator.plan()) == "1 of 2 nodes are ready; alpha ready"
    again.rejoin(beta, "beta")
    again.measure(beta)
    pipeline = again.coordinator.plan()
    assert layout(pipeline) == [(0, "0:4"), (beta, "4:8")]
    assert pipeline.epoch == 2
    assert again.coordinator.enrol("gamma") == 2


def test_every_change_is_on_disk_before_the_call_returns(
    make_cluster: MakeCluster, store: MemoryStore
) -> None:
    cluster = make_cluster(2)
    coordinator = cluster.coordinator
    changes: list[Callable[[], object]] = [
        lambda: cluster.ready("beta"),
        lambda: coordinator.plan(),
        lambda: coordinator.stage_lost(HEAD, "killed"),
        lambda: coordinator.node_lost(NodeId(1), "gone"),
        lambda: coordinator.add_token(b"root", 1e12),
        lambda: coordinator.drop_pipeline(),
    ]
    for change in changes:
        before = cluster.state
        change()
        assert store.load() == cluster.state != before


def test_what_cannot_be_saved_has_not_happened(
    make_cluster: MakeCluster, store: MemoryStore
) -> None:
    cluster = make_cluster(2)
    before = cluster.state
    store.save = _full  # type: ignore[method-assign]
    with pytest.raises(OSError, match="disk full"):
        cluster.coordinator.enrol("beta")
    assert cluster.state is before


def _full(state: ClusterState) -> None:
    raise OSError("disk full")


def test_losing_a_spare_leaves_the_pipeline_and_losing_it_again_does_nothing(
    make_cluster: MakeCluster,
) -> None:
    cluster = make_cluster(2)
    cluster.ready("beta")
    gamma = cluster.ready("gamma")
    cluster.coordinator.plan()
    cluster.coordinator.stage_lost(gamma, "killed")
    assert cluster.state.node(gamma).status is NodeStatus.JOINED
    cluster.coordinator.node_lost(gamma, "gone")
    before = cluster.state
    cluster.coordinator.node_lost(gamma, "gone again")
    cluster.coordinator.stage_lost(gamma, "killed before")
    assert cluster.state is before
    assert not before.is_down


def happen(cluster: Any, what: str, node: NodeId, layers: str | None) -> None:
    if what == "new":
        cluster.join(f"n{node}", layers)
    elif what == "restart":
        assert cluster.state.model is not None
        cluster.coordinator.start(cluster.state.model, "alpha")
    elif what == "lose":
        cluster.coordinator.node_lost(node, "gone")
    elif what == "kill":
        cluster.coordinator.stage_lost(node, "killed")
    elif what == "drop":
        cluster.coordinator.drop_pipeline()
    elif what == "return":
        cluster.rejoin(node, f"n{node}", layers)
        cluster.measure(node)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.none() | st.integers(1, 3),
    st.lists(
        st.tuples(
            st.sampled_from(["new", *["return"] * 3, "lose", "kill", "restart", "drop"]),
            st.integers(0, 3).map(NodeId),
            st.none() | st.sampled_from(["0:4", "4:8", "2:6"]),
        ),
        max_size=30,
    ),
)
def test_whatever_nodes_do_pipelines_are_whole_and_epochs_grow(
    make_cluster: MakeCluster,
    check_invariants: Callable[[ClusterState], None],
    nodes_wanted: int | None,
    story: list[tuple[str, NodeId, str | None]],
) -> None:
    cluster = make_cluster(nodes_wanted)
    planned: list[Pipeline] = []
    for what, node, layers in story:
        with suppress(AdmissionError, PlanError):
            happen(cluster, what, node, layers)
            now = cluster.coordinator.plan()
            assert isinstance(now, Waiting) == (
                cluster.state.pipeline is None or cluster.state.is_down
            )
            if isinstance(now, Pipeline) and now not in planned:
                planned.append(now)
        check_invariants(cluster.state)
    epochs = [pipeline.epoch for pipeline in planned]
    assert epochs == list(range(1, len(epochs) + 1))


def test_an_expired_token_lets_nobody_in(
    store: MemoryStore, versions: Versions, model: ModelFacts
) -> None:
    now = 100.0
    coordinator = Coordinator(ClusterState("c"), store, lambda: now, versions)
    coordinator.start(model, "alpha")
    coordinator.add_token(b"short", expires_at=150)
    coordinator.add_token(b"long", expires_at=250)
    assert coordinator.live_roots == [b"short", b"long"]
    now = 200.0
    assert coordinator.live_roots == [b"long"]
