"""What the gateway costs, and how much it carries.

Price: the same requests go to the engine's own socket and through the gateway, in turns: the time
to the first token of one stream at a time, and output tokens/s of many at once. Two stages of the
bundled model on this machine.

Load: an engine that only pretends, on a core with the clients, and a gateway on a core of its own:
many streams at once, each event checked; and small answers, as fast as they come. Prints tables,
writes JSON, asserts nothing.

    python benchmarks/gateway.py [price|load] [--rounds N] [--streams N] [--json FILE]
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import uvloop
from contestants import Molink
from measure import Say
from models import BUNDLED, existing
from rich.console import Console
from rich.table import Table
from terminal import run

from molink.gateway.admission import Admission, Limits
from molink.gateway.gateway import Gateway
from molink.gateway.keys import Keys
from molink.gateway.server import GatewayServer, Tls
from molink.gateway.upstream import Upstream

PATH = "/v1/completions"
PAIRS = 300  # streams of each way, one at a time
AT_ONCE, TOKENS = 32, 64  # of a round of throughput
EVENTS = 200  # of a pretended stream
PACE_S = 0.05  # between two of them
ANSWERS = 20_000  # small ones
CONNECTIONS = 32
GATEWAY_CORE, OTHER_CORE = 0, 1


class Benchmark:
    """Owns the results."""

    def __init__(self, options: argparse.Namespace, console: Console, say: Say) -> None:
        self._options, self._console, self._say = options, console, say
        self.results: dict[str, Any] = {}

    def run(self) -> None:
        if self._options.part in ("price", None):
            self.results["price"] = self._price()
            self._console.print(price_table(self.results["price"]))
        if self._options.part in ("load", None):
            self.results["load"] = uvloop.run(self._load())
            self._console.print(load_table(self.results["load"]))

    # Price

    def _price(self) -> dict[str, Any]:
        flags = ("--dtype=float32", "--max-model-len=512", "--max-num-seqs=64")
        with Molink("a cluster", existing(BUNDLED), 2, flags) as cluster:
            self._say("starting a cluster")
            cluster.start()
            cluster.wait_until_serving()
            engine = engines_socket(cluster)
            ways: dict[str, Address] = {"engine": engine, "gateway": ("127.0.0.1", cluster.port)}
            return uvloop.run(self._compare(ways, str(cluster.subject.path)))

    async def _compare(self, ways: "dict[str, Address]", model: str) -> dict[str, Any]:
        clients = {way: await Client.connect(address) for way, address in ways.items()}
        first: dict[str, list[float]] = {way: [] for way in ways}
        self._say(f"{PAIRS} streams each way, one at a time")
        for number in range(PAIRS):
            for way in sorted(ways, reverse=number % 2 == 0):
                body = completion(model, seed=number, tokens=4)
                first[way].append((await clients[way].stream(body)).first_s)
        rates: dict[str, list[float]] = {way: [] for way in ways}
        for number in range(self._options.rounds):
            self._say(f"{AT_ONCE} streams at once, round {number + 1}")
            for way in sorted(ways, reverse=number % 2 == 0):
                rates[way].append(await tokens_per_s(ways[way], model, seed=1000 * number))
        return {"first_token_s": first, "tokens_per_s": rates}

    # Load

    async def _load(self) -> dict[str, Any]:
        os.sched_setaffinity(0, {OTHER_CORE})
        with tempfile.TemporaryDirectory(prefix="molink-bench-") as folder:
            engine = Path(folder) / "engine"
            with pretended(engine), gateway_before(engine) as (process, port):
                self._say(f"{self._options.streams} streams at once")
                streams = await self._streams(process, port)
                self._say(f"{ANSWERS} small answers")
                answers = await self._answers(process, port)
        return {"streams": streams, "answers": answers}

    async def _streams(self, process: psutil.Process, port: int) -> dict[str, float]:
        before, began = cpu_s(process), time.perf_counter()
        clients = [await Client.connect(("127.0.0.1", port)) for _ in range(self._options.streams)]
        found = await asyncio.gather(*(client.stream(b'{"stream": true}') for client in clients))
        seconds, used = time.perf_counter() - began, cpu_s(process) - before
        whole = sum(stream.events == EVENTS and stream.is_done for stream in found)
        events = sum(stream.events for stream in found)
        return {
            "streams": len(found),
            "whole": whole,
            "events_per_s": events / seconds,
            "core_share": used / seconds,
            "cpu_us_per_event": used / events * 1e6,
            "resident_mib": process.memory_info().rss / (1 << 20),
        }

    async def _answers(self, process: psutil.Process, port: int) -> dict[str, float]:
        clients = [await Client.connect(("127.0.0.1", port)) for _ in range(CONNECTIONS)]
        before, began = cpu_s(process), time.perf_counter()
        times: list[float] = []

        async def ask(client: Client) -> None:
            body = json.dumps({"prompt": "x" * 1600, "max_tokens": 1}).encode()
            for _ in range(ANSWERS // CONNECTIONS):
                sent = time.perf_counter()
                await client.whole(body)
                times.append(time.perf_counter() - sent)

        await asyncio.gather(*map(ask, clients))
        seconds, used = time.perf_counter() - began, cpu_s(process) - before
        times.sort()
        return {
            "per_s": len(times) / seconds,
            "core_share": used / seconds,
            "cpu_us_each": used / len(times) * 1e6,
            "p50_ms": times[len(times) // 2] * 1e3,
            "p99_ms": times[len(times) * 99 // 100] * 1e3,
        }


Address = Path | tuple[str, int]


def engines_socket(cluster: Molink) -> Path:
    """Where the engine itself answers."""
    (engine,) = (process for role, process in cluster.processes() if role == "api server")
    (argument,) = (word for word in engine.cmdline() if word.startswith("--http="))
    return Path(argument.removeprefix("--http="))


class Stream:
    """What came of one stream."""

    first_s = 0.0
    events = 0
    is_done = False


class Client:
    """One connection, kept."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def connect(cls, address: Address) -> "Client":
        if isinstance(address, Path):
            return cls(*await asyncio.open_unix_connection(str(address)))
        return cls(*await asyncio.open_connection(*address))

    def _send(self, body: bytes) -> None:
        head = f"POST {PATH} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        self._writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)

    async def stream(self, body: bytes) -> Stream:
        found, sent = Stream(), time.perf_counter()
        self._send(body)
        await self._reader.readuntil(b"\r\n\r\n")
        while True:
            line = await self._reader.readline()
            if line.startswith(b"data: [DONE]"):
                found.is_done = True
            elif line.startswith(b"data: "):
                found.first_s = found.first_s or time.perf_counter() - sent
                found.events += 1
            elif line in (b"0\r\n", b""):
                await self._reader.readline()
                return found

    async def whole(self, body: bytes) -> None:
        self._send(body)
        head = await self._reader.readuntil(b"\r\n\r\n")
        length = int(head.split(b"content-length: ")[1].split(b"\r\n")[0])
        await self._reader.readexactly(length)


