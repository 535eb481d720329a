"""The command as a whole: help, version, and what the terminal says at the end."""

from importlib.metadata import PackageNotFoundError

import pytest
import typer

from molink import __version__
from molink.cli import console
from molink.core import errors

from .conftest import Run

OPTIONS = {
    "serve": """--host --port --listen --advertise --nodes --layers --token-file --device --cluster
                --name""",
    "join": """HEAD:PORT --token --token-file --model --layers --listen --advertise --port --host
               --device --name""",
    "status": "HEAD:PORT --json",
}


@pytest.mark.parametrize("command", OPTIONS)
def test_help_of_a_command_names_all_it_takes(run: Run, command: str) -> None:
    help_text = run(command, "--help")
    assert help_text.status == 0
    assert [name for name in OPTIONS[command].split() if name not in help_text.said] == []


@pytest.mark.parametrize("command", ["serve", "join"])
def test_help_says_where_vllms_flags_go(run: Run, command: str) -> None:
    assert "vLLM" in run(command, "--help").said


def test_help_and_version(run: Run) -> None:
    listed = run("--help").said
    assert all(command in listed for command in OPTIONS)
    assert run("--version").said == f"molink {__version__}\n"


def test_no_command_shows_the_help(run: Run) -> None:
    outcome = run()
    assert "Usage: " in outcome.said + outcome.error
    assert outcome.status == 2


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (errors.UsageError("x"), 2),
        (errors.TokenError("x"), 2),
        (errors.PlanError("x"), 2),
        (errors.AdmissionError("x"), 1),
        (errors.IdentityError("x"), 1),
        (errors.LinkError("x"), 1),
    ],
)
def test_the_exit_status_says_who_can_mend_it(error: errors.MolinkError, status: int) -> None:
    with pytest.raises(typer.Exit) as ending:
        console.fail(error)
    assert ending.value.exit_code == status


def test_words_in_brackets_are_not_markup(capsys: pytest.CaptureFixture[str]) -> None:
    console.say("listens on [::1]:7171 [bold]")
    assert capsys.readouterr().out == "molink  listens on [::1]:7171 [bold]\n"


def test_without_vllm_the_way_to_install_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(console, "version", version)
    with pytest.raises(errors.UsageError, match="scripts/install"):
        console.own_versions()
