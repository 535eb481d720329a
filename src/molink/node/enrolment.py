"""How a machine with a join token becomes a node: both sides of the one call a token allows."""

import msgspec

from molink.cluster.coordinator import Coordinator
from molink.transport.identity import ClusterAuthority, NodeIdentity, NodeKey
from molink.transport.server import enroll
from molink.transport.token import JoinToken, enrolled_under
from molink.wire import structs
from molink.wire.to_head import EnrollReply, EnrollRequest

ENROLL_TIMEOUT_S = 10.0

_requests = msgspec.msgpack.Decoder(EnrollRequest)
_replies = msgspec.msgpack.Decoder(EnrollReply)


def enrol(
    coordinator: Coordinator, authority: ClusterAuthority, leaf: bytes, request: bytes
) -> EnrollReply:
    """The head's side.

    Raises:
        MolinkError: the token is not live any more, or the request is not one.
    """
    root = enrolled_under(leaf, coordinator.live_roots)
    asked = structs.decode(_requests, request)
    node = coordinator.enrol(asked.name, root)
    certificate = authority.sign_node(
        asked.signing_request, node=node, name=coordinator.state.node(node).name
    )
    return EnrollReply(certificate, authority.certificate_pem)


async def request_identity(address: str, token: JoinToken, name: str) -> NodeIdentity:
    """The joining node's side: make a key, have it signed.

    Raises:
        LinkError: the head cannot be reached or refuses the node; says why.
        TokenError: it does not accept the token, or is another cluster's.
        IdentityError: the answer is not from the cluster that the token names.
        WireError: the answer cannot be read.
    """
    key = NodeKey()
    request = msgspec.msgpack.encode(EnrollRequest(name, key.request_pem()))
    answer = await enroll(address, token, request, ENROLL_TIMEOUT_S)
    reply = structs.decode(_replies, answer)
    return key.accept(reply.certificate, reply.authority, authority_key=token.authority_key)
