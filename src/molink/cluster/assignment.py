"""Who computes what, decided from the cluster's state alone."""

from collections.abc import Mapping, Set
from dataclasses import dataclass, replace

from molink.cluster.state import ClusterState, NodeRecord, NodeStatus
from molink.core.errors import PlanError
from molink.core.ids import HEAD, NodeId
from molink.core.model import ModelFacts
from molink.core.plan import LayerRange, Stage
from molink.planning.split import Candidate, find_gaps, fits, needed_bytes, plan_stages


@dataclass(frozen=True, slots=True)
class Waiting:
    """No pipeline can be made yet."""

    text: str  # for the user: what is missing, who is there


def first_stages(
    state: ClusterState, model: ModelFacts, nodes_wanted: int | None
) -> tuple[Stage, ...] | Waiting:
    """The stages of a new pipeline.

    With `nodes_wanted` the first so many ready nodes by id share the layers, others in the place of
    those with too little memory; every node counts, the head too, also when it computes nothing.
    Without it all pinned nodes take part, as soon as they cover the model or others are there for
    what they leave; of those no more than needed. Nodes that joined to stand by do not count.

    The stages of the last pipeline come again if their nodes are those that take part now: they may
    hold the layers still.

    Raises:
        PlanError: the nodes wanted are there, but cannot make a pipeline.
    """
    if _are_wanted(state.last_stages, state, nodes_wanted):
        return state.last_stages
    if nodes_wanted is None:
        return _around_pinned(state, model)
    ready = _for_stages(state)
    if len(ready) < nodes_wanted:
        here = f"{len(ready)} of {nodes_wanted} nodes are ready"
        return Waiting(f"{here}; {_presence(state)}")
    nodes = list(ready)
    while True:
        chosen = [node for node in nodes[:nodes_wanted] if node.computes]
        if not chosen:
            raise PlanError(f"no node is left to compute the {model.num_layers} layers")
        try:
            return plan_stages(model, [_candidate(node) for node in chosen])
        except PlanError:
            if len(nodes) == nodes_wanted or all(node.layers for node in chosen):
                raise
            nodes.remove(min((n for n in chosen if not n.layers), key=_free_bytes))


def remaining_stages(
    state: ClusterState, model: ModelFacts, nodes_wanted: int | None = None
) -> tuple[Stage, ...] | Waiting:
    """The stages that those who are here could share, if nobody takes the place of a lost one.

    All of them take part, also such as joined to stand by; fewer if some have too little memory.

    Args:
        nodes_wanted: exactly so many, if it is given.
    """
    nodes = tuple(replace(node, stands_by=False) for node in state.nodes)
    here = replace(state, nodes=nodes, last_stages=())
    trouble = Waiting(f"nobody is here: {_presence(state)}")
    for count in [nodes_wanted] if nodes_wanted else range(len(_for_stages(here)), 0, -1):
        try:
            stages = first_stages(here, model, count)
        except PlanError as error:
            trouble = Waiting(str(error))
            continue
        return stages
    return trouble


def _are_wanted(stages: tuple[Stage, ...], state: ClusterState, nodes_wanted: int | None) -> bool:
    """Whether stages of before can be those of now."""
    if not stages or not all(_has_returned(state, stage) for stage in stages):
        return False
    ready = {node.id for node in state.ready}
    if nodes_wanted is None:
        return {node.id for node in _for_stages(state) if node.layers} <= {s.node for s in stages}
    idle = {node.id for node in state.ready if not node.computes}
    return len(idle) + len(stages) == nodes_wanted <= len(ready)


def _has_returned(state: ClusterState, stage: Stage) -> bool:
    node = state.node(stage.node)
    return node.status is NodeStatus.READY and _may_take(node, stage)


def _for_stages(state: ClusterState) -> list[NodeRecord]:
    """Ready nodes that have not joined to stand by, and are not to go."""
    return [node for node in state.ready if not node.stands_by and not node.drains]


def _around_pinned(state: ClusterState, model: ModelFacts) -> tuple[Stage, ...] | Waiting:
    """All pinned nodes, and as few others as can hold what they leave."""
    ready = _for_stages(state)
    pinned = [node for node in ready if node.layers]
    others = [node for node in ready if node.computes and not node.layers]
    gaps = find_gaps([(n.name, n.layers) for n in pinned if n.layers], model.num_layers)
    if not gaps:
        return plan_stages(model, [_candidate(node) for node in pinned])
    trouble = f"waiting for layers {', '.join(map(str, gaps))}"
    for count in range(len(gaps), len(others) + 1):
        try:
            return plan_stages(model, [_candidate(node) for node in pinned + others[:count]])
        except PlanError as error:
            trouble = str(error)
    return Waiting(f"{trouble}; {_presence(state)}")


def mended_stages(state: ClusterState, model: ModelFacts) -> tuple[Stage, ...] | Waiting:
    """The stages of a pipeline that is down, each lost node replaced.

    A lost stage goes to the same node if it is back already, otherwise to a standby that has loaded
    its layers, or to a spare that is pinned to exactly these layers, or unpinned and large enough.
    The ranges stay as they are.
    """
    assert state.pipeline is not None
    spares = _spares(state)
    stages = []
    for stage in state.pipeline.stages:
        owner = state.node(stage.node)
        if owner.status is not NodeStatus.READY or not _may_take(owner, stage):
            heirs = [spare for spare in spares if _is_heir(spare, stage, model)]
            if not heirs:
                return Waiting(_lost_text(owner, stage, model))
            owner = max(heirs, key=lambda spare: spare.loaded is not None)
            spares.remove(owner)
        stages.append(Stage(owner.id, stage.layers, owner.tensor_parallel_size))
    return tuple(stages)