def completion(model: str, seed: int, tokens: int) -> bytes:
    prompt = [16 + (seed * 7919 + i * 31) % 900 for i in range(16)]
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "ignore_eos": True}
    return json.dumps(body | {"stream": True, "temperature": 0.0}).encode()


async def tokens_per_s(address: Address, model: str, seed: int) -> float:
    clients = [await Client.connect(address) for _ in range(AT_ONCE)]
    began = time.perf_counter()
    bodies = (completion(model, seed + i, TOKENS) for i in range(AT_ONCE))
    await asyncio.gather(*(c.stream(body) for c, body in zip(clients, bodies, strict=True)))
    return AT_ONCE * TOKENS / (time.perf_counter() - began)


def cpu_s(process: psutil.Process) -> float:
    return sum(process.cpu_times()[:2])


# An engine that only pretends, and the gateway before it


@contextmanager
def pretended(path: Path) -> Iterator[None]:
    """An engine on the clients' core."""
    process = multiprocessing.get_context("spawn").Process(target=_pretend, args=(path,))
    process.start()
    while not path.exists():
        time.sleep(0.05)
    try:
        yield
    finally:
        process.kill()
        process.join()


def _pretend(path: Path) -> None:
    os.sched_setaffinity(0, {OTHER_CORE})
    uvloop.run(_serve_pretended(path))


