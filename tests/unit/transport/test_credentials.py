"""Real gRPC on loopback: who gets in, as whom, and what a refused user is told."""

import asyncio
import http.server
import socket
import ssl
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import grpc
import grpc.aio
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from molink.core.errors import IdentityError, TokenError
from molink.core.ids import HEAD, NodeId
from molink.transport.credentials import (
    channel_credentials,
    diagnose,
    expect_node,
    peer_certificate,
    server_credentials,
)
from molink.transport.identity import (
    ClusterAuthority,
    NodeIdentity,
    NodeKey,
    build_certificate,
    distinguished_name,
    key_to_pem,
    peer_identity,
    read_certificate,
    to_pem,
)
from molink.transport.token import JoinToken, enrolled_under, new_secret

HOUR = 3600


class Cluster:
    """A head that answers every caller with what it takes the caller for."""

    def __init__(self) -> None:
        self.authority = ClusterAuthority.create("home")
        self.identity = self.enrol(HEAD)
        self.roots: list[bytes] = []
        self.port = 0

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def enrol(self, node: int, days: float = 0) -> NodeIdentity:
        """A node with a certificate for one day, signed `days` from now."""
        key, now = NodeKey(), datetime.now(UTC) + timedelta(days=days)
        certificate = self.authority.sign_node(
            key.request_pem(), node=NodeId(node), name="attic", valid_for=timedelta(days=1), now=now
        )
        # Not `accept`, which refuses the expired ones that some tests want.
        return NodeIdentity(key_to_pem(key._key), certificate, self.authority.certificate_pem)

    def token(self, expires_in: int = HOUR) -> JoinToken:
        token = JoinToken(
            addresses=(self.address,),
            authority_key=self.authority.public_key_bytes,
            secret=new_secret(),
            cluster_id="home",
            expires_at=int(time.time()) + expires_in,
        )
        self.roots.append(token.enrolment_root())
        return JoinToken.decode(token.encode())

    async def who(self, _: bytes, context: Any) -> bytes:
        leaf = peer_certificate(context.auth_context())
        try:
            return f"node {peer_identity(leaf, self.authority.certificate_pem).node}".encode()
        except IdentityError:
            pass
        try:
            return f"token {self.roots.index(enrolled_under(leaf, self.roots))}".encode()
        except IdentityError:
            return b"nobody"


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    cluster, server = Cluster(), grpc.aio.server()
    method: Any = grpc.unary_unary_rpc_method_handler(cluster.who)
    handlers = grpc.method_handlers_generic_handler("molink.Agent", {"Who": method})
    server.add_generic_rpc_handlers((handlers,))
    credentials = server_credentials(lambda: cluster.identity, lambda: cluster.roots)
    cluster.port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    yield cluster
    await server.stop(None)


def connect(
    cluster: Cluster, credentials: grpc.ChannelCredentials, node: NodeId = HEAD
) -> grpc.aio.Channel:
    options = [expect_node(node), ("grpc.use_local_subchannel_pool", 1)]
    return grpc.aio.secure_channel(cluster.address, credentials, options)


async def ask(channel: grpc.aio.Channel) -> str:
    who: Any = channel.unary_unary("/molink.Agent/Who")
    answer: bytes = await who(b"", timeout=10)
    return answer.decode()


async def ask_once(
    cluster: Cluster, credentials: grpc.ChannelCredentials, node: NodeId = HEAD
) -> str:
    async with connect(cluster, credentials, node) as channel:
        return await ask(channel)


async def assert_shut_out(cluster: Cluster, credentials: grpc.ChannelCredentials) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ask_once(cluster, credentials)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


# --- who gets in


async def test_a_joiner_with_nothing_but_the_token_gets_in_and_is_known_by_it(
    cluster: Cluster,
) -> None:
    cluster.token()
    assert await ask_once(cluster, channel_credentials(cluster.token())) == "token 1"


async def test_a_node_gets_in_and_is_known_by_its_ordinal(cluster: Cluster) -> None:
    assert await ask_once(cluster, channel_credentials(cluster.enrol(7))) == "node 7"


async def test_a_joiner_becomes_a_node(cluster: Cluster) -> None:
    token, key = cluster.token(), NodeKey()
    assert await ask_once(cluster, channel_credentials(token)) == "token 0"
    certificate = cluster.authority.sign_node(key.request_pem(), node=NodeId(3), name="attic")
    identity = key.accept(
        certificate, cluster.authority.certificate_pem, authority_key=token.authority_key
    )
    cluster.roots.clear()  # a node needs its token no more
    assert await ask_once(cluster, channel_credentials(identity)) == "node 3"


