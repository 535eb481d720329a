"""Messages of a link. The first byte says what one is:

    PROTOCOL_VERSION     one or more whole frames, each of which begins with it
    PIECE + priority     the next bytes of a frame of that class, which is not sent whole
    RECEIPT              how much the sender of the receipt has received; a message may follow

The frames of a class arrive in order; those of different classes overtake one another.
"""

import struct
from collections.abc import Iterable, Iterator

from molink.core.errors import WireError
from molink.transport.window import Receipt
from molink.wire.frames import HEADER_SIZE, PRIORITY_AT, FrameHeader, Priority

PIECE = 0x80
RECEIPT = 0xFF
_RECEIPT = struct.Struct("<BQddB")  # what, bytes, arrived, held, paused classes as bits
_LANES = tuple(Priority)
Frame = tuple[FrameHeader, bytes]


def join(lane: Priority, piece: memoryview) -> bytes:
    """A message with a piece of a frame."""
    return b"".join((bytes((PIECE + lane,)), piece))


def lane_of(message: bytes) -> Priority:
    """The class of (the first) frame of a message that is no receipt."""
    return _LANES[message[0] - PIECE if message[0] >= PIECE else message[PRIORITY_AT]]


def pack_receipt(receipt: Receipt, paused: Iterable[Priority]) -> bytes:
    return _RECEIPT.pack(RECEIPT, *receipt, sum(1 << lane for lane in paused))


def split_receipt(data: bytes) -> tuple[Receipt, frozenset[Priority], bytes]:
    """A receipt, the classes that are to pause, and the message that follows it, if one does.

    Raises:
        WireError: `pack_receipt` does not make that.
    """
    try:
        _, received, arrived_s, held_s, bits = _RECEIPT.unpack_from(data)
    except struct.error as error:
        raise WireError(f"a receipt of {len(data)} bytes") from error
    if not (abs(arrived_s) <= 1e15 and 0 <= held_s <= 1e9 and bits < 1 << len(Priority)):
        raise WireError("a receipt makes no sense")
    paused = frozenset(lane for lane in Priority if bits & 1 << lane)
    return Receipt(received, arrived_s, held_s), paused, data[_RECEIPT.size :]


class Reassembly:
    """The receiving end: keeps at most one unfinished frame of each class."""

    def __init__(self) -> None:
        self._unfinished = [bytearray() for _ in Priority]

    def take(self, data: bytes) -> Iterator[Frame]:
        """The frames that a message completes.

        Raises:
            WireError: the peer broke the protocol.
        """
        kind = data[0] if data else 0
        if PIECE <= kind < PIECE + len(Priority):
            return self._piece(Priority(kind - PIECE), memoryview(data)[1:])
        return self._whole(data)

    def _whole(self, data: bytes) -> Iterator[Frame]:
        offset = 0
        view = memoryview(data)
        while offset < len(data) or not data:
            header = FrameHeader.unpack(view[offset:])
            end = offset + HEADER_SIZE + header.length
            if end > len(data):
                raise WireError("a frame is cut off")
            if self._unfinished[header.priority]:
                raise WireError("a frame before the rest of another")
            yield header, data if end - offset == len(data) else data[offset:end]
            offset = end

    def _piece(self, lane: Priority, piece: memoryview) -> Iterator[Frame]:
        frame = self._unfinished[lane]
        if not piece:
            raise WireError("an empty piece of a frame")
        frame += piece
        if len(frame) < HEADER_SIZE:
            return
        header = FrameHeader.unpack(frame)
        missing = HEADER_SIZE + header.length - len(frame)
        if missing < 0 or header.priority != lane:
            raise WireError("a piece does not fit its frame")
        if missing == 0:
            self._unfinished[lane] = bytearray()
            yield header, bytes(frame)
