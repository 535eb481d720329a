"""Tables of runs: a list of rows, which a terminal or a page shows.

What they read is the benchmark's JSON: `links[profile]["rates"][rate][server]` is a list of runs.
"""

from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from .run import Run

VLLM, LOOPBACK, DEFAULTS = "vLLM", "MoLink, loopback", "MoLink, defaults"
FIXED = "MoLink, micro-batches-"
HEAD = (
    "requests/s",
    "server",
    "tokens/s (least to most)",
    "of vLLM",
    "of loopback",
    "links allow",
    "slowest stage allows",
    "cores allow",
    "TTFT p50 / p99, s",
    "TPOT p50 / p99, ms",
    "longest gap, s",
    "same answers",
    "cores used elsewhere",
)

Runs = Mapping[str, Sequence[Run]]


def runs_of(servers: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, list[Run]]:
    return {name: [Run.from_json(run) for run in runs] for name, runs in servers.items()}


def rows(rate: str, runs: Runs, cores: int) -> Iterator[list[str]]:
    """A row for each server: medians over its runs, ratios of runs with the same seed."""
    for name, own in runs.items():
        speeds = [run.tokens_per_s for run in own]
        yield [
            rate,
            name,
            f"{median(speeds):.1f} ({min(speeds):.1f} to {max(speeds):.1f})",
            _text(paired(runs, name, VLLM), "×{:.2f}"),
            _text(paired(runs, name, LOOPBACK), "{:.2f}"),
            _text(_median(run.link_bound for run in own), "{:.0f}"),
            _text(_median(run.stage_bound for run in own), "{:.0f}"),
            "" if name == VLLM else f"{median(run.core_bound(cores) for run in own):.0f}",
            _pair(own, "ttft_p50_s", "ttft_p99_s", 1.0, ".2f"),
            _pair(own, "tpot_p50_s", "tpot_p99_s", 1e3, ".0f"),
            f"{max(run.longest_gap_s for run in own):.2f}",
            same_answers(runs, name),
            f"{median(run.elsewhere_s / run.seconds for run in own):.2f}",
        ]


def paired(runs: Runs, name: str, other: str) -> float | None:
    """Median ratio of output tokens/s to those of another server with the same seed."""
    if name == other:
        return None
    theirs = {run.seed: run.tokens_per_s for run in runs.get(other, ())}
    return _median(run.tokens_per_s / theirs[run.seed] for run in runs[name] if run.seed in theirs)


def same_answers(runs: Runs, name: str) -> str:
    """How many answers are, to the token, those that crossed no slow link."""
    expected = {run.seed: run.answers for run in runs.get(LOOPBACK, ())}
    pairs = [
        ours == theirs
        for run in runs[name]
        for ours, theirs in zip(run.answers, expected.get(run.seed, ()), strict=False)
    ]
    return "" if name == LOOPBACK or not pairs else f"{sum(pairs)} of {len(pairs)}"


def proof_rows(rates: Mapping[str, Runs]) -> Iterator[list[str]]:
    """The chosen number of micro-batches beside every fixed one: medians of output tokens/s."""
    for rate, runs in rates.items():
        fixed = {
            name.removeprefix(FIXED): median(run.tokens_per_s for run in own)
            for name, own in sorted(runs.items())
            if name.startswith(FIXED)
        }
        if not fixed or DEFAULTS not in runs:
            continue
        ours = median(run.tokens_per_s for run in runs[DEFAULTS])
        best = max(fixed, key=lambda number: fixed[number])
        all_fixed = ", ".join(f"{number}: {speed:.1f}" for number, speed in fixed.items())
        yield [rate, f"{ours:.1f}", all_fixed, best, f"{ours / fixed[best]:.3f}"]


PROOF_HEAD = ("requests/s", "chosen, tokens/s", "fixed, tokens/s", "best", "chosen / best")


def merged(files: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Results of several invocations as if they were one; the machine is the first one's.

    Raises:
        ValueError: their runs cannot stand side by side.
    """
    for name in ("workload", "dtype", "stages"):
        if any(file.get(name) != files[0].get(name) for file in files):
            raise ValueError(f"{name} is not the same in all files")
    whole: dict[str, Any] = {**files[0], "links": {}}
    for file in files:
        for profile, found in file["links"].items():
            link = whole["links"].setdefault(profile, {**found, "rates": {}})
            for rate, servers in found["rates"].items():
                runs = link["rates"].setdefault(rate, {})
                for name, own in servers.items():
                    there = runs.setdefault(name, [])
                    if {run["seed"] for run in there} & {run["seed"] for run in own}:
                        raise ValueError(f"{name} has runs of one seed in two files")
                    there.extend(own)
    return whole


def link_text(profile: str, found: Mapping[str, Any]) -> str:
    """What the line of a profile really does."""
    if (link := found["link"]) is None:
        return f"{profile}: no link between the stages"
    ways = " and ".join(f"{link[way]['one_stream'] / 1e6:.1f}" for way in ("up", "down"))
    rtt = f"{1e3 * link['rtt_mean_s']:.1f} ms round trip"
    return f"{profile}: found {rtt}, {ways} Mbit/s of a TCP stream"


def _median(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def _text(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _pair(runs: Sequence[Run], first: str, second: str, unit: float, form: str) -> str:
    """Medians over the runs of two figures."""
    return " / ".join(
        format(unit * median(getattr(run, name) for run in runs), form) for name in (first, second)
    )
