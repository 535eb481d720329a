"""Certificates: what the authority signs, and what it takes to be recognised as a node."""

import stat
from base64 import b64encode
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import given
from hypothesis import strategies as st

from molink.core.errors import IdentityError
from molink.core.ids import HEAD, MAX_NODE_ID, NodeId
from molink.transport.identity import (
    MAX_REQUEST_SIZE,
    NODE_LIFETIME,
    ClusterAuthority,
    NodeIdentity,
    NodeKey,
    PeerIdentity,
    build_certificate,
    distinguished_name,
    peer_identity,
    read_certificate,
    to_pem,
)

AUTHORITY = ClusterAuthority.create("home")
REQUEST = NodeKey().request_pem()


def enrol(
    authority: ClusterAuthority = AUTHORITY, node: int = 3, name: str = "attic"
) -> NodeIdentity:
    key = NodeKey()
    certificate = authority.sign_node(key.request_pem(), node=NodeId(node), name=name)
    return key.accept(
        certificate, authority.certificate_pem, authority_key=authority.public_key_bytes
    )


def sign_request(key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey) -> bytes:
    builder = x509.CertificateSigningRequestBuilder(x509.Name([]))
    return builder.sign(key, SHA256()).public_bytes(Encoding.PEM)


def in_days(days: float) -> datetime:
    return datetime.now(UTC) + timedelta(days=days)


# --- what the authority signs


def test_a_node_is_recognised_by_its_certificate() -> None:
    identity = enrol(node=3, name="attic, RTX 4090 «left»")
    assert identity.verify() == PeerIdentity(NodeId(3), "attic, RTX 4090 «left»", "home")


def test_a_node_certificate_is_for_both_ends_and_names_the_node_not_the_host() -> None:
    extensions = read_certificate(enrol(node=3).certificate_pem).extensions
    names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    usages = extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert names.get_values_for_type(x509.DNSName) == ["node-3.molink"]
    assert set(usages) == {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}
    assert not extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_of_a_request_only_the_public_key_is_taken() -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.SERIAL_NUMBER, "0")])
    builder = x509.CertificateSigningRequestBuilder(subject)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
    request = builder.sign(key, SHA256()).public_bytes(Encoding.PEM)
    leaf = read_certificate(AUTHORITY.sign_node(request, node=NodeId(3), name="attic"))
    assert leaf.public_key() == key.public_key()
    assert peer_identity(to_pem(leaf), AUTHORITY.certificate_pem).node == 3
    assert not leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


@pytest.mark.parametrize(
    "request_pem",
    [
        pytest.param(b"", id="empty"),
        pytest.param(REQUEST + b"\n" * MAX_REQUEST_SIZE, id="too long"),
        pytest.param(AUTHORITY.certificate_pem, id="a certificate"),
        pytest.param(sign_request(rsa.generate_private_key(65537, 2048)), id="RSA"),
        pytest.param(sign_request(ec.generate_private_key(ec.SECP384R1())), id="P-384"),
        pytest.param(
            x509.CertificateSigningRequestBuilder(x509.Name([]))
            .sign(ed25519.Ed25519PrivateKey.generate(), None)
            .public_bytes(Encoding.PEM),
            id="Ed25519",
        ),
    ],
)
def test_a_request_that_is_not_for_a_p256_key_is_refused(request_pem: bytes) -> None:
    with pytest.raises(IdentityError):
        AUTHORITY.sign_node(request_pem, node=NodeId(1), name="attic")


def test_a_request_must_prove_that_its_key_is_held() -> None:
    request = x509.load_pem_x509_csr(REQUEST).public_bytes(Encoding.DER)
    forged = b64encode(request[:-1] + bytes([request[-1] ^ 1]))
    pem = b"-----BEGIN CERTIFICATE REQUEST-----\n%b\n-----END CERTIFICATE REQUEST-----\n" % forged
    with pytest.raises(IdentityError, match="signature is wrong"):
        AUTHORITY.sign_node(pem, node=NodeId(1), name="attic")


@given(position=st.integers(0, len(REQUEST) - 1), byte=st.integers(0, 255))
def test_a_damaged_request_is_refused_cleanly(position: int, byte: int) -> None:
    damaged = REQUEST[:position] + bytes([byte]) + REQUEST[position + 1 :]
    try:
        leaf = read_certificate(AUTHORITY.sign_node(damaged, node=NodeId(1), name="attic"))
    except IdentityError:
        return
    assert leaf.public_key() == x509.load_pem_x509_csr(REQUEST).public_key()


@given(st.binary(max_size=300))
def test_random_bytes_are_no_request_and_no_certificate(data: bytes) -> None:
    with pytest.raises(IdentityError):
        AUTHORITY.sign_node(data, node=NodeId(1), name="attic")
    with pytest.raises(IdentityError):
        peer_identity(data, AUTHORITY.certificate_pem)


@pytest.mark.parametrize("name", ["", "n" * 65, "line\nbreak", "escape\x1b[2J"])
def test_names_are_short_and_printable(name: str) -> None:
    with pytest.raises(IdentityError, match="printable"):
        AUTHORITY.sign_node(REQUEST, node=NodeId(1), name=name)
    with pytest.raises(IdentityError, match="printable"):
        ClusterAuthority.create(name)


