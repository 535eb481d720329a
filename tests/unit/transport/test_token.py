"""Join tokens: what a person may do to one, and what is derived from it."""

import time
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.pretty import pretty_repr

from molink.core.errors import IdentityError, TokenError
from molink.core.ids import HEAD
from molink.transport.identity import ClusterAuthority, NodeKey, read_certificate
from molink.transport.token import MAX_TOKEN_LENGTH, JoinToken, enrolled_under, new_secret

AUTHORITY = ClusterAuthority.create("home")
TOKEN = JoinToken(
    addresses=("192.0.2.7:8470", "[2001:db8::7]:8470", "head.example.org:8470"),
    authority_key=AUTHORITY.public_key_bytes,
    secret=new_secret(),
    cluster_id="home",
    expires_at=int(time.time()) + 3600,
)
TEXT = TOKEN.encode()


def changed(**changes: Any) -> JoinToken:
    return msgspec.structs.replace(TOKEN, **changes)


def test_a_token_round_trips_as_one_short_word() -> None:
    assert JoinToken.decode(TEXT) == TOKEN
    assert TEXT.startswith("molink1-")
    assert TEXT.replace("-", "").replace("_", "").isalnum()
    assert len(TEXT) < 256


def test_blanks_and_line_breaks_from_a_terminal_do_not_matter() -> None:
    assert JoinToken.decode(f"  {TEXT[:40]}\n{TEXT[40:]}\r\n") == TOKEN


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a join token"),
        ("hello", "not a join token"),
        ("molink-abc", "not a join token"),
        ("192.0.2.7:8470", "not a join token"),
        ("molink2-AAAA", "format 2.*reads format 1"),
        ("molink1-", "damaged or incomplete"),
        (TEXT[:-1], "damaged"),
        (TEXT[:-9], "damaged"),
        (TEXT + "AAAA", "damaged"),
        (TEXT.replace(TEXT[30:32], TEXT[31] + "!"), "foreign characters"),
        (TEXT + "é", "foreign characters"),
        ("molink1-" + "A" * MAX_TOKEN_LENGTH, "too many"),
    ],
)
def test_what_is_wrong_with_a_token_is_said(text: str, message: str) -> None:
    with pytest.raises(TokenError, match=message):
        JoinToken.decode(text)


@pytest.mark.parametrize(
    "changes",
    [
        {"addresses": ()},
        {"addresses": ("no-port",)},
        {"addresses": ("two words:80",)},
        {"authority_key": b"\x02" + b"\xff" * 32},  # not a point of the curve
        {"authority_key": b"short"},
        {"secret": b"short"},
        {"cluster_id": ""},
        {"cluster_id": "line\nbreak"},
        {"expires_at": 1 << 60},
        {"expires_at": "never"},
    ],
)
def test_a_token_with_a_right_checksum_and_wrong_contents_is_refused(
    changes: dict[str, Any],
) -> None:
    with pytest.raises(TokenError, match="makes no sense"):
        JoinToken.decode(changed(**changes).encode())


@given(st.text(max_size=200) | st.text(max_size=200).map("molink1-{}".format))
def test_random_text_is_refused_cleanly(text: str) -> None:
    with pytest.raises(TokenError):
        JoinToken.decode(text)


@given(st.integers(0, len(TEXT) - 1), st.characters())
def test_a_mistyped_token_is_refused_or_the_same(position: int, letter: str) -> None:
    try:
        token = JoinToken.decode(TEXT[:position] + letter + TEXT[position + 1 :])
    except TokenError:
        return
    assert token == TOKEN


@given(st.integers(0, len(TEXT) - 1))
def test_a_truncated_token_is_refused(length: int) -> None:
    with pytest.raises(TokenError):
        JoinToken.decode(TEXT[:length])


def test_an_expired_token_names_both_times() -> None:
    token = changed(expires_at=1_790_000_000)
    token.check_not_expired(now=1_789_999_999)
    with pytest.raises(TokenError, match=r"2026-09-21 14:13 UTC.*2026-09-21 15:13 UTC"):
        token.check_not_expired(now=1_790_003_600)


def test_the_secret_is_never_shown() -> None:
    for shown in (repr(TOKEN), str(TOKEN), pretty_repr(TOKEN)):
        assert "192.0.2.7:8470" in shown
        assert repr(TOKEN.secret) not in shown
        assert "secret" not in shown


def test_secrets_differ() -> None:
    assert len({new_secret() for _ in range(100)}) == 100


# --- what is derived


def test_head_and_joiner_derive_the_same_enrolment_root() -> None:
    here, there = read_certificate(TOKEN.enrolment_root()), JoinToken.decode(TEXT).enrolment_root()
    assert here.public_key() == read_certificate(there).public_key()
    assert here.subject == read_certificate(there).subject


@pytest.mark.parametrize(
    "changes",
    [
        {"secret": bytes(16)},
        {"authority_key": ClusterAuthority.create("home").public_key_bytes},
    ],
)
def test_secret_and_cluster_both_make_the_enrolment_key(changes: dict[str, Any]) -> None:
    mine = read_certificate(TOKEN.enrolment_root())
    other = read_certificate(changed(**changes).enrolment_root())
    assert mine.public_key() != other.public_key()
    assert mine.subject != other.subject


def test_the_derivation_does_not_change_between_versions() -> None:
    generator = "036b17d1f2e12c4247f8bce6e563a440f277037d812deb33a0f4a13945d898c296"
    token = changed(authority_key=bytes.fromhex(generator), secret=bytes(range(16)))
    subject = read_certificate(token.enrolment_root()).subject.rfc4514_string()
    assert subject == "CN=enrolment 2a93905e2b5628275502a8a3658490379f3d7c4f,O=home"


def test_an_enrolment_root_holds_no_secret_and_ends_with_the_token() -> None:
    root = TOKEN.enrolment_root()
    assert b"PRIVATE" not in root
    assert TOKEN.secret not in root
    assert read_certificate(root).not_valid_after_utc.timestamp() == TOKEN.expires_at


def test_the_anchor_has_the_name_and_key_of_the_authority() -> None:
    anchor = read_certificate(TOKEN.authority_anchor())
    authority = read_certificate(AUTHORITY.certificate_pem)
    assert anchor.subject == authority.subject
    assert anchor.public_key() == authority.public_key()
    leaf = AUTHORITY.sign_node(NodeKey().request_pem(), node=HEAD, name="head")
    read_certificate(leaf).verify_directly_issued_by(anchor)


def test_a_joiner_is_matched_to_its_token() -> None:
    other = changed(secret=new_secret())
    roots = [other.enrolment_root(), TOKEN.enrolment_root()]
    _, leaf = TOKEN.enrolment_leaf()
    assert enrolled_under(leaf, roots) == roots[1]
    with pytest.raises(IdentityError, match="revoked or has expired"):
        enrolled_under(leaf, roots[:1])
    with pytest.raises(IdentityError, match="revoked or has expired"):
        enrolled_under(leaf, roots, datetime.fromtimestamp(TOKEN.expires_at + 1, UTC))
