"""Commands that end at once, run as a person would: exit status, and words on stderr alone."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from tests.e2e.cluster import COMMAND, ENVIRONMENT, free_port
from tests.e2e.conftest import BUNDLED

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return os.environ | ENVIRONMENT | {"MOLINK_HOME": str(tmp_path / "home")}


def fails(environment: dict[str, str], *arguments: object) -> tuple[int, str]:
    """Run a command that fails: its exit status, and its one line on stderr."""
    ended = subprocess.run(
        [sys.executable, "-c", COMMAND, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert "Traceback" not in ended.stdout + ended.stderr
    assert ended.stderr.count("\n") == 1, ended.stderr
    return ended.returncode, ended.stderr


def serve(*arguments: object) -> tuple[object, ...]:
    return ("serve", BUNDLED, "--port", free_port(), *arguments)


def test_the_agents_port_is_taken(environment: dict[str, str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        listen = f"127.0.0.1:{other.getsockname()[1]}"
        status, said = fails(environment, *serve("--nodes", 2, "--listen", listen))
    assert status == 2
    assert f"cannot listen on {listen}: another program uses the port" in said


def test_the_agents_address_is_another_machines(environment: dict[str, str]) -> None:
    status, said = fails(environment, *serve("--nodes", 2, "--listen", "203.0.113.1:0"))
    assert status == 2
    assert "cannot listen on 203.0.113.1:0" in said


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--frobnicate"], "error: unrecognized arguments: --frobnicate"),
        (["--max-num-seqs", "many"], "error: argument --max-num-seqs: invalid"),
    ],
)
def test_vllm_does_not_take_the_flags(
    environment: dict[str, str], flags: list[str], words: str
) -> None:
    listen = ("--nodes", 2, "--listen", "127.0.0.1:0")
    status, said = fails(environment, *serve(*listen, *flags))
    assert status == 2
    assert words in said


def test_vllm_cannot_serve_the_model_so(environment: dict[str, str]) -> None:
    listen = ("--layers", "0:-1", "--listen", "127.0.0.1:0")
    status, said = fails(environment, *serve(*listen, "--max-model-len", 100_000))
    assert status == 2
    assert "100000" in said


def test_two_heads_of_one_cluster(environment: dict[str, str], tmp_path: Path) -> None:
    arguments = serve("--nodes", 2, "--listen", "127.0.0.1:0", "--token-file", tmp_path / "token")
    with subprocess.Popen(
        [sys.executable, "-c", COMMAND, *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    ) as first:
        assert first.stdout is not None
        try:
            first.stdout.readline()
            status, said = fails(environment, *serve("--nodes", 2, "--listen", "127.0.0.1:0"))
        finally:
            first.terminate()
            first.stdout.read()
    assert first.returncode == 0
    assert status == 2
    assert "another head of this cluster runs on this machine" in said


def test_no_cluster_answers(environment: dict[str, str]) -> None:
    status, said = fails(environment, "status")
    assert status == 2
    assert "belongs to no cluster" in said
