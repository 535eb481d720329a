"""The blocking end of a local socket: how engine and stages talk to their own agent.

A unix stream socket in a folder only the user can enter. Sending tries once without blocking and
leaves the rest to a thread, so that a stage computes its next step while its output still leaves;
end of file means that the agent is gone. Prefill and bulk have a socket of their own, which the
agent may leave unread while their lane of a link is full.
"""

import contextlib
import logging
import os
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path

from molink.core.errors import LinkError, MolinkError
from molink.core.ids import Address, Port
from molink.wire.assembly import Assembler, Message
from molink.wire.frames import HEADER_SIZE, FrameHeader, Kind, Priority, cut

logger = logging.getLogger("molink.agent")
SOCKET_BUFFER = 4 * 1024 * 1024  # bytes asked of the kernel, which may give less
MAX_UNFINISHED = 1 << 31  # bytes of messages that may be half received
_MAX_PIECES = 64  # buffers of one system call


class LocalSocket:
    """One process's connection to its agent. One thread receives; any thread may send.

    Raises:
        LinkError: no agent listens at `path`.
    """

    def __init__(self, path: Path, address: Address, rank: int = 0) -> None:
        self.address = address
        self.rank = rank
        self._path = path
        self._socket = _connect(path)
        self._assembler = Assembler(MAX_UNFINISHED)
        self._header = bytearray(HEADER_SIZE)
        self._outbox = _Outbox(self._socket)
        self._slow: _Outbox | None = None
        self._opening = threading.Lock()

    def send(
        self,
        kind: Kind,
        destination: Address,
        parts: Iterable[bytes | bytearray | memoryview],
        *,
        priority: Priority = Priority.CONTROL,
        epoch: int = 0,
        sequence: int = 0,
    ) -> None:
        """Send one message made of `parts`; returns before it has left.

        The parts' memory may be written again at once: what the kernel has not taken is copied
        (a middle stage's output is the buffer of its next input). When the agent is gone nothing
        leaves any more; `receive` says so.
        """
        pieces: list[memoryview] = []
        for header, piece in cut(
            kind,
            priority,
            self.address,
            destination,
            [memoryview(part).cast("B") for part in parts],
            epoch=epoch,
            sequence=sequence,
            rank=self.rank,
        ):
            pieces.append(memoryview(header))
            pieces.extend(piece)
        outbox = self._outbox if priority < Priority.PREFILL else self._slow_outbox()
        if outbox is not None:
            outbox.send(pieces)

    def _slow_outbox(self) -> "_Outbox | None":
        with self._opening:
            if self._slow is None:
                with contextlib.suppress(LinkError):  # `receive` says that the agent is gone
                    self._slow = _Outbox(_connect(self._path))
            return self._slow

    def receive(self) -> Message:
        """The next whole message; blocks.

        Raises:
            LinkError: the agent is gone.
            WireError: the bytes break the protocol.
        """
        while True:
            self._fill(memoryview(self._header))
            header = FrameHeader.unpack(self._header)
            self._fill(self._assembler.buffer(header))
            message = self._assembler.commit(header)
            if message is not None:
                return message

    def follow(self, handle: Callable[[bytes | bytearray], None]) -> None:
        """In a thread, hand on every control message of the agent; end the process with it."""

        def receive() -> None:
            agent = Address(self.address.node, Port.AGENT)
            try:
                while True:
                    message = self.receive()
                    if message.kind == Kind.CONTROL and message.source == agent:
                        handle(message.payload)
            except MolinkError:
                os._exit(1)
            except Exception:
                logger.exception("the agent said what nobody understands")
                os._exit(1)

        threading.Thread(target=receive, name="agent-client", daemon=True).start()

    def _fill(self, view: memoryview) -> None:
        while view.nbytes:
            try:
                count = self._socket.recv_into(view)
            except OSError as error:
                raise LinkError(f"the local agent's socket failed: {error}") from error
            if count == 0:
                raise LinkError("the local agent is gone")
            view = view[count:]

    def close(self) -> None:
        """Wake a blocked `receive`, which raises LinkError; what has not left yet is dropped."""
        with self._opening:
            for outbox in (self._outbox, self._slow):
                if outbox is not None:
                    outbox.close()


def _connect(path: Path) -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BUFFER)
    try:
        made.connect(str(path))
    except OSError as error:
        made.close()
        raise LinkError(f"no local agent at {path}: {error}") from error
    return made


class _Outbox:
    """Owns a socket. Sends what the kernel takes at once; a thread sends what is left, in order."""

    def __init__(self, target: socket.socket) -> None:
        self._socket = target
        self._pending: deque[memoryview] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._drain, name="local-outbox", daemon=True)
        self._thread.start()

    def send(self, pieces: list[memoryview]) -> None:
        with self._changed:
            if not self._pending and not self._closed:
                pieces = self._try_send(pieces)
            if pieces and not self._closed:
                self._pending.extend(memoryview(bytes(piece)) for piece in pieces)
                self._changed.notify()

    def _try_send(self, pieces: list[memoryview]) -> list[memoryview]:
        while pieces:
            try:
                count = self._socket.sendmsg(pieces[:_MAX_PIECES], (), socket.MSG_DONTWAIT)
            except BlockingIOError:
                break
            except OSError:
                return []  # the receiving side reports that the agent is gone
            pieces = _after(pieces, count)
        return pieces

    def _drain(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending or self._closed)
                if self._closed:
                    self._pending.clear()
                    return
                batch = list(islice(self._pending, _MAX_PIECES))
            try:
                rest = _after(batch, self._socket.sendmsg(batch))
            except OSError:
                rest, self._closed = batch, True
            with self._changed:
                for _ in batch:
                    self._pending.popleft()
                self._pending.extendleft(reversed(rest))

    def close(self) -> None:
        with contextlib.suppress(OSError):  # the other end was faster
            self._socket.shutdown(socket.SHUT_RDWR)
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()
        self._socket.close()


def _after(pieces: list[memoryview], count: int) -> list[memoryview]:
    """What is left of `pieces` after `count` bytes."""
    for index, piece in enumerate(pieces):
        if count < piece.nbytes:
            return [piece[count:], *pieces[index + 1 :]]
        count -= piece.nbytes
    return []
