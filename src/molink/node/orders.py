"""Carries out what the operator's commands ask of the head."""

import time
from collections.abc import Callable

from molink.cluster.coordinator import Coordinator
from molink.core.ids import NodeId
from molink.transport.identity import ClusterAuthority
from molink.transport.token import JoinToken, new_secret
from molink.wire import orders
from molink.wire.orders import (
    CreateToken,
    Done,
    DrainNode,
    ListTokens,
    Reply,
    RevokeNode,
    RevokeToken,
    TokenMade,
    Tokens,
    TokenView,
)


class Orders:
    """The head's side.

    Args:
        addresses: where nodes reach the head.
        revoked: called with a node that was shut out.
        changed: called when there may be another plan.
    """

    def __init__(
        self,
        coordinator: Coordinator,
        authority: ClusterAuthority,
        addresses: Callable[[], tuple[str, ...]],
        revoked: Callable[[NodeId], None],
        changed: Callable[[], None],
    ) -> None:
        self._coordinator = coordinator
        self._authority = authority
        self._addresses = addresses
        self._revoked = revoked
        self._changed = changed

    def carry_out(self, payload: bytes) -> bytes:
        """Answer one order. Raises MolinkError for what cannot be done, and says why."""
        return orders.encode(self._answer(orders.decode_order(payload)))

    def _answer(self, order: orders.Order) -> Reply:
        match order:
            case CreateToken(node=node, uses=uses, seconds=seconds):
                return TokenMade(self.invite(seconds, node, uses).encode())
            case ListTokens():
                live = self._coordinator.live_tokens
                return Tokens(
                    [TokenView(t.id, t.expires_at, t.node_name, t.uses_left) for t in live]
                )
            case RevokeToken(id=token):
                self._coordinator.revoke_token(token)
                return Done(f"token {token} lets nobody in any more; who joined with it stays")
            case RevokeNode(node=name):
                for node_id in self._coordinator.revoke_node(name):
                    self._revoked(node_id)
                return Done(f"{name} is shut out: it may only join anew, with another token")
            case DrainNode(node=name):
                heir = self._coordinator.drain(name)
                self._changed()
                done = f"{heir} computes its layers" if heir else "it computed nothing"
                return Done(f"{name} may go: {done}")

    def invite(self, seconds: int, node: str | None = None, uses: int | None = None) -> JoinToken:
        """A new join token. Raises UsageError for a malformed name."""
        token = JoinToken(
            addresses=self._addresses(),
            authority_key=self._authority.public_key_bytes,
            secret=new_secret(),
            cluster_id=self._authority.cluster_id,
            expires_at=int(time.time()) + seconds,
        )
        self._coordinator.add_token(token.enrolment_root(), token.expires_at, node, uses)
        return token
