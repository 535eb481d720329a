"""`molink status` where there is nothing to show."""

from pathlib import Path
from typing import NoReturn

import pytest

from molink.cli import status as command
from molink.core.errors import LinkError
from molink.transport.identity import ClusterAuthority, NodeIdentity, NodeKey

from .conftest import Run


def put_identity(folder: Path, cluster_id: str) -> None:
    """Make `folder` that of a node which has been in a cluster."""
    folder.mkdir(parents=True)
    authority, key = ClusterAuthority.create(cluster_id), NodeKey()
    certificate = authority.sign_node(key.request_pem(), node=1, name="beta")
    key.accept(
        certificate, authority.certificate_pem, authority_key=authority.public_key_bytes
    ).save(folder / "identity.pem")


def test_this_machine_is_in_no_cluster(run: Run) -> None:
    outcome = run("status")
    assert outcome.status == 2
    assert "this machine belongs to no cluster: start one with molink serve" in outcome.error


def test_a_head_is_named_to_a_machine_without_identity(run: Run) -> None:
    outcome = run("status", "127.0.0.1:1")
    assert outcome.status == 2
    assert "this machine has no identity in any cluster" in outcome.error


def test_what_is_no_address(run: Run) -> None:
    outcome = run("status", "nonsense")
    assert outcome.status == 2
    assert "HEAD:PORT «nonsense»: expected HOST:PORT" in outcome.error


@pytest.fixture
def nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fetch_status(address: str, identity: NodeIdentity, timeout_s: float) -> NoReturn:
        raise LinkError(f"nothing listens at {address}")

    monkeypatch.setattr(command, "fetch_status", fetch_status)


@pytest.mark.usefixtures("nobody_answers")
def test_the_head_has_ended(run: Run, home: Path) -> None:
    put_identity(home / "joined-mini-1", "mini-1")
    (home / "joined-mini-1" / "head").write_text("127.0.0.1:1")
    ended = run("status")
    assert ended.status == 1
    assert "no cluster answers: nothing listens at 127.0.0.1:1" in ended.error
    outcome = run("status", "127.0.0.1:1", "--json")
    assert outcome.status == 1
    assert "nothing listens at 127.0.0.1:1" in outcome.error
    assert outcome.said == ""


def test_folders_without_or_with_damaged_identity_do_not_matter(run: Run, home: Path) -> None:
    for name, text in (("one", None), ("two", "damaged")):
        (home / name).mkdir(parents=True)
        (home / name / "head").write_text("127.0.0.1:1")
        if text:
            (home / name / "identity.pem").write_text(text)
    assert "belongs to no cluster" in run("status").error
