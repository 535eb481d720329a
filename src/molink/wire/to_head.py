"""What the head reads from the other nodes' agents."""

from typing import Annotated

import msgspec

from molink.wire import structs
from molink.wire.structs import Bytes, Rate, Seconds, Share
from molink.wire.to_agent import Downloading, Probe, StageCounters, StageUp

MAX_RANKS = 256  # of a stage: a frame's header has one byte for it


class EnrollRequest(msgspec.Struct, frozen=True):
    """The one call a holder of a join token may make."""

    name: str
    signing_request: bytes  # PEM


class EnrollReply(msgspec.Struct, frozen=True):
    certificate: bytes  # PEM
    authority: bytes  # PEM


class Hello(msgspec.Struct, frozen=True, tag=True):
    """First message on a link to the head."""

    protocol: int
    molink: str
    vllm: str
    name: str
    layers: str | None  # pinned range, as typed
    tensor_parallel_size: Annotated[int, msgspec.Meta(ge=1, le=MAX_RANKS)]
    listen_port: int
    # HOST:PORT under which others may dial this node
    advertise: Annotated[str, msgspec.Meta(max_length=300)] | None
    stands_by: bool = False


class ModelChecked(msgspec.Struct, frozen=True, tag=True):
    """The node holds a model with this configuration."""

    config_hash: str
    revision: str | None


class Renew(msgspec.Struct, frozen=True, tag=True):
    """The node's certificate is about to expire; answered by `to_agent.Renewed`."""

    signing_request: bytes  # PEM


class Leaving(msgspec.Struct, frozen=True, tag=True):
    """The node goes away on purpose."""

    reason: str


class StageGone(msgspec.Struct, frozen=True, tag=True):
    """The node's stage process ended; the node starts another."""

    reason: str


class Dialled(msgspec.Struct, frozen=True, tag=True):
    node: int
    ok: bool


class LinkLost(msgspec.Struct, frozen=True, tag=True):
    """A direct link to another node broke."""

    node: int
    reason: str
    nothing: bool = False  # was lost with it: all that this node sent has arrived


class LinkCounters(msgspec.Struct, frozen=True, kw_only=True):
    """One link as seen from one end, and what leaves from there. None: not known."""

    peer: int
    bytes_sent: Bytes
    bytes_received: Bytes
    frames_queued: int
    bytes_queued: Annotated[list[Bytes], msgspec.Meta(max_length=8)]  # by class of frames
    bytes_in_flight: Bytes
    window: Bytes  # most that may be in flight
    bytes_per_s: Rate | None  # that the link delivers
    rtt_s: Seconds | None  # shortest of late
    jitter_s: Seconds
    loss: Share | None  # of TCP's segments, as far as TCP noticed


class NodeReport(msgspec.Struct, frozen=True, tag=True):
    """Counters of a node, once a second."""

    stage: StageCounters
    links: list[LinkCounters]
    download: Downloading | None = None  # while its stage downloads
    stage_age_s: Seconds = 0.0  # since the stage has counted


ToHead = (
    Hello
    | ModelChecked
    | StageUp
    | StageGone
    | Renew
    | Leaving
    | Dialled
    | LinkLost
    | NodeReport
    | Probe
)

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[ToHead] = msgspec.msgpack.Decoder(ToHead)


def encode(message: ToHead) -> bytes:
    return _encoder.encode(message)


def decode(payload: bytes | bytearray | memoryview) -> ToHead:
    """Raises WireError for anything else."""
    return structs.decode(_decoder, payload)
