"""The network lab: what its links do to packets, who can dial whom, and cuts."""

import socket
import threading
import time
from collections.abc import Iterator

import pytest
from benchmarks.netlab import PROFILES, Lab, LabError, Line, why_not

pytestmark = [pytest.mark.netns, pytest.mark.timeout(60)]

FAST = Line(1e9, 1e9)
SO_RCVBUFFORCE = 33  # Linux; Python has no name for it


@pytest.fixture
def lab() -> Iterator[Lab]:
    if reason := why_not():
        pytest.skip(reason)
    with Lab() as lab:
        yield lab


def hosts(lab: Lab, *names: str) -> None:
    for name in names:
        lab.add_host(name)


def rtt_s(lab: Lab, one: str, other: str) -> float:
    """The least seconds of ten handshakes: each is one round trip."""
    found = []
    for _ in range(10):
        begin = time.perf_counter()
        assert lab.can_reach(one, other)
        found.append(time.perf_counter() - begin)
    return min(found)


def accept_one(lab: Lab, host: str) -> tuple[int, threading.Thread, list[str]]:
    """Listen on a port there; its thread ends with the address of who has called."""
    callers: list[str] = []
    server = lab.call(host, lambda: socket.create_server(("", 0)))
    server.settimeout(5)

    def accept() -> None:
        with server:
            connection, (address, _) = server.accept()
            callers.append(address)
            connection.close()

    thread = threading.Thread(target=accept)
    thread.start()
    return server.getsockname()[1], thread, callers


def seconds_to_send(lab: Lab, one: str, other: str, size: int) -> float:
    """From the first byte sent to the last received."""
    server = lab.call(other, lambda: socket.create_server(("", 0)))
    client = lab.call(
        one, lambda: socket.create_connection((lab.address(other), server.getsockname()[1]), 5)
    )
    connection, _ = server.accept()
    with server, client, connection:
        connection.settimeout(20)
        begin = time.perf_counter()
        sender = threading.Thread(target=client.sendall, args=(bytes(size),))
        sender.start()
        received = 0
        while received < size:
            received += len(connection.recv(1 << 16))
        sender.join()
        return time.perf_counter() - begin


@pytest.mark.parametrize("shape", ["star", "line"])
def test_a_delay_is_that_of_the_whole_way(lab: Lab, shape: str) -> None:
    hosts(lab, "a", "b", "c")
    getattr(lab, shape)(["a", "b", "c"], Line(1e9, 1e9, delay_s=0.02))
    expected = {"star": (0.04, 0.04), "line": (0.04, 0.08)}[shape]
    for other, seconds in zip(("b", "c"), expected, strict=True):
        assert seconds <= rtt_s(lab, "a", other) < seconds + 0.02


def test_each_direction_has_its_rate_and_it_changes(lab: Lab) -> None:
    hosts(lab, "a", "b")
    lab.link("a", "b", Line(up=8e6, down=80e6))
    assert 0.8 < seconds_to_send(lab, "a", "b", 1_000_000) < 1.5
    assert 0.05 < seconds_to_send(lab, "b", "a", 1_000_000) < 0.4
    lab.set_rate("b", "a", up=8e6, down=80e6)
    assert 0.05 < seconds_to_send(lab, "a", "b", 1_000_000) < 0.4
    assert 0.8 < seconds_to_send(lab, "b", "a", 1_000_000) < 1.5


def test_a_full_link_becomes_another_and_goes_on(lab: Lab) -> None:
    hosts(lab, "a", "b")
    lab.link("a", "b", Line(100e6, 100e6, delay_s=0.005))
    slower = threading.Timer(0.1, lab.change, ("b", "a", Line(50e6, 10e6, delay_s=0.02)))
    slower.start()
    assert 1.0 < seconds_to_send(lab, "a", "b", 3_000_000) < 5
    assert 0.04 <= rtt_s(lab, "a", "b") < 0.06
    assert 3_000_000 < lab.bytes_sent("a", "b") < 3_500_000


def test_a_link_without_a_relay_gets_no_delay(lab: Lab) -> None:
    hosts(lab, "a", "b")
    lab.link("a", "b", FAST)
    with pytest.raises(LabError, match="without a relay"):
        lab.change("a", "b", Line(1e9, 1e9, delay_s=0.02))


def test_some_packets_vanish_and_tcp_mends_it(lab: Lab) -> None:
    hosts(lab, "a", "b")
    lab.link("a", "b", Line(50e6, 50e6, delay_s=0.005, loss=0.05))
    received = datagrams(lab, "a", "b", 1000)
    assert 920 <= received <= 980
    assert seconds_to_send(lab, "a", "b", 500_000) < 10


def datagrams(lab: Lab, one: str, other: str, number: int) -> int:
    """How many of so many small datagrams arrive."""

    def bound() -> socket.socket:
        made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        made.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 8 << 20)
        made.bind(("", 0))
        made.settimeout(0.5)
        return made

    with lab.call(one, bound) as source, lab.call(other, bound) as target:
        address = (lab.address(other), target.getsockname()[1])
        for _ in range(number):
            source.sendto(b"x" * 100, address)
            time.sleep(0.0005)
        received = 0
        try:
            while True:
                target.recv(200)
                received += 1
        except TimeoutError:
            return received


def test_behind_a_nat_a_host_dials_and_is_not_dialled(lab: Lab) -> None:
    if reason := why_not(nat=True):
        pytest.skip(reason)
    lab.add_host("head")
    lab.add_host("home", behind_nat=True)
    lab.link("head", "home", FAST)
    assert lab.can_reach("home", "head")
    assert not lab.can_reach("head", "home")
    port, thread, callers = accept_one(lab, "head")
    target = (lab.address("head"), port)
    lab.call("home", lambda: socket.create_connection(target, 5)).close()
    thread.join()
    assert callers == [lab.address("home-nat")]


def test_a_cut_link_is_silent_until_it_is_restored(lab: Lab) -> None:
    hosts(lab, "a", "b")
    lab.link("a", "b", PROFILES["dsl-10m-15ms"])
    for _ in range(2):
        assert lab.can_reach("a", "b")
        lab.cut("a", "b")
        assert not lab.can_reach("a", "b")
        assert not lab.can_reach("b", "a")
        lab.restore("b", "a")
    assert lab.can_reach("b", "a")


def test_two_labs_do_not_meet(lab: Lab) -> None:
    hosts(lab, "a")
    with Lab() as other:
        hosts(other, "a", "b")
        other.link("a", "b", FAST)
        assert other.can_reach("a", "b")
    assert lab.command("a", "ip", "-o", "link").count("\n") == 1  # its loopback alone
