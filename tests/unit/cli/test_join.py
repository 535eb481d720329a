"""`molink join` with input that cannot work."""

import time
from pathlib import Path
from typing import NoReturn

import pytest

from molink.cli import join as command
from molink.core.errors import LinkError
from molink.node.surroundings import Place, Surroundings
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
        (["127.0.0.1:1"], "the head keeps it in MODEL/token under its MOLINK_HOME"),
        (["--token", TOKEN, "--port", "0"], "--port"),
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


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The addresses that were asked for an identity; nobody answers."""
    addresses: list[str] = []

    async def request_identity(address: str, token: JoinToken, name: str) -> NoReturn:
        addresses.append(address)
        raise LinkError(f"nothing listens at {address}")

    monkeypatch.setattr(command, "request_identity", request_identity)
    return addresses


def test_the_token_may_come_from_a_file_with_a_line_break(
    run: Run, asked: list[str], tmp_path: Path
) -> None:
    (tmp_path / "token").write_text(TOKEN + "\n")
    outcome = run("join", "--token-file", tmp_path / "token")
    assert asked == ["127.0.0.1:1"]
    assert outcome.status == 1


def test_the_environments_token_counts_where_none_is_given(
    run: Run, asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOLINK_TOKEN", TOKEN)
    (tmp_path / "token").write_text(make_token("127.0.0.1:3"))
    run("join")
    run("join", "--token-file", tmp_path / "token")
    run("join", "--token", make_token("127.0.0.1:4"))
    assert asked == ["127.0.0.1:1", "127.0.0.1:3", "127.0.0.1:4"]


@pytest.mark.parametrize("head", ["127.0.0.1:5", "localhost:5"])
def test_the_token_of_a_head_on_this_machine_is_found(
    run: Run, asked: list[str], home: Path, head: str
) -> None:
    for name, text in [
        ("a", "damaged"),
        ("b", make_token("127.0.0.1:4")),
        ("c", make_token("192.0.2.1:5", "127.0.0.1:5")),
    ]:
        (home / name).mkdir(parents=True)
        (home / name / "token").write_text(text + "\n")
    (home / "joined-x-1").mkdir()
    run("join", head)
    assert asked == [head]
    assert "give the token" in run("join", "127.0.0.1:6").error


def test_every_address_of_the_token_is_tried(run: Run, asked: list[str]) -> None:
    outcome = run("join", "--token", make_token("127.0.0.1:1", "head.invalid:2"))
    assert asked == ["127.0.0.1:1", "head.invalid:2"]
    assert outcome.status == 1
    assert outcome.error.count("nothing listens at") == 2


@pytest.mark.parametrize(
    "flags", [["-tp", "2"], ["--gpu-memory-utilization", "0.5"], ["--tp=2"], ["--tp", "2"]]
)
def test_vllms_flags_need_no_address_before_them(
    run: Run, asked: list[str], flags: list[str]
) -> None:
    run("join", *flags, "--token", TOKEN)
    run("join", "--token", TOKEN, *flags)
    assert asked == ["127.0.0.1:1"] * 2


def test_an_address_by_hand_replaces_the_tokens(run: Run, asked: list[str]) -> None:
    outcome = run("join", "127.0.0.1:2", "--token", TOKEN)
    assert asked == ["127.0.0.1:2"]
    assert "cannot join: nothing listens at 127.0.0.1:2" in outcome.error


def test_nothing_is_left_of_a_join_that_failed(
    run: Run, asked: list[str], home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    run("join", "--token", TOKEN)
    assert list(tmp_path.glob("molink-*")) == []
    assert list(home.rglob("*.pem")) == []


@pytest.mark.parametrize(
    ("here", "arguments", "words"),
    [
        (Surroundings(Place.MACHINE, False, 64 << 20), [], []),
        (Surroundings(Place.WSL2, True, None), [], ["this is WSL 2"]),
        (Surroundings(Place.WSL2, True, None), ["--advertise", "192.168.1.5:7172"], []),
        (Surroundings(Place.DOCKER, True, 64 << 20), ["-tp", "2"], ["this is a Docker", "64 MiB"]),
    ],
)
def test_what_the_surroundings_mean_is_said(
    run: Run,
    asked: list[str],
    monkeypatch: pytest.MonkeyPatch,
    here: Surroundings,
    arguments: list[str],
    words: list[str],
) -> None:
    monkeypatch.setattr(command, "recognise", lambda: here)
    said = run("join", "--token", TOKEN, *arguments).said
    assert said.count("molink  ") == len(words)
    assert all(word in said for word in words)
