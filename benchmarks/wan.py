"""Stages across slow links, beside vLLM's own pipeline across the same: open-loop arrivals.

Hosts are network namespaces of `netlab`, each server has one core a stage, and the client sits on
the head's host. Requests come at random times (Poisson), whether earlier ones are done or not. All
servers answer the same requests at the same times, in turned order every other round; each round
has other requests. They are started once: between two profiles the links change below them.

`loopback` is the same cluster of ours without any link between its stages: what compute allows.
`defaults` is MoLink as it comes; `sum` and `fp8` send fewer bytes; `together` and `apart` never and
always keep prompts out of decode steps; `pace-off` is `together` with two micro-batches; `uncoded`
sends both tensors as they are; `levers-off` is all of that.
Prints what each link really does, then a table for it; writes JSON with the machine, and beside it
a picture of how busy stages and links were in the first round. Asserts nothing.

    python benchmarks/wan.py [PROFILE…] [--server NAME …] [--load RATE:REQUESTS …] [--rounds N]
                             [--stages N] [--json FILE]

Where micro-batches are fixed in some servers (`micro-batches-1` and so on) and chosen in another
(`defaults`), a second table sets them side by side.

Needs root, and iproute2, iperf3 and iputils-ping of Debian; without them all stages are on
loopback.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from measure import Say
from models import RANDOM, random_model
from netlab import PROFILES, Lab, Line, add_profiles, why_not
from netlab.accuracy import Measured, measure
from open_load import Ways, measured_run, warm_up
from rich.console import Console
from rich.table import Table
from terminal import run
from wan_results import picture, tables
from wan_results.machine import describe_machine
from wan_servers import SERVERS, Here, Site, Staged, make_server
from workload import Workload

DEFAULT_PROFILES = ("wan-100m-15ms", "dsl-10m-15ms")
DEFAULT_LOADS = ("2:48", "20:48")  # requests a second: moderate, and beyond what two cores compute
WORKLOAD = Workload(num_requests=48, prompt_tokens=384, output_tokens=48)
WARM_UP = Workload(num_requests=8, prompt_tokens=32, output_tokens=8)
ADAPT = Workload(num_requests=6, prompt_tokens=384, output_tokens=24)  # to a link that has changed
NO_LINK = "loopback"
HEADERS = 1428 / 1400  # of the datagrams that measure a line's rate
STREAM_HEADERS = 1500 / 1448  # of a TCP stream, where datagrams are too slow for the line


class Benchmark:
    """All servers over each link, at each load, in turns. Owns the results."""

    def __init__(self, options: argparse.Namespace, console: Console, say: Say) -> None:
        self._console = console
        self._say = say
        self._options = options
        self._hosts = ["head", *(f"far-{n}" for n in range(1, options.stages))]
        ends = list(pairwise(self._hosts))
        self._ways: Ways = {
            f"{one} → {other}": (one, other) for pair in ends for one, other in (pair, pair[::-1])
        }
        self._links: dict[str, Measured] = {}
        self.results: dict[str, Any] = {
            "machine": describe_machine(),
            "workload": {"prompt_tokens": options.prompt, "output_tokens": options.output},
            "dtype": options.dtype,
            "stages": options.stages,
            "links": {},
        }

    def run(self) -> None:
        if reason := why_not(measured=True):
            unable = ", ".join(self._options.profiles or DEFAULT_PROFILES)
            self._console.print(f"no lab: {reason}; loopback alone, not {unable}")
            self._hosts, self._ways = ["head"] * self._options.stages, {}
            self._compare(Here(), None, [NO_LINK])
            return
        profiles = self._options.profiles or list(DEFAULT_PROFILES)
        relayed = [name for name in profiles if PROFILES[name].needs_relay]
        for group in (relayed, [name for name in profiles if name not in relayed]):
            if group:
                with Lab() as lab:
                    for host in self._hosts:
                        lab.add_host(host)
                    lab.line(self._hosts, PROFILES[group[0]])
                    self._measure(lab, group)
                    self._compare(lab, lab, group)

    def _measure(self, lab: Lab, profiles: Sequence[str]) -> None:
        for profile in profiles:
            self._say(f"{profile}: measuring a link")
            self._change(lab, PROFILES[profile])
            self._links[profile] = measure(lab, *self._hosts[:2], PROFILES[profile])

    def _change(self, lab: Lab, line: Line) -> None:
        for one, other in pairwise(self._hosts):
            lab.change(one, other, line)

    def _compare(self, site: Site, lab: Lab | None, profiles: Sequence[str]) -> None:
        subject = random_model(RANDOM)
        servers = [
            make_server(name, subject, site, self._hosts, self._options.dtype)
            for name in self._options.server
        ]
        with ExitStack() as stack:
            self._say("starting all servers")
            for server in servers:
                stack.enter_context(server)
                server.start()
            for server in servers:
                server.wait_until_serving()
                server.suspend()
            for server in servers:
                warm_up(server, WARM_UP)
            for profile in profiles:
                link = self._links.get(profile)
                if lab is not None:
                    self._change(lab, PROFILES[profile])
                found = {"link": link and asdict(link), "rates": {}}
                self.results["links"][profile] = found
                for server in servers:
                    self._say(f"{profile}: {server.name} gets to know the link")
                    warm_up(server, ADAPT)
                for load in self._options.load:
                    self._rounds(profile, servers, load, found["rates"])
                    self._show(profile, found)

    def _rounds(
        self, profile: str, servers: list[Staged], load: tuple[float, int], rates: dict[str, Any]
    ) -> None:
        rate, requests = load
        workload = Workload(requests, self._options.prompt, self._options.output)
        runs = rates.setdefault(f"{rate:g}", {})
        for number in range(self._options.rounds):
            seed = number + self._options.seed
            for server in servers if number % 2 == 0 else servers[::-1]:
                rates_of_ways = {} if server.name == tables.LOOPBACK else self._rates(profile)
                ways = {way: self._ways[way] for way in rates_of_ways}
                done = measured_run(server, workload, rate, seed, ways, rates_of_ways)
                speed = f"{done.tokens_per_s:.1f} tokens/s"
                self._say(f"{profile}, {rate:g}/s, round {number + 1}, {server.name}: {speed}")
                figures = done if number == 0 else replace(done, occupancy=[])
                runs.setdefault(server.name, []).append(figures.as_json())
                self._write()

    def _rates(self, profile: str) -> dict[str, float]:
        """Bits a second of each way as measured, with the headers of IP."""
        if (link := self._links.get(profile)) is None:
            return {}
        rates = [
            way.capacity * HEADERS if way.capacity else way.one_stream * STREAM_HEADERS
            for way in (link.up, link.down)
        ]
        return {way: rates[number % 2] for number, way in enumerate(self._ways)}

    def _show(self, profile: str, found: Mapping[str, Any]) -> None:
        """The tables of what is there by now, and the pictures."""
        cores = self.results["machine"]["cores"]
        rates = {rate: tables.runs_of(servers) for rate, servers in found["rates"].items()}
        lines = [row for rate, runs in rates.items() for row in tables.rows(rate, runs, cores)]
        title = tables.link_text(profile, found)
        self._console.print(rich_table(title, tables.HEAD, lines))
        if proof := list(tables.proof_rows(rates)):
            self._console.print(rich_table(title, tables.PROOF_HEAD, proof))
        file: Path | None = self._options.json
        if file and picture.why_not() is None:
            for rate, runs in rates.items():
                name = f"{file.stem}-{profile}-{rate}.png"
                picture.draw(f"{title}; {rate} requests/s", runs, file.with_name(name))

    def _write(self) -> None:
        """After every run, so that what has been measured is kept if one fails."""
        if self._options.json:
            self._options.json.write_text(json.dumps(self.results))


def rich_table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(*head, title=title)
    for row in rows:
        table.add_row(*row)
    return table


def options_of(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_profiles(parser)
    parser.add_argument(
        "--server",
        nargs="+",
        choices=SERVERS,
        default=["vllm", "loopback", "defaults"],
        metavar="NAME",
        help=f"{', '.join(SERVERS)} (default: the first three); each takes 5 GB of memory",
    )
    parser.add_argument(
        "--load",
        nargs="+",
        type=load_of,
        default=list(map(load_of, DEFAULT_LOADS)),
        metavar="RATE:REQUESTS",
        help=f"requests a second, and how many (default: {' '.join(DEFAULT_LOADS)})",
    )
    parser.add_argument("--rounds", type=int, default=3, help="of each load (default: 3)")
    parser.add_argument("--seed", type=int, default=1, help="of the first round's requests")
    parser.add_argument("--stages", type=int, default=2, help="hosts in a line (default: 2)")
    parser.add_argument("--prompt", type=int, default=WORKLOAD.prompt_tokens, help="tokens")
    parser.add_argument("--output", type=int, default=WORKLOAD.output_tokens, help="tokens")
    parser.add_argument("--dtype", default="bfloat16", help="of the model (default: bfloat16)")
    parser.add_argument("--json", type=Path, help="write every figure here, pictures beside it")
    options = parser.parse_args(arguments)
    if options.stages < 2:
        parser.error("--stages: a pipeline has two and more")
    for name in ("rounds", "prompt", "output"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: one and more")
    if options.json and not options.json.absolute().parent.is_dir():
        parser.error(f"--json: there is no folder {options.json.absolute().parent}")
    return options


def load_of(text: str) -> tuple[float, int]:
    """RATE:REQUESTS. Raises ArgumentTypeError if it is something else."""
    with suppress(ValueError):
        rate, requests = text.split(":")
        if float(rate) > 0 and int(requests) > 0:
            return float(rate), int(requests)
    raise argparse.ArgumentTypeError(f"{text!r} is not RATE:REQUESTS, both above 0, like 2:48")


def main() -> None:
    options = options_of()
    if options.json and (reason := picture.why_not()):
        print(f"no pictures: {reason}")
    run(lambda console, say: Benchmark(options, console, say), None)


if __name__ == "__main__":
    main()
