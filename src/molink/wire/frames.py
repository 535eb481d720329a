"""Frames: pieces of messages, with a priority.

A message is cut into frames by its sender and put together by its receiver; agents in between only
read the header. There is one way to cut a message: every piece but the last holds MAX_PAYLOAD
bytes, so a message that is unfinished at its receiver has cost its sender at least that much.

Layout, little endian, HEADER_SIZE bytes, then `length` bytes of payload:

    u8 version  u8 kind  u8 priority  u8 port of source  u8 port of destination  u8 rank  u16 source
    u16 destination  u16 -  u32 epoch  u64 sequence  u32 offset  u32 total  u32 length
"""

import struct
from collections.abc import Iterator
from enum import IntEnum
from functools import lru_cache

import msgspec

from molink.core.errors import WireError
from molink.core.ids import Address, NodeId, Port

PROTOCOL_VERSION = 1
MAX_PAYLOAD = 256 * 1024
MAX_MESSAGE = 1 << 30  # bytes; a prefill of 16,384 tokens of an 8,192-wide bf16 model is half of it

_ROUTE = struct.Struct("<BBBBBBHHH")
_HEADER = struct.Struct(f"<{_ROUTE.size}sIQIII")
HEADER_SIZE = _HEADER.size
PRIORITY_AT = 2  # its byte


class Kind(IntEnum):
    """What a message is; each is read by one receiver."""

    CONTROL = 0  # agent <-> agent, agent <-> its own processes: a struct of a to_… module
    STEP = 1  # engine -> every stage: run one step
    SAMPLE = 2  # engine -> last stage: the second half of a step whose grammar came later
    ACTIVATIONS = 3  # stage -> next stage: tensors of one step
    RESULT = 4  # last stage -> engine: the output of one step
    CALL = 5  # engine -> stage: one of a closed list of methods
    REPLY = 6  # stage -> engine: answer to a CALL
    FAILURE = 7  # stage -> engine: a CALL raised; a stage whose step raises ends


class Priority(IntEnum):
    """Classes of frames, each a lane of a link; smaller goes first."""

    CONTROL = 0
    DECODE = 1
    PREFILL = 2
    BULK = 3


class FrameHeader(msgspec.Struct, frozen=True, gc=False):
    """Where a piece of a message goes and where in the message it lies.

    `sequence` is the step or call number; with kind, source and epoch it names the message.
    `offset`, `total` and `length` are bytes of payload.
    """

    kind: Kind
    priority: Priority
    source: Address
    destination: Address
    rank: int  # tensor-parallel rank of the source
    epoch: int
    sequence: int
    offset: int
    total: int
    length: int

    def pack(self) -> bytes:
        route = _ROUTE.pack(
            PROTOCOL_VERSION,
            self.kind,
            self.priority,
            self.source.port,
            self.destination.port,
            self.rank,
            self.source.node,
            self.destination.node,
            0,
        )
        return _HEADER.pack(route, self.epoch, self.sequence, self.offset, self.total, self.length)

    @classmethod
    def unpack(cls, data: bytes | bytearray | memoryview) -> "FrameHeader":
        """Read and check a header.

        Raises:
            WireError: too short, another version, unknown kind, or a piece that `cut` never makes.
        """
        if len(data) < HEADER_SIZE:
            raise WireError(f"frame of {len(data)} bytes is shorter than its header")
        route, epoch, sequence, offset, total, length = _HEADER.unpack_from(data)
        kind, priority, source, destination, rank = _unpack_route(route)
        if (
            total > MAX_MESSAGE
            or offset >= (total or 1)
            or offset % MAX_PAYLOAD
            or length != min(MAX_PAYLOAD, total - offset)
        ):
            raise WireError(f"frame piece {offset}+{length} of {total} bytes is out of bounds")
        return cls(
            kind, priority, source, destination, rank, epoch, sequence, offset, total, length
        )


@lru_cache(1024)  # few routes, and a frame's header is read at every process that it passes
def _unpack_route(route: bytes) -> tuple[Kind, Priority, Address, Address, int]:
    fields = _ROUTE.unpack(route)
    version, kind, priority, source_port, destination_port, rank, source, destination, _ = fields
    if version != PROTOCOL_VERSION:
        raise WireError(f"frame has protocol version {version}, expected {PROTOCOL_VERSION}")
    try:
        return (
            Kind(kind),
            Priority(priority),
            Address(NodeId(source), Port(source_port)),
            Address(NodeId(destination), Port(destination_port)),
            rank,
        )
    except ValueError as error:
        raise WireError(f"frame header: {error}") from None


def cut(
    kind: Kind,
    priority: Priority,
    source: Address,
    destination: Address,
    parts: list[memoryview],
    *,
    epoch: int = 0,
    sequence: int = 0,
    rank: int = 0,
) -> Iterator[tuple[bytes, list[memoryview]]]:
    """Cut one message into (header, pieces of payload); no byte is copied.

    Args:
        parts: contiguous views of single bytes; the message is what they hold one after the other.
            An empty message is one empty frame.

    Raises:
        WireError: the message is larger than MAX_MESSAGE.
    """
    total = sum(part.nbytes for part in parts)
    if total > MAX_MESSAGE:
        raise WireError(f"message of {total} bytes is larger than {MAX_MESSAGE}")
    parts = [part for part in reversed(parts) if part.nbytes]
    for offset in range(0, total or 1, MAX_PAYLOAD):
        length = min(MAX_PAYLOAD, total - offset)
        header = FrameHeader(
            kind, priority, source, destination, rank, epoch, sequence, offset, total, length
        )
        yield header.pack(), _take(parts, length)


def _take(parts: list[memoryview], length: int) -> list[memoryview]:
    """Remove `length` bytes from the end of the reversed list `parts`."""
    taken = []
    while length:
        part = parts.pop()
        if part.nbytes > length:
            parts.append(part[length:])
            part = part[:length]
        taken.append(part)
        length -= part.nbytes
    return taken
