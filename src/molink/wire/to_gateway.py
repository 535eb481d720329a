"""What the head's agent tells the gateway."""

import msgspec

from molink.wire import structs


class PipelineDown(msgspec.Struct, frozen=True, tag=True):
    """A stage is lost; the engine keeps what it has, and takes requests."""

    reason: str


class EngineGone(msgspec.Struct, frozen=True, tag=True):
    """The engine has ended, and all that it had is lost; another one is about to start."""

    reason: str


class ClusterView(msgspec.Struct, frozen=True, tag=True):
    """What the cluster looks like; sent every second. Whatever was down is up if it serves."""

    view: bytes  # JSON, as `/cluster` serves it


class Drain(msgspec.Struct, frozen=True, tag=True):
    """The head is about to end: take nothing more; answered by `to_agent.GatewayDrains`."""


ToGateway = PipelineDown | EngineGone | ClusterView | Drain

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[ToGateway] = msgspec.msgpack.Decoder(ToGateway)


def encode(message: ToGateway) -> bytes:
    return _encoder.encode(message)


def decode(payload: bytes | bytearray | memoryview) -> ToGateway:
    """Raises WireError for anything else."""
    return structs.decode(_decoder, payload)
