"""Bringing a planned pipeline into being, and what the engine is told of it."""

from dataclasses import replace
from typing import Protocol

from molink.cluster.coordinator import Coordinator
from molink.core.ids import HEAD, NodeId, Port
from molink.core.plan import LayerRange, Pipeline, Stage
from molink.node.paths import Paths
from molink.wire import to_agent, to_engine, to_gateway
from molink.wire.to_agent import EngineState, PaceDecision, StageAssigned
from molink.wire.to_engine import (
    PipelineAssigned,
    PipelineDown,
    PipelineRepaired,
    StagePlace,
    StandbyChosen,
    StandbyDropped,
)


class Voice(Protocol):
    """Whom a deployment can speak to: nodes, the engine, the person at the terminal."""

    def tell(self, node: NodeId, message: to_agent.ToAgent) -> None: ...

    def tell_engine(self, message: to_engine.ToEngine) -> None: ...

    def tell_gateway(self, message: to_gateway.ToGateway) -> None: ...

    def say(self, text: str) -> None: ...

    def publish_view(self) -> None: ...


class Deployment:
    """Owns what the engine was told of its pipeline, and whether it serves."""

    def __init__(self, coordinator: Coordinator, voice: Voice, http: str) -> None:
        self._coordinator = coordinator
        self._voice = voice
        self._http = http
        self.paths = Paths(coordinator, voice)
        self._trouble = ""
        self.pipeline: Pipeline | None = None
        self.assigned: PipelineAssigned | None = None
        self.unloaded: set[NodeId] = set()  # nodes whose stage this engine has not loaded
        self.is_down = False  # and the engine knows
        self.was_lost = False  # since the engine started; it may have been mended meanwhile
        self.loading: frozenset[NodeId] = frozenset()  # by the repair that is under way
        self.warming: dict[NodeId, LayerRange] = {}  # what spares are loading ahead
        self.unable: set[tuple[NodeId, LayerRange]] = set()  # what spares could not load
        self.http_up = False
        self.at_once: int | None = None  # requests that the engine computes at once
        self.serving = False
        self.has_served = False  # it, or an engine before it
        self.steps_in_flight = 0
        self.pace: PaceDecision | None = None

    @property
    def nodes(self) -> tuple[NodeId, ...]:
        """Nodes of the pipeline that the engine was told of."""
        return self.pipeline.nodes if self.pipeline else ()

    def take_down(self, reason: str) -> None:
        """Tell the engine, once, that its pipeline has lost a stage."""
        if self.pipeline is not None and not self.is_down:
            self.is_down, self.was_lost, self.serving = True, True, False
            self._trouble = reason  # the engine will say it too
            self._voice.tell_engine(PipelineDown(reason))
            self._voice.tell_gateway(to_gateway.PipelineDown(reason))

    def take_half_loaded(self) -> frozenset[NodeId]:
        """Nodes whose stage was being loaded when the pipeline was lost again; told once."""
        half_loaded, self.loading = self.loading, frozenset()
        warming, self.warming = self.warming, {}
        return half_loaded | warming.keys()

    def forget(self, reason: str) -> None:
        """The engine that was told is gone; the next one starts from nothing."""
        self._voice.tell_gateway(to_gateway.EngineGone(reason))
        self.pipeline = self.assigned = None
        self.is_down = self.was_lost = self.http_up = self.serving = False
        self.loading = frozenset()
        self.warming = {}

    @property
    def news(self) -> PipelineAssigned | PipelineDown | None:
        """What an engine that has just attached must know; None while nothing is planned."""
        return PipelineDown(self._trouble) if self.is_down else self.assigned

    async def assign(self, pipeline: Pipeline) -> None:
        """Link the stages, then tell the engine; nothing if it is forgotten meanwhile."""
        before, self.pipeline = self.pipeline, pipeline
        await self.paths.link(pipeline.nodes)
        if self.pipeline is not pipeline:
            return
        places = [self._place(stage) for stage in pipeline.stages]
        for index, place in enumerate(places):
            text = f"{place.name}: layers {place.start}:{place.end}"
            self._voice.say(f"stage {index + 1} of {len(places)} is {text}")
            if place.node != HEAD:
                self._voice.tell(
                    NodeId(place.node),
                    StageAssigned(place.start, place.end, index, len(places)),
                )
        self.assigned = PipelineAssigned(pipeline.epoch, places)
        replaced = [i for i, node in enumerate(pipeline.nodes) if node in self.unloaded]
        self.unloaded.difference_update(pipeline.nodes)
        self.is_down = False
        if before is None:
            self._voice.tell_engine(self.assigned)
        else:
            self.loading |= {pipeline.nodes[index] for index in replaced}
            self._voice.tell_engine(PipelineRepaired(self.assigned, replaced))

    async def warm_up(self, node: NodeId, stage: Stage) -> None:
        """Link a spare to where a stage is, then have the engine load its layers there too.

        `warming` says so already; nothing if it does not any more.
        """
        assert self.pipeline is not None
        pipeline, index = self.pipeline, self.pipeline.stages.index(stage)
        await self.paths.link((*pipeline.nodes[:index], node, *pipeline.nodes[index + 1 :]))
        if self.warming.get(node) == stage.layers and self.pipeline is pipeline:
            place = self._place(replace(stage, node=node))
            self._voice.tell_engine(StandbyChosen(place, index, pipeline.epoch))

    def arrived(self, node: NodeId) -> None:
        """A node has joined, perhaps anew: its stage's process holds nothing."""
        self.stage_gone(node)
        self.unable = {(other, layers) for other, layers in self.unable if other != node}
        self.paths.forget(node)

    def stage_gone(self, node: NodeId) -> None:
        """A node's stage is gone; if it was loading layers ahead, nobody waits for it any more."""
        self.unloaded.discard(node)
        if self.warming.pop(node, None) is not None:
            self._voice.tell_engine(StandbyDropped(node))

    def _place(self, stage: Stage) -> StagePlace:
        node, layers = self._coordinator.state.node(stage.node), stage.layers
        dtypes = list(node.resources.dtypes) if node.resources else []
        return StagePlace(
            node.id, node.name, layers.start, layers.end, stage.tensor_parallel_size, dtypes
        )

    # The engine

    def engine_state(self, port: Port, state: EngineState) -> NodeId | None:
        """The HTTP server says once that it answers; the engine says every second how it is.

        Returns the node whose stage could not be loaded into the present pipeline.
        """
        if port == Port.SERVER:
            self.http_up, self.at_once = True, state.at_once
            return None
        self.steps_in_flight, self.pace = state.steps_in_flight, state.pace
        if self.pipeline is None or state.epoch != self.pipeline.epoch or self.is_down:
            return None
        if state.error is not None and state.error != self._trouble:
            self._voice.say(f"the engine cannot use its pipeline: {state.error}")
        self._trouble = state.error or ""
        if state.error is None:
            self.loading = frozenset()
        had_served, self.serving = self.serving, self.http_up and state.error is None
        self.has_served |= self.serving
        if self.serving and not had_served:
            self._voice.publish_view()  # the gateway refuses requests until it knows
            self._voice.say(f"serving at {self._http}")
        failed = NodeId(state.failed) if state.failed is not None else None
        return failed if failed in self.nodes else None
