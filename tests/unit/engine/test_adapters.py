"""A stage's copy of an adapter must be the head's, file by file."""

import shutil
from pathlib import Path

import pytest
from vllm.lora.request import LoRARequest

from molink.core.errors import UsageError
from molink.engine.adapters import adapter_digest, check_adapter


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    return folder


def request_of(folder: Path) -> LoRARequest:
    return LoRARequest("own", 1, str(folder))


def test_a_copy_is_the_same(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "README.md").write_text("not read by vLLM")
    check_adapter(request_of(copy), adapter_digest(request_of(folder)))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("adapter_config.json", b"{ }"),
        ("adapter_model.safetensors", b"weightz"),
        ("adapter_model.bin", b""),
    ],
)
def test_another_file_is_another_adapter(folder: Path, name: str, content: bytes) -> None:
    digest = adapter_digest(request_of(folder))
    (folder / name).write_bytes(content)
    with pytest.raises(UsageError, match=f"differs from the head's.*{digest} on the head"):
        check_adapter(request_of(folder), digest)


def test_bytes_do_not_move_between_files(folder: Path) -> None:
    before = adapter_digest(request_of(folder))
    (folder / "adapter_config.json").write_text("{}w")
    (folder / "adapter_model.safetensors").write_bytes(b"eights")
    assert adapter_digest(request_of(folder)) != before


@pytest.mark.parametrize("name", ["adapter_config.json", ""])
def test_no_adapter(folder: Path, name: str) -> None:
    shutil.rmtree(folder / name) if not name else (folder / name).unlink()
    with pytest.raises(UsageError, match=r"no LoRA adapter .* on this machine: copy its folder"):
        adapter_digest(request_of(folder))


def test_a_name_that_the_hub_does_not_give(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str) -> str:
        raise FileNotFoundError(name)

    monkeypatch.setattr("molink.engine.adapters.get_adapter_absolute_path", download)
    with pytest.raises(UsageError, match="no LoRA adapter somebody/adapter on this machine"):
        adapter_digest(request_of(Path("somebody/adapter")))
