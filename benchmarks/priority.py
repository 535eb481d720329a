"""What a full link does to frames that matter more: two agents across slow links.

One agent sends PREFILL frames without end and, ten times a second, a DECODE message of 4 KiB; both
read one clock, so the delay of each DECODE message is of one way. Prints a table, writes JSON,
asserts nothing.

    python benchmarks/priority.py [PROFILE…] [--seconds S] [--tcp reno] [--json FILE]

Needs root, iproute2 and /dev/net/tun.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import struct
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import uvloop
from netlab import PROFILES, Lab, Line, add_profiles, why_not
from rich.console import Console
from rich.table import Table
from transport import OTHER, BenchAgent, make_identities
from workload import quantile

from molink.core.ids import HEAD, Address, NodeId, Port
from molink.node.home import RunFolder
from molink.transport.credentials import server_credentials
from molink.transport.identity import NodeIdentity
from molink.transport.link import Link
from molink.transport.server import Accepted, LinkServer, dial
from molink.wire.frames import MAX_PAYLOAD, Kind, Priority, cut

DEFAULT_PROFILES = ("dsl-10m-15ms", "wan-100m-15ms", "lte-jitter", "lossy-1pct")
PORT = 7341
DECODE_INTERVAL_S = 0.1
DECODE_SIZE = 4096  # bytes
WARM_UP_S = 3.0
_STAMP = struct.Struct("<d")


@dataclass(frozen=True, slots=True)
class Delays:
    """Of DECODE messages, one way, in seconds."""

    median: float
    p99: float
    most: float
    count: int

    @classmethod
    def of(cls, delays: list[float]) -> "Delays":
        return cls(quantile(delays, 0.5), quantile(delays, 0.99), max(delays), len(delays))


@dataclass(frozen=True, slots=True)
class Result:
    idle: Delays
    full: Delays
    utilisation: float  # bytes of frames that arrived, as a share of the line's rate


class StampedAgent(BenchAgent):
    """Notes how old each DECODE message is when it arrives."""

    def __init__(self, node: NodeId, run_folder: RunFolder) -> None:
        super().__init__(node, run_folder, lambda _: None, lambda _: None)
        self.delays: list[float] = []

    def on_remote(self, node: NodeId, payload: bytes) -> None:
        if len(payload) == DECODE_SIZE:
            self.delays.append(time.monotonic() - _STAMP.unpack_from(payload)[0])
        else:
            super().on_remote(node, payload)


def run_agent(node: int, folder: str, pipe: Connection, address: str) -> None:
    """One agent process; the first listens and receives, the second dials it and sends."""
    uvloop.run((_receive if node == HEAD else _send)(Path(folder), pipe, address))
    os._exit(0)


async def _receive(folder: Path, pipe: Connection, address: str) -> None:
    identity = NodeIdentity.load(folder / f"{HEAD}.pem")
    agent = StampedAgent(HEAD, RunFolder())
    agent.switch.stage_nodes = (HEAD, OTHER)

    async def accept(accepted: Accepted) -> None:
        await agent.run_link(accepted.link)

    server = LinkServer(lambda: identity.authority_pem, accept)
    await server.start(address, server_credentials(lambda: identity))
    pipe.send(None)
    while await asyncio.to_thread(pipe.recv):
        agent.delays.clear()
        link = agent.switch.links[OTHER]
        before, since = link.bytes_received, time.monotonic()
        pipe.send(None)
        await asyncio.to_thread(pipe.recv)
        rate = (link.bytes_received - before) / (time.monotonic() - since)
        pipe.send((list(agent.delays), rate))
    agent.run_folder.remove()


async def _send(folder: Path, pipe: Connection, address: str) -> None:
    identity = NodeIdentity.load(folder / f"{OTHER}.pem")
    agent = BenchAgent(OTHER, RunFolder(), lambda _: None, lambda _: None)
    dialled = await dial(address, identity, HEAD, 10.0)
    agent.spawn(agent.run_link(dialled.link))
    agent.spawn(_send_decode(dialled.link))
    pipe.send(None)
    filling: asyncio.Task[None] | None = None
    while (is_full := await asyncio.to_thread(pipe.recv)) is not None:
        if is_full:
            filling = asyncio.create_task(_send_prefill(dialled.link))
    if filling is not None:
        filling.cancel()
        with suppress(asyncio.CancelledError):
            await filling
    agent.run_folder.remove()


async def _send_decode(link: Link) -> None:
    while True:
        _put(link, Kind.CONTROL, Priority.DECODE, Port.AGENT, DECODE_SIZE)
        await asyncio.sleep(DECODE_INTERVAL_S)


async def _send_prefill(link: Link) -> None:
    while True:
        room = _put(link, Kind.ACTIVATIONS, Priority.PREFILL, Port.GATEWAY, MAX_PAYLOAD)
        if room is not None:
            await room


def _put(link: Link, kind: Kind, priority: Priority, port: Port, size: int) -> Any:
    payload = _STAMP.pack(time.monotonic()) + bytes(size - _STAMP.size)
    source, destination = Address(OTHER, Port.AGENT), Address(HEAD, port)
    (header, pieces), *_ = cut(kind, priority, source, destination, [memoryview(payload)])
    return link.send(b"".join([header, *pieces]), priority)


def measure(line: Line, seconds: float, tcp: str | None) -> Result:
    context = multiprocessing.get_context("spawn")
    with Lab() as lab, tempfile.TemporaryDirectory() as folder:
        make_identities(Path(folder))
        lab.add_host("head")
        lab.add_host("far")
        lab.link("far", "head", line)
        for host in ("head", "far") if tcp else ():
            lab.command(host, "sysctl", "-qw", f"net.ipv4.tcp_congestion_control={tcp}")
        pipes = []
        for node, host in ((HEAD, "head"), (OTHER, "far")):
            ours, theirs = context.Pipe()
            place = f"{lab.address('head')}:{PORT}"
            process = context.Process(
                target=run_agent, args=(node, folder, theirs, place), daemon=True
            )
            lab.call(host, process.start)
            ours.recv()
            pipes.append(ours)
        receiver, sender = pipes
        time.sleep(WARM_UP_S)
        idle, _ = _during(receiver, seconds / 2)
        sender.send(True)
        time.sleep(WARM_UP_S)
        full, rate = _during(receiver, seconds)
        for pipe in (sender, receiver):
            pipe.send(None)
        return Result(Delays.of(idle), Delays.of(full), rate * 8 / line.up)


def _during(receiver: Connection, seconds: float) -> tuple[list[float], float]:
    """Delays and bytes a second of a while."""
    receiver.send(True)
    receiver.recv()
    time.sleep(seconds)
    receiver.send(True)
    found: tuple[list[float], float] = receiver.recv()
    return found


def table(found: dict[str, Result]) -> Table:
    made = Table("link", "idle, ms", "full: median", "p99", "most", "more than idle", "used")
    for name, result in found.items():
        values = (result.idle.median, result.full.median, result.full.p99, result.full.most)
        cells = [f"{value * 1e3:.1f}" for value in values]
        more = f"{(result.full.median - result.idle.median) * 1e3:.1f}"
        made.add_row(name, *cells, more, f"{result.utilisation:.3f}")
    return made


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_profiles(parser)
    parser.add_argument("--seconds", type=float, default=20.0, help="with a full link")
    parser.add_argument("--tcp", help="congestion control; the machine's if not given")
    parser.add_argument("--json", type=Path, help="write every figure here")
    options = parser.parse_args()
    if reason := why_not():
        sys.exit(f"no lab: {reason}")
    resource_tracker.ensure_running()  # here: what begins in a lab ends with it
    found = {
        name: measure(PROFILES[name], options.seconds, options.tcp)
        for name in options.profiles or DEFAULT_PROFILES
    }
    Console(highlight=False).print(table(found))
    if options.json:
        figures = {name: asdict(result) for name, result in found.items()}
        options.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
