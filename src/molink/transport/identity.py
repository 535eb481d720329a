"""Who is who: a cluster's own certificate authority and the certificates of its nodes.

The authority is an ECDSA P-256 key that never leaves the head. A certificate names a node, not a
machine: hosts behind home routers change their address, so its only DNS name is the constant
`node-<ordinal>.molink`, and a client expects the name of the node it means to dial
(`grpc.ssl_target_name_override`). A node can therefore not pose as the head or as another node.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Self

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from molink.core.errors import IdentityError
from molink.core.ids import MAX_NODE_ID, NodeId

CLOCK_SKEW = timedelta(hours=1)  # how far a node's clock may be behind the head's
AUTHORITY_LIFETIME = timedelta(days=3650)
NODE_LIFETIME = timedelta(days=30)
MAX_NAME_LENGTH = 64  # characters; X.509's own bound for a common name and an organization
MAX_REQUEST_SIZE = 4096  # bytes of a PEM certificate request; ours have about 400

_MALFORMED = (
    ValueError,
    TypeError,
    InvalidSignature,
    UnsupportedAlgorithm,
    x509.DuplicateExtension,
    x509.ExtensionNotFound,
    x509.InvalidVersion,
)


def server_name(node: NodeId) -> str:
    """The DNS name in the certificate of `node`, the same wherever the node runs."""
    return f"node-{node}.molink"


@dataclass(frozen=True, slots=True)
class PeerIdentity:
    """What a node's certificate says, once it is verified."""

    node: NodeId
    name: str
    cluster_id: str


@dataclass(frozen=True, slots=True)
class NodeIdentity:
    """A node's private key, its certificate, and the authority that issued it; all PEM."""

    key_pem: bytes = field(repr=False)
    certificate_pem: bytes
    authority_pem: bytes

    @property
    def valid_until(self) -> datetime:
        """When the certificate expires."""
        return read_certificate(self.certificate_pem).not_valid_after_utc

    def verify(self, now: datetime | None = None) -> PeerIdentity:
        """Who this is.

        Raises:
            IdentityError: the three parts do not belong together, or the certificate has expired.
        """
        peer = peer_identity(self.certificate_pem, self.authority_pem, now)
        certificate = read_certificate(self.certificate_pem)
        if _read_key(self.key_pem).public_key() != certificate.public_key():
            raise IdentityError("the node's certificate is for another private key")
        return peer

    def check_authority(self, authority_key: bytes) -> None:
        """Raises IdentityError if the authority is not the one that a token pins."""
        pinned = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), authority_key)
        if read_certificate(self.authority_pem).public_key() != pinned:
            raise IdentityError("the head's authority is not the one that the token names")

    def save(self, path: Path) -> None:
        """Write one PEM file that only the user can read, whole or not at all."""
        _write_private(path, self.key_pem + self.certificate_pem + self.authority_pem)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote; an expired certificate loads too, `verify` tells.

        Raises:
            IdentityError: the file is missing or damaged.
        """
        key, (certificate, authority) = _read_private(path, num_certificates=2)
        return cls(key_to_pem(key), to_pem(certificate), to_pem(authority))


class NodeKey:
    """The private key of a node that has no certificate for it yet."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())

    def request_pem(self) -> bytes:
        """A certificate request: the public key, and proof that this node holds the private one."""
        builder = x509.CertificateSigningRequestBuilder(x509.Name([]))
        return builder.sign(self._key, SHA256()).public_bytes(Encoding.PEM)

    def accept(
        self, certificate_pem: bytes, authority_pem: bytes, *, authority_key: bytes
    ) -> NodeIdentity:
        """The identity made of the head's answer; `authority_key` is what the join token pins.

        Raises:
            IdentityError: another authority signed, or it signed another key.
        """
        identity = NodeIdentity(key_to_pem(self._key), certificate_pem, authority_pem)
        identity.check_authority(authority_key)
        identity.verify()
        return identity

    def renew(self, certificate_pem: bytes, old: NodeIdentity) -> NodeIdentity:
        """The next identity of a node that has one.

        Raises:
            IdentityError: another authority signed, it signed another key, or for another node.
        """
        identity = NodeIdentity(key_to_pem(self._key), certificate_pem, old.authority_pem)
        if identity.verify().node != old.verify().node:
            raise IdentityError("the certificate is for another node")
        return identity