async def test_tokens_come_and_go_without_a_restart(cluster: Cluster) -> None:
    first = cluster.token()
    assert await ask_once(cluster, channel_credentials(first)) == "token 0"
    second = cluster.token()
    assert await ask_once(cluster, channel_credentials(second)) == "token 1"
    del cluster.roots[0]
    await assert_shut_out(cluster, channel_credentials(first))
    assert await ask_once(cluster, channel_credentials(second)) == "token 0"


async def test_a_renewed_head_certificate_is_served_without_a_restart(cluster: Cluster) -> None:
    cluster.identity = cluster.enrol(HEAD, days=-9)
    await assert_shut_out(cluster, channel_credentials(cluster.enrol(1)))
    cluster.identity = cluster.enrol(HEAD)
    assert await ask_once(cluster, channel_credentials(cluster.enrol(1))) == "node 1"


# --- who does not


async def test_a_client_without_a_certificate_is_shut_out(cluster: Cluster) -> None:
    await assert_shut_out(cluster, grpc.ssl_channel_credentials(cluster.authority.certificate_pem))


async def test_a_plain_client_is_shut_out(cluster: Cluster) -> None:
    async with grpc.aio.insecure_channel(cluster.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError):
            await ask(channel)


def showing(cluster: Cluster, key_pem: bytes, leaf_pem: bytes) -> grpc.ChannelCredentials:
    """A client that trusts the server and shows a certificate of its choice."""
    return grpc.ssl_channel_credentials(cluster.authority.certificate_pem, key_pem, leaf_pem)


async def test_nodes_and_tokens_of_another_cluster_are_shut_out(cluster: Cluster) -> None:
    other = Cluster()
    stranger = other.enrol(1)
    await assert_shut_out(cluster, showing(cluster, stranger.key_pem, stranger.certificate_pem))
    await assert_shut_out(cluster, showing(cluster, *other.token().enrolment_leaf()))


async def test_a_server_of_another_cluster_is_not_trusted(cluster: Cluster) -> None:
    other = Cluster()  # same cluster id, so the same names in all certificates
    cluster.roots += [other.token().enrolment_root(), other.authority.certificate_pem]
    await assert_shut_out(cluster, channel_credentials(other.token()))
    await assert_shut_out(cluster, channel_credentials(other.enrol(1)))


async def test_an_expired_token_is_shut_out_even_if_the_head_forgot_it(cluster: Cluster) -> None:
    await assert_shut_out(cluster, channel_credentials(cluster.token(expires_in=-1)))


async def test_an_expired_node_is_shut_out(cluster: Cluster) -> None:
    expired = cluster.enrol(1, days=-9)
    await assert_shut_out(cluster, channel_credentials(expired))


async def test_a_node_cannot_pose_as_the_head(cluster: Cluster) -> None:
    cluster.identity = cluster.enrol(4)
    await assert_shut_out(cluster, channel_credentials(cluster.token()))
    assert await ask_once(cluster, channel_credentials(cluster.enrol(1)), NodeId(4)) == "node 1"


def mint(cluster: Cluster, token: JoinToken, *, as_authority: bool) -> grpc.ChannelCredentials:
    """A leaf with a node's name, made by somebody who holds a token and no certificate."""
    key, root = ec.generate_private_key(ec.SECP256R1()), read_certificate(token.enrolment_root())
    authority = read_certificate(cluster.authority.certificate_pem)
    now = datetime.now(UTC)
    leaf = build_certificate(
        distinguished_name("home", "name 1", NodeId(1)),
        key.public_key(),
        issuer=authority.subject if as_authority else root.subject,
        issuer_key=token._enrolment_key(),
        valid=(now - timedelta(hours=1), now + timedelta(hours=1)),
        usages=[ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH],
        dns_name="node-1.molink",
    )
    return showing(cluster, key_to_pem(key), to_pem(leaf))


async def test_a_token_holder_cannot_mint_a_node(cluster: Cluster) -> None:
    token = cluster.token()
    assert await ask_once(cluster, mint(cluster, token, as_authority=False)) == "token 0"
    await assert_shut_out(cluster, mint(cluster, token, as_authority=True))


async def test_an_open_connection_does_not_outlive_its_token(cluster: Cluster) -> None:
    async with connect(cluster, channel_credentials(cluster.token())) as channel:
        assert await ask(channel) == "token 0"
        cluster.roots.clear()
        assert await ask(channel) == "nobody"


def tls_connect(
    cluster: Cluster, context: ssl.SSLContext, session: ssl.SSLSession | None = None
) -> tuple[ssl.SSLSession | None, bool | None]:
    """The session to resume later, and whether this one was resumed."""
    with (
        socket.create_connection(("127.0.0.1", cluster.port), 10) as connection,
        context.wrap_socket(connection, server_hostname="node-0.molink", session=session) as tls,
    ):
        assert tls.recv(1)
        return tls.session, tls.session_reused


