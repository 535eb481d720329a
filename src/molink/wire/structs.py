"""Control messages: msgspec structs, tagged by their names, in MessagePack."""

from typing import Annotated, TypeVar

import msgspec

from molink.core.errors import WireError

T = TypeVar("T")
Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e12)]
"""Refuses NaN and infinity too, which JSON cannot say."""
Rate = Annotated[float, msgspec.Meta(ge=0, le=1e15)]
"""Bytes a second; refuses the same."""
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Bytes = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


def decode(decoder: msgspec.msgpack.Decoder[T], payload: bytes | bytearray | memoryview) -> T:
    """Read what came from elsewhere.

    msgspec 0.22 has more ways than DecodeError to refuse: a tag that is not UTF-8, and an unknown
    field nested without end.

    Raises:
        WireError: the payload is not a message of the decoder's type.
    """
    try:
        return decoder.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise WireError(f"unreadable message: {error}") from error
