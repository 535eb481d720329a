"""What a pipeline over our wire gives, beside one process and vLLM's own pipeline.

Every contestant has one core a stage and is asked over HTTP by one client: 32 prompts of 128 random
tokens, 64 new tokens each, all at once. Contestants are started once and take turns; figures are
medians over the rounds, ratios are paired by round. Prints tables, writes JSON, asserts nothing.

    python benchmarks/pipeline.py [--quick] [--rounds N] [--json FILE]
    python benchmarks/pipeline.py --plain     `molink serve MODEL` against vLLM's own server
    python benchmarks/pipeline.py --memory    resident memory at request 2,000 and 10,000
"""

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

import report
from contestants import Contestant, Molink, MolinkAlone, ServerError, Vllm
from curve import measure_curve
from measure import Say, alternate, serving
from models import BUNDLED, HALF, RANDOM, Subject, existing, random_model
from soak import soak
from workload import Workload

ONE, VLLM_TWO, OURS_TWO = "one process", "vLLM's pipeline, 2", "MoLink, 2 stages"
console = Console()


def main() -> None:
    options = _parser().parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    results: dict[str, Any] = {}
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    try:
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task("")
            _run(options, results, lambda text: progress.update(task, description=text))
    except KeyboardInterrupt:
        console.print("stopped")
        sys.exit(130)
    except ServerError as error:
        console.print(str(error), markup=False)
        sys.exit(1)
    finally:
        if options.json and results:
            options.json.write_text(json.dumps(results, indent=2))


def _run(options: argparse.Namespace, results: dict[str, Any], say: Say) -> None:
    workload = Workload(output_tokens=16) if options.quick else Workload()
    rounds = options.rounds or (2 if options.quick else 5)
    subjects = [existing(path) for path in options.model] or _subjects(options)
    if options.memory:
        results["memory"] = soak(subjects[-1], options.requests, say)
        for title, values in results["memory"].items():
            console.print(report.values_table(title, values))
        return
    for subject in subjects:
        if options.plain:
            contestants: list[Contestant] = [Vllm(ONE, subject), MolinkAlone("molink serve", subject)]
            pairs = [("molink serve", ONE)]
        else:
            contestants, pairs = _contestants(subject, options.stages)
        found = _compare(subject, contestants, pairs, workload, rounds, say)
        results[subject.name] = found
        if subject.path == random_model(RANDOM).path and not options.plain and OURS_TWO in found:
            results["stage curve"] = _bound(found, workload, 1 if options.quick else 3, say)


def _contestants(
    subject: Subject, stages: Sequence[int]
) -> tuple[list[Contestant], list[tuple[str, str]]]:
    ours = [Molink(f"MoLink, {number} stages", subject, number) for number in stages]
    contestants = [Vllm(ONE, subject), Vllm(VLLM_TWO, subject, stages=2), *ours]
    pairs = [(each.name, theirs) for each in ours for theirs in (VLLM_TWO, ONE)]
    return contestants, [*pairs, (VLLM_TWO, ONE)]
