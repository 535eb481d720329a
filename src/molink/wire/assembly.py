"""Putting messages together from frames, within a bound."""

from dataclasses import dataclass, field
from typing import NamedTuple

from molink.core.errors import WireError
from molink.core.ids import Address
from molink.wire.frames import MAX_PAYLOAD, FrameHeader, Kind

TRUST = 16  # so that messages up to 4 MiB, and longer ones soon, need no copy to grow
_Key = tuple[Address, int, Kind, int, int]


class Message(NamedTuple):
    """A whole message; `payload` is writable and owned by the receiver."""

    kind: Kind
    source: Address
    rank: int
    epoch: int
    sequence: int
    payload: bytearray


@dataclass(slots=True)
class _Unfinished:
    total: int  # bytes announced
    filled: int = 0  # bytes received
    data: bytearray = field(default_factory=bytearray)  # at most TRUST times what was received


class Assembler:
    """Receives frames piece by piece; a sender's pieces of one message arrive in order.

    A message whose sender or link went away is never finished. It is forgotten when it begins
    again, when one of its pieces turns out to be missing, or when a newer epoch begins; what still
    arrives of it is skipped, because the receiver has done nothing wrong and lives on.

    Args:
        max_bytes: bound on the memory of unfinished messages together. What a header announces is
            believed up to TRUST times what has arrived.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._open: dict[_Key, _Unfinished] = {}
        self._open_bytes = 0
        self._epoch = 0
        self.skipped = 0  # pieces of messages that lost an earlier piece

    def buffer(self, header: FrameHeader) -> memoryview:
        """Where the piece's payload goes (`header.length` bytes); fill it, then `commit`.

        Raises:
            WireError: the bound would be passed.
        """
        key = _key(header)
        if header.offset == 0:
            self._begin(key, header)
        message = self._open.get(key)
        if message is None or (message.filled, message.total) != (header.offset, header.total):
            self._forget(key)
            self.skipped += 1
            return memoryview(bytearray(header.length))
        end = header.offset + header.length
        self._grow(key, message, end)
        return memoryview(message.data)[header.offset : end]

    def commit(self, header: FrameHeader) -> Message | None:
        """The message, once its last piece has been filled."""
        key = _key(header)
        message = self._open.get(key)
        if message is None:  # a skipped piece
            return None
        message.filled += header.length
        if message.filled < message.total:
            return None
        self._forget(key)
        source, rank, kind, epoch, sequence = key
        return Message(kind, source, rank, epoch, sequence, message.data)

    def _begin(self, key: _Key, header: FrameHeader) -> None:
        if header.epoch > self._epoch:
            self._epoch = header.epoch
            for old in [old for old in self._open if 0 < old[3] < header.epoch]:
                self._forget(old)
        self._forget(key)
        self._open[key] = _Unfinished(header.total)

    def _grow(self, key: _Key, message: _Unfinished, end: int) -> None:
        """Make room for `end` bytes, and for more to come."""
        if end <= len(message.data):
            return
        size = min(message.total, TRUST * end)
        more = size - len(message.data)
        if self._open_bytes + more > self._max_bytes:
            self._forget(key)
            raise WireError(f"unfinished messages would pass {self._max_bytes} bytes")
        grown = bytearray(size)
        grown[: message.filled] = memoryview(message.data)[: message.filled]
        message.data = grown
        self._open_bytes += more

    def _forget(self, key: _Key) -> None:
        message = self._open.pop(key, None)
        if message is not None:
            self._open_bytes -= len(message.data)

    def check_conservation(self) -> None:
        """Assert, between two frames, that what is counted is held and has all been paid for."""
        assert self._open_bytes == sum(len(message.data) for message in self._open.values())
        for message in self._open.values():
            assert MAX_PAYLOAD <= message.filled <= len(message.data) <= TRUST * message.filled


def _key(header: FrameHeader) -> _Key:
    return (header.source, header.rank, header.kind, header.epoch, header.sequence)
