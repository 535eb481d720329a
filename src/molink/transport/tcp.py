"""What the kernel knows of a link's TCP connection.

gRPC hides its sockets, so they are looked for among the process's own files. Losses are those that
TCP found: segments that it sent again, some of them for nothing.
"""

import os
import socket
import struct
from contextlib import suppress

_TOTAL_RETRANS, _DATA_SEGS_OUT = 100, 156  # offsets in struct tcp_info (linux/tcp.h)
_TCP_INFO_SIZE = 160
_U32 = struct.Struct("=I")
_LAP = 1 << 32  # the kernel's counters begin again
SEGMENTS = 500  # sent, before a share of them is believed


class TcpSocket:
    """A socket of this process that another part of it owns and may close at any time."""

    def __init__(self, fd: int, inode: int) -> None:
        self._fd = fd
        self._inode = inode
        self._before = (0, 0)  # segments sent, and sent again
        self._loss: float | None = None

    @property
    def loss(self) -> float | None:
        """Share of the last segments that were sent again; None: too few were, or it is unknown."""
        counted = self._count()
        if counted is not None:
            pairs = zip(counted, self._before, strict=True)
            sent, again = ((now - before) % _LAP for now, before in pairs)
            if sent >= SEGMENTS:
                self._before, self._loss = counted, min(again / sent, 1.0)
        return self._loss

    def _count(self) -> tuple[int, int] | None:
        with suppress(OSError, struct.error):
            if os.fstat(self._fd).st_ino != self._inode:
                return None
            # A copy that lived longer would keep the connection open.
            with socket.socket(fileno=os.dup(self._fd)) as copy:
                info = copy.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_SIZE)
            return (
                _U32.unpack_from(info, _DATA_SEGS_OUT)[0],
                _U32.unpack_from(info, _TOTAL_RETRANS)[0],
            )
        return None


def tcp_sockets() -> dict[int, tuple[int, tuple[str, int]]]:
    """This process's connected TCP sockets: inode -> (file descriptor, peer)."""
    found: dict[int, tuple[int, tuple[str, int]]] = {}
    with suppress(OSError):  # where there is no /proc, nothing is known
        for name in os.listdir("/proc/self/fd"):
            with suppress(OSError):
                if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                    with socket.socket(fileno=os.dup(int(name))) as copy:
                        if copy.family in (socket.AF_INET, socket.AF_INET6):
                            host, port, *_ = copy.getpeername()
                            found[os.fstat(int(name)).st_ino] = int(name), (_plain(host), port)
    return found


def accepted_from(host: str, port: int) -> TcpSocket | None:
    """The socket of a connection from that address; None: it is not found."""
    for inode, (fd, peer) in tcp_sockets().items():
        if peer == (_plain(host.strip("[]")), port):
            return TcpSocket(fd, inode)
    return None


def opened_since(before: dict[int, tuple[int, tuple[str, int]]], port: int) -> TcpSocket | None:
    """The one socket to that port that was not there before; None: it is not found."""
    new = [
        TcpSocket(fd, inode)
        for inode, (fd, peer) in tcp_sockets().items()
        if inode not in before and peer[1] == port
    ]
    return new[0] if len(new) == 1 else None


def _plain(host: str) -> str:
    """An IPv4 address as such, if a socket of both kinds says it in IPv6's way."""
    return host.removeprefix("::ffff:")
