"""Join tokens: what a machine needs to join a cluster, as one line to paste.

A token pins the cluster by the public key of its authority and holds a secret, from which head and
joiner both derive the same *enrolment key* (HKDF-SHA256, RFC 5869, onto P-256 as in FIPS 186-5,
A.2.1). The head trusts a root certificate of that key for as long as the token lives; the joiner
makes itself a leaf under it, passes the mutual-TLS handshake, and may then call Enroll and nothing
else. The joiner's own trust anchor is a certificate that it builds from the authority's name and
public key: verifiers look at name and key of an anchor, not at its signature.

The head keeps the root certificate, which is public, and never the secret.
"""

import base64
import re
import secrets
import time
import zlib
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Annotated, Any, Self

import msgspec
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.x509 import Name, SubjectKeyIdentifier
from cryptography.x509.oid import ExtendedKeyUsageOID

from molink.core.errors import IdentityError, TokenError
from molink.transport.identity import (
    MAX_NAME_LENGTH,
    authority_name,
    build_certificate,
    distinguished_name,
    key_to_pem,
    read_certificate,
    to_pem,
    verify_issued,
)

VERSION = 1
MAX_TOKEN_LENGTH = 8192  # characters
SECRET_SIZE = 16  # bytes
_CHECKSUM_SIZE = 4  # bytes, CRC-32: against slips of hand, not against malice
_P256_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551

# The dates of an enrolment certificate and of the anchor come from the token and from here, so that
# the joiner's clock plays no part in them.
_LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)
_FOR_EVER = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)  # RFC 5280, 4.1.2.5

_HostPort = Annotated[
    str, msgspec.Meta(pattern=r"^(\[[0-9A-Fa-f:.%]+\]|[^\s:\[\]]+):[0-9]{1,5}$", max_length=260)
]