class ClusterAuthority:
    """Signs the certificates of one cluster's nodes. Lives on the head only."""

    def __init__(self, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> None:
        self._key = key
        self._certificate = certificate
        self.cluster_id = _attribute(certificate.subject, NameOID.ORGANIZATION_NAME)
        self.certificate_pem = to_pem(certificate)
        # The compressed point, 33 bytes: what a join token pins.
        self.public_key_bytes = key.public_key().public_bytes(
            Encoding.X962, PublicFormat.CompressedPoint
        )

    @classmethod
    def create(cls, cluster_id: str, now: datetime | None = None) -> Self:
        """A new authority with a new key.

        Raises:
            IdentityError: `cluster_id` is empty, unprintable or longer than 64 characters.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        now = now or datetime.now(UTC)
        certificate = build_certificate(
            authority_name(cluster_id),
            key.public_key(),
            issuer=authority_name(cluster_id),
            issuer_key=key,
            valid=(now - CLOCK_SKEW, now + AUTHORITY_LIFETIME),
        )
        return cls(key, certificate)

    def sign_node(
        self,
        request_pem: bytes,
        *,
        node: NodeId,
        name: str,
        valid_for: timedelta = NODE_LIFETIME,
        now: datetime | None = None,
    ) -> bytes:
        """A PEM certificate for `node`; of the request, only the public key is taken.

        Raises:
            IdentityError: the request is not a signed one for a P-256 key, or the name is refused.
        """
        if not 0 <= node <= MAX_NODE_ID:
            raise IdentityError(f"node ordinal {node} is out of range")
        now = now or datetime.now(UTC)
        certificate = build_certificate(
            distinguished_name(self.cluster_id, name, node),
            _requested_key(request_pem),
            issuer=self._certificate.subject,
            issuer_key=self._key,
            valid=(now - CLOCK_SKEW, now + valid_for),
            usages=[ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH],
            dns_name=server_name(node),
        )
        return to_pem(certificate)

    def save(self, path: Path) -> None:
        """Write one PEM file that only the user can read, whole or not at all."""
        _write_private(path, key_to_pem(self._key) + self.certificate_pem)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote.

        Raises:
            IdentityError: the file is missing or damaged.
        """
        key, (certificate,) = _read_private(path, num_certificates=1)
        if certificate.public_key() != key.public_key():
            raise IdentityError(f"{path}: the certificate is for another private key")
        return cls(key, certificate)


def peer_identity(
    leaf_pem: bytes, authority_pem: bytes, now: datetime | None = None
) -> PeerIdentity:
    """Who the owner of `leaf_pem` is, if the authority itself made it a node, and still.

    TLS has checked the chain when the connection began. This tells a node from a machine that is
    enrolling, whose certificate passes TLS too, and ends a long connection's rights in time.

    Raises:
        IdentityError: another key signed, the certificate is not a node's, or it is out of date.
    """
    leaf, authority = read_certificate(leaf_pem), read_certificate(authority_pem)
    verify_issued(leaf, authority, now)
    with _refusing("the certificate is not that of a node"):
        usages = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        if ExtendedKeyUsageOID.CLIENT_AUTH not in usages:
            raise ValueError("not for clients")
        return PeerIdentity(
            node=NodeId(int(_attribute(leaf.subject, NameOID.SERIAL_NUMBER))),
            name=_attribute(leaf.subject, NameOID.COMMON_NAME),
            cluster_id=_attribute(leaf.subject, NameOID.ORGANIZATION_NAME),
        )


def verify_issued(
    leaf: x509.Certificate, issuer: x509.Certificate, now: datetime | None = None
) -> None:
    """Check that `issuer`'s key signed `leaf` and that the time is within both their dates.

    Raises:
        IdentityError: it did not, or it is not.
    """
    with _refusing("the certificate was not issued by this cluster's authority"):
        leaf.verify_directly_issued_by(issuer)
    now = now or datetime.now(UTC)
    for certificate in (leaf, issuer):
        first, last = certificate.not_valid_before_utc, certificate.not_valid_after_utc
        if not first <= now <= last:
            raise IdentityError(f"a certificate valid from {first} to {last} is used on {now}")


def authority_name(cluster_id: str) -> x509.Name:
    """The subject of a cluster's authority; whoever knows the cluster's id can build it."""
    return distinguished_name(cluster_id, "MoLink cluster authority")


def distinguished_name(cluster_id: str, name: str, node: NodeId | None = None) -> x509.Name:
    """An X.509 subject.

    Raises:
        IdentityError: a part is empty, unprintable or longer than 64 characters.
    """
    for text in (cluster_id, name):
        if not (text.isprintable() and 0 < len(text) <= MAX_NAME_LENGTH):
            raise IdentityError(
                f"{text[:MAX_NAME_LENGTH]!r}: a name has 1 to {MAX_NAME_LENGTH} printable letters"
            )
    attributes = [(NameOID.ORGANIZATION_NAME, cluster_id), (NameOID.COMMON_NAME, name)]
    if node is not None:
        attributes.append((NameOID.SERIAL_NUMBER, str(node)))
    return x509.Name([x509.NameAttribute(oid, value) for oid, value in attributes])


def build_certificate(
    subject: x509.Name,
    key: ec.EllipticCurvePublicKey,
    *,
    issuer: x509.Name,
    issuer_key: ec.EllipticCurvePrivateKey,
    valid: tuple[datetime, datetime],
    usages: list[x509.ObjectIdentifier] | None = None,
    dns_name: str | None = None,
) -> x509.Certificate:
    """A certificate for `key`: an authority if it has no `usages`, else a leaf (RFC 5280, 4.2)."""
    is_authority = not usages
    extensions: list[x509.ExtensionType] = [x509.SubjectKeyIdentifier.from_public_key(key)]
    if usages:
        issuer_public_key = issuer_key.public_key()
        extensions.append(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_public_key))
        extensions.append(x509.ExtendedKeyUsage(usages))
    if dns_name:
        extensions.append(x509.SubjectAlternativeName([x509.DNSName(dns_name)]))
    builder = (
        x509.CertificateBuilder(issuer, subject, key, x509.random_serial_number(), *valid)
        .add_extension(x509.BasicConstraints(is_authority, 0 if is_authority else None), True)
        .add_extension(_key_usage(is_authority), critical=True)
    )
    for extension in extensions:
        builder = builder.add_extension(extension, critical=False)
    return builder.sign(issuer_key, SHA256())


