"""A stage's files from an imitation of the hub: what is asked for, and what goes wrong."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from time import time
from types import SimpleNamespace
from typing import Any

import pytest
from tests.e2e.hub import COMMIT, Hub

from molink.checkpoint.weights import INDEX, read_header, read_index
from molink.core.errors import HubError, UsageError
from molink.core.plan import LayerRange
from molink.node.download import StageFiles
from molink.wire.to_agent import Downloading, Notice

SHARDS = {
    "embed.safetensors": "model.embed_tokens.weight",
    "zero.safetensors": "model.layers.0.mlp.weight",
    "one.safetensors": "model.layers.1.mlp.weight",
    "two.safetensors": "model.layers.2.mlp.weight",
    "head.safetensors": "lm_head.weight",
}
TENSOR_BYTES = 3 << 20
SMALL = ["config.json", "tokenizer.json", "chat_template.jinja", INDEX]


def safetensors(*tensors: str) -> bytes:
    header: dict[str, Any] = {}
    for number, name in enumerate(tensors):
        start = number * TENSOR_BYTES
        offsets = [start, start + TENSOR_BYTES]
        header[name] = {"dtype": "U8", "shape": [TENSOR_BYTES], "data_offsets": offsets}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + tensors[0].encode()[:1] * (offsets[1])


def a_model(folder: Path) -> Path:
    """Three layers, and what a model's folder on the hub holds besides."""
    folder.mkdir()
    config = {"num_hidden_layers": 3, "hidden_size": 8, "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "chat_template.jinja", "README.md", "modeling.py"):
        (folder / name).write_text(f"of {folder.name}: {name}")
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    sharded = a_model(root / "sharded")
    for file, tensor in SHARDS.items():
        (sharded / file).write_bytes(safetensors(tensor))
    weight_map = {tensor: file for file, tensor in SHARDS.items()}
    (sharded / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    whole = a_model(root / "whole")
    (whole / "model.safetensors").write_bytes(safetensors(*SHARDS.values()))
    pickled = a_model(root / "pickled")
    for name in ("pytorch_model-1.bin", "pytorch_model-2.bin", "training_args.bin"):
        (pickled / name).write_bytes(name.encode() * 100)
    return {f"maker/{folder.name}": folder for folder in (sharded, whole, pickled)}


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def hub(models: dict[str, Path], cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The imitation, as this process's hub."""
    with Hub(models) as hub:
        hub.replace_real(monkeypatch, cache)
        for part in ("file_download", "utils._http"):  # tries again without the pauses between
            monkeypatch.setattr(
                f"huggingface_hub.{part}.time", SimpleNamespace(time=time, sleep=lambda _: None)
            )
        yield hub


class Stage:
    """What a stage asks for, and what it says meanwhile."""

    def __init__(self, tmp_path: Path, model: str, layers: str = "0:1", **changes: Any) -> None:
        self.said: list[Downloading | Notice] = []
        run_folder = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        run_folder.mkdir()
        values: dict[str, Any] = {
            "model": model,
            "revision": None,
            "layers": LayerRange.parse(layers, 3),
            "num_layers": 3,
            "load_format": "auto",
            "with_code": False,
            "cache": None,
            "run_folder": run_folder,
        }
        self.files = StageFiles(**(values | changes))

    def bring(self) -> Path:
        return Path(self.files.bring(self.said.append))

    @property
    def progress(self) -> list[Downloading]:
        return [message for message in self.said if isinstance(message, Downloading)]


def weights(hub: Hub) -> list[str]:
    """Weight files that were asked for, in order; the log is emptied."""
    names = [request.file for request in hub.downloads("test")]
    hub.requests.clear()
    return names


@pytest.mark.parametrize(
    ("layers", "shards"),
    [
        ("0:1", ["embed.safetensors", "zero.safetensors"]),
        ("1:2", ["one.safetensors"]),
        ("2:3", ["head.safetensors", "two.safetensors"]),
    ],
)
def test_a_stage_asks_for_the_shards_of_its_layers(
    tmp_path: Path, hub: Hub, models: dict[str, Path], layers: str, shards: list[str]
) -> None:
    folder = Stage(tmp_path, "maker/sharded", layers).bring()
    assert weights(hub) == shards
    assert sorted(path.name for path in folder.iterdir()) == sorted([*shards, *SMALL])
    for name in shards:
        assert (folder / name).read_bytes() == (models["maker/sharded"] / name).read_bytes()
    assert set(read_index(folder / INDEX).values()) == set(shards)


def test_another_range_fetches_only_what_is_missing(tmp_path: Path, hub: Hub) -> None:
    Stage(tmp_path, "maker/sharded", "0:1").bring()
    weights(hub)
    Stage(tmp_path, "maker/sharded", "0:2").bring()
    assert weights(hub) == ["one.safetensors"]
    Stage(tmp_path, "maker/sharded", "1:2").bring()
    assert weights(hub) == []


def test_a_checkpoint_in_one_file_is_fetched_once(tmp_path: Path, hub: Hub) -> None:
    for layers in ("0:1", "1:3"):
        folder = Stage(tmp_path, "maker/whole", layers).bring()
        assert len(read_header(folder / "model.safetensors")) == 5
    assert weights(hub) == ["model.safetensors"]


def test_another_rank_of_the_stage_finds_what_the_first_has_brought(
    tmp_path: Path, hub: Hub
) -> None:
    stage = Stage(tmp_path, "maker/sharded", "1:2")
    folder = stage.bring()
    weights(hub)
    said = list(stage.said)
    assert (stage.bring(), stage.said, weights(hub)) == (folder, said, [])


def test_without_safetensors_a_stage_says_that_it_fetches_all(tmp_path: Path, hub: Hub) -> None:
    stage = Stage(tmp_path, "maker/pickled")
    folder = stage.bring()
    assert weights(hub) == ["pytorch_model-1.bin", "pytorch_model-2.bin"]
    assert (folder / "pytorch_model-1.bin").is_file()
    (notice,) = (message for message in stage.said if isinstance(message, Notice))
    assert notice.text == "maker/pickled has no index of its weights: every stage downloads all"


def test_code_comes_only_if_it_is_trusted(tmp_path: Path, hub: Hub) -> None:
    assert not (Stage(tmp_path, "maker/sharded").bring() / "modeling.py").exists()
    assert (Stage(tmp_path, "maker/sharded", with_code=True).bring() / "modeling.py").exists()


def test_dummy_weights_are_not_fetched(tmp_path: Path, hub: Hub) -> None:
    Stage(tmp_path, "maker/sharded", load_format="dummy").bring()
    assert weights(hub) == []


def test_other_formats_are_left_to_vllm(tmp_path: Path, hub: Hub) -> None:
    assert Stage(tmp_path, "maker/sharded", load_format="tensorizer").bring() == Path(
        "maker/sharded"
    )
    assert hub.requests == []


def test_progress_grows_to_its_end(tmp_path: Path, hub: Hub) -> None:
    stage = Stage(tmp_path, "maker/sharded", "0:2")
    stage.bring()
    done = [message.bytes_done for message in stage.progress]
    assert done == sorted(done)
    assert [message.is_done for message in stage.progress][-1]
    assert {message.bytes_total for message in stage.progress} == {done[-1]}
    assert 3 * TENSOR_BYTES < done[-1] < 3 * TENSOR_BYTES + 1000


def test_a_connection_that_breaks_is_gone_on_with(tmp_path: Path, hub: Hub) -> None:
    with hub.misbehaving(cuts_after={"zero.safetensors": 2 << 20}):
        folder = Stage(tmp_path, "maker/sharded").bring()
    parts = [r for r in hub.downloads("test") if r.file == "zero.safetensors"]
    assert [part.start for part in parts] == [0, 2 << 20]
    assert read_header(folder / "zero.safetensors")


def test_a_hub_that_hangs_is_named_with_its_file_and_a_new_start_goes_on(
    tmp_path: Path, hub: Hub
) -> None:
    with (
        hub.misbehaving(hangs_after={"zero.safetensors": 2 << 20}),
        pytest.raises(
            HubError,
            match=r"cannot download zero\.safetensors of maker/sharded: the hub does not "
            r"answer \(ReadTimeout\); a new start goes on where this ended",
        ),
    ):
        Stage(tmp_path, "maker/sharded").bring()
    hub.requests.clear()
    Stage(tmp_path, "maker/sharded").bring()
    assert [(r.file, r.start) for r in hub.downloads("test")] == [("zero.safetensors", 2 << 20)]


@pytest.mark.parametrize("name", ["zero.safetensors", "tokenizer.json"])
def test_other_bytes_than_the_hub_said_are_not_kept(tmp_path: Path, hub: Hub, name: str) -> None:
    with (
        hub.misbehaving(corrupts={name}),
        pytest.raises(HubError, match=rf"{name} of maker/sharded arrived damaged: its hash"),
    ):
        Stage(tmp_path, "maker/sharded").bring()
    folder = Stage(tmp_path, "maker/sharded").bring()
    assert read_header(folder / "zero.safetensors")


def test_a_file_that_is_cut_short_on_its_way_may_be_whole_next_time(
    tmp_path: Path, hub: Hub
) -> None:
    with (
        hub.misbehaving(shortens={"zero.safetensors"}),
        pytest.raises(HubError, match=r"Consistency check failed"),
    ):
        Stage(tmp_path, "maker/sharded").bring()
    assert read_header(Stage(tmp_path, "maker/sharded").bring() / "zero.safetensors")


@pytest.mark.parametrize(
    ("refusal", "words"),
    [
        ((401, "RepoNotFound"), "there is none, or it is private: .* set HF_TOKEN"),
        ((404, "RepoNotFound"), "there is none, or it is private: .* set HF_TOKEN"),
        ((403, "GatedRepo"), "it is gated: accept its terms on the hub, then set HF_TOKEN"),
        ((403, "Forbidden"), "the hub does not allow it: set HF_TOKEN"),
        ((404, "RevisionNotFound"), "it has no such revision"),
    ],
)
def test_a_hub_that_refuses_says_why(
    tmp_path: Path, hub: Hub, refusal: tuple[int, str], words: str
) -> None:
    with hub.misbehaving(refuses=refusal), pytest.raises(UsageError, match=words) as raised:
        Stage(tmp_path, "maker/sharded").bring()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_what_may_pass_is_told_apart(tmp_path: Path, hub: Hub, status: int) -> None:
    with hub.misbehaving(refuses=(status, "")), pytest.raises(HubError, match=str(status)):
        Stage(tmp_path, "maker/sharded").bring()


def test_a_hub_that_is_away_does_not_matter_if_all_is_there(tmp_path: Path, hub: Hub) -> None:
    Stage(tmp_path, "maker/sharded", "0:2", revision=COMMIT).bring()
    with hub.misbehaving(refuses=(404, "RepoNotFound")):
        Stage(tmp_path, "maker/sharded", "1:2", revision=COMMIT).bring()
        with pytest.raises(UsageError, match="cannot ask the hub for the files of maker/sharded"):
            Stage(tmp_path, "maker/sharded", "2:3", revision=COMMIT).bring()


def test_a_disk_that_is_too_small_is_named_before_the_download(
    tmp_path: Path, hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=5_000_000))
    with pytest.raises(
        UsageError, match=rf"the disk of {cache} has 0\.01 GB free, .* need 0\.01 GB: make room"
    ):
        Stage(tmp_path, "maker/sharded").bring()
    assert weights(hub) == []


def test_a_damaged_file_of_a_folder_is_named_to_the_stage_that_needs_it(
    tmp_path: Path, models: dict[str, Path]
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(models["maker/sharded"], folder)
    shard = folder / "one.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    Stage(tmp_path, str(folder), "0:1").bring()
    with pytest.raises(UsageError, match=rf"{shard} is damaged or incomplete"):
        Stage(tmp_path, str(folder), "1:2").bring()
    shard.unlink()
    Stage(tmp_path, str(folder), "0:1").bring()
    with pytest.raises(UsageError, match=rf"{folder} lacks one\.safetensors"):
        Stage(tmp_path, str(folder), "1:2").bring()
