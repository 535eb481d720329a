"""What n-gram speculation gives across a slow link: with all drafts, with those worth it, without.

The bundled model goes on for 96 tokens after 64 random ones, over two stages on two hosts of the
lab, with so many requests at once. Greedily it repeats itself, and most drafts are right; at a high
temperature most are wrong, and each costs its share of a step. The three servers answer in turns.
Prints a table, writes JSON, asserts nothing.

    python benchmarks/speculation.py [PROFILE…] [--at-once N …] [--rounds N] [--json FILE]

Needs root, and iproute2 of Debian.
"""

import argparse
import asyncio
import json
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from measure import Say
from models import BUNDLED, existing
from netlab import PROFILES, Lab, add_profiles, why_not
from rich.console import Console
from rich.table import Table
from terminal import run
from wan_servers import Molink, Staged
from workload import Workload, run_round

HOSTS = ("head", "far")
NGRAM = {"method": "ngram", "num_speculative_tokens": 5}
NGRAM |= {"prompt_lookup_min": 1, "prompt_lookup_max": 4}
SPECULATION = f"--speculative-config={json.dumps(NGRAM)}"
SERVERS = {"none": (), "all": (SPECULATION, "--drafts=all"), "auto": (SPECULATION,)}
TEXTS: Mapping[str, Mapping[str, Any]] = {
    "repeats itself": {},
    "hardly ever does": {"temperature": 2.0},
}
SETTLE_S = 1.0  # what was stopped catches up


class Benchmark:
    """Three servers over each link, for each text and number of requests at once, in turns."""

    def __init__(self, options: argparse.Namespace, console: Console, say: Say) -> None:
        self._console = console
        self._say = say
        self._profiles: list[str] = options.profiles or ["wan-100m-15ms"]
        self._at_once: list[int] = options.at_once
        self._rounds: int = options.rounds
        self.results: dict[str, Any] = {}

    def run(self) -> None:
        for profile in self._profiles:
            with Lab() as lab, ExitStack() as stack:
                for host in HOSTS:
                    lab.add_host(host)
                lab.link(*HOSTS, PROFILES[profile])
                servers = self._start(lab, stack)
                found = self.results[profile] = {}
                for text in TEXTS:
                    for number in self._at_once:
                        self._say(f"{profile}: a text that {text}, {number} at once")
                        found[f"{text}, {number}"] = self._compare(servers, text, number)
                self._console.print(table(profile, found))

    def _start(self, lab: Lab, stack: ExitStack) -> list[Staged]:
        subject, servers = existing(BUNDLED), []
        for name, flags in SERVERS.items():
            self._say(f"starting the server with {name} drafts")
            server = stack.enter_context(Molink(name, subject, lab, HOSTS, flags))
            server.start()
            server.wait_until_serving()
            self._ask(server, Workload(8, 16, 8), "repeats itself", seed=0)
            servers.append(server)
        return servers

    def _compare(self, servers: list[Staged], text: str, number: int) -> dict[str, list[float]]:
        found: dict[str, list[float]] = {server.name: [] for server in servers}
        workload = Workload(number, prompt_tokens=64, output_tokens=96)
        for index in range(self._rounds):
            for server in servers if index % 2 == 0 else servers[::-1]:
                found[server.name].append(self._ask(server, workload, text, seed=index))
        return found

    def _ask(self, server: Staged, workload: Workload, text: str, seed: int) -> float:
        """Output tokens a second of requests that are sent at the same time."""
        time.sleep(SETTLE_S)
        subject = server.subject
        prompts = workload.prompts(subject.vocab_size, seed + 1000 * workload.num_requests)
        round_ = run_round(
            server.url, str(subject.path), prompts, workload.output_tokens, extra=TEXTS[text]
        )
        return server.site.call(HOSTS[0], lambda: asyncio.run(round_)).tokens_per_s


def table(profile: str, found: Mapping[str, Mapping[str, list[float]]]) -> Table:
    made = Table("text, requests at once", title=f"{profile}: output tokens/s, medians")
    for name in SERVERS:
        made.add_column("without" if name == "none" else f"{name} drafts")
    for case, servers in found.items():
        made.add_row(case, *(f"{median(values):.0f}" for values in servers.values()))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_profiles(parser)
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 4, 16], metavar="N")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write every figure here")
    options = parser.parse_args()
    if reason := why_not():
        parser.error(f"no lab: {reason}")
    run(lambda console, say: Benchmark(options, console, say), options.json)


if __name__ == "__main__":
    main()