async def test_a_session_ticket_spares_nobody_the_check_of_its_certificate(
    cluster: Cluster, tmp_path: Path
) -> None:
    identity = cluster.enrol(1)
    (tmp_path / "client.pem").write_bytes(identity.key_pem + identity.certificate_pem)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=identity.authority_pem.decode())
    context.load_cert_chain(tmp_path / "client.pem")
    context.set_alpn_protocols(["h2"])
    session, _ = await asyncio.to_thread(tls_connect, cluster, context)
    assert session is not None
    assert session.has_ticket
    assert await asyncio.to_thread(tls_connect, cluster, context, session) == (ANY, False)


def test_a_caller_without_certificate_is_named() -> None:
    with pytest.raises(IdentityError, match="no certificate"):
        peer_certificate({"transport_security_type": [b"insecure"]})


# --- what a refused user is told


async def explain(cluster: Cluster, proof: JoinToken | NodeIdentity, node: NodeId = HEAD) -> str:
    return str(await asyncio.to_thread(diagnose, cluster.address, proof, node))


async def test_a_good_token_is_told_to_try_again(cluster: Cluster) -> None:
    assert "try again" in await explain(cluster, cluster.token())
    assert "try again" in await explain(cluster, cluster.enrol(1))


async def test_a_revoked_or_expired_token_is_told(cluster: Cluster) -> None:
    token, expired = cluster.token(), cluster.token(expires_in=-1)
    del cluster.roots[0]
    for refused in (token, expired):
        assert "does not accept this token" in await explain(cluster, refused)


async def test_an_expired_node_is_told(cluster: Cluster) -> None:
    expired = cluster.enrol(1, days=-9)
    assert "this node's certificate" in await explain(cluster, expired)


async def test_another_cluster_at_the_address_is_told(cluster: Cluster) -> None:
    other = Cluster()
    assert "another cluster than the token" in await explain(cluster, other.token())
    assert "another cluster than this node" in await explain(cluster, other.enrol(1))


async def test_another_node_at_the_address_is_told(cluster: Cluster) -> None:
    assert "another node of the cluster than node 5" in await explain(
        cluster, cluster.enrol(1), NodeId(5)
    )
    cluster.identity = cluster.enrol(4)
    assert "another node of the cluster than the head" in await explain(cluster, cluster.token())


async def test_a_wrong_clock_is_told(cluster: Cluster) -> None:
    for days in (-9, 9):
        cluster.identity = cluster.enrol(HEAD, days=days)
        assert "check the time" in await explain(cluster, cluster.token())


async def test_only_a_token_that_will_never_do_is_the_users_mistake(cluster: Cluster) -> None:
    expired, stranger = cluster.token(expires_in=-1), Cluster()
    hopeless = [expired, stranger.token()]
    for proof in (cluster.token(), cluster.enrol(1), stranger.enrol(1), *hopeless):
        error = await asyncio.to_thread(diagnose, cluster.address, proof)
        assert isinstance(error, TokenError) == (proof in hopeless)


@contextmanager
def listening() -> Iterator[tuple[socket.socket, str]]:
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        yield server, f"127.0.0.1:{server.getsockname()[1]}"


def said(address: str, proof: JoinToken | NodeIdentity) -> str:
    return str(diagnose(address, proof))


def quick(address: str) -> str:
    return str(diagnose(address, Cluster().token(), timeout_s=0.2))


def test_nothing_there_is_told() -> None:
    with listening() as (_, address):
        pass
    assert "nothing listens" in quick(address)


def test_an_http_server_is_told() -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        assert "not as a MoLink agent" in said(f"127.0.0.1:{server.server_port}", Cluster().token())
        thread.join()


def test_a_service_that_hangs_up_is_told() -> None:
    with listening() as (server, address):
        thread = threading.Thread(target=lambda: server.accept()[0].close())
        thread.start()
        assert "not as a MoLink agent" in said(address, Cluster().token())
        thread.join()


def test_a_service_that_says_nothing_is_told() -> None:
    with listening() as (_, address):
        assert "not as a MoLink agent" in quick(address)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (TimeoutError(), "does not answer: the machine is off"),
        (socket.gaierror(-2, "Name or service not known"), "cannot be resolved"),
        (OSError(101, "Network is unreachable"), "Network is unreachable"),
    ],
)
def test_what_the_network_says_is_told(
    monkeypatch: pytest.MonkeyPatch, error: OSError, message: str
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(socket, "create_connection", fail)
    assert message in quick("head.example:8470")


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("head", "is not HOST:PORT"),
        (":8470", "is not HOST:PORT"),
        ("head:http", "is not HOST:PORT"),
        ("127.0.0.1:65536", "is not HOST:PORT"),
        ("a..b:8470", "cannot be resolved"),
    ],
)
def test_an_impossible_address_is_told(address: str, message: str) -> None:
    assert message in quick(address)
