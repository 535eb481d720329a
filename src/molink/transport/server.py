"""The agent's one port: a gRPC server with mutual TLS, and dialling the same service elsewhere."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

import grpc
import grpc.aio
import msgspec

from molink.core.errors import IdentityError, LinkError, MolinkError, UsageError
from molink.core.ids import HEAD, NodeId
from molink.transport.credentials import (
    channel_credentials,
    diagnose,
    expect_node,
    peer_certificate,
)
from molink.transport.identity import NodeIdentity, PeerIdentity, peer_identity
from molink.transport.link import (
    CHANNEL_OPTIONS,
    ENROLL_METHOD,
    LINK_METHOD,
    ORDER_METHOD,
    STATUS_METHOD,
    TUNNEL_METHOD,
    Link,
)
from molink.transport.tcp import accepted_from, opened_since, tcp_sockets
from molink.transport.token import JoinToken

SERVICE = "molink.Agent"
MAX_ENROLL_REQUEST = 16 * 1024  # bytes
HANDSHAKE_TIMEOUT_S = 5.0  # a connection that says nothing holds a file descriptor until then
MAX_BACKOFF_MS = 2000  # a head that is back is found this soon


class Accepted(NamedTuple):
    """A link that another node opened, and where it came from."""

    link: Link
    identity: PeerIdentity
    remote_host: str


AcceptHandler = Callable[[Accepted], Awaitable[None]]
EnrollHandler = Callable[[bytes, bytes], bytes]
"""(the caller's certificate, its request) -> reply; MolinkError refuses."""
TunnelHandler = Callable[[Any, NodeId], Awaitable[None]]
"""(stream, node that opened it): carries bytes until it is over; LinkError breaks it off."""


class LinkServer:
    """Listens for links and, on the head, for enrolment.

    Args:
        authority: of the cluster; peers whose certificate it did not issue may only enrol.
        accept: runs one link until it ends; never cancelled, its link ends with LinkError instead.
        enroll: None where nobody can enrol.
        status: what any node of the cluster may read.
        tunnel: what any node of the cluster may connect to.
        order: carries out what the head's own user asks; MolinkError refuses.
        is_revoked: whether a node was shut out, whatever its certificate says.
    """

    def __init__(
        self,
        authority: Callable[[], bytes],
        accept: AcceptHandler,
        enroll: EnrollHandler | None = None,
        status: Callable[[], bytes] | None = None,
        tunnel: TunnelHandler | None = None,
        order: Callable[[bytes], bytes] | None = None,
        is_revoked: Callable[[NodeId], bool] = lambda node: False,
    ) -> None:
        self._order = order
        self._is_revoked = is_revoked
        self._status = status
        self._tunnel = tunnel
        self._authority = authority
        self._accept = accept
        self._enroll = enroll
        self._server: grpc.aio.Server | None = None
        self._running: set[asyncio.Future[None]] = set()
        self._tunnels: dict[NodeId, set[asyncio.Future[None]]] = {}

    async def start(self, listen: str, credentials: grpc.ServerCredentials) -> int:
        """Listen on HOST:PORT; returns the port.

        Raises:
            UsageError: the address is taken or not this machine's.
        """
        self._server = grpc.aio.server(
            options=[
                *CHANNEL_OPTIONS,
                ("grpc.so_reuseport", 0),
                ("grpc.server_handshake_timeout_ms", int(HANDSHAKE_TIMEOUT_S * 1000)),
            ]
        )
        handlers: dict[str, Any] = {"Link": grpc.stream_stream_rpc_method_handler(self._link)}
        if self._enroll is not None:
            handlers["Enroll"] = grpc.unary_unary_rpc_method_handler(self._enroll_call)
        if self._status is not None:
            handlers["Status"] = grpc.unary_unary_rpc_method_handler(self._status_call)
        if self._order is not None:
            handlers["Order"] = grpc.unary_unary_rpc_method_handler(self._order_call)
        if self._tunnel is not None:
            handlers["Tunnel"] = grpc.stream_stream_rpc_method_handler(self._tunnel_call)
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(SERVICE, handlers),)
        )
        try:
            port = self._server.add_secure_port(listen, credentials)
        except RuntimeError as error:
            await self.stop()
            raise UsageError(
                f"cannot listen on {listen}: another program uses the port, or the address is not "
                "this machine's; choose another one with --listen HOST:PORT"
            ) from error
        await self._server.start()
        return port

    async def stop(self) -> None:
        """Close the port and all links; returns when every `accept` and tunnel has."""
        if self._server is not None:
            await self._server.stop(grace=0.2)
        if self._running:
            await asyncio.wait(self._running)

    def end_tunnels(self, node: NodeId) -> None:
        """End what a node has open but its link."""
        for tunnel in list(self._tunnels.get(node, ())):
            tunnel.cancel()

    async def _identify(self, context: Any) -> PeerIdentity:
        """Who calls; refuses everybody who is not a node of the cluster, or not any more."""
        try:
            found = peer_identity(peer_certificate(context.auth_context()), self._authority())
            if self._is_revoked(found.node):
                raise IdentityError(f"{found.name} was revoked")
        except IdentityError as error:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, str(error))
            raise
        return found

    async def _status_call(self, _: bytes, context: Any) -> bytes:
        await self._identify(context)
        assert self._status is not None
        return self._status()

    async def _order_call(self, request: bytes, context: Any) -> bytes:
        """The head's identity lies in a folder that its user alone can read."""
        identity = await self._identify(context)
        assert self._order is not None
        if identity.node != HEAD:
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, "only the head's user may")
        try:
            return self._order(request)
        except MolinkError as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
            raise

    async def _tunnel_call(self, _: Any, context: Any) -> None:
        identity = await self._identify(context)
        assert self._tunnel is not None
        carrying = self._watch(self._tunnel(context, identity.node))
        tunnels = self._tunnels.setdefault(identity.node, set())
        tunnels.add(carrying)
        carrying.add_done_callback(tunnels.discard)
        try:
            await asyncio.shield(carrying)
        except asyncio.CancelledError:
            carrying.cancel()
            await asyncio.gather(carrying, return_exceptions=True)
            raise
        except LinkError as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))

    async def _link(self, _: Any, context: Any) -> None:
        identity = await self._identify(context)
        host, port = _address_of(context.peer())
        link = Link(identity.node, context, accepted_from(host, port))
        accepted = Accepted(link, identity, host)
        accepting = self._watch(self._accept(accepted))
        try:
            await asyncio.shield(accepting)
        except asyncio.CancelledError:  # gRPC's way to say that the peer, or this server, is gone
            link.close()
            await asyncio.wait((accepting,))
            raise

    def _watch(self, work: Awaitable[None]) -> asyncio.Future[None]:
        """Begin something that `stop` waits for."""
        task = asyncio.ensure_future(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return task

    async def _enroll_call(self, request: bytes, context: Any) -> bytes:
        assert self._enroll is not None
        if len(request) > MAX_ENROLL_REQUEST:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the request is too large")
        try:
            return self._enroll(peer_certificate(context.auth_context()), request)
        except (MolinkError, msgspec.DecodeError) as error:
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, str(error))
            raise