class JoinToken(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What `molink serve` hands out and `molink join` takes."""

    addresses: Annotated[tuple[_HostPort, ...], msgspec.Meta(min_length=1, max_length=16)]
    authority_key: Annotated[bytes, msgspec.Meta(min_length=33, max_length=33)]
    secret: Annotated[bytes, msgspec.Meta(min_length=SECRET_SIZE, max_length=SECRET_SIZE)]
    cluster_id: Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_NAME_LENGTH)]
    expires_at: Annotated[int, msgspec.Meta(ge=1_600_000_000, lt=1 << 37)]  # seconds since 1970

    def __repr__(self) -> str:
        return f"JoinToken({', '.join(self.addresses)}; cluster {self.cluster_id})"  # no secret

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return [("addresses", self.addresses), ("cluster_id", self.cluster_id)]

    def encode(self) -> str:
        """The token as one line of letters, digits, `-` and `_`."""
        payload = msgspec.msgpack.encode(self)
        data = payload + zlib.crc32(payload).to_bytes(_CHECKSUM_SIZE)
        return f"molink{VERSION}-" + base64.urlsafe_b64encode(data).decode().rstrip("=")

    @classmethod
    def decode(cls, text: str) -> Self:
        """Read what `encode` wrote; blanks and line breaks from pasting do not matter.

        Raises:
            TokenError: not a token, damaged, or made by another version of MoLink.
        """
        if len(text) > MAX_TOKEN_LENGTH:
            raise TokenError(f"{len(text)} characters are too many for a join token")
        payload = _payload("".join(text.split()))
        try:
            token = msgspec.msgpack.decode(payload, type=cls)
            ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), token.authority_key)
            authority_name(token.cluster_id)
        except (msgspec.DecodeError, ValueError, IdentityError) as error:
            raise TokenError(f"the join token makes no sense: {error}") from error
        return token

    def check_not_expired(self, now: float | None = None) -> None:
        """Raises TokenError if the token's time is over; `now` in seconds since 1970."""
        now = time.time() if now is None else now
        if now >= self.expires_at:
            raise TokenError(
                f"the join token expired on {_date(self.expires_at)} (here it is {_date(now)}); "
                "start the head again for a new one"
            )

    def enrolment_root(self) -> bytes:
        """The PEM certificate with which the head trusts this token's joiners; holds no secret."""
        key = self._enrolment_key()
        name = self._enrolment_name(key)
        return to_pem(
            build_certificate(
                name, key.public_key(), issuer=name, issuer_key=key, valid=self._validity()
            )
        )

    def enrolment_leaf(self) -> tuple[bytes, bytes]:
        """A new private key and its certificate under the enrolment root, both PEM."""
        root_key, key = self._enrolment_key(), ec.generate_private_key(ec.SECP256R1())
        leaf = build_certificate(
            distinguished_name(self.cluster_id, "enrolling node"),
            key.public_key(),
            issuer=self._enrolment_name(root_key),
            issuer_key=root_key,
            valid=self._validity(),
            usages=[ExtendedKeyUsageOID.CLIENT_AUTH],
        )
        return key_to_pem(key), to_pem(leaf)

    def authority_anchor(self) -> bytes:
        """A PEM certificate with the authority's name and key, signed by a key thrown away."""
        public_key = ec.EllipticCurvePublicKey.from_encoded_point(
            ec.SECP256R1(), self.authority_key
        )
        name = authority_name(self.cluster_id)
        return to_pem(
            build_certificate(
                name,
                public_key,
                issuer=name,
                issuer_key=ec.generate_private_key(ec.SECP256R1()),
                valid=(_LONG_AGO, _FOR_EVER),
            )
        )

    def _enrolment_key(self) -> ec.EllipticCurvePrivateKey:
        derivation = HKDF(SHA256(), length=48, salt=self.authority_key, info=b"molink enrolment 1")
        number = int.from_bytes(derivation.derive(self.secret))
        return ec.derive_private_key(number % (_P256_ORDER - 1) + 1, ec.SECP256R1())

    def _enrolment_name(self, key: ec.EllipticCurvePrivateKey) -> Name:
        digest = SubjectKeyIdentifier.from_public_key(key.public_key()).digest
        return distinguished_name(self.cluster_id, f"enrolment {digest.hex()}")

    def _validity(self) -> tuple[datetime, datetime]:
        return _LONG_AGO, datetime.fromtimestamp(self.expires_at, UTC)


def new_secret() -> bytes:
    return secrets.token_bytes(SECRET_SIZE)


def enrolled_under(leaf_pem: bytes, roots: Iterable[bytes], now: datetime | None = None) -> bytes:
    """Which of the live `roots` the caller's certificate was made under.

    A connection outlives the handshake that let it in, so Enroll asks again at every call.

    Raises:
        IdentityError: none; the token was revoked, has expired, or never was one.
    """
    leaf = read_certificate(leaf_pem)
    for root in roots:
        try:
            verify_issued(leaf, read_certificate(root), now)
        except IdentityError:
            continue
        return root
    raise IdentityError("the join token was revoked or has expired")


def _payload(text: str) -> bytes:
    match = re.match(r"molink([0-9]{1,4})-", text)
    if not match:
        raise TokenError("this is not a join token; one begins with «molink1-»")
    if int(match[1]) != VERSION:
        raise TokenError(
            f"the join token has format {match[1]}, this MoLink reads format {VERSION}: "
            "install the head's version here"
        )
    body = text[match.end() :]
    try:
        data = base64.b64decode(body + "=" * (-len(body) % 4), altchars=b"-_", validate=True)
    except ValueError as error:
        raise TokenError("the join token is damaged: it holds foreign characters") from error
    payload, checksum = data[:-_CHECKSUM_SIZE], data[-_CHECKSUM_SIZE:]
    if zlib.crc32(payload).to_bytes(_CHECKSUM_SIZE) != checksum:
        raise TokenError("the join token is damaged or incomplete; copy all of it")
    return payload


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
