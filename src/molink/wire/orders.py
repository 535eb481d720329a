"""What the operator's commands ask of a running head, and what it answers."""

from typing import Annotated

import msgspec

from molink.wire import structs

Name = Annotated[str, msgspec.Meta(max_length=64)]


class CreateToken(msgspec.Struct, frozen=True, tag=True):
    """Make a join token; answered by `TokenMade`."""

    node: Name | None  # the only name with which it may be used
    uses: Annotated[int, msgspec.Meta(ge=1)] | None  # times that it may be used
    seconds: Annotated[int, msgspec.Meta(ge=1, le=366 * 24 * 3600)]  # that it is good for


class ListTokens(msgspec.Struct, frozen=True, tag=True):
    """Answered by `Tokens`."""


class RevokeToken(msgspec.Struct, frozen=True, tag=True):
    """Have a token let nobody in any more; answered by `Done`."""

    id: Name


class RevokeNode(msgspec.Struct, frozen=True, tag=True):
    """Shut a node out for good; answered by `Done`."""

    node: Name


class DrainNode(msgspec.Struct, frozen=True, tag=True):
    """Have others compute a node's layers, so that it may go; answered by `Done`."""

    node: Name


class TokenMade(msgspec.Struct, frozen=True, tag=True):
    text: str


class TokenView(msgspec.Struct, frozen=True):
    """A live token, without its secret, which nobody has kept."""

    id: str
    expires_at: float  # unix seconds
    node: str | None
    uses_left: int | None


class Tokens(msgspec.Struct, frozen=True, tag=True):
    tokens: list[TokenView]


class Done(msgspec.Struct, frozen=True, tag=True):
    """It is as was wanted; what that means, for the person at the terminal."""

    text: str


Order = CreateToken | ListTokens | RevokeToken | RevokeNode | DrainNode
Reply = TokenMade | Tokens | Done

_encoder = msgspec.msgpack.Encoder()
_orders: msgspec.msgpack.Decoder[Order] = msgspec.msgpack.Decoder(Order)
_replies: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)


def encode(message: Order | Reply) -> bytes:
    return _encoder.encode(message)


def decode_order(payload: bytes) -> Order:
    """Raises WireError for anything else."""
    return structs.decode(_orders, payload)


def decode_reply(payload: bytes) -> Reply:
    """Raises WireError for anything else."""
    return structs.decode(_replies, payload)
