"""What the wire costs: agent to agent, and stage to stage through both agents, TLS on, loopback.

Real processes: two agents, and at each a process on its local socket. Prints a table, writes JSON.

    python benchmarks/transport.py [--json FILE]
"""

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import uvloop
from rich.console import Console
from rich.table import Table

from molink.core.errors import LinkError
from molink.core.ids import HEAD, Address, NodeId, Port
from molink.node.agent import Agent
from molink.node.home import RunFolder
from molink.transport.credentials import server_credentials
from molink.transport.identity import ClusterAuthority, NodeIdentity, NodeKey
from molink.transport.link import Link
from molink.transport.local import LocalSocket
from molink.transport.server import Accepted, LinkServer, dial
from molink.wire import to_agent
from molink.wire.frames import MAX_PAYLOAD, Kind, Priority, cut

MIB = 1024 * 1024
OTHER = NodeId(1)


class BenchAgent(Agent):
    """An agent that only switches."""

    def on_remote(self, node: NodeId, payload: bytes) -> None:
        message = to_agent.decode(payload)
        if isinstance(message, to_agent.Ping | to_agent.Pong):
            self.on_ping(node, message)


def run_agent(node: int, folder: str, pipe: Connection) -> None:
    """One agent process; the first listens, the second dials it."""
    uvloop.run(_agent(NodeId(node), Path(folder), pipe))


async def _agent(node: NodeId, folder: Path, pipe: Connection) -> None:
    identity = NodeIdentity.load(folder / f"{node}.pem")
    run_folder = RunFolder()
    agent = BenchAgent(node, run_folder)
    await agent.listen_locally()
    if node == HEAD:
        await _listen(agent, identity, pipe)
    else:
        dialled = await dial(pipe.recv(), identity, HEAD, 10.0)
        agent.spawn(agent.run_link(dialled.link))
    pipe.send(str(run_folder.socket))
    while (job := await asyncio.to_thread(pipe.recv)) is not None:
        pipe.send(await _flood(agent.switch.links[OTHER], job))
    run_folder.remove()
    os._exit(0)


async def _listen(agent: Agent, identity: NodeIdentity, pipe: Connection) -> None:
    async def accept(accepted: Accepted) -> None:
        with contextlib.suppress(LinkError):
            await agent.run_link(accepted.link)

    server = LinkServer(lambda: identity.authority_pem, accept)
    port = await server.start("127.0.0.1:0", server_credentials(lambda: identity))
    agent.server = server  # type: ignore[attr-defined]
    pipe.send(f"127.0.0.1:{port}")


async def _flood(link: Link, num_bytes: int) -> float:
    """Seconds to push frames nobody reads (dropped at the other agent) through the link."""
    frame = next(
        header + bytes(pieces[0])
        for header, pieces in cut(
            Kind.ACTIVATIONS,
            Priority.PREFILL,
            Address(HEAD, Port.STAGE),
            Address(OTHER, Port.GATEWAY),
            [memoryview(bytes(MAX_PAYLOAD))],
        )
    )
    started, before = time.perf_counter(), link.bytes_sent
    for _ in range(num_bytes // MAX_PAYLOAD):
        waiting = link.send(frame, Priority.PREFILL)
        if waiting is not None:
            await waiting
    while link.bytes_sent - before < num_bytes:  # noqa: ASYNC110 - a link has no such event
        await asyncio.sleep(0.001)
    return time.perf_counter() - started


def run_echo(socket_path: str) -> None:
    """The far stage: answers every message with 16 bytes."""
    local = LocalSocket(Path(socket_path), Address(OTHER, Port.STAGE))
    local.send(Kind.CONTROL, Address(OTHER, Port.AGENT), [to_agent.encode(to_agent.Attach())])
    try:
        while True:
            message = local.receive()
            local.send(Kind.RESULT, message.source, [bytes(16)], sequence=message.sequence)
    except LinkError:
        pass


def measure(socket_path: str) -> dict[str, float]:
    """Stage to stage: bandwidth with 4 messages of 8 MiB in flight, and round trips."""
    local = LocalSocket(Path(socket_path), Address(HEAD, Port.STAGE))
    local.send(Kind.CONTROL, Address(HEAD, Port.AGENT), [to_agent.encode(to_agent.Attach())])
    far = Address(OTHER, Port.STAGE)

    def round_trips(size: int, count: int) -> list[float]:
        payload, times = os.urandom(size), []
        for _ in range(count):
            started = time.perf_counter()
            local.send(Kind.ACTIVATIONS, far, [payload], priority=Priority.DECODE)
            local.receive()
            times.append(time.perf_counter() - started)
        return times

    round_trips(100_000, 200)
    small, step = round_trips(256, 2000), round_trips(100_000, 2000)
    payload, count, window = os.urandom(8 * MIB), 64, 4
    started = time.perf_counter()
    for index in range(count + window):
        if index < count:
            local.send(Kind.ACTIVATIONS, far, [payload], sequence=index)
        if index >= window:
            local.receive()
    seconds = time.perf_counter() - started
    empty = statistics.median(small)
    return {
        "stage to stage, MiB/s": count * 8 / seconds,
        "round trip of 256 B, ms": empty * 1e3,
        "round trip of 100 kB, short answer, ms": statistics.median(step) * 1e3,
        "the same, 99th percentile, ms": statistics.quantiles(step, n=100)[98] * 1e3,
        "one way of 100 kB, ms": (statistics.median(step) - empty / 2) * 1e3,
    }


def make_identities(folder: Path) -> None:
    authority = ClusterAuthority.create("bench")
    for node in (HEAD, OTHER):
        key = NodeKey()
        certificate = authority.sign_node(key.request_pem(), node=node, name=f"bench-{node}")
        key.accept(
            certificate, authority.certificate_pem, authority_key=authority.public_key_bytes
        ).save(folder / f"{node}.pem")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        make_identities(Path(folder))
        pipes, processes = [], []
        for node in (HEAD, OTHER):
            ours, theirs = context.Pipe()
            process = context.Process(target=run_agent, args=(node, folder, theirs), daemon=True)
            process.start()
            pipes.append(ours)
            processes.append(process)
        pipes[1].send(pipes[0].recv())
        sockets = [pipe.recv() for pipe in pipes]
        time.sleep(0.5)
        floods = []
        for _ in range(3):
            pipes[0].send(512 * MIB)
            floods.append(512 / pipes[0].recv())
        results["agent to agent, MiB/s"] = statistics.median(floods)
        echo = context.Process(target=run_echo, args=(sockets[1],), daemon=True)
        echo.start()
        time.sleep(2.0)
        results |= measure(sockets[0])
        for pipe in pipes:
            pipe.send(None)
    table = Table("figure", "value", title="transport, mutual TLS, loopback")
    for name, value in results.items():
        table.add_row(name, f"{value:,.2f}")
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