def _address_of(peer: str) -> tuple[str, int]:
    """`ipv4:10.0.0.7:41234` -> `10.0.0.7`, 41234; IPv6 is written `ipv6:%5B::1%5D:41234`."""
    host, _, port = peer.partition(":")[2].rpartition(":")
    return host.replace("%5B", "[").replace("%5D", "]"), int(port)


class Dialled(NamedTuple):
    """A link this node opened; close the channel after it."""

    link: Link
    channel: grpc.aio.Channel


async def dial(address: str, identity: NodeIdentity, node: NodeId, timeout_s: float) -> Dialled:
    """Open a link to `node` at HOST:PORT.

    Raises:
        LinkError: it cannot be reached in time or is somebody else; says why.
    """
    before = tcp_sockets()
    channel = await _connect(address, identity, node, timeout_s)
    tcp = opened_since(before, int(address.rpartition(":")[2]))
    call: Any = channel.stream_stream(LINK_METHOD)()
    return Dialled(Link(node, call, tcp), channel)


async def enroll(address: str, token: JoinToken, request: bytes, timeout_s: float) -> bytes:
    """Make the one call that a token allows.

    Raises:
        LinkError: the head cannot be reached or refused; says why.
        TokenError: it does not accept the token, or is another cluster's.
    """
    return await _call(ENROLL_METHOD, address, token, request, timeout_s)


async def fetch_status(address: str, identity: NodeIdentity, timeout_s: float) -> bytes:
    """What the head at HOST:PORT says of its cluster (JSON).

    Raises:
        LinkError: the head cannot be reached or is another cluster's; says why.
    """
    return await _call(STATUS_METHOD, address, identity, b"", timeout_s)


async def send_order(address: str, identity: NodeIdentity, order: bytes, timeout_s: float) -> bytes:
    """Have the head at HOST:PORT carry out an order.

    Raises:
        LinkError: it cannot be reached, or refuses; says why.
    """
    return await _call(ORDER_METHOD, address, identity, order, timeout_s)


class TunnelChannel:
    """A node's connection to the head at HOST:PORT for tunnels alone; made when first needed."""

    def __init__(self, address: str, identity: NodeIdentity) -> None:
        options = [
            *CHANNEL_OPTIONS,
            expect_node(HEAD),
            ("grpc.max_reconnect_backoff_ms", MAX_BACKOFF_MS),
        ]
        credentials = channel_credentials(identity)
        self._channel = grpc.aio.secure_channel(address, credentials, options=options)

    def open_stream(self) -> Any:
        """Begin a tunnel: gRPC's call object, which fails by itself if the head is not there."""
        return self._channel.stream_stream(TUNNEL_METHOD)()

    async def close(self) -> None:
        await self._channel.close()


async def _call(
    method: str, address: str, proof: JoinToken | NodeIdentity, request: bytes, timeout_s: float
) -> bytes:
    channel = await _connect(address, proof, HEAD, timeout_s)
    try:
        call: Any = channel.unary_unary(method)
        reply: bytes = await call(request, timeout=timeout_s)
        return reply
    except grpc.aio.AioRpcError as error:
        raise LinkError(f"the head refused: {error.details()}") from error
    finally:
        await channel.close()


async def _connect(
    address: str, proof: JoinToken | NodeIdentity, node: NodeId, timeout_s: float
) -> grpc.aio.Channel:
    options = [*CHANNEL_OPTIONS, expect_node(node)]
    channel = grpc.aio.secure_channel(address, channel_credentials(proof), options=options)
    try:
        await asyncio.wait_for(_until_ready(channel), timeout_s)
    except (TimeoutError, ConnectionError) as error:
        await channel.close()
        raise await asyncio.to_thread(diagnose, address, proof, node) from error
    return channel


async def _until_ready(channel: grpc.aio.Channel) -> None:
    """Raises ConnectionError when an attempt has failed, where gRPC would try on without a word."""
    state = channel.get_state(try_to_connect=True)
    while state is not grpc.ChannelConnectivity.READY:
        if state is grpc.ChannelConnectivity.TRANSIENT_FAILURE:
            raise ConnectionError
        await channel.wait_for_state_change(state)
        state = channel.get_state(try_to_connect=True)
