"""How long streams are silent when a stage is killed, or the engine.

Two stages of the bundled model on this machine. While requests stream, one process is killed
(SIGKILL): the last stage, which its node loads again; the same, with a third node that stands by;
or the engine's core, which another engine follows while the stages keep their layers. Silence is
the longest time without a token from then on, of all streams; the answers are compared with those
of an undisturbed run, in float32. Prints a table, writes JSON, asserts nothing.

    python benchmarks/outage.py [--rounds N] [--at-once N] [--json FILE]
"""

import argparse
import asyncio
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import uvloop
from contestants import MOLINK, Contestant, Molink
from measure import Say, ask
from models import BUNDLED, existing
from rich.console import Console
from rich.table import Table
from terminal import run
from workload import Answer, Workload, run_round

STANDBY = "a stage: a standby takes over"
RELOAD = "a stage: its node loads it again"
ENGINE = "the engine: another one starts"
KILL_AFTER_S = 2.0  # all streams have begun by then, and none has ended
SETTLE_S = 60.0  # until everybody is back


class WithStandby(Molink):
    """A cluster of two stages, and a third node that stands by."""

    def start(self) -> None:
        super().start()
        member = ["join", f"--token-file={self.folder / 'token'}", "--listen=127.0.0.1:0"]
        self.spawn((*MOLINK, *member, "--name=standby", "--standby"), **self._environment)


class Benchmark:
    """Rounds of one cluster, then of the other. Owns the results."""

    def __init__(self, options: argparse.Namespace, console: Console, say: Say) -> None:
        self._console, self._say = console, say
        self._rounds: int = options.rounds
        self._workload = Workload(options.at_once, prompt_tokens=64, output_tokens=400)
        self.results: dict[str, Any] = {}

    def run(self) -> None:
        subject, flags = existing(BUNDLED), ("--dtype=float32", "--max-model-len=512")
        clusters: list[tuple[Molink, dict[str, Victim]]] = [
            (Molink("two nodes", subject, 2, flags), {RELOAD: last_stage, ENGINE: engine_core}),
            (WithStandby("and a standby", subject, 2, flags), {STANDBY: last_stage}),
        ]
        for cluster, faults in clusters:
            with cluster:
                self._say(f"starting {cluster.name}")
                cluster.start()
                cluster.wait_until_serving()
                for name, victim in faults.items():
                    found = self.results[name] = []
                    for number in range(self._rounds):
                        self._say(f"{name}, round {number + 1} of {self._rounds}")
                        found.append(self._round(cluster, victim, seed=number))
        self._console.print(table(self.results))

    def _round(self, cluster: Molink, victim: "Victim", seed: int) -> dict[str, float]:
        prompts = self._workload.prompts(cluster.subject.vocab_size, seed)
        wait_until_whole(cluster)
        undisturbed = ask(cluster, prompts, self._workload.output_tokens).answers
        killed_at, answers = uvloop.run(self._disturbed(cluster, victim, prompts))
        gaps = [_silence_s(answer, killed_at) for answer in answers]
        pairs = zip(undisturbed, answers, strict=True)
        return {
            "silence_s": max(gaps),
            "other_answers": sum(one.text != other.text for one, other in pairs),
            "longest_gap_before_s": max(answer.longest_gap_s for answer in undisturbed),
        }

    async def _disturbed(
        self, cluster: Molink, victim: "Victim", prompts: list[list[int]]
    ) -> tuple[float, Sequence[Answer]]:
        model, tokens = str(cluster.subject.path), self._workload.output_tokens
        asked = asyncio.create_task(run_round(cluster.url, model, prompts, tokens))
        await asyncio.sleep(KILL_AFTER_S)
        victim(cluster).kill()
        return time.perf_counter(), (await asked).answers


def _silence_s(answer: Answer, since: float) -> float:
    """Most seconds without a token of a stream, after what came before `since`."""
    before = [at for at in answer.arrivals if at <= since][-1:]
    later = [*before, *(at for at in answer.arrivals if at > since)]
    return max((b - a for a, b in pairwise(later)), default=0.0)


def last_stage(cluster: Molink) -> psutil.Process:
    """The process that computes the last stage now."""
    view = cluster.cluster()
    node = next(n["id"] for n in view["nodes"] if n["name"] == view["stages"][-1]["node"])
    return next(process for role, process in cluster.processes() if role == f"stage {node}")


def engine_core(cluster: Molink) -> psutil.Process:
    return next(process for role, process in cluster.processes() if role == "engine core")


Victim = Callable[[Molink], psutil.Process]


def wait_until_whole(cluster: Contestant) -> None:
    """Until it serves, and whoever stands by has loaded a stage's layers."""
    end = time.monotonic() + SETTLE_S
    while time.monotonic() < end:
        view = cluster.cluster() or {}
        if view.get("serving") and all(n["role"] in ("stage", "standby") for n in view["nodes"]):
            return
        time.sleep(0.5)


def table(results: dict[str, list[dict[str, float]]]) -> Table:
    made = Table("what is killed", "silence, s: median", "least", "most", "other answers")
    for name, rounds in results.items():
        silences = [found["silence_s"] for found in rounds]
        figures = (median(silences), min(silences), max(silences))
        other = sum(int(found["other_answers"]) for found in rounds)
        made.add_row(name, *(f"{value:.2f}" for value in figures), str(other))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--at-once", type=int, default=8, help="streams (default: 8)")
    parser.add_argument("--json", type=Path, help="write every figure here")
    options = parser.parse_args()
    run(lambda console, say: Benchmark(options, console, say), options.json)


if __name__ == "__main__":
    main()
