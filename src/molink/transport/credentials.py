"""gRPC credentials made of tokens and identities, and words for a connection that failed.

Client certificates are always required. Certificates name nodes, not hosts (see
`transport.identity`), so a channel needs the option `expect_node(...)` beside its credentials.
"""

import socket
import ssl
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import grpc

from molink.core.errors import IdentityError, LinkError, TokenError
from molink.core.ids import HEAD, NodeId
from molink.transport.identity import NodeIdentity, server_name
from molink.transport.token import JoinToken

PROBE_TIMEOUT_S = 3.0  # for each step of `diagnose`
_NOT_YET_VALID, _EXPIRED, _OTHER_NAME = 9, 10, 62  # X509_V_ERR_… of OpenSSL's x509_vfy.h


def server_credentials(
    identity: Callable[[], NodeIdentity], enrolment_roots: Callable[[], Iterable[bytes]] = tuple
) -> grpc.ServerCredentials:
    """Credentials that follow the identity and tokens as they change.

    Both functions are called on a thread of gRPC before every handshake; they must be quick and
    must not raise (gRPC would go on with what it had). The configuration is new each time, because
    with an unchanged one gRPC resumes TLS sessions whose client certificate has expired (measured).
    """

    def configuration() -> grpc.ServerCertificateConfiguration:
        mine = identity()
        trusted = b"".join([mine.authority_pem, *enrolment_roots()])
        return grpc.ssl_server_certificate_configuration(
            [(mine.key_pem, mine.certificate_pem)], trusted
        )

    return grpc.dynamic_ssl_server_credentials(
        configuration(), configuration, require_client_authentication=True
    )


def channel_credentials(proof: JoinToken | NodeIdentity) -> grpc.ChannelCredentials:
    """Credentials of a client: a node's, or with a token those of a machine that only enrols."""
    client = _ClientSide.of(proof)
    return grpc.ssl_channel_credentials(client.trusted, client.key, client.certificate)


def expect_node(node: NodeId) -> tuple[str, str]:
    """The channel option that accepts `node` at the other end and nobody else."""
    return ("grpc.ssl_target_name_override", server_name(node))


def peer_certificate(auth_context: Mapping[str, Iterable[bytes]]) -> bytes:
    """The PEM leaf certificate of an RPC's caller, from `context.auth_context()`.

    Raises:
        IdentityError: the caller showed none.
    """
    for pem in auth_context.get("x509_pem_cert", ()):
        return pem
    raise IdentityError("the caller showed no certificate")


ACCEPTED = "can be reached and accepts this machine now"


def diagnose(
    address: str,
    proof: JoinToken | NodeIdentity,
    node: NodeId = HEAD,
    timeout_s: float = PROBE_TIMEOUT_S,
) -> LinkError | TokenError:
    """Why gRPC could not connect to `address` (HOST:PORT); a TokenError if another token is needed.

    gRPC says «failed to connect» to everything; this tries again by hand. It blocks for up to
    `timeout_s` in each of its steps (connect, handshake, answer), and the resolver's own time.
    """
    host, _, digits = address.rpartition(":")
    port = int(digits) if digits.isascii() and digits.isdigit() else 0
    if not host or not 0 < port < 1 << 16:
        return LinkError(f"{address!r} is not HOST:PORT")
    try:
        connection = socket.create_connection((host.strip("[]"), port), timeout_s)
    except (socket.gaierror, UnicodeError):
        return LinkError(f"the name {host!r} cannot be resolved")
    except ConnectionRefusedError:
        return LinkError(
            f"nothing listens at {address}: is it running, and is this its agent's port?"
        )
    except TimeoutError:
        return LinkError(
            f"{address} does not answer: the machine is off, the address is wrong, "
            "or a firewall is in between"
        )
    except OSError as error:
        return LinkError(f"{address} cannot be reached: {error}")
    with connection:
        return _diagnose_tls(connection, address, proof, node)


@dataclass(frozen=True, slots=True)
class _ClientSide:
    """What a TLS client trusts and shows, in PEM."""

    trusted: bytes
    key: bytes = field(repr=False)
    certificate: bytes

    @classmethod
    def of(cls, proof: JoinToken | NodeIdentity) -> "_ClientSide":
        if isinstance(proof, JoinToken):
            return cls(proof.authority_anchor(), *proof.enrolment_leaf())
        return cls(proof.authority_pem, proof.key_pem, proof.certificate_pem)

    def context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(cadata=self.trusted.decode())
        context.set_alpn_protocols(["h2"])
        with tempfile.NamedTemporaryFile() as file:  # mode 0600; the ssl module reads files only
            file.write(self.key + self.certificate)
            file.flush()
            context.load_cert_chain(file.name)
        return context


def _diagnose_tls(
    connection: socket.socket, address: str, proof: JoinToken | NodeIdentity, node: NodeId
) -> LinkError | TokenError:
    try:
        tls = (
            _ClientSide.of(proof)
            .context()
            .wrap_socket(connection, server_hostname=server_name(node))
        )
    except ssl.SSLCertVerificationError as error:
        return _about_certificate(error, address, proof, node)
    except OSError:
        return LinkError(
            f"{address} answers, but not as a MoLink agent: is this another service's port?"
        )
    with tls:
        try:
            # With TLS 1.3 a server checks the client's certificate after the client is done.
            greeting = tls.recv(1)
        except TimeoutError:
            return LinkError(f"{address} took the connection but does not answer")
        except OSError:
            greeting = b""
    if greeting:
        return LinkError(f"{address} {ACCEPTED}; try again")
    if isinstance(proof, JoinToken):
        return TokenError(f"{address} does not accept this token: it was revoked or has expired")
    return LinkError(f"{address} does not accept this node's certificate, which may have expired")


def _about_certificate(
    error: ssl.SSLCertVerificationError,
    address: str,
    proof: JoinToken | NodeIdentity,
    node: NodeId,
) -> LinkError | TokenError:
    if error.verify_code in (_NOT_YET_VALID, _EXPIRED):
        return LinkError(
            f"the certificate at {address} is not valid by this machine's clock: "
            "check the time on both machines"
        )
    if error.verify_code == _OTHER_NAME:
        return LinkError(f"another node of the cluster than {_called(node)} answers at {address}")
    if isinstance(proof, JoinToken):
        return TokenError(f"the machine at {address} belongs to another cluster than the token")
    return LinkError(f"the machine at {address} belongs to another cluster than this node")


def _called(node: NodeId) -> str:
    return "the head" if node == HEAD else f"node {node}"
