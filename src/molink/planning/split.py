"""Which node computes which layers.

Decode reads every weight of a stage once a step, so a stage's time is taken as its number of
layers over the node's memory bandwidth, and the slowest stage is the pipeline's throughput. The
time of the output head is left out: a checkpoint's sizes do not tell it from the embedding, and
equal machines are to get equal shares.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice, pairwise
from math import ceil

from molink.core.errors import PlanError
from molink.core.ids import NodeId
from molink.core.model import ModelFacts
from molink.core.plan import LayerRange, Stage

KV_CACHE_SHARE = 0.2
"""Part of a node's free memory that weights leave to the KV cache and to activations."""

SPEED_NOISE = 0.1
"""Measured speeds that differ by less than this share count as equal."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A node that can compute, as the planner sees it; `name` is for messages only."""

    node: NodeId
    name: str
    free_bytes: int
    bytes_per_s: float  # memory read bandwidth, > 0
    layers: LayerRange | None = None  # pinned by the user
    tensor_parallel_size: int = 1


def plan_stages(model: ModelFacts, nodes: Sequence[Candidate]) -> tuple[Stage, ...]:
    """Give every node a stage: pinned nodes their range, the others a share of the gaps.

    A gap that pinned ranges leave goes to consecutive unpinned nodes in the order of `nodes`,
    their number in proportion to its layers. Pinned ranges are the user's word: their memory is
    not checked.

    Raises:
        PlanError: ranges that overlap, a gap no node is left for, a node no layer is left for,
            not enough memory.
    """
    placed = {node.node: node.layers for node in nodes if node.layers}
    unpinned = [node for node in nodes if node.layers is None]
    gaps = find_gaps(((n.name, n.layers) for n in nodes if n.layers), model.num_layers)
    if len(unpinned) < len(gaps):
        raise PlanError(f"no node is left for layers {_join(gaps)} ({_claims(nodes)})")
    if len(unpinned) > sum(map(len, gaps)):
        raise PlanError(
            f"{len(unpinned)} nodes ({_join(n.name for n in unpinned)}) cannot share "
            f"{sum(map(len, gaps))} layers: each needs at least one"
        )
    group_sizes = _deal(len(unpinned), [len(gap) for gap in gaps], lambda i, k: (k / len(gaps[i]),))
    remaining = iter(unpinned)
    for gap, size in zip(gaps, group_sizes, strict=True):
        group = list(islice(remaining, size))
        ranges = _split(gap, model, group)
        placed |= {node.node: layers for node, layers in zip(group, ranges, strict=True)}
    stages = (Stage(n.node, placed[n.node], n.tensor_parallel_size) for n in nodes)
    return tuple(sorted(stages, key=lambda stage: stage.layers))


def find_gaps(claims: Iterable[tuple[str, LayerRange]], num_layers: int) -> list[LayerRange]:
    """Layers that none of the (node name, range) claims covers; empty when they make a pipeline.

    Raises:
        PlanError: two claims share a layer, or one lies outside the model.
    """
    ordered = sorted(claims, key=lambda claim: claim[1])
    for (name, layers), (other_name, other) in pairwise(ordered):
        if other.start < layers.end:
            shared = LayerRange(other.start, min(layers.end, other.end))
            raise PlanError(
                f"layers {shared} are claimed by both {name} ({layers}) and {other_name} ({other})"
            )
    if ordered and ordered[-1][1].end > num_layers:
        name, layers = ordered[-1]
        raise PlanError(
            f"{name}: layers {layers} lie outside the model, which has {num_layers} layers"
        )
    starts = [layers.start for _, layers in ordered] + [num_layers]
    ends = [0] + [layers.end for _, layers in ordered]
    return [LayerRange(end, start) for end, start in zip(ends, starts, strict=True) if end < start]


def split_layers(model: ModelFacts, nodes: Sequence[Candidate]) -> list[LayerRange]:
    """Split a whole model over `nodes`, in their order, at least one layer each; pins are ignored.

    The slowest stage is as fast as memory allows. Among splits that are equal in this, the layers
    go where most KV cache remains for each: the engine takes the smallest block count of all.

    Raises:
        PlanError: more nodes than layers, or not enough memory.
    """
    if not 0 < len(nodes) <= model.num_layers:
        raise PlanError(f"{len(nodes)} nodes cannot share {model.num_layers} layers")
    return _split(LayerRange(0, model.num_layers), model, nodes)


def fits(model: ModelFacts, layers: LayerRange, free_bytes: int) -> bool:
    """Whether a node with `free_bytes` can hold these layers and a KV cache."""
    return _weight_bytes(model, layers) <= _weight_budget(free_bytes)


