"""Network namespaces: machines with addresses of their own, and only the ways between them that a
test lays. Needs root."""

import ctypes
import errno
import os
import socket
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self, TypeVar

_CLONE_NEWNET = 0x40000000
CLOSED_PORT = 9  # nobody listens there: a host that is reached refuses
_libc = ctypes.CDLL(None, use_errno=True)
Result = TypeVar("Result")


def can_make_namespaces() -> bool:
    """Whether this user may make a namespace here; in a container root may not."""
    name = f"molink-try-{os.getpid()}"
    try:
        made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False)
    except FileNotFoundError:
        return False
    if made.returncode == 0:
        _ip("netns", "delete", name)
    return made.returncode == 0


class Namespaces:
    """Hosts named `head`, `a` and so on; a context manager that removes them.

    Host number i has the address 10.77.i.2, and 10.77.i.1 is the head's end of its only way.
    Nobody forwards: two hosts reach each other when `connect` has laid a way between them.
    """

    def __init__(self, *hosts: str) -> None:
        self._hosts = hosts
        self._addresses = {host: f"10.77.{i}.2" for i, host in enumerate(hosts, 1)}

    def __enter__(self) -> Self:
        try:
            for host in ("head", *self._hosts):
                _ip("netns", "add", _name(host))
                _ip("-n", _name(host), "link", "set", "lo", "up")
                run_in(host, _do_not_forward)
            for host, address in self._addresses.items():
                gateway = f"{address.removesuffix('2')}1"
                self._lay("head", host)
                _ip("-n", _name("head"), "address", "add", f"{gateway}/24", "dev", f"to-{host}")
                _ip("-n", _name(host), "address", "add", f"{address}/24", "dev", "to-head")
                # vLLM and torch take the address on the default route for this machine's.
                _ip("-n", _name(host), "route", "add", "default", "via", gateway)
            first = self._addresses[self._hosts[0]]
            _ip("-n", _name("head"), "route", "add", "default", "via", first)
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._remove()

    def connect(self, one: str, other: str) -> None:
        """Lay a way between two hosts that had none."""
        self._lay(one, other)
        for host, peer in ((one, other), (other, one)):
            route = ("route", "add", f"{self._addresses[peer]}/32", "dev", f"to-{peer}")
            _ip("-n", _name(host), *route, "src", self._addresses[host])

    def can_reach(self, host: str, other: str) -> bool:
        """Whether packets of `host` reach `other` ("head" or a host) and come back."""
        target = (self._addresses.get(other, "10.77.1.1"), CLOSED_PORT)

        def try_it() -> bool:
            with socket.socket() as probe:
                probe.settimeout(1.0)
                return probe.connect_ex(target) == errno.ECONNREFUSED

        return run_in(host, try_it)

    def _lay(self, one: str, other: str) -> None:
        ends = ("link", "add", f"to-{other}", "netns", _name(one), "type", "veth")
        _ip(*ends, "peer", "name", f"to-{one}", "netns", _name(other))
        _ip("-n", _name(one), "link", "set", f"to-{other}", "up")
        _ip("-n", _name(other), "link", "set", f"to-{one}", "up")

    def _remove(self) -> None:
        for host in ("head", *self._hosts):
            subprocess.run(["ip", "netns", "delete", _name(host)], capture_output=True, check=False)


def command_prefix(host: str) -> list[str]:
    """What runs a command on that host."""
    return ["ip", "netns", "exec", _name(host)]


def run_in(host: str, function: Callable[[], Result]) -> Result:
    """Call `function` on that host: what it connects to and starts is there."""
    with ThreadPoolExecutor(1, initializer=_enter, initargs=(_name(host),)) as thread:
        return thread.submit(function).result()


def _enter(namespace: str) -> None:
    """Move this thread; threads and processes that it starts are moved too."""
    with open(f"/run/netns/{namespace}") as file:
        if _libc.setns(file.fileno(), _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"cannot enter {namespace}")


def _do_not_forward() -> None:
    """A new namespace does what the machine does, and one with containers forwards."""
    Path("/proc/sys/net/ipv4/ip_forward").write_text("0")


def _name(host: str) -> str:
    return f"molink-{os.getpid()}-{host}"


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
