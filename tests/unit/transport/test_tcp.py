"""The kernel's figures of sockets that somebody else owns."""

import socket
from collections.abc import Iterator

import pytest

from molink.transport.tcp import SEGMENTS, accepted_from, opened_since, tcp_sockets

Ends = tuple[socket.socket, socket.socket]


@pytest.fixture
def ends() -> Iterator[Ends]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        far, _ = server.accept()
        with near, far:
            near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            yield near, far


def test_a_socket_is_found_from_either_end(ends: Ends) -> None:
    near, far = ends
    assert accepted_from(*near.getsockname()) is not None
    before = {inode: at for inode, at in tcp_sockets().items() if at[0] != near.fileno()}
    assert opened_since(before, far.getsockname()[1]) is not None
    assert opened_since(tcp_sockets(), far.getsockname()[1]) is None
    assert accepted_from("127.0.0.1", 1) is None


def test_a_loss_is_said_after_enough_segments(ends: Ends) -> None:
    near, far = ends
    found = opened_since({}, far.getsockname()[1])
    assert found is not None
    assert found.loss is None
    for _ in range(SEGMENTS):
        near.send(b"x")
        far.recv(1)
    assert found.loss == 0.0


def test_a_closed_socket_s_number_may_be_another_s(ends: Ends) -> None:
    near, far = ends
    found = opened_since({}, far.getsockname()[1])
    assert found is not None
    number = near.fileno()
    near.close()
    with socket.socket() as other:
        assert other.fileno() == number
        assert found.loss is None


def test_looking_does_not_keep_a_connection_open(ends: Ends) -> None:
    near, far = ends
    found = opened_since({}, far.getsockname()[1])
    assert found is not None
    assert found.loss is None
    near.close()
    far.settimeout(5)
    assert far.recv(1) == b""