def _key_usage(is_authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not is_authority,
        key_cert_sign=is_authority,
        crl_sign=is_authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def read_certificate(pem: bytes) -> x509.Certificate:
    """Parse one PEM certificate.

    Raises:
        IdentityError: it is not one.
    """
    with _refusing("not a certificate"):
        return x509.load_pem_x509_certificate(pem)


def to_pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.PEM)


def key_to_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _requested_key(request_pem: bytes) -> ec.EllipticCurvePublicKey:
    if len(request_pem) > MAX_REQUEST_SIZE:
        raise IdentityError(f"a certificate request of {len(request_pem)} bytes is too long")
    with _refusing("not a certificate request"):
        request = x509.load_pem_x509_csr(request_pem)
        key = request.public_key()
        if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != "secp256r1":
            raise ValueError("only P-256 keys are accepted")
        if not request.is_signature_valid:
            raise ValueError("its signature is wrong")
    return key


def _attribute(name: x509.Name, oid: x509.ObjectIdentifier) -> str:
    values = name.get_attributes_for_oid(oid)
    if len(values) != 1:
        raise IdentityError("the certificate's subject is not one of MoLink's")
    return str(values[0].value)


@contextmanager
def _refusing(problem: str) -> Iterator[None]:
    try:
        yield
    except _MALFORMED as error:
        raise IdentityError(f"{problem}: {str(error) or type(error).__name__}") from error


def _read_key(pem: bytes) -> ec.EllipticCurvePrivateKey:
    with _refusing("not a private key"):
        key = load_pem_private_key(pem, password=None)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise ValueError("it is not for an elliptic curve")
    return key


def _read_private(
    path: Path, num_certificates: int
) -> tuple[ec.EllipticCurvePrivateKey, list[x509.Certificate]]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise IdentityError(f"cannot read {path}: {error.strerror}") from error
    with _refusing(f"{path} is damaged"):
        certificates = x509.load_pem_x509_certificates(data)
        if len(certificates) != num_certificates:
            raise ValueError(f"{len(certificates)} certificates instead of {num_certificates}")
    return _read_key(data), certificates


def _write_private(path: Path, data: bytes) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)  # mode 0600
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
