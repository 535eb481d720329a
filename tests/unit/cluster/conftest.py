"""Factories of the nouns that a cluster is made of."""

from collections.abc import Callable
from dataclasses import replace
from itertools import count

import pytest

from molink.cluster.admission import HeldModel, Hello
from molink.cluster.coordinator import Coordinator
from molink.cluster.state import ClusterState, NodeStatus, Role
from molink.cluster.store import MemoryStore
from molink.core.cluster import Resources, Versions
from molink.core.ids import NodeId
from molink.core.model import ModelFacts

GIB = 1 << 30


@pytest.fixture(scope="session")
def versions() -> Versions:
    return Versions(protocol=1, molink="0.1.0", vllm="0.32.0")


@pytest.fixture(scope="session")
def model() -> ModelFacts:
    return ModelFacts("models/tiny", 8, 64, "a" * 64, None, layer_bytes=1 << 20, edge_bytes=1 << 20)


@pytest.fixture(scope="session")
def resources() -> Resources:
    return Resources("cpu", 1, free_bytes=GIB, bytes_per_s=1e10, flop_per_s=1e11)


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture(scope="session")
def check_invariants() -> Callable[[ClusterState], None]:
    """What holds in every state, whatever happened before."""

    def check(state: ClusterState) -> None:
        assert [node.id for node in state.nodes] == list(range(len(state.nodes)))
        for node in state.nodes:
            assert (node.resources is not None) == (node.status is NodeStatus.READY)
            if node.loaded is not None:
                assert node.status is NodeStatus.READY
                assert state.role(node.id) is not Role.STAGE
        if state.pipeline is None:
            assert not state.is_down
            return
        assert state.model is not None
        covered = [i for s in state.pipeline.stages for i in range(s.layers.start, s.layers.end)]
        assert covered == list(range(state.model.num_layers))
        assert len(set(state.pipeline.nodes)) == len(state.pipeline.nodes)
        assert state.pipeline.epoch == state.last_epoch
        if not state.is_down:
            assert all(state.node(n).status is NodeStatus.READY for n in state.pipeline.nodes)

    return check


class Cluster:
    """A coordinator with a clock that ticks once a reading, and short words for what nodes do."""

    def __init__(self, coordinator: Coordinator, resources: Resources, versions: Versions) -> None:
        self.coordinator = coordinator
        self._resources = resources
        self._versions = versions

    @property
    def state(self) -> ClusterState:
        return self.coordinator.state

    def join(self, name: str, layers: str | None = None, *, stands_by: bool = False) -> NodeId:
        node = self.coordinator.enrol(name)
        self.rejoin(node, name, layers, stands_by=stands_by)
        return node

    def rejoin(
        self,
        node: NodeId,
        name: str,
        layers: str | None = None,
        tensor_parallel_size: int = 1,
        *,
        stands_by: bool = False,
    ) -> None:
        hello = Hello(name, self._versions, None, layers, tensor_parallel_size, stands_by)
        self.coordinator.admit(node, hello)

    def measure(self, node: NodeId, free_bytes: int = GIB) -> None:
        assert self.state.model is not None
        resources = replace(self._resources, free_bytes=free_bytes)
        self.coordinator.measured(node, resources, HeldModel.of(self.state.model))

    def ready(
        self,
        name: str,
        layers: str | None = None,
        free_bytes: int = GIB,
        *,
        stands_by: bool = False,
    ) -> NodeId:
        node = self.join(name, layers, stands_by=stands_by)
        self.measure(node, free_bytes)
        return node


@pytest.fixture
def make_cluster(
    store: MemoryStore, model: ModelFacts, resources: Resources, versions: Versions
) -> Callable[..., Cluster]:
    """Start a head: `make_cluster(nodes_wanted=None, head_layers=None, state=None)`."""
    ticks = count(1000)

    def make(
        nodes_wanted: int | None = None,
        head_layers: str | None = None,
        state: ClusterState | None = None,
    ) -> Cluster:
        coordinator = Coordinator(
            state or ClusterState("c"), store, lambda: next(ticks), versions, nodes_wanted
        )
        coordinator.start(model, "alpha")
        cluster = Cluster(coordinator, resources, versions)
        cluster.rejoin(NodeId(0), "alpha", head_layers)
        cluster.measure(NodeId(0))
        return cluster

    return make
