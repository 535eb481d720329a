"""Putting messages together from frames, within a bound."""

from typing import NamedTuple

from molink.core.errors import WireError
from molink.core.ids import Address
from molink.wire.frames import FrameHeader, Kind

_Key = tuple[Address, int, Kind, int, int]


class Message(NamedTuple):
    """A whole message; `payload` is writable and owned by the receiver."""

    kind: Kind
    source: Address
    rank: int
    epoch: int
    sequence: int
    payload: bytearray


class Assembler:
    """Receives frames piece by piece; a sender's pieces of one message arrive in order.

    Args:
        max_bytes: bound on what unfinished messages may occupy together.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._open: dict[_Key, tuple[bytearray, int]] = {}
        self._open_bytes = 0

    def buffer(self, header: FrameHeader) -> memoryview:
        """Where the piece's payload goes (`header.length` bytes); fill it, then `commit`.

        Raises:
            WireError: the piece does not continue its message, or the bound would be passed.
        """
        key = _key(header)
        if header.offset == 0:
            if self._open_bytes + header.total > self._max_bytes:
                raise WireError(f"unfinished messages would pass {self._max_bytes} bytes")
            if key in self._open:
                raise WireError(f"message {key} begins twice")
            self._open[key] = (bytearray(header.total), 0)
            self._open_bytes += header.total
        data, filled = self._open.get(key, (bytearray(), -1))
        if filled != header.offset or len(data) != header.total:
            raise WireError(f"piece at {header.offset} of message {key} is out of order")
        return memoryview(data)[header.offset : header.offset + header.length]

    def commit(self, header: FrameHeader) -> Message | None:
        """The message, once its last piece has been filled."""
        key = _key(header)
        data, filled = self._open[key]
        filled += header.length
        if filled < header.total:
            self._open[key] = (data, filled)
            return None
        del self._open[key]
        self._open_bytes -= header.total
        source, rank, kind, epoch, sequence = key
        return Message(kind, source, rank, epoch, sequence, data)

    def drop_before(self, epoch: int) -> None:
        """Forget unfinished messages of older epochs."""
        for key in [key for key in self._open if key[3] < epoch]:
            data, _ = self._open.pop(key)
            self._open_bytes -= len(data)


def _key(header: FrameHeader) -> _Key:
    return (header.source, header.rank, header.kind, header.epoch, header.sequence)
