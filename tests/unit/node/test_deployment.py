"""A plan is carried out: the engine hears of it once its stages are linked, if it still counts."""

import asyncio

import pytest

from molink.cluster.coordinator import Coordinator
from molink.cluster.state import ClusterState, NodeRecord, NodeStatus
from molink.cluster.store import MemoryStore
from molink.core.cluster import Resources, Versions
from molink.core.ids import NodeId
from molink.core.plan import LayerRange, Pipeline, Stage
from molink.node.deployment import Deployment
from molink.wire import to_agent, to_engine, to_gateway
from molink.wire.to_agent import Dial, StageAssigned
from molink.wire.to_engine import PipelineAssigned, PipelineRepaired

ONE, TWO = NodeId(1), NodeId(2)
PLAN = Pipeline((Stage(ONE, LayerRange(0, 4), 1), Stage(TWO, LayerRange(4, 8), 1)), 1)


class StubVoice:
    """Keeps what was said."""

    def __init__(self) -> None:
        self.told: list[tuple[NodeId, to_agent.ToAgent]] = []
        self.engine: list[to_engine.ToEngine] = []
        self.gateway: list[to_gateway.ToGateway] = []

    def tell(self, node: NodeId, message: to_agent.ToAgent) -> None:
        self.told.append((node, message))

    def tell_engine(self, message: to_engine.ToEngine) -> None:
        self.engine.append(message)

    def tell_gateway(self, message: to_gateway.ToGateway) -> None:
        self.gateway.append(message)

    def say(self, text: str) -> None:
        pass

    def publish_view(self) -> None:
        pass


@pytest.fixture
def voice() -> StubVoice:
    return StubVoice()


@pytest.fixture
def deployment(voice: StubVoice) -> Deployment:
    """Of a head that computes nothing, and two nodes that hold nothing yet."""
    free = Resources("cpu", 1, free_bytes=1, bytes_per_s=1.0, flop_per_s=1.0)
    nodes = tuple(
        NodeRecord(NodeId(i), f"n{i}", NodeStatus.READY, 0.0, address=f"h:{i}", resources=free)
        for i in range(3)
    )
    versions = Versions(1, "0.1.0", "0.32.0")
    coordinator = Coordinator(ClusterState("c", None, nodes), MemoryStore(), lambda: 0.0, versions)
    deployment = Deployment(coordinator, voice, "http://here")
    deployment.unloaded = {ONE, TWO}
    return deployment


async def assigned_until_the_dial(deployment: Deployment) -> asyncio.Task[None]:
    assigning = asyncio.create_task(deployment.assign(PLAN))
    for _ in range(5):
        await asyncio.sleep(0)
    return assigning


async def test_neighbours_are_linked_before_the_engine_hears_of_them(
    deployment: Deployment, voice: StubVoice
) -> None:
    assigning = await assigned_until_the_dial(deployment)
    assert (voice.told, voice.engine) == ([(ONE, Dial(TWO, "h:2"))], [])
    deployment.paths.dialled(ONE, TWO, ok=True)
    await assigning
    assert [type(message) for _, message in voice.told[1:]] == [StageAssigned, StageAssigned]
    (assigned,) = voice.engine
    assert isinstance(assigned, PipelineAssigned)
    assert (assigned.epoch, deployment.news, deployment.unloaded) == (1, assigned, set())


async def test_what_was_forgotten_while_it_was_linked_is_told_to_nobody(
    deployment: Deployment, voice: StubVoice
) -> None:
    assigning = await assigned_until_the_dial(deployment)
    deployment.forget("it was killed")
    assert voice.gateway == [to_gateway.EngineGone("it was killed")]
    deployment.paths.dialled(ONE, TWO, ok=True)
    await assigning
    assert voice.engine == []
    assert (deployment.news, deployment.unloaded) == (None, {ONE, TWO})


async def test_a_mended_pipeline_names_the_stages_that_hold_nothing(
    deployment: Deployment, voice: StubVoice
) -> None:
    assigning = await assigned_until_the_dial(deployment)
    deployment.paths.dialled(ONE, TWO, ok=True)
    await assigning
    deployment.take_down("two is gone")
    deployment.take_down("said once")
    assert deployment.news == to_engine.PipelineDown("two is gone")
    deployment.unloaded = {TWO}
    again = asyncio.create_task(deployment.assign(Pipeline(PLAN.stages, 2)))
    await asyncio.sleep(0.01)
    deployment.paths.dialled(ONE, TWO, ok=True)
    await again
    down, repaired = voice.engine[1:]
    assert down == to_engine.PipelineDown("two is gone")
    assert isinstance(repaired, PipelineRepaired)
    assert (repaired.pipeline.epoch, repaired.replaced) == (2, [1])
    assert deployment.take_half_loaded() == {TWO}
