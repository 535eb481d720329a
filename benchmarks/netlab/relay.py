"""Holds packets back between two hosts, because this kernel may have no `netem`.

    python relay.py NAMESPACE:DEVICE NAMESPACE:DEVICE DELAY_S JITTER_S LOSS SEED

Makes a TUN device in each namespace and says `ready`. A line `DELAY_S JITTER_S LOSS` changes what
happens to packets from then on; it ends when its input does.
"""

import ctypes
import fcntl
import os
import random
import select
import struct
import sys
import time
from collections import deque

_CLONE_NEWNET = 0x40000000
_TUNSETIFF = 0x400454CA
_IFF_TUN, _IFF_NO_PI = 0x0001, 0x1000
MAX_PACKET = 65536
JITTER_HOLDS_S = 0.04  # one draw; of one for every packet, a stream would see only the largest
TICK_S = 0.0005  # packets of so long are read and written together: a wake costs more than they do
PRIORITY = 50  # among real-time processes: what is measured must not disturb the clock


class Direction:
    """Packets from one device on their way to the other."""

    def __init__(
        self, source: int, target: int, delay_s: float, jitter_s: float, loss: float, seed: int
    ) -> None:
        self.source = source
        self._target = target
        self.change(delay_s, jitter_s, loss)
        self._random = random.Random(seed)
        self._waiting: deque[tuple[float, bytes]] = deque()
        self._extra_s = 0.0
        self._extra_until = 0.0
        self._last_due = 0.0

    def change(self, delay_s: float, jitter_s: float, loss: float) -> None:
        self._delay_s, self._jitter_s, self._loss = delay_s, jitter_s, loss

    @property
    def due(self) -> float:
        return self._waiting[0][0] if self._waiting else float("inf")

    def take(self) -> None:
        """Read all packets that are there."""
        while True:
            try:
                packet = os.read(self.source, MAX_PACKET)
            except BlockingIOError:
                return
            if self._loss and self._random.random() < self._loss:
                continue
            now = time.monotonic()
            if self._jitter_s and now >= self._extra_until:
                self._extra_s = self._random.uniform(0.0, self._jitter_s)
                self._extra_until = now + JITTER_HOLDS_S
            self._last_due = max(self._last_due, now + self._delay_s + self._extra_s)
            self._waiting.append((self._last_due, packet))

    def deliver(self, now: float) -> None:
        """Write the packets whose time has come; a device that takes none loses them."""
        while self._waiting and self._waiting[0][0] <= now:
            _, packet = self._waiting.popleft()
            try:
                os.write(self._target, packet)
            except OSError:
                continue


def open_tun(place: str) -> int:
    """Make DEVICE in NAMESPACE (`/run/netns`), and stay there."""
    namespace, _, device = place.partition(":")
    with open(f"/run/netns/{namespace}") as file:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(file.fileno(), _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"cannot enter {namespace}")
    tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tun, _TUNSETIFF, struct.pack("16sH", device.encode(), _IFF_TUN | _IFF_NO_PI))
    return tun


def main() -> None:
    first, second = map(open_tun, sys.argv[1:3])
    delay_s, jitter_s, loss = map(float, sys.argv[3:6])
    seed = int(sys.argv[6])
    directions = {
        first: Direction(first, second, delay_s, jitter_s, loss, seed),
        second: Direction(second, first, delay_s, jitter_s, loss, seed + 1),
    }
    os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(PRIORITY))
    print("ready", flush=True)
    while True:
        wait_s = min(direction.due for direction in directions.values()) - time.monotonic()
        timeout = None if wait_s == float("inf") else max(0.0, wait_s)
        readable, _, _ = select.select([*directions, sys.stdin], [], [], timeout)
        if sys.stdin in readable:
            if not (line := sys.stdin.readline()):
                return
            readable.remove(sys.stdin)
            for direction in directions.values():
                direction.change(*map(float, line.split()))
        for source in readable:
            directions[source].take()
        now = time.monotonic()
        for direction in directions.values():
            direction.deliver(now)
        time.sleep(TICK_S)


if __name__ == "__main__":
    main()
