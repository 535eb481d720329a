"""Hosts, the links between them, and what may happen to a link."""

import contextlib
import ctypes
import errno
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import count, pairwise
from pathlib import Path
from typing import Any, Self, TypeVar

from .profiles import Line

Result = TypeVar("Result")

RELAY = Path(__file__).with_name("relay.py")
NEEDED = {"ip": "iproute2", "tc": "iproute2"}
NEEDED_FOR_NAT = {"nft": "nftables"}
NEEDED_TO_MEASURE = {"ping": "iputils-ping", "iperf3": "iperf3"}
NEEDS_LARGE_PACKETS = 1e9  # bits a second, from which single packets cost too much
CLOSED_PORT = 9  # nobody listens there: a host that is reached refuses
_CLONE_NEWNET = 0x40000000
_NAT = """
add table ip nat
add chain ip nat out {{ type nat hook postrouting priority srcnat; }}
add rule ip nat out oifname != "{inside}" snat to {address}
add chain ip nat in {{ type filter hook forward priority 0; }}
add rule ip nat in iifname != "{inside}" ct state new drop
"""
_labs = count(1)


class LabError(Exception):
    """This machine cannot do what the lab needs; the message names it."""


def why_not(*, nat: bool = False, measured: bool = False) -> str | None:
    """What keeps this user from making a lab here, with a NAT, measured; None if nothing does."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    needed = NEEDED | (NEEDED_FOR_NAT if nat else {}) | (NEEDED_TO_MEASURE if measured else {})
    for command, package in needed.items():
        if shutil.which(command) is None:
            return f"{command} is not installed (Debian: {package})"
    if not Path("/dev/net/tun").exists():
        return "there is no /dev/net/tun"
    name = f"molink-try-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode != 0:
        return f"may not make network namespaces: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)
    return None


@dataclass(slots=True)
class _Host:
    namespace: str
    address: str
    router: str | None  # its NAT's, for a host behind one
    forwards: bool = False
    neighbours: dict[str, str] = field(default_factory=dict)  # host -> the device that leads there


class Lab:
    """Owns namespaces, devices and relays; a context manager that removes them."""

    def __init__(self) -> None:
        if reason := why_not():
            raise LabError(reason)
        self._prefix = f"molink-{os.getpid()}-{next(_labs)}"
        self._hosts: dict[str, _Host] = {}
        self._lines: dict[tuple[str, str], Line] = {}  # by their ends
        self._relays: dict[tuple[str, str], subprocess.Popen[str]] = {}  # by their ends

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for relay in self._relays.values():
            relay.communicate(timeout=5)  # closes its input, at which it ends
        for host in self._hosts.values():
            _end_processes(host.namespace)
            subprocess.run(
                ["ip", "netns", "delete", host.namespace], capture_output=True, check=False
            )

    # What there is

    def add_host(self, name: str, *, forwards: bool = False, behind_nat: bool = False) -> None:
        """A host with one address.

        Args:
            forwards: passes on what is not for itself.
            behind_nat: others cannot dial it, and see the address of its router.
        """
        number = len(self._hosts) + 1
        router = f"{name}-nat" if behind_nat else None
        host = _Host(f"{self._prefix}-{name}", f"10.77.0.{number}", router)
        _run("ip", "netns", "add", host.namespace)
        self._hosts[name] = host
        self.command(name, "ip", "link", "set", "lo", "up")
        self.command(name, "ip", "address", "add", f"{host.address}/32", "dev", "lo")
        self._set_forwarding(name, on=forwards)
        if router is not None:
            self._add_router(name, router)

    def _add_router(self, host: str, router: str) -> None:
        self.add_host(router, forwards=True)
        self._lay_cable(host, router)
        self._route()
        inside = self._hosts[router].neighbours[host]
        self.command(router, "nft", _NAT.format(inside=inside, address=self.address(router)))

    def link(self, one: str, other: str, line: Line) -> None:
        """Lay a link between two hosts, or between their routers."""
        one, other = self._door(one), self._door(other)
        if line.needs_relay:
            self._start_relay(one, other, line)
        else:
            self._lay_cable(one, other)
        if min(line.up, line.down) < NEEDS_LARGE_PACKETS:
            self._forbid_large_packets(one, other)
        self._lines[one, other] = line
        self._shape(one, other)
        self._route()

    def star(self, hosts: Sequence[str], line: Line) -> None:
        """Give each of these hosts its own access line, so that `line` is what lies between two."""
        self.add_host("internet", forwards=True)
        for host in hosts:
            self.link(host, "internet", line.halved())

    def line(self, hosts: Sequence[str], line: Line) -> None:
        """Link each of these hosts to the next; those between forward."""
        for host in hosts[1:-1]:
            self._set_forwarding(host, on=True)
        for one, other in pairwise(hosts):
            self.link(one, other, line)

    def address(self, host: str) -> str:
        return self._hosts[host].address

    def device(self, host: str, neighbour: str) -> str:
        """The name of the device of `host` that leads to a neighbour."""
        return self._hosts[host].neighbours[self._door(neighbour)]

    # What happens to a link

    def cut(self, one: str, other: str) -> None:
        """Have every packet on a link vanish, until `restore` or `set_rate`."""
        self._shape(*self._ends(one, other), is_cut=True)

    def restore(self, one: str, other: str) -> None:
        """Undo `cut`."""
        self._shape(*self._ends(one, other))

    def set_rate(self, one: str, other: str, up: float, down: float) -> None:
        """Change the rates of a link, in bits a second; `up` is from `one` to `other`."""
        ends = self._ends(one, other)
        if ends[0] != self._door(one):
            up, down = down, up
        self._lines[ends] = replace(self._lines[ends], up=up, down=down)
        self._shape(*ends)

    def change(self, one: str, other: str, line: Line) -> None:
        """Make a link another one, while whatever uses it goes on; `line.up` is from `one`."""
        ends = self._ends(one, other)
        if ends[0] != self._door(one):
            line = replace(line, up=line.down, down=line.up)
        if relay := self._relays.get(ends):
            assert relay.stdin is not None
            relay.stdin.write(f"{line.delay_s} {line.jitter_s} {line.loss}\n")
            relay.stdin.flush()
        elif line.needs_relay:
            raise LabError("a link without a relay cannot become one that needs it")
        self._lines[ends] = line
        self._shape(*ends)

    # Work on a host

    def prefix(self, host: str) -> list[str]:
        """What runs a command on that host."""
        return ["ip", "netns", "exec", self._hosts[host].namespace]

    def command(self, host: str, *arguments: str) -> str:
        """Run a command there to its end; what it printed."""
        return _run(*self.prefix(host), *arguments)

    def popen(self, host: str, arguments: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        return subprocess.Popen([*self.prefix(host), *arguments], **options)

    def call(self, host: str, function: Callable[[], Result]) -> Result:
        """Call `function` on that host: what it connects to and starts is there."""
        namespace = self._hosts[host].namespace
        with ThreadPoolExecutor(1, initializer=_enter, initargs=(namespace,)) as thread:
            return thread.submit(function).result()

    def can_reach(self, host: str, other: str) -> bool:
        """Whether packets of `host` reach `other` and come back."""

        def try_it() -> bool:
            with socket.socket() as probe:
                probe.settimeout(1.0)
                return probe.connect_ex((self.address(other), CLOSED_PORT)) == errno.ECONNREFUSED

        return self.call(host, try_it)

    def bytes_sent(self, host: str, neighbour: str) -> int:
        """What has left `host` for a neighbour, with the headers of IP."""
        device = self.device(host, neighbour)
        lines = self.call(host, Path("/proc/thread-self/net/dev").read_text).splitlines()
        counters = next(line for line in lines if line.strip().startswith(f"{device}:"))
        return int(counters.split(":")[1].split()[8])

    # Devices and routes

    def _set_forwarding(self, host: str, *, on: bool) -> None:
        """Said to hosts that do not, too: a new namespace does what the machine does."""
        self._hosts[host].forwards = on
        switch = Path("/proc/sys/net/ipv4/ip_forward")
        self.call(host, lambda: switch.write_text("1" if on else "0"))

    def _door(self, host: str) -> str:
        return self._hosts[host].router or host

    def _ends(self, one: str, other: str) -> tuple[str, str]:
        """The two ends of a link, in the order in which it was laid."""
        ends = self._door(one), self._door(other)
        return ends if ends in self._lines else (ends[1], ends[0])

    def _join(self, one: str, other: str) -> tuple[str, str]:
        """Names for the devices of a new link."""
        devices = f"to-{other}"[:15], f"to-{one}"[:15]
        self._hosts[one].neighbours[other], self._hosts[other].neighbours[one] = devices
        return devices

    def _lay_cable(self, one: str, other: str) -> None:
        first, second = self._join(one, other)
        ends = [self._hosts[host].namespace for host in (one, other)]
        peer = ("peer", "name", second, "netns", ends[1])
        _run("ip", "link", "add", first, "netns", ends[0], "type", "veth", *peer)
        self._bring_up(one, other)

    def _start_relay(self, one: str, other: str, line: Line) -> None:
        first, second = self._join(one, other)
        places = [
            f"{self._hosts[host].namespace}:{device}"
            for host, device in ((one, first), (other, second))
        ]
        numbers = (line.delay_s, line.jitter_s, line.loss, len(self._relays))
        relay = subprocess.Popen(
            [sys.executable, RELAY, *places, *map(str, numbers)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for whoever uses the lab
        )
        self._relays[one, other] = relay
        assert relay.stdout is not None
        if relay.stdout.readline() != "ready\n":
            raise LabError("the relay of packets did not start")
        self._bring_up(one, other, "mtu", str(line.mtu))

    def _bring_up(self, one: str, other: str, *settings: str) -> None:
        """Every device of a host has the host's address: Gloo looks for one on the device."""
        for host, peer in ((one, other), (other, one)):
            device = self._hosts[host].neighbours[peer]
            self.command(host, "ip", "link", "set", device, *settings, "up")
            self.command(host, "ip", "address", "add", f"{self.address(host)}/32", "dev", device)

    def _forbid_large_packets(self, one: str, other: str) -> None:
        """Have TCP cut its segments itself: one that waits while the burst shrinks must fit in."""
        for host, peer in ((one, other), (other, one)):
            device = self._hosts[host].neighbours[peer]
            self.command(host, "ip", "link", "set", device, "gso_max_segs", "1")

    def _shape(self, one: str, other: str, *, is_cut: bool = False) -> None:
        """Have the kernel send at the line's rates, each with a queue before it."""
        line = self._lines[one, other]
        for host, peer, rate in ((one, other, line.up), (other, one, line.down)):
            burst = max(2 * line.mtu, rate / 8 * 1e-3)
            queue = 1 if is_cut else burst + rate / 8 * line.buffer_s  # one byte: no packet fits
            shape = ("rate", f"{rate:.0f}", "burst", f"{burst:.0f}", "limit", f"{queue:.0f}")
            device = self._hosts[host].neighbours[peer]
            self.command(host, "tc", "qdisc", "replace", "dev", device, "root", "tbf", *shape)

    def _route(self) -> None:
        """Tell every host the device on its way to every other one it can dial."""
        for name, host in self._hosts.items():
            for other, neighbour in self._ways(name).items():
                self._add_route(name, f"{self.address(other)}/32", neighbour)
            if host.neighbours:  # vLLM and torch take the address on it for this machine's
                self._add_route(name, "default", next(iter(host.neighbours)))

    def _add_route(self, host: str, target: str, neighbour: str) -> None:
        way = ("via", self.address(neighbour), "dev", self._hosts[host].neighbours[neighbour])
        source = ("onlink", "src", self.address(host))
        self.command(host, "ip", "route", "replace", target, *way, *source)

    def _ways(self, start: str) -> dict[str, str]:
        """For every host that `start` can dial, the neighbour that packets for it go to."""
        ways: dict[str, str] = {}
        queue = deque((peer, peer) for peer in self._hosts[start].neighbours)
        while queue:
            name, neighbour = queue.popleft()
            if name == start or name in ways:
                continue
            ways[name] = neighbour
            host = self._hosts[name]
            for peer in host.neighbours if host.forwards else ():
                if self._hosts[peer].router != name:  # a NAT lets nobody in
                    queue.append((peer, neighbour))
        return ways


def _enter(namespace: str) -> None:
    """Move this thread; threads and processes that it starts are moved too."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{namespace}") as file:
        if libc.setns(file.fileno(), _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"cannot enter {namespace}")


def _end_processes(namespace: str) -> None:
    found = subprocess.run(
        ["ip", "netns", "pids", namespace], capture_output=True, text=True, check=False
    )
    for process in map(int, found.stdout.split()):
        if process != os.getpid():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)


def _run(*arguments: str) -> str:
    ended = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if ended.returncode != 0:
        raise LabError(f"{' '.join(arguments)}: {ended.stderr.strip()}")
    return ended.stdout
