"""What the wire costs: agent to agent, and stage to stage through both agents, TLS on, loopback.

Real processes: two agents, and at each a process on its local socket. What gRPC alone gives between
the same two processes, with the same TLS and messages of the same size, is the bound of what agents
can reach; runs alternate. Prints a table, writes JSON.

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

import grpc
import grpc.aio
import uvloop
from rich.console import Console
from rich.table import Table

from molink.core.errors import LinkError
from molink.core.ids import HEAD, Address, NodeId, Port
from molink.node.agent import Agent
from molink.node.home import RunFolder
from molink.transport.credentials import channel_credentials, expect_node, server_credentials
from molink.transport.identity import ClusterAuthority, NodeIdentity, NodeKey
from molink.transport.link import CHANNEL_OPTIONS, Link
from molink.transport.local import LocalSocket
from molink.transport.server import Accepted, LinkServer, dial
from molink.wire import to_agent
from molink.wire.frames import MAX_PAYLOAD, Kind, Priority, cut

MIB = 1024 * 1024
OTHER = NodeId(1)
FLOOD = 512 * MIB  # bytes of one run
ROUNDS = 5


class BenchAgent(Agent):
    """An agent that only switches."""

    def on_remote(self, node: NodeId, payload: bytes) -> None:
        to_agent.decode(payload)


def run_agent(node: int, folder: str, pipe: Connection) -> None:
    """One agent process; the first listens, the second dials it."""
    uvloop.run(_agent(NodeId(node), Path(folder), pipe))


async def _agent(node: NodeId, folder: Path, pipe: Connection) -> None:
    identity = NodeIdentity.load(folder / f"{node}.pem")
    run_folder = RunFolder()
    agent = BenchAgent(node, run_folder, lambda _: None, lambda _: None)
    agent.switch.stage_nodes = (HEAD, OTHER)
    await agent.listen_locally()
    if node == HEAD:
        pipe.send([await _listen(agent, identity), await _listen_raw(agent, identity)])
    else:
        address, raw_address = pipe.recv()
        dialled = await dial(address, identity, HEAD, 10.0)
        agent.spawn(agent.run_link(dialled.link))
    pipe.send(str(run_folder.socket))
    while await asyncio.to_thread(pipe.recv):
        if node == HEAD:
            pipe.send(await _flood(agent.switch.links[OTHER]))
        else:
            pipe.send(await _drain_raw(raw_address, identity))
    run_folder.remove()
    os._exit(0)


async def _listen(agent: Agent, identity: NodeIdentity) -> str:
    async def accept(accepted: Accepted) -> None:
        with contextlib.suppress(LinkError):
            await agent.run_link(accepted.link)

    server = LinkServer(lambda: identity.authority_pem, accept)
    port = await server.start("127.0.0.1:0", server_credentials(lambda: identity))
    agent.server = server  # type: ignore[attr-defined]
    return f"127.0.0.1:{port}"


async def _listen_raw(agent: Agent, identity: NodeIdentity) -> str:
    """gRPC alone: whoever calls gets as many bytes as `_flood` sends."""
    payload = bytes(MAX_PAYLOAD)

    async def flood(_: Any, context: Any) -> None:
        for _ in range(FLOOD // MAX_PAYLOAD):
            await context.write(payload)

    server = grpc.aio.server(options=CHANNEL_OPTIONS)
    handler = grpc.stream_stream_rpc_method_handler(flood)
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("bench.Raw", {"Flood": handler}),)
    )
    port = server.add_secure_port("127.0.0.1:0", server_credentials(lambda: identity))
    await server.start()
    agent.raw_server = server  # type: ignore[attr-defined]
    return f"127.0.0.1:{port}"


async def _drain_raw(address: str, identity: NodeIdentity) -> float:
    """Seconds in which gRPC alone brings the bytes."""
    options = [*CHANNEL_OPTIONS, expect_node(HEAD)]
    credentials = channel_credentials(identity)
    async with grpc.aio.secure_channel(address, credentials, options=options) as channel:
        await channel.channel_ready()
        call: Any = channel.stream_stream("/bench.Raw/Flood")()
        started = time.perf_counter()
        while await call.read() is not grpc.aio.EOF:
            pass
        return time.perf_counter() - started


async def _flood(link: Link) -> float:
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
    started, before = time.perf_counter(), link.window.delivered
    for _ in range(FLOOD // MAX_PAYLOAD):
        waiting = link.send(frame, Priority.PREFILL)
        if waiting is not None:
            await waiting
    while link.window.delivered - before < FLOOD:  # noqa: ASYNC110 - a link has no such event
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
        rates: list[list[float]] = [[], []]
        for _ in range(ROUNDS):
            for node, pipe in enumerate(pipes):
                pipe.send(True)
                rates[node].append(FLOOD / MIB / pipe.recv())
        agents, raw = map(statistics.median, rates)
        results["gRPC alone, MiB/s"] = raw
        results["agent to agent, MiB/s"] = agents
        results["agent to agent, share of gRPC alone"] = statistics.median(
            ours / bound for ours, bound in zip(*rates, strict=True)
        )
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
