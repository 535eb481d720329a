"""Which layers go where: coverage, memory, speed, pins."""

from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from molink.core.errors import PlanError
from molink.core.ids import NodeId
from molink.core.model import ModelFacts
from molink.core.plan import LayerRange
from molink.planning.split import (
    KV_CACHE_SHARE,
    SPEED_NOISE,
    Candidate,
    find_gaps,
    fits,
    needed_bytes,
    plan_stages,
    split_layers,
    steady_speeds,
)

MIB, GIB = 1 << 20, 1 << 30
NAMES = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta")


def a_model(
    num_layers: int = 32, layer_bytes: int = 400 * MIB, edge_bytes: int = GIB
) -> ModelFacts:
    return ModelFacts("m", num_layers, 4096, "hash", None, layer_bytes, edge_bytes)


def a_node(
    i: int, free_gib: float = 24, bytes_per_s: float = 1e12, layers: LayerRange | None = None
) -> Candidate:
    return Candidate(NodeId(i), NAMES[i], int(free_gib * GIB), bytes_per_s, layers)


models = st.builds(
    a_model,
    num_layers=st.integers(1, 64),
    layer_bytes=st.integers(1, GIB),
    edge_bytes=st.integers(0, 2 * GIB),
)
node_lists = st.lists(
    st.tuples(st.floats(0.1, 80), st.floats(1e9, 4e12)), min_size=1, max_size=6
).map(lambda pairs: [a_node(i, *pair) for i, pair in enumerate(pairs)])


def slowest(counts: list[int], speeds: list[float]) -> float:
    return max(count / speed for count, speed in zip(counts, speeds, strict=True))


def split_or_skip(model: ModelFacts, nodes: list[Candidate]) -> list[LayerRange]:
    try:
        return split_layers(model, nodes)
    except PlanError:
        assume(False)
        raise AssertionError from None


