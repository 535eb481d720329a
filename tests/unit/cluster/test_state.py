"""apply() keeps its invariants over any sequence of events."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from molink.cluster.events import (
    EngineLost,
    Event,
    HeadStarted,
    NodeDrained,
    NodeEnrolled,
    NodeJoined,
    NodeLost,
    NodeMeasured,
    NodeRevoked,
    PipelineDropped,
    PipelinePlanned,
    StageLost,
    StandbyLoaded,
    TokenCreated,
    TokenRevoked,
    TokenUsed,
)
from molink.cluster.state import ClusterState, NodeStatus, Role, apply
from molink.core.cluster import Resources, Versions
from molink.core.ids import NodeId
from molink.core.model import ModelFacts
from molink.core.plan import LayerRange, Pipeline, Stage

VERSIONS = Versions(1, "0.1.0", "0.32.0")
RESOURCES = Resources("cpu", 1, 1 << 30, 1e10, 1e11)
MODEL = ModelFacts("m", 4, 64, "hash", None, 1, 1)

node_ids = st.integers(0, 3).map(NodeId)
ranges = st.tuples(st.integers(0, 3), st.integers(1, 4)).filter(lambda p: p[0] < p[1])
stages = st.builds(Stage, node_ids, ranges.map(lambda pair: LayerRange(*pair)))
halves = st.permutations([NodeId(0), NodeId(1), NodeId(2)]).map(
    lambda nodes: (Stage(nodes[0], LayerRange(0, 2)), Stage(nodes[1], LayerRange(2, 4)))
)
pipelines = st.builds(
    Pipeline,
    st.one_of(halves, st.lists(stages, min_size=1, max_size=3).map(tuple)),
    st.integers(1, 9),
)
at = st.floats(0, 1e10)
roots, uses = st.sampled_from([b"one", b"two"]), st.integers(1, 3)
events: st.SearchStrategy[Event] = st.one_of(
    st.builds(HeadStarted, st.builds(replace, st.just(MODEL), num_layers=st.sampled_from([4])), at),
    st.builds(TokenCreated, roots, at, at, st.none() | st.just("beta"), st.none() | uses),
    st.builds(TokenUsed, roots, at),
    st.builds(TokenRevoked, roots, at),
    st.builds(NodeRevoked, node_ids, at),
    st.builds(NodeDrained, node_ids, at),
    st.builds(NodeEnrolled, node_ids, st.sampled_from(["alpha", "beta"]), at),
    st.builds(
        NodeJoined,
        node_ids,
        st.sampled_from(["alpha", "beta"]),
        st.just(VERSIONS),
        st.none() | st.just("10.0.0.2:7000"),
        st.none() | st.just(LayerRange(0, 2)),
        st.booleans(),
        st.integers(1, 2),
        at,
    ),
    st.builds(NodeMeasured, node_ids, st.just(RESOURCES), at),
    st.builds(NodeLost, node_ids, st.text(max_size=5), at),
    st.builds(StageLost, node_ids, st.text(max_size=5), at),
    st.builds(StandbyLoaded, node_ids, st.just(LayerRange(0, 2)), at),
    st.builds(PipelinePlanned, pipelines, at),
    st.builds(PipelineDropped, at),
    st.builds(EngineLost, at),
)


def joined(node: int, name: str = "beta", at: float = 2) -> NodeJoined:
    return NodeJoined(NodeId(node), name, VERSIONS, None, None, True, 1, at)


def two_ready(last: Event | None = None) -> ClusterState:
    state = apply(ClusterState("c"), HeadStarted(MODEL, 1))
    for i in range(2):
        state = apply(state, NodeEnrolled(NodeId(i), f"n{i}", 1))
        state = apply(state, joined(i, f"n{i}"))
        state = apply(state, NodeMeasured(NodeId(i), RESOURCES, 3))
    return apply(state, last) if last else state


def planned(epoch: int = 1) -> PipelinePlanned:
    halves = (Stage(NodeId(0), LayerRange(0, 2)), Stage(NodeId(1), LayerRange(2, 4)))
    return PipelinePlanned(Pipeline(halves, epoch), 4)


@given(st.booleans(), st.lists(events, max_size=30))
def test_invariants_hold_after_every_event(
    check_invariants: Callable[[ClusterState], None], from_ready: bool, sequence: list[Event]
) -> None:
    state = two_ready() if from_ready else ClusterState("c")
    for event in sequence:
        try:
            after = apply(state, event)
        except ValueError:
            continue
        check_invariants(after)
        assert after.last_epoch >= state.last_epoch
        assert after.last_epoch == state.last_epoch or isinstance(event, PipelinePlanned)
        assert len(after.nodes) - len(state.nodes) == isinstance(event, NodeEnrolled)
        assert after.cluster_id == state.cluster_id
        assert all(token.uses_left is None or token.uses_left > 0 for token in after.tokens)
        for old, new in zip(state.nodes, after.nodes, strict=False):
            assert new.is_revoked >= old.is_revoked
        state = after


def test_a_node_that_rejoins_replaces_its_record() -> None:
    state = apply(two_ready(), joined(1, "delta", at=9))
    assert len(state.nodes) == 2
    record = state.node(NodeId(1))
    assert (record.name, record.status, record.since) == ("delta", NodeStatus.JOINED, 9)
    assert record.resources is None


def test_an_id_is_not_given_twice() -> None:
    with pytest.raises(ValueError, match="not the next one"):
        apply(two_ready(), NodeEnrolled(NodeId(1), "beta", 5))


@pytest.mark.parametrize(
    "event", [joined(5), NodeMeasured(NodeId(5), RESOURCES, 1), NodeLost(NodeId(5), "", 1)]
)
def test_an_unknown_node_is_an_error(event: Event) -> None:
    with pytest.raises(ValueError, match="node 5 is not known"):
        apply(two_ready(), event)


def test_roles_exist_with_a_pipeline() -> None:
    assert two_ready().role(NodeId(0)) is None
    state = apply(two_ready(planned()), NodeEnrolled(NodeId(2), "gamma", 5))
    assert state.role(NodeId(0)) is Role.STAGE
    assert state.role(NodeId(2)) is Role.SPARE


@pytest.mark.parametrize(
    "event", [NodeLost(NodeId(1), "gone", 5), StageLost(NodeId(1), "killed", 5), joined(1)]
)
def test_a_lost_stage_takes_the_pipeline_down_until_it_is_planned_again(event: Event) -> None:
    state = two_ready(planned())
    assert not state.is_down
    state = apply(state, event)
    assert state.is_down
    if not isinstance(event, StageLost):
        state = apply(state, joined(1))
    state = apply(state, NodeMeasured(NodeId(1), RESOURCES, 6))
    assert state.is_down
    assert not apply(state, planned(2)).is_down


def test_a_lost_spare_leaves_the_pipeline_up() -> None:
    state = apply(two_ready(planned()), NodeEnrolled(NodeId(2), "gamma", 5))
    assert not apply(state, NodeLost(NodeId(2), "gone", 6)).is_down


def test_why_a_node_was_lost_is_known_until_it_is_back() -> None:
    state = apply(two_ready(), NodeLost(NodeId(1), "no heartbeat", 5))
    assert state.node(NodeId(1)).trouble == "no heartbeat"
    assert apply(state, joined(1)).node(NodeId(1)).trouble == ""


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        ([(0, 0, 2)], "does not cover"),
        ([(0, 0, 2), (1, 3, 4)], "does not cover"),
        ([(0, 0, 3), (1, 2, 4)], "does not cover"),
        ([(0, 0, 2), (1, 2, 5)], "does not cover"),
        ([(0, 0, 2), (0, 2, 4)], "two stages on one node"),
    ],
)
def test_a_wrong_pipeline_is_an_error(bad: list[tuple[int, int, int]], text: str) -> None:
    pipeline = Pipeline(tuple(Stage(NodeId(n), LayerRange(a, b)) for n, a, b in bad))
    with pytest.raises(ValueError, match=text):
        apply(two_ready(), PipelinePlanned(pipeline, 5))


def test_a_stage_needs_a_ready_node_and_a_new_epoch() -> None:
    with pytest.raises(ValueError, match="does not follow"):
        apply(two_ready(planned()), planned())
    with pytest.raises(ValueError, match="not ready"):
        apply(apply(two_ready(), NodeLost(NodeId(1), "", 4)), planned())


def test_a_started_head_has_no_pipeline_and_nobody_connected_but_remembers() -> None:
    state = apply(two_ready(planned(6)), HeadStarted(MODEL, 9))
    assert state.pipeline is None
    assert state.connected == ()
    assert [node.name for node in state.nodes] == ["n0", "n1"]
    assert state.last_epoch == 6


def test_expired_tokens_are_dropped_when_a_token_is_made() -> None:
    state = apply(ClusterState("c"), TokenCreated(b"old", expires_at=10, at=1))
    state = apply(state, TokenCreated(b"new", expires_at=20, at=11))
    assert [token.root_certificate for token in state.tokens] == [b"new"]