async def _serve_pretended(path: Path) -> None:
    server = await asyncio.start_unix_server(_answer, str(path))
    await server.serve_forever()


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    event = {"id": "cmpl-0123456789abcdef", "object": "text_completion", "created": 1, "model": "m"}
    choice = {"index": 0, "text": " word", "logprobs": None, "finish_reason": None}
    choice |= {"stop_reason": None, "prompt_token_ids": None, "token_ids": [1234]}
    data = b"data: " + json.dumps(event | {"choices": [choice]}, separators=(",", ":")).encode()
    chunk = b"%x\r\n%b\r\n" % (len(data) + 2, data + b"\n\n")
    whole = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 700\r\n\r\n"
    begin = (
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    )
    try:
        while head := await reader.readuntil(b"\r\n\r\n"):
            length = int(head.split(b"content-length: ")[1].split(b"\r\n")[0])
            body = await reader.readexactly(length)
            if b'"stream":true' not in body:
                writer.write(whole + bytes(700))
                continue
            writer.write(begin)
            for _ in range(EVENTS):
                writer.write(chunk)
                await asyncio.sleep(PACE_S)
            writer.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()


@contextmanager
def gateway_before(engine: Path) -> Iterator[tuple[psutil.Process, int]]:
    """A gateway on a core of its own; its process and port."""
    context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_gateway, args=(engine, sending.send))
    process.start()
    try:
        yield psutil.Process(process.pid), receiving.recv()
    finally:
        process.kill()
        process.join()


def _gateway(engine: Path, tell: Callable[[int], None]) -> None:
    os.sched_setaffinity(0, {GATEWAY_CORE})
    uvloop.run(_serve_gateway(engine, tell))


async def _serve_gateway(engine: Path, tell: Callable[[int], None]) -> None:
    admission = Admission(Limits(running=10_000), lambda: None)
    agent = AlwaysUp()
    handle = Gateway(agent, Upstream(engine), Keys([], None), admission)  # type: ignore[arg-type]
    server = GatewayServer(handle)
    tell(await server.start("127.0.0.1", 0, Tls()))
    await asyncio.Event().wait()


class AlwaysUp:
    """What an agent would say of an engine that is never lost."""

    down = None
    engines_lost = 0
    drains = asyncio.Event()
    view = None
    view_json = b"{}"


# Tables


def price_table(found: dict[str, Any]) -> Table:
    made = Table("", "engine alone", "through the gateway", "difference")
    first, rates = found["first_token_s"], found["tokens_per_s"]
    alone, through = (median(first[way]) * 1e3 for way in ("engine", "gateway"))
    pairs = zip(first["engine"], first["gateway"], strict=True)
    added = median(1e3 * (b - a) for a, b in pairs)
    made.add_row("first token, p50, ms", f"{alone:.2f}", f"{through:.2f}", f"+{added:.2f}")
    alone, through = (median(rates[way]) for way in ("engine", "gateway"))
    pairs = zip(rates["engine"], rates["gateway"], strict=True)
    ratio = median(b / a for a, b in pairs)
    label = f"tokens/s, {AT_ONCE} streams"
    made.add_row(label, f"{alone:.0f}", f"{through:.0f}", f"{100 * (ratio - 1):+.1f} %")
    return made


def load_table(found: dict[str, Any]) -> Table:
    made = Table("", "figure")
    streams, answers = found["streams"], found["answers"]
    made.add_row("streams at once, and whole", f"{streams['streams']}, {streams['whole']}")
    made.add_row("events/s", f"{streams['events_per_s']:.0f}")
    made.add_row("share of a core", f"{streams['core_share']:.2f}")
    made.add_row("CPU µs per event", f"{streams['cpu_us_per_event']:.1f}")
    made.add_row("memory, MiB", f"{streams['resident_mib']:.0f}")
    made.add_row("small answers/s", f"{answers['per_s']:.0f}")
    made.add_row("share of a core", f"{answers['core_share']:.2f}")
    made.add_row("CPU µs each", f"{answers['cpu_us_each']:.0f}")
    made.add_row("p50, p99, ms", f"{answers['p50_ms']:.2f}, {answers['p99_ms']:.2f}")
    return made


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", nargs="?", choices=["price", "load"], help="both, if not given")
    parser.add_argument("--rounds", type=int, default=7, help="of throughput (default: 7)")
    parser.add_argument("--streams", type=int, default=500, help="at once (default: 500)")
    parser.add_argument("--json", type=Path, help="write every figure here")
    options = parser.parse_args()
    run(lambda console, say: Benchmark(options, console, say), options.json)


if __name__ == "__main__":
    main()