@pytest.mark.parametrize("node", [-1, MAX_NODE_ID + 1])
def test_node_ordinals_are_bounded(node: int) -> None:
    with pytest.raises(IdentityError, match="out of range"):
        AUTHORITY.sign_node(REQUEST, node=NodeId(node), name="attic")


# --- who is recognised


def test_another_authority_of_the_same_cluster_name_is_not_ours() -> None:
    stranger = enrol(ClusterAuthority.create("home"))
    with pytest.raises(IdentityError, match="not issued by"):
        peer_identity(stranger.certificate_pem, AUTHORITY.certificate_pem)


def test_a_node_cannot_issue_certificates() -> None:
    key, mallory = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    leaf = AUTHORITY.sign_node(sign_request(mallory), node=NodeId(3), name="attic")
    minted = build_certificate(
        distinguished_name("home", "head", HEAD),
        key.public_key(),
        issuer=read_certificate(leaf).subject,
        issuer_key=mallory,
        valid=(in_days(-1), in_days(1)),
        usages=[ExtendedKeyUsageOID.CLIENT_AUTH],
    )
    with pytest.raises(IdentityError, match="not issued by"):
        peer_identity(to_pem(minted), AUTHORITY.certificate_pem)


def test_the_authority_is_not_a_node() -> None:
    with pytest.raises(IdentityError, match="not that of a node"):
        peer_identity(AUTHORITY.certificate_pem, AUTHORITY.certificate_pem)


def test_a_certificate_for_servers_only_is_not_a_node() -> None:
    leaf = build_certificate(
        distinguished_name("home", "attic", NodeId(3)),
        ec.generate_private_key(ec.SECP256R1()).public_key(),
        issuer=read_certificate(AUTHORITY.certificate_pem).subject,
        issuer_key=AUTHORITY._key,
        valid=(in_days(-1), in_days(1)),
        usages=[ExtendedKeyUsageOID.SERVER_AUTH],
    )
    with pytest.raises(IdentityError, match="not for clients"):
        peer_identity(to_pem(leaf), AUTHORITY.certificate_pem)


@pytest.mark.parametrize(("days", "valid"), [(-1, False), (-0.02, True), (29, True), (31, False)])
def test_a_certificate_counts_within_its_dates_and_an_hour_before(days: float, valid: bool) -> None:
    identity = enrol()
    if valid:
        identity.verify(in_days(days))
    else:
        with pytest.raises(IdentityError, match="valid from"):
            identity.verify(in_days(days))


def test_an_identity_knows_when_to_renew() -> None:
    left = enrol().valid_until - datetime.now(UTC)
    assert NODE_LIFETIME - timedelta(minutes=1) < left <= NODE_LIFETIME


# --- what a joining node accepts


def test_a_node_refuses_an_authority_that_its_token_does_not_name() -> None:
    key, other = NodeKey(), ClusterAuthority.create("home")
    certificate = other.sign_node(key.request_pem(), node=NodeId(3), name="attic")
    with pytest.raises(IdentityError, match="not the one that the token names"):
        key.accept(certificate, other.certificate_pem, authority_key=AUTHORITY.public_key_bytes)


def test_a_node_refuses_a_certificate_for_another_key() -> None:
    certificate = AUTHORITY.sign_node(REQUEST, node=NodeId(3), name="attic")
    with pytest.raises(IdentityError, match="another private key"):
        NodeKey().accept(
            certificate,
            AUTHORITY.certificate_pem,
            authority_key=AUTHORITY.public_key_bytes,
        )


# --- files


def test_authority_and_identity_survive_a_restart(tmp_path: Path) -> None:
    AUTHORITY.save(tmp_path / "authority.pem")
    enrol(node=5).save(tmp_path / "node.pem")
    authority = ClusterAuthority.load(tmp_path / "authority.pem")
    identity = NodeIdentity.load(tmp_path / "node.pem")
    assert authority.public_key_bytes == AUTHORITY.public_key_bytes
    assert authority.cluster_id == "home"
    assert identity.verify().node == 5
    assert enrol(authority).authority_pem == identity.authority_pem


def test_secrets_are_for_their_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "cluster" / "node.pem"
    for _ in range(2):  # a renewal replaces the file
        enrol().save(path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert list(path.parent.iterdir()) == [path]
    assert "PRIVATE" not in repr(enrol())


def test_a_failed_save_leaves_the_old_file_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "node.pem"
    enrol(node=5).save(path)

    def full_disk(_: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        enrol(node=6).save(path)
    assert list(tmp_path.iterdir()) == [path]
    assert NodeIdentity.load(path).verify().node == 5


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "node.pem"
    with pytest.raises(IdentityError, match="No such file"):
        NodeIdentity.load(path)
    identity = enrol()
    for damaged in (
        b"",
        identity.certificate_pem + identity.authority_pem,  # no key
        identity.key_pem + identity.certificate_pem,  # no authority
        identity.key_pem + identity.certificate_pem + identity.authority_pem[:-100],
    ):
        path.write_bytes(damaged)
        with pytest.raises(IdentityError):
            NodeIdentity.load(path)


def test_an_authority_file_with_a_foreign_key_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "authority.pem"
    path.write_bytes(enrol().key_pem + AUTHORITY.certificate_pem)
    with pytest.raises(IdentityError, match="another private key"):
        ClusterAuthority.load(path)
