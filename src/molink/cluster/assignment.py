"""Who computes what, decided from the cluster's state alone."""

from dataclasses import dataclass

from molink.cluster.state import ClusterState, NodeRecord, NodeStatus
from molink.core.errors import PlanError
from molink.core.model import ModelFacts
from molink.core.plan import Stage
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
    what they leave; of those no more than needed.

    Raises:
        PlanError: the nodes wanted are there, but cannot make a pipeline.
    """
    if nodes_wanted is None:
        return _around_pinned(state, model)
    if len(state.ready) < nodes_wanted:
        here = f"{len(state.ready)} of {nodes_wanted} nodes are ready"
        return Waiting(f"{here}; {_presence(state)}")
    nodes = list(state.ready)
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


def _around_pinned(state: ClusterState, model: ModelFacts) -> tuple[Stage, ...] | Waiting:
    """All pinned nodes, and as few others as can hold what they leave."""
    pinned = [node for node in state.ready if node.layers]
    others = [node for node in state.ready if node.computes and not node.layers]
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

    A lost stage goes to the same node once it is back, otherwise to a spare that is pinned to
    exactly these layers, or unpinned and large enough. The ranges stay as they are.
    """
    assert state.pipeline is not None
    spares = [node for node in state.ready if node.id not in state.pipeline.nodes]
    stages = []
    for stage in state.pipeline.stages:
        owner = state.node(stage.node)
        if owner.status is not NodeStatus.READY or not _may_take(owner, stage):
            heirs = (spare for spare in spares if _can_take(spare, stage, model))
            heir = next(heirs, None)
            if heir is None:
                return Waiting(_lost_text(owner, stage, model))
            spares.remove(heir)
            owner = heir
        stages.append(Stage(owner.id, stage.layers, owner.tensor_parallel_size))
    return tuple(stages)


def _may_take(node: NodeRecord, stage: Stage) -> bool:
    """Not with other ranks: the other stages know how many there are."""
    is_same = node.tensor_parallel_size == stage.tensor_parallel_size
    return node.computes and is_same and node.layers in (None, stage.layers)


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
    return ", ".join(f"{n.name} {n.status}{_pin(n)}" for n in state.connected) or "nobody is here"


def _size(num_bytes: int) -> str:
    gib = num_bytes / (1 << 30)
    return f"{gib:.1f} GiB" if gib >= 0.1 else f"{gib * 1024:.0f} MiB"


def _pin(node: NodeRecord) -> str:
    if not node.computes:
        return " (computes nothing)"
    return f" ({node.layers})" if node.layers else ""
