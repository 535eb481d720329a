"""Putting messages together from frames, within a bound."""

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

from molink.core.ids import HEAD, Address, NodeId
from molink.wire.frames import MAX_PAYLOAD, FrameHeader, Kind

# So that messages up to 4 MiB, and longer ones soon, need no copy to grow. Python fills a new
# bytearray with zeros: what is announced takes memory at once, measured as 1024 MiB for 1 GiB.
TRUST = 16
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
    again, when one of its pieces turns out to be missing, or when its node or the head, whose word
    it is, begins a newer epoch; what still arrives of it is skipped, because the receiver has done
    nothing wrong and lives on.

    The memory of unfinished messages is bounded. Where the bound would be passed, all those of the
    node that holds most are dropped (longest queue drop: Suter et al., INFOCOM 1998). So of N nodes
    one that holds at most 1/N of the bound loses nothing, whatever the others send. A node counts
    as one because links vouch for it; port and rank in a header are what its sender likes.

    Args:
        max_bytes: the bound. What a header announces is believed up to TRUST times what arrived.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._open: dict[_Key, _Unfinished] = {}
        self._open_bytes = 0
        self._epochs: dict[NodeId, int] = {}  # the newest one each node has sent in
        self.skipped = 0  # pieces of messages that lost an earlier piece
        self.dropped = 0  # unfinished messages, to stay within the bound

    def buffer(self, header: FrameHeader) -> memoryview:
        """Where the piece's payload goes (`header.length` bytes); fill it, then `commit`."""
        key = _key(header)
        if header.offset == 0:
            self._begin(key, header)
        message = self._open.get(key)
        if message is None or (message.filled, message.total) != (header.offset, header.total):
            self._forget(key)
            self.skipped += 1
            return memoryview(bytearray(header.length))
        end = header.offset + header.length
        if end > len(message.data) and not self._grow(key, message, end):
            return memoryview(bytearray(header.length))
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
        node = header.source.node
        if header.epoch > self._epochs.get(node, 0):
            self._epochs[node] = header.epoch
            for old in [old for old in self._open if 0 < old[3] < header.epoch]:
                if node in (HEAD, old[0].node):
                    self._forget(old)
        self._forget(key)
        self._open[key] = _Unfinished(header.total)

    def _grow(self, key: _Key, message: _Unfinished, end: int) -> bool:
        """Make room for `end` bytes, and for more to come; False if the message was dropped."""
        size = min(message.total, TRUST * end)
        more = size - len(message.data)
        while self._open_bytes + more > self._max_bytes:
            self._drop_most(key, more)
            if key not in self._open:
                return False
        grown = bytearray(size)
        grown[: message.filled] = memoryview(message.data)[: message.filled]
        message.data = grown
        self._open_bytes += more
        return True

    def _drop_most(self, key: _Key, more: int) -> None:
        """Drop what the node holds that holds most, once `key` has got `more` bytes."""
        held: Counter[NodeId] = Counter({key[0].node: more})
        for (source, *_), message in self._open.items():
            held[source.node] += len(message.data)
        most = max(held, key=held.__getitem__)
        for old in [old for old in self._open if old[0].node == most]:
            self._forget(old)
            self.dropped += 1

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
