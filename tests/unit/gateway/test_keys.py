"""Keys, their file, and what a client without one gets."""

import os
from pathlib import Path

import pytest

from molink.core.errors import UsageError
from molink.gateway.http import Refusal, Request
from molink.gateway.keys import ANYBODY, Keys, entry, hash_of, new_key, read_keys


def request(path: str = "/v1/models", method: bytes = b"GET", **headers: str) -> Request:
    named = [(k.replace("_", "-").encode(), v.encode()) for k, v in headers.items()]
    return Request(method, path.encode(), named)


def test_without_keys_anybody_may_ask() -> None:
    assert Keys([], None).tenant_of(request()) is ANYBODY


def test_a_key_says_who_asks(tmp_path: Path) -> None:
    file, key = tmp_path / "keys.toml", new_key()
    file.write_text(entry("alice", key) + "weight = 2\nrequests-per-minute = 5\nat-once = 1\n")
    keys = Keys([hash_of("given")], file)
    alice = keys.tenant_of(request(authorization=f"Bearer {key}"))
    assert (alice.name, alice.weight, alice.requests_per_minute, alice.at_once) == (
        "alice",
        2,
        5,
        1,
    )
    assert keys.tenant_of(request(authorization="bearer given")).name == "key-1"
    assert keys.tenant_of(request(x_api_key=key)) == alice
    assert key not in file.read_text()


@pytest.mark.parametrize("said", ["", "Bearer", "Bearer wrong", "Basic given", "given"])
def test_a_key_that_is_missing_or_wrong(said: str) -> None:
    keys = Keys([hash_of("given")], None)
    with pytest.raises(Refusal, match="Bearer KEY") as caught:
        keys.tenant_of(request(authorization=said))
    assert caught.value.status == 401


@pytest.mark.parametrize("path", ["/health", "/metrics", "/cluster", "/version?x=1"])
def test_how_the_server_is_everybody_may_know(path: str) -> None:
    assert Keys([hash_of("given")], None).tenant_of(request(path)) is ANYBODY


@pytest.mark.parametrize("path", ["/invocations", "/v1/models", "/things/one", "/docs"])
def test_every_other_route_asks_for_the_key(path: str) -> None:
    keys = Keys([hash_of("key")], None)
    with pytest.raises(Refusal) as caught:
        keys.tenant_of(request(path))
    assert caught.value.status == 401
    assert keys.tenant_of(request(path, authorization="Bearer key")).name == "key-1"


def test_a_browser_may_ask_what_it_may_ask() -> None:
    assert Keys([hash_of("given")], None).tenant_of(request(method=b"OPTIONS")) is ANYBODY


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[keys.a]", "key a has no sha256"),
        ('[keys.a]\nsha256 = "short"', "keys[...].sha256"),
        (entry("a", "k") + "wieght = 2", "wieght"),
        (entry("a", "k") + "weight = 0", "weight"),
        (entry("a", "k") + "at-once = 0", "at-once"),
        ("[keys.a\nx", "line 1"),
        (entry("a", "k") + entry("a", "l"), "line 3"),
        ("nothing = 1", "nothing"),
    ],
)
def test_a_file_with_a_mistake_says_where(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(text)
    with pytest.raises(UsageError) as caught:
        read_keys(file)
    assert str(file) in str(caught.value)
    assert words in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        Keys([], tmp_path / "none.toml")


def test_a_key_is_revoked_while_the_server_runs_and_a_mistake_changes_nothing(
    tmp_path: Path,
) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(entry("a", "one") + entry("b", "two"))
    keys = Keys([], file)
    change(file, "[oops", 1)
    keys.refresh()
    assert "keys.toml: Expected ']'" in str(keys.trouble)
    assert keys.tenant_of(request(authorization="Bearer one")).name == "a"
    change(file, entry("b", "two"), 2)
    keys.refresh()
    assert keys.trouble is None
    assert keys.tenant_of(request(authorization="Bearer two")).name == "b"
    with pytest.raises(Refusal):
        keys.tenant_of(request(authorization="Bearer one"))


def change(file: Path, text: str, second: int) -> None:
    file.write_text(text)
    os.utime(file, (second, second))


@pytest.mark.parametrize("name", ["", "a b", "../x", "a" * 41, '"'])
def test_a_name_that_is_none(name: str) -> None:
    with pytest.raises(UsageError, match="up to 40 letters"):
        entry(name, "key")
