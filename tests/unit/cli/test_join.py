"""`molink join` with input that cannot work."""

import socket
import time
from pathlib import Path

import pytest

from molink.node import enrolment
from molink.transport.identity import ClusterAuthority
from molink.transport.token import JoinToken, new_secret

from .conftest import Run


def make_token(*addresses: str, lifetime_s: int = 3600) -> str:
    authority = ClusterAuthority.create("mini-abc123")
    token = JoinToken(
        addresses=addresses or ("127.0.0.1:1",),
        authority_key=authority.public_key_bytes,
        secret=new_secret(),
        cluster_id=authority.cluster_id,
        expires_at=int(time.time()) + lifetime_s,
    )
    return token.encode()


TOKEN = make_token()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give the token that molink serve printed: --token T or --token-file F"),
        (["--token", TOKEN, "--token-file", "x"], "give the token that molink serve printed"),
        (["--token", ""], "not a join token"),
        (["--token", "hello"], "not a join token"),
        (["--token", TOKEN[:-6]], "damaged or incomplete"),
        (["--token", TOKEN[:30] + "!" + TOKEN[31:]], "damaged"),
        (["--token", TOKEN.replace("molink1-", "molink9-")], "format 9, this MoLink reads"),
        (["--token", make_token(lifetime_s=-60)], "expired on"),
        (["--token-file", "/no/such/file"], "cannot read the token file /no/such/file"),
        (["--token-file", "/"], "cannot read the token file"),
        (["nonsense", "--token", TOKEN], "HEAD:PORT «nonsense»: expected HOST:PORT"),
        (["--token", TOKEN, "--listen", "x"], "--listen «x»: expected HOST:PORT"),
        (["--token", TOKEN, "--advertise", "x"], "--advertise «x»: expected HOST:PORT"),
        (["--token", TOKEN, "--layers", "some"], "layers «some»: expected START:END"),
        (["--token", TOKEN, "--layers", "4:4"], "layers 4:4 are empty"),
        (["--token", TOKEN, "--device", "gpu"], "--device gpu: expected auto, cpu or cuda"),
        (["--token", TOKEN, "-pp", "2"], "-pp cannot be given"),
        (["127.0.0.1:1", "stray", "--token", TOKEN], "unexpected argument «stray»"),
    ],
)
def test_what_cannot_work(run: Run, arguments: list[str], words: str) -> None:
    outcome = run("join", *arguments)
    assert (outcome.status, words in outcome.error) == (2, True), outcome.error


def test_the_token_may_come_from_a_file_with_a_line_break(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(enrolment, "ENROLL_TIMEOUT_S", 0.2)
    (tmp_path / "token").write_text(TOKEN + "\n")
    outcome = run("join", "--token-file", tmp_path / "token")
    assert "127.0.0.1:1: nothing listens at 127.0.0.1:1" in outcome.error


def test_every_address_of_the_token_is_tried(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(enrolment, "ENROLL_TIMEOUT_S", 0.2)
    token = make_token("127.0.0.1:1", "no-such-host.invalid:2")
    outcome = run("join", "--token", token)
    assert outcome.status == 1
    assert "nothing listens at 127.0.0.1:1" in outcome.error
    assert "'no-such-host.invalid' cannot be resolved" in outcome.error


def test_an_address_by_hand_replaces_the_tokens(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(enrolment, "ENROLL_TIMEOUT_S", 0.2)
    outcome = run("join", "127.0.0.1:2", "--token", TOKEN)
    assert outcome.status == 1
    assert "cannot join: 127.0.0.1:2: nothing listens at 127.0.0.1:2" in outcome.error
    assert "127.0.0.1:1" not in outcome.error


def test_another_service_answers_there(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(enrolment, "ENROLL_TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as other:
        other.settimeout(0)
        address = f"127.0.0.1:{other.getsockname()[1]}"
        monkeypatch.setattr("molink.transport.credentials.PROBE_TIMEOUT_S", 0.2)
        outcome = run("join", address, "--token", TOKEN)
    assert outcome.status == 1
    assert f"cannot join: {address}: " in outcome.error


def test_nothing_is_left_of_a_join_that_failed(
    run: Run, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(enrolment, "ENROLL_TIMEOUT_S", 0.2)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    run("join", "--token", TOKEN)
    assert list(tmp_path.glob("molink-*")) == []
    assert list(home.rglob("*.pem")) == []