def even_counts(total: int, parts: int) -> list[int]:
    return [total // parts + (i < total % parts) for i in range(parts)]


@given(models, node_lists)
def test_every_layer_lies_on_one_node_and_fits(model: ModelFacts, nodes: list[Candidate]) -> None:
    ranges = split_or_skip(model, nodes)
    assert len(ranges) == len(nodes)
    assert [i for r in ranges for i in range(r.start, r.end)] == list(range(model.num_layers))
    for node, layers in zip(nodes, ranges, strict=True):
        assert fits(model, layers, node.free_bytes)
        assert needed_bytes(model, layers) <= node.free_bytes + 2


@given(models, node_lists)
def test_the_slowest_stage_is_no_slower_than_in_an_even_split(
    model: ModelFacts, nodes: list[Candidate]
) -> None:
    roomy = [replace(node, free_bytes=1 << 50) for node in nodes]
    counts = [len(layers) for layers in split_or_skip(model, roomy)]
    even = even_counts(model.num_layers, len(nodes))
    measured = [node.bytes_per_s for node in nodes]
    assert slowest(counts, measured) <= slowest(even, measured) * (1 + SPEED_NOISE) * (1 + 1e-9)
    taken = steady_speeds(measured)
    assert slowest(counts, taken) <= slowest(even, taken)


@given(models, node_lists)
def test_no_other_split_that_fits_is_faster(model: ModelFacts, nodes: list[Candidate]) -> None:
    model, nodes = replace(model, num_layers=min(model.num_layers, 16)), nodes[:3]
    counts = [len(layers) for layers in split_or_skip(model, nodes)]
    speeds = steady_speeds([node.bytes_per_s for node in nodes])
    best = slowest(counts, speeds)
    for other in compositions(model.num_layers, len(nodes)):
        starts = [sum(other[:i]) for i in range(len(other))]
        ranges = [LayerRange(s, s + k) for s, k in zip(starts, other, strict=True)]
        if all(fits(model, r, n.free_bytes) for r, n in zip(ranges, nodes, strict=True)):
            assert slowest(other, speeds) >= best


def compositions(total: int, parts: int) -> list[list[int]]:
    if parts == 1:
        return [[total]]
    return [
        [first, *rest]
        for first in range(1, total - parts + 2)
        for rest in compositions(total - first, parts - 1)
    ]


@pytest.mark.parametrize("speed", [1e12, 0.93e12, 1.08e12])
def test_machines_that_measure_nearly_alike_get_equal_halves(speed: float) -> None:
    nodes = [a_node(0), a_node(1, bytes_per_s=speed)]
    assert split_layers(a_model(), nodes) == [LayerRange(0, 16), LayerRange(16, 32)]


def test_a_machine_twice_as_fast_gets_twice_the_layers() -> None:
    nodes = [a_node(0), a_node(1, bytes_per_s=2e12)]
    assert [len(r) for r in split_layers(a_model(12), nodes)] == [4, 8]


def test_memory_limits_a_fast_machine() -> None:
    nodes = [a_node(0), a_node(1, free_gib=4, bytes_per_s=4e12)]
    ranges = split_layers(a_model(), nodes)
    assert len(ranges[1]) == int((4 * (1 - KV_CACHE_SHARE) - 1) * GIB / (400 * MIB))


def test_an_odd_layer_goes_where_most_cache_remains() -> None:
    nodes = [a_node(0, free_gib=16), a_node(1, free_gib=24), a_node(2, free_gib=16)]
    assert [len(r) for r in split_layers(a_model(10), nodes)] == [3, 4, 3]


def test_one_node_takes_the_whole_model_and_pays_for_both_ends_once() -> None:
    model = a_model(4, layer_bytes=GIB, edge_bytes=4 * GIB)
    assert split_layers(model, [a_node(0, free_gib=10.01)]) == [LayerRange(0, 4)]


def test_too_little_memory_names_what_is_missing_for_each_node() -> None:
    model = a_model(10, layer_bytes=GIB, edge_bytes=0)
    with pytest.raises(PlanError) as caught:
        split_layers(model, [a_node(0, free_gib=5), a_node(1, free_gib=0.25)])
    text = str(caught.value)
    assert "7.25 GiB are missing" in text  # 5 layers for others, 0.8 for beta's first, over 0.8
    assert "alpha has 5.00 GiB free, enough for 4 of 10 layers" in text
    assert "beta has 0.25 GiB free, enough for 0 of 10 layers (1.00 GiB too little)" in text


def test_more_nodes_than_layers_are_refused() -> None:
    with pytest.raises(PlanError, match="3 nodes cannot share 2 layers"):
        split_layers(a_model(2), [a_node(i) for i in range(3)])


def test_gaps_are_what_no_claim_covers() -> None:
    claims = [("beta", LayerRange(6, 8)), ("alpha", LayerRange(2, 4))]
    assert find_gaps(claims, 10) == [LayerRange(0, 2), LayerRange(4, 6), LayerRange(8, 10)]
    assert find_gaps([("alpha", LayerRange(0, 10))], 10) == []
    assert find_gaps([], 10) == [LayerRange(0, 10)]


@given(st.lists(st.integers(1, 6), min_size=1, max_size=8), st.data())
def test_gaps_and_claims_together_cover_every_layer_once(
    sizes: list[int], data: st.DataObject
) -> None:
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    ranges = [LayerRange(s, s + k) for s, k in zip(starts, sizes, strict=True)]
    claims = data.draw(st.lists(st.sampled_from(ranges), unique=True))
    gaps = find_gaps([("n", layers) for layers in claims], sum(sizes))
    covered = [i for r in sorted([*gaps, *claims]) for i in range(r.start, r.end)]
    assert covered == list(range(sum(sizes)))


@pytest.mark.parametrize(
    ("beta", "text"),
    [
        ("4:8", r"layers 4:6 are claimed by both alpha \(0:6\) and beta \(4:8\)"),
        ("0:6", r"layers 0:6 are claimed by both alpha \(0:6\) and beta \(0:6\)"),
        ("1:2", r"layers 1:2 are claimed by both alpha \(0:6\) and beta \(1:2\)"),
        ("6:9", r"beta: layers 6:9 lie outside the model, which has 8 layers"),
    ],
)
def test_claims_that_cannot_stand_name_nodes_and_layers(beta: str, text: str) -> None:
    with pytest.raises(PlanError, match=text):
        find_gaps([("alpha", LayerRange(0, 6)), ("beta", LayerRange.parse(beta))], 8)


def test_unpinned_nodes_share_what_pins_leave() -> None:
    nodes = [a_node(0), a_node(1, layers=LayerRange(10, 20)), a_node(2), a_node(3)]
    stages = plan_stages(a_model(), nodes)
    assert [(s.node, str(s.layers)) for s in stages] == [
        (0, "0:10"),
        (1, "10:20"),
        (2, "20:26"),
        (3, "26:32"),
    ]


def test_pinned_nodes_alone_make_the_pipeline_in_order_of_layers() -> None:
    nodes = [
        a_node(0, layers=LayerRange(4, 8)),
        replace(a_node(1, layers=LayerRange(0, 4)), tensor_parallel_size=2),
    ]
    stages = plan_stages(a_model(8), nodes)
    assert [(s.node, s.tensor_parallel_size) for s in stages] == [(1, 2), (0, 1)]


def test_a_gap_without_a_node_is_refused() -> None:
    nodes = [a_node(0, layers=LayerRange(0, 4)), a_node(1, layers=LayerRange(6, 8))]
    text = r"no node is left for layers 4:6 \(alpha has 0:4, beta has 6:8\)"
    with pytest.raises(PlanError, match=text):
        plan_stages(a_model(8), nodes)


def test_a_node_without_a_layer_is_refused() -> None:
    nodes = [a_node(0, layers=LayerRange(0, 8)), a_node(1)]
    with pytest.raises(PlanError, match=r"1 nodes \(beta\) cannot share 0 layers"):
        plan_stages(a_model(8), nodes)


@given(models, node_lists, st.data())
def test_any_plan_covers_the_model_once_with_every_node_in_it(
    model: ModelFacts, nodes: list[Candidate], data: st.DataObject
) -> None:
    cuts = data.draw(st.lists(st.integers(0, model.num_layers), max_size=4).map(sorted))
    for i, (start, end) in enumerate(zip(cuts[::2], cuts[1::2], strict=False)):
        if start < end and i < len(nodes):
            nodes[i] = replace(nodes[i], layers=LayerRange(start, end))
    try:
        stages = plan_stages(model, nodes)
    except PlanError:
        return
    covered = [i for s in stages for i in range(s.layers.start, s.layers.end)]
    assert covered == list(range(model.num_layers))
    assert sorted(s.node for s in stages) == [node.node for node in nodes]
    for node in nodes:
        assert node.layers is None or node.layers == next(
            s.layers for s in stages if s.node == node.node
        )
