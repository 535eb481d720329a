"""Commands of the terminal, run in this process."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from molink.cli.main import app

Run = Callable[..., "Outcome"]


class Outcome:
    """How a command ended. Everything but its own words and an exit status is a failure here."""

    def __init__(self, arguments: list[str]) -> None:
        result = CliRunner(env={"NO_COLOR": "1", "COLUMNS": "200"}).invoke(app, arguments)
        if not isinstance(result.exception, SystemExit | None):
            raise AssertionError("a traceback would be shown") from result.exception
        self.status = result.exit_code
        self.said = result.stdout
        self.error = result.stderr


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "home"
    monkeypatch.setenv("MOLINK_HOME", str(folder))
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    return folder


@pytest.fixture
def run(home: Path) -> Run:
    return lambda *arguments: Outcome([str(argument) for argument in arguments])


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model of eight layers, as far as its configuration tells."""
    folder = tmp_path / "model"
    folder.mkdir()
    numbers = {
        "num_hidden_layers": 8,
        "hidden_size": 64,
        "vocab_size": 100,
        "intermediate_size": 128,
        "num_attention_heads": 4,
    }
    (folder / "config.json").write_text(json.dumps(numbers))
    return folder
