"""Facts of hand-made models, and of models that lie."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.e2e.hub import COMMIT, Hub

from molink.checkpoint.model import config_hash, read_model
from molink.checkpoint.weights import MAX_HEADER_BYTES
from molink.core.errors import HubError, UsageError

CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "torch_dtype": "float32",
}
TENSORS = {
    "model.embed_tokens.weight": 1000,
    "model.layers.0.mlp.weight": 300,
    "model.layers.1.mlp.weight": 300,
    "model.layers.1.norm.weight": 40,
    "model.layers.2.mtp.weight": 7,  # a draft layer, past the last
    "model.visual.blocks.0.weight": 11,
    "lm_head.weight": 500,
}


def safetensors(sizes: dict[str, int]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, size in sizes.items():
        header[name] = {"dtype": "U8", "shape": [size], "data_offsets": [start, start + size]}
        start += size
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(start)


def a_folder(path: Path, config: object = CONFIG, **files: bytes) -> str:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    for name, content in files.items():
        (path / f"{name}.safetensors").write_bytes(content)
    return str(path)


def test_sizes_come_from_the_headers(tmp_path: Path) -> None:
    facts = read_model(a_folder(tmp_path, model=safetensors(TENSORS)))
    assert (facts.num_layers, facts.hidden_size) == (2, 64)
    assert facts.layer_bytes == 320
    assert facts.edge_bytes == 1000 + 500 + 7 + 11
    assert facts.name == str(tmp_path)
    assert facts.revision is None


def test_a_sharded_model_counts_the_files_of_its_index_only(tmp_path: Path) -> None:
    names = list(TENSORS)
    first, second = ({n: TENSORS[n] for n in part} for part in (names[:3], names[3:]))
    folder = a_folder(
        tmp_path,
        part1=safetensors(first),
        part2=safetensors(second),
        consolidated=safetensors(TENSORS),
    )
    weight_map = dict.fromkeys(first, "part1.safetensors")
    weight_map |= dict.fromkeys(second, "part2.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    facts = read_model(folder)
    assert (facts.layer_bytes, facts.edge_bytes) == (320, 1518)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "..", "", 7])
def test_an_index_that_points_elsewhere_is_refused(tmp_path: Path, name: object) -> None:
    folder = a_folder(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(UsageError, match="does not name files of this folder"):
        read_model(folder)


def test_without_weights_sizes_are_estimated_from_the_configuration(tmp_path: Path) -> None:
    facts = read_model(a_folder(tmp_path))
    weights = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128
    assert facts.layer_bytes == 4 * weights
    assert facts.edge_bytes == 4 * 2 * 100 * 64
    quantized = {**CONFIG, "quantization_config": {"bits": 4}, "tie_word_embeddings": True}
    facts = read_model(a_folder(tmp_path, quantized))
    assert facts.layer_bytes == weights // 2
    assert facts.edge_bytes == 4 * 100 * 64


def test_experts_are_counted(tmp_path: Path) -> None:
    experts = {"num_experts": 8, "moe_intermediate_size": 32}
    dense = read_model(a_folder(tmp_path)).layer_bytes
    moe = read_model(a_folder(tmp_path, {**CONFIG, **experts})).layer_bytes
    assert moe - dense == 4 * 3 * 64 * (8 * 32 - 128)


@pytest.mark.parametrize(
    "config",
    [
        {"n_layer": 3, "n_embd": 32},
        {"num_layers": 3, "d_model": 32},
        {"text_config": {"num_hidden_layers": 3, "hidden_size": 32}, "hidden_size": 999},
    ],
)
def test_other_spellings_of_size(tmp_path: Path, config: dict[str, Any]) -> None:
    facts = read_model(a_folder(tmp_path, config))
    assert (facts.num_layers, facts.hidden_size) == (3, 32)


@pytest.mark.parametrize(
    "config", [{}, {"num_hidden_layers": True}, {"num_hidden_layers": -1}, {"n_layer": "12"}]
)
def test_a_configuration_without_layers_is_refused(tmp_path: Path, config: object) -> None:
    with pytest.raises(UsageError, match=r"config\.json has none of num_hidden_layers"):
        read_model(a_folder(tmp_path, config))


def test_the_hash_ignores_order_and_writers_but_not_values() -> None:
    base = config_hash(CONFIG)
    assert config_hash(dict(reversed(CONFIG.items()))) == base
    written = {**CONFIG, "_name_or_path": "/home/me/x", "transformers_version": "5.0"}
    assert config_hash(written) == base
    assert config_hash({**CONFIG, "torch_dtype": "bfloat16"}) != base
    nested = {"text_config": CONFIG}
    assert config_hash({"text_config": written}) == config_hash(nested) != base


def test_a_missing_folder_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"there is no model folder .*--model PATH"):
        read_model(str(tmp_path / "missing"))
    with pytest.raises(UsageError, match=r"has no config\.json.*--model PATH"):
        read_model(str(tmp_path))


@pytest.mark.parametrize("text", ["{", "[]", "\udcff", "[" * 100_000])
def test_a_broken_configuration_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UsageError, match=r"config\.json"):
        read_model(str(tmp_path))


def damaged(length: int, text: bytes = b"", data: bytes = b"") -> bytes:
    return length.to_bytes(8, "little") + text + data


def header(tensor: object) -> bytes:
    text = json.dumps({"a": tensor}).encode()
    return damaged(len(text), text, bytes(8))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x01\x02",
        damaged(0),
        damaged(2**64 - 1, b"{}"),
        damaged(MAX_HEADER_BYTES + 1, b"{}"),
        damaged(3, b"{}"),
        damaged(2, b"[]"),
        damaged(2, b"{]"),
        damaged(2, b"\xff\xff"),
        header(7),
        header({"dtype": "U8"}),
        header({"data_offsets": [0, 9]}),
        header({"data_offsets": [-1, 4]}),
        header({"data_offsets": [4, 2]}),
        header({"data_offsets": [0, 4, 8]}),
        header({"data_offsets": ["0", "4"]}),
        header({"data_offsets": [0, float("nan")]}),
    ],
)
def test_a_damaged_header_is_named(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(UsageError, match=r"model\.safetensors"):
        read_model(a_folder(tmp_path, model=content))


def test_a_header_beyond_the_bound_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    folder = a_folder(tmp_path, model=damaged(MAX_HEADER_BYTES + 1))
    with path.open("r+b") as file:
        file.truncate(MAX_HEADER_BYTES + 100)  # a hole: the file is long enough, but only sparse
    with pytest.raises(UsageError, match=f"its header says {MAX_HEADER_BYTES + 1} bytes"):
        read_model(folder)


@settings(deadline=None)
@given(st.binary(max_size=200), st.integers(0, 300))
def test_random_and_cut_files_give_facts_or_a_clean_error(
    tmp_path_factory: pytest.TempPathFactory, noise: bytes, cut: int
) -> None:
    folder = tmp_path_factory.getbasetemp() / "fuzzed"
    for content in (noise, safetensors(TENSORS)[:cut], damaged(len(noise), noise)):
        with suppress(UsageError):
            assert read_model(a_folder(folder, model=content)).layer_bytes > 0


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An offline hub whose cache holds the configuration of `maker/tiny`."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    model = tmp_path / "models--maker--tiny"
    snapshot = model / "snapshots" / ("c" * 40)
    snapshot.mkdir(parents=True)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("c" * 40)
    a_folder(snapshot)
    return snapshot


def test_a_hub_model_is_known_by_its_commit(hub: Path) -> None:
    facts = read_model("maker/tiny")
    assert (facts.name, facts.revision) == ("maker/tiny", "c" * 40)
    estimated = facts.layer_bytes
    (hub / "model.safetensors").write_bytes(safetensors(TENSORS))
    assert read_model("maker/tiny").layer_bytes == 320 != estimated


def test_a_cache_with_some_of_the_files_counts_as_none(hub: Path) -> None:
    weight_map = dict.fromkeys(TENSORS, "model-00002.safetensors")
    (hub / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert read_model("maker/tiny").layer_bytes > 320


def test_a_configuration_that_arrives_damaged_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "tiny"
    a_folder(folder, model=safetensors(TENSORS))
    with Hub({"maker/tiny": folder}) as hub:
        hub.replace_real(monkeypatch, tmp_path / "cache")
        with (
            hub.misbehaving(corrupts={"config.json"}),
            pytest.raises(HubError, match="arrived damaged"),
        ):
            read_model("maker/tiny")
        assert read_model("maker/tiny").num_layers == 2


def test_sizes_of_a_model_on_the_hub_come_from_its_headers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "tiny"
    a_folder(folder, model=safetensors(TENSORS))
    cache = tmp_path / "cache"
    with Hub({"maker/tiny": folder}) as hub:
        hub.replace_real(monkeypatch, cache)
        facts = read_model("maker/tiny")
    assert (facts.layer_bytes, facts.edge_bytes, facts.revision) == (320, 1518, COMMIT)
    assert list(cache.rglob("*.safetensors")) == []


def test_a_model_the_hub_does_not_give_is_named(hub: Path) -> None:
    with pytest.raises(UsageError, match=r"maker/other is neither a folder .*--model PATH"):
        read_model("maker/other")
