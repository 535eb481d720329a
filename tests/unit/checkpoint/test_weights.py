"""Which files of a checkpoint a stage needs, and files that are not what they should be."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from molink.checkpoint.weights import (
    INDEX,
    Share,
    check_files,
    choose_files,
    files_of,
    link_files,
    read_index,
)
from molink.core.errors import UsageError
from molink.core.plan import LayerRange

EDGES = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")


def share(start: int, end: int, num_layers: int = 4, *, is_tied: bool = False) -> Share:
    return Share(LayerRange(start, end), num_layers, is_tied)


def a_map(num_layers: int, layers_per_file: int = 1) -> dict[str, str]:
    """A file for every so many layers, and one for every tensor at the edges."""
    files = {name: f"{name}.safetensors" for name in EDGES}
    for layer in range(num_layers):
        for part in ("attn", "mlp"):
            number = layer // layers_per_file
            files[f"model.layers.{layer}.{part}.weight"] = f"{number}.safetensors"
    return files


@st.composite
def splits(draw: st.DrawFn) -> tuple[int, list[LayerRange]]:
    """Layers of a model, and the ranges of its stages."""
    num_layers = draw(st.integers(1, 12))
    cuts = sorted(draw(st.sets(st.integers(1, num_layers - 1)))) if num_layers > 1 else []
    starts = [0, *cuts]
    return num_layers, [LayerRange(*pair) for pair in zip(starts, [*cuts, num_layers], strict=True)]


@given(splits(), st.integers(1, 3), st.booleans())
def test_the_stages_together_get_every_tensor_and_the_middle_no_edge(
    split: tuple[int, list[LayerRange]], layers_per_file: int, is_tied: bool
) -> None:
    num_layers, ranges = split
    weight_map = a_map(num_layers, layers_per_file)
    of_stages = [set(files_of(weight_map, Share(r, num_layers, is_tied))) for r in ranges]
    assert set().union(*of_stages) == set(weight_map.values())
    edges = {f"{name}.safetensors" for name in EDGES}
    for files in of_stages[1:-1]:
        assert not files & edges
    for layers, files in zip(ranges, of_stages, strict=True):
        for layer in range(layers.start, layers.end):
            assert weight_map[f"model.layers.{layer}.mlp.weight"] in files


def test_an_end_gets_the_tensors_of_that_end() -> None:
    weight_map = a_map(4)
    assert files_of(weight_map, share(0, 2)) == [
        "0.safetensors",
        "1.safetensors",
        "model.embed_tokens.weight.safetensors",
    ]
    assert files_of(weight_map, share(2, 4)) == [
        "2.safetensors",
        "3.safetensors",
        "lm_head.weight.safetensors",
        "model.norm.weight.safetensors",
    ]


@pytest.mark.parametrize("has_head", [True, False])
def test_a_last_stage_whose_head_may_be_the_embedding_gets_that_too(has_head: bool) -> None:
    weight_map = a_map(4)
    if not has_head:
        del weight_map["lm_head.weight"]
    files = files_of(weight_map, share(2, 4, is_tied=has_head))
    assert "model.embed_tokens.weight.safetensors" in files


@pytest.mark.parametrize(
    ("tensor", "at_first", "at_middle", "at_last"),
    [
        ("model.layers.0.mlp.weight", True, False, False),
        ("transformer.h.3.attn.weight", False, False, True),
        ("model.layers.4.mtp.weight", True, False, True),  # a draft layer, past the last
        ("model.visual.blocks.1.attn.weight", True, False, True),
        ("model.vision_tower.norm.weight", True, False, True),
        ("multi_modal_projector.linear.weight", True, False, True),
        ("model.language_model.norm.weight", False, False, True),
        ("transformer.wte.weight", True, False, False),
        ("transformer.wpe.weight", True, False, True),
        ("gpt_neox.final_layer_norm.bias", False, False, True),
        ("embed_out.weight", False, False, True),
        ("lm_head.qweight", False, False, True),
    ],
)
def test_where_a_tensor_is_needed(
    tensor: str, at_first: bool, at_middle: bool, at_last: bool
) -> None:
    needed = [share(start, end).needs(tensor) for start, end in ((0, 1), (1, 3), (3, 4))]
    assert needed == [at_first, at_middle, at_last]


def test_layers_that_are_named_as_nobody_knows_bring_everything() -> None:
    weight_map = {f"model.tower.{layer}.weight": f"{layer}.safetensors" for layer in range(4)}
    assert len(files_of(weight_map, share(1, 2))) == 4


def an_index(folder: Path, weight_map: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize(
    ("names", "files"),
    [
        (["model.safetensors", "pytorch_model.bin"], ("model.safetensors",)),
        (["b.bin", "a.bin", "training_args.bin", "a.pt"], ("a.bin", "b.bin")),
        (["consolidated.safetensors", "model.safetensors"], ("consolidated.safetensors",)),
        (["model.bin", "onnx/model.safetensors", "onnx/a.bin"], ("model.bin",)),
    ],
)
def test_without_an_index_all_that_vllm_takes(
    tmp_path: Path, names: list[str], files: tuple[str, ...]
) -> None:
    chosen = choose_files(tmp_path, names, share(0, 2))
    assert (chosen.files, chosen.index) == (files, None)


def test_dummy_weights_are_no_files(tmp_path: Path) -> None:
    assert choose_files(tmp_path, [], share(0, 2), "dummy").files == ()


def test_a_checkpoint_without_weights_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=rf"{tmp_path} holds no weights"):
        choose_files(tmp_path, ["config.json"], share(0, 2))


def test_a_shard_that_is_missing_is_named_to_the_stage_that_needs_it(tmp_path: Path) -> None:
    folder = an_index(tmp_path, a_map(4))
    names = [INDEX, *set(a_map(4).values()) - {"3.safetensors"}]
    assert choose_files(folder, names, share(0, 2)).index == INDEX
    with pytest.raises(UsageError, match=r"lacks 3\.safetensors, .* for layers 2:4"):
        choose_files(folder, names, share(2, 4))


def test_links_lead_to_all_but_the_weights_of_other_stages(tmp_path: Path) -> None:
    source = an_index(tmp_path / "source", a_map(4))
    for name in ("config.json", *a_map(4).values()):
        (source / name).write_text(name)
    chosen = choose_files(source, [path.name for path in source.iterdir()], share(0, 2))
    target = tmp_path / "target"
    link_files(source, chosen, target)
    linked = {path.name for path in target.iterdir() if path.is_symlink()}
    assert linked == {"config.json", *chosen.files}
    assert (target / "config.json").read_text() == "config.json"
    assert set(read_index(target / INDEX).values()) == set(chosen.files)


def test_a_file_that_was_cut_short_is_named(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "U8", "shape": [9], "data_offsets": [0, 9]}}).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(9))
    check_files([file, tmp_path / "ignored.bin"])
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UsageError, match=rf"{file} is damaged or incomplete"):
        check_files([file])
