"""What a link is like, and the links that have names."""

import argparse
from dataclasses import dataclass, replace
from typing import Self


@dataclass(frozen=True, slots=True)
class Line:
    """One link. Times are of one way, and the same for both.

    Args:
        up: bits a second from the link's first host to its second.
        down: bits a second the other way.
        delay_s: that every packet waits.
        jitter_s: more wait, drawn anew from 0 to this every few packets; nothing is overtaken.
        loss: share of packets that vanish.
        buffer_s: what the bottleneck's queue holds, in seconds of its rate; the rest is dropped.
        mtu: bytes of a packet.
    """

    up: float
    down: float
    delay_s: float = 0.0
    jitter_s: float = 0.0
    loss: float = 0.0
    buffer_s: float = 0.1
    mtu: int = 1500

    @property
    def needs_relay(self) -> bool:
        """The kernel shapes a rate by itself; all else is done by a process."""
        return bool(self.delay_s or self.jitter_s or self.loss)

    def halved(self) -> Self:
        """Half of a path that leads over two such lines, one at each end."""
        loss = 1 - (1 - self.loss) ** 0.5
        return replace(self, delay_s=self.delay_s / 2, jitter_s=self.jitter_s / 2, loss=loss)


MBIT = 1e6
PROFILES = {
    "lan-10g": Line(10_000 * MBIT, 10_000 * MBIT),
    "wan-100m-15ms": Line(100 * MBIT, 100 * MBIT, delay_s=0.015),
    "dsl-10m-15ms": Line(10 * MBIT, 10 * MBIT, delay_s=0.015),
    "lte-jitter": Line(20 * MBIT, 50 * MBIT, delay_s=0.020, jitter_s=0.020),
    "lossy-1pct": Line(100 * MBIT, 100 * MBIT, delay_s=0.015, loss=0.01),
}


def add_profiles(parser: argparse.ArgumentParser) -> None:
    """Let a command take names of profiles."""

    def known(name: str) -> str:
        if name not in PROFILES:
            raise argparse.ArgumentTypeError(
                f"there is no profile {name}; there are {', '.join(PROFILES)}"
            )
        return name

    text = ", ".join(PROFILES)
    parser.add_argument("profiles", nargs="*", type=known, metavar="PROFILE", help=text)