def needed_bytes(model: ModelFacts, layers: LayerRange) -> int:
    """Free memory that a stage of these layers asks for, the KV cache's share counted."""
    return ceil(_weight_bytes(model, layers) / (1 - KV_CACHE_SHARE))


def steady_speeds(speeds: Sequence[float]) -> list[float]:
    """Measured speeds without their noise: near ones are all taken as the slowest of them."""
    steady: dict[float, float] = {}
    slowest = 0.0
    for speed in sorted(speeds):
        if speed > slowest * (1 + SPEED_NOISE):
            slowest = speed
        steady[speed] = slowest
    return [steady[speed] for speed in speeds]


def _split(span: LayerRange, model: ModelFacts, nodes: Sequence[Candidate]) -> list[LayerRange]:
    """Split `span` over nodes that are no more than its layers. Cost: O(layers x nodes)."""
    edges = [0] * len(nodes)
    if span.start == 0:
        edges[0] = model.edge_bytes
    if span.end == model.num_layers:
        edges[-1] = model.edge_bytes
    limits = _layer_limits(span, model, nodes, edges)
    speeds = steady_speeds([node.bytes_per_s for node in nodes])
    by_time = _deal(len(span), limits, lambda i, k: (k / speeds[i],))
    slowest = max(k / speed for k, speed in zip(by_time, speeds, strict=True))

    def cost(i: int, k: int) -> tuple[float, ...]:
        kv_bytes = nodes[i].free_bytes - edges[i] - k * model.layer_bytes
        return k / speeds[i] > slowest, -kv_bytes / k

    counts = _deal(len(span), limits, cost)
    ends = list(accumulate(counts, initial=span.start))
    return [LayerRange(start, end) for start, end in pairwise(ends)]


def _deal(
    total: int, limits: Sequence[int], cost: Callable[[int, int], tuple[float, ...]]
) -> list[int]:
    """Deal `total` items, from one to `limits[i]` of them to i, so that the largest cost is least.

    `cost(i, k)` is what i pays for k items and never falls as k grows. Then giving each next item
    to whoever pays least for it is optimal: once that exceeds the optimum's largest cost, everybody
    already holds all that an optimal deal could give them, so nothing is left to deal.
    """
    counts = [1] * len(limits)
    for _ in range(total - len(limits)):
        below_limit = (i for i, limit in enumerate(limits) if counts[i] < limit)
        counts[min(below_limit, key=lambda i: cost(i, counts[i] + 1))] += 1
    return counts


def _layer_limits(
    span: LayerRange, model: ModelFacts, nodes: Sequence[Candidate], edges: Sequence[int]
) -> list[int]:
    """How many layers fit on each node; PlanError where that is too few."""
    layer_bytes = max(1, model.layer_bytes)
    room = [_weight_budget(n.free_bytes) - edge for n, edge in zip(nodes, edges, strict=True)]
    limits = [max(0, r // layer_bytes) for r in room]
    to_first_layer = sum(max(0, layer_bytes - r) for r in room)
    layers_left_over = max(0, len(span) - sum(max(1, limit) for limit in limits))
    missing = to_first_layer + layers_left_over * layer_bytes
    if not missing:
        return limits
    each = "; ".join(
        f"{node.name} has {_gib(node.free_bytes)} free, enough for {limit} of {len(span)} layers"
        + ("" if limit else f" ({_gib((layer_bytes - r) / (1 - KV_CACHE_SHARE))} too little)")
        for node, limit, r in zip(nodes, limits, room, strict=True)
    )
    raise PlanError(
        f"not enough memory for layers {span}: {_gib(missing / (1 - KV_CACHE_SHARE))} are missing. "
        f"A layer takes {_gib(layer_bytes)}, the first and the last stage {_gib(model.edge_bytes)} "
        f"more, and {KV_CACHE_SHARE:.0%} is kept for the KV cache. {each}"
    )


def _weight_bytes(model: ModelFacts, layers: LayerRange) -> int:
    """Either end is charged with embedding and output head: they may be one (tied) matrix."""
    is_edge = layers.start == 0 or layers.end == model.num_layers
    return len(layers) * model.layer_bytes + (model.edge_bytes if is_edge else 0)


def _weight_budget(free_bytes: int) -> int:
    return int(free_bytes * (1 - KV_CACHE_SHARE))


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / (1 << 30):.2f} GiB"


def _join(items: Iterable[object]) -> str:
    return ", ".join(map(str, items))


def _claims(nodes: Sequence[Candidate]) -> str:
    return _join(f"{n.name} has {n.layers}" for n in nodes if n.layers) or "no node has any"