def heir_of(state: ClusterState, model: ModelFacts, node: NodeId) -> NodeRecord | None:
    """Who would take a node's stage now, one that has loaded it before all others; None: nobody."""
    assert state.pipeline is not None
    stage = next(stage for stage in state.pipeline.stages if stage.node == node)
    heirs = [spare for spare in _spares(state) if _is_heir(spare, stage, model)]
    return max(heirs, key=lambda spare: spare.loaded is not None, default=None)


def next_standby(
    state: ClusterState,
    model: ModelFacts,
    warming: Mapping[NodeId, LayerRange],
    unable: Set[tuple[NodeId, LayerRange]],
) -> tuple[NodeRecord, Stage] | None:
    """A spare that holds nothing, and the stage whose layers it should load ahead.

    Of the stages that it could take, one that has fewest standbys; rather another node's than the
    head's, whose loss nothing outlives. None: nothing is to be done.

    Args:
        warming: what spares are loading.
        unable: what they have tried in vain.
    """
    if state.pipeline is None or state.is_down:
        return None
    spares = [node for node in _spares(state) if node.id != HEAD]
    held = [node.loaded or warming.get(node.id) for node in spares]
    for spare in spares:
        stages = [
            stage
            for stage in state.pipeline.stages
            if _can_take(spare, stage, model) and (spare.id, stage.layers) not in unable
        ]
        if spare.loaded is None and spare.id not in warming and stages:
            return spare, min(stages, key=lambda s: (held.count(s.layers), s.node == HEAD))
    return None


def misplaced(state: ClusterState, model: ModelFacts) -> list[NodeId]:
    """Standbys that must give up what they hold, because nobody else can take a lost node's stage.

    As many as are needed beside those that are about to be ready. The stage of a node that is
    connected comes back with it.
    """
    assert state.pipeline is not None
    spares, orphans = _spares(state), []
    for stage in state.pipeline.stages:
        if not state.node(stage.node).is_connected:
            heir = next((spare for spare in spares if _is_heir(spare, stage, model)), None)
            if heir is None:
                orphans.append(stage)
            else:
                spares.remove(heir)
    able = [n.id for n in spares if n.loaded and any(_can_take(n, s, model) for s in orphans)]
    coming = [n for n in state.nodes if n.status is NodeStatus.JOINED]
    coming = [n for n in coming if n.id not in state.pipeline.nodes]
    return able[: max(0, len(orphans) - len(coming))]


def _spares(state: ClusterState) -> list[NodeRecord]:
    assert state.pipeline is not None
    return [n for n in state.ready if n.id not in state.pipeline.nodes and not n.drains]


def _is_heir(spare: NodeRecord, stage: Stage, model: ModelFacts) -> bool:
    """Whether it could take a stage without giving up what it has loaded."""
    return spare.loaded in (None, stage.layers) and _can_take(spare, stage, model)


def _may_take(node: NodeRecord, stage: Stage) -> bool:
    """Not with other ranks: the other stages know how many there are."""
    is_same = node.tensor_parallel_size == stage.tensor_parallel_size
    return node.computes and not node.drains and is_same and node.layers in (None, stage.layers)


def _can_take(spare: NodeRecord, stage: Stage, model: ModelFacts) -> bool:
    if not _may_take(spare, stage) or spare.resources is None:
        return False
    return spare.layers is not None or fits(model, stage.layers, spare.resources.free_bytes)


def _candidate(node: NodeRecord) -> Candidate:
    assert node.resources is not None  # it is ready
    return Candidate(
        node.id,
        node.name,
        node.resources.free_bytes,
        node.resources.bytes_per_s,
        node.layers,
        node.tensor_parallel_size,
    )


def _free_bytes(node: NodeRecord) -> int:
    assert node.resources is not None  # it is ready
    return node.resources.free_bytes


def _lost_text(owner: NodeRecord, stage: Stage, model: ModelFacts) -> str:
    free = _size(needed_bytes(model, stage.layers))
    size = stage.tensor_parallel_size
    ranks = "" if size == 1 else f" and --tensor-parallel-size {size}"
    if owner.status is NodeStatus.READY:
        lost = (
            f"{owner.name} came back with other layers than {stage.layers}, or another tensor "
            f"parallel size than {stage.tensor_parallel_size}"
        )
    else:
        why = f" ({owner.trouble})" if owner.trouble else ""
        lost = f"{owner.name} with layers {stage.layers} is {owner.status}{why}"
    return f"the pipeline is down: {lost}; waiting for it, or for a node with {free} free{ranks}"


def _presence(state: ClusterState) -> str:
    """Who is there, for the terminal: `alpha ready (0:4), beta joined`."""
    here = (f"{n.name} {n.status}{_pin(n)}" for n in state.connected)
    return ", ".join(here) or "nobody is here"


def _size(num_bytes: int) -> str:
    gib = num_bytes / (1 << 30)
    return f"{gib:.1f} GiB" if gib >= 0.1 else f"{gib * 1024:.0f} MiB"


def _pin(node: NodeRecord) -> str:
    if not node.computes:
        return " (computes nothing)"
    if node.stands_by:
        return " (only stands by)"
    return f" ({node.layers})" if node.layers else ""
