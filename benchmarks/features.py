"""What a feature costs over two stages, beside what it costs in one process.

Both servers answer the same 32 prompts of 128 random tokens, 64 new tokens each, plain and with one
feature at a time, in turns; both have the same flags and one core a stage. The cost of a feature is
the seconds of a round with it over those of a plain round of the same server just before: the
median of all rounds, the least and the most. Prints a table, writes JSON, asserts nothing.

    python benchmarks/features.py [FEATURE…] [--quick] [--rounds N] [--json FILE]
"""

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from contestants import Contestant, Molink, Vllm
from measure import Say, ask, serving
from models import RANDOM, random_adapter, random_model
from rich.console import Console
from rich.table import Table
from terminal import run
from workload import Workload

ADAPTER = "adapter"
PLAIN, PREFIX_HITS = "plain", "prefix hits"
FEATURES: Mapping[str, Mapping[str, Any]] = {
    "structured output": {"structured_outputs": {"regex": "(w[0-9]{1,4})+"}},
    "LoRA": {"model": ADAPTER},
    "logprobs": {"logprobs": 5},
}
"""What joins the body of every request."""
ALLOWED = 2.0  # times the cost in one process; more is to be explained
CATCH_UP_S = 1.0  # what was stopped meanwhile


class Benchmark:
    """Rounds of plain and of every feature on both servers, in turns."""

    def __init__(self, options: argparse.Namespace, console: Console, say: Say) -> None:
        self._console = console
        self._say = say
        self._rounds: int = options.rounds or (1 if options.quick else 6)
        self._features = {name: FEATURES[name] for name in options.features or FEATURES}
        self._workload = Workload(output_tokens=16) if options.quick else Workload()
        self.results: dict[str, dict[str, list[float]]] = {}

    def run(self) -> None:
        self._say("making the model")
        subject = random_model(RANDOM)
        flags = ("--enable-prefix-caching", "--block-size=32")  # of 128, no prompt would fill one
        flags += ("--enable-lora", "--max-lora-rank=16", "--max-loras=1")
        flags += ("--lora-modules", f"{ADAPTER}={random_adapter(RANDOM)}")
        servers = [
            Vllm("one process", subject, flags=flags),
            Molink("MoLink, 2 stages", subject, 2, flags=flags),
        ]
        with serving(servers, self._workload, self._say):
            for server in servers:
                self._feature_rounds(server, seed=-1)  # vLLM compiles for what it meets first
            for number in range(self._rounds):
                for server in servers if number % 2 == 0 else servers[::-1]:
                    self._say(f"round {number + 1} of {self._rounds}: {server.name}")
                    taken = self.results.setdefault(server.name, {})
                    for name, seconds in self._feature_rounds(server, number).items():
                        taken.setdefault(name, []).append(seconds)
        self._console.print(costs_table(self.results))

    def _feature_rounds(self, server: Contestant, seed: int) -> dict[str, float]:
        """Seconds of a plain round, of the same prompts again, and of one with each feature."""
        server.resume()
        time.sleep(CATCH_UP_S)

        def seconds(number: int, extra: Mapping[str, Any]) -> float:
            workload = self._workload
            prompts = workload.prompts(server.subject.vocab_size, 100 * (seed + 2) + number)
            return ask(server, prompts, workload.output_tokens, extra).seconds

        found = {PLAIN: seconds(0, {}), PREFIX_HITS: seconds(0, {})}
        for number, (name, extra) in enumerate(self._features.items(), 1):
            found[name] = seconds(number, extra)
        server.suspend()
        return found


def costs(results: Mapping[str, Mapping[str, Sequence[float]]], feature: str) -> list[list[float]]:
    """For each server the seconds with the feature over those without, round by round."""
    return [
        [a / b for a, b in zip(taken[feature], taken[PLAIN], strict=True)]
        for taken in results.values()
    ]


def costs_table(results: Mapping[str, Mapping[str, Sequence[float]]]) -> Table:
    table = Table("seconds of a round, over a plain one", *results, "added, ours / theirs")
    features = next(iter(results.values())).keys() - {PLAIN}
    for feature in sorted(features):
        found = costs(results, feature)
        one, ours = map(median, found)
        share = f"{(ours - 1) / (one - 1):.2f}" if one > 1 else "–"
        mark = " (explain)" if ours > 1 and ours - 1 > ALLOWED * max(one - 1, 0.0) else ""
        cells = (f"{median(c):.3f} ({min(c):.2f} to {max(c):.2f})" for c in found)
        table.add_row(feature, *cells, share + mark)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "features", nargs="*", metavar="FEATURE", help=f"{', '.join(FEATURES)}; all if none is said"
    )
    parser.add_argument("--quick", action="store_true", help="1 short round: does it run?")
    parser.add_argument("--rounds", type=int, help="rounds of each server (default 6)")
    parser.add_argument("--json", type=Path, help="write every figure here")
    options = parser.parse_args()
    if unknown := set(options.features) - set(FEATURES):
        parser.error(f"there is no feature {unknown.pop()}; there are {', '.join(FEATURES)}")
    run(lambda console, say: Benchmark(options, console, say), options.json)


if __name__ == "__main__":
    main()
