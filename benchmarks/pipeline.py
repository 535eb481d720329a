"""What a pipeline over our wire gives, beside one process and vLLM's own pipeline.

Every contestant has one core a stage and is asked over HTTP by one client: 32 prompts of 128 random
tokens, 64 new tokens each, all at once. Contestants are started once and take turns; figures are
medians over the rounds, ratios are paired by round. Prints tables, writes JSON, asserts nothing.

    python benchmarks/pipeline.py [--quick] [--rounds N] [--json FILE]
    python benchmarks/pipeline.py --beside DIR    MoLink as it is in another checkout, for vLLM's
    python benchmarks/pipeline.py --plain     `molink serve MODEL` against vLLM's own server
    python benchmarks/pipeline.py --memory    resident memory at request 2,000 and 10,000
    python benchmarks/pipeline.py --gpu       one process beside stages that share one NVIDIA GPU

With --gpu all use CUDA graphs, prompts have 256 tokens, and first the bundled model answers in
float32: how many tokens differ from those of one process. Stages that share a GPU take turns on it,
so what they lose is what the pipeline itself takes.
"""

import argparse
from pathlib import Path
from statistics import median
from typing import Any

import report
from contestants import Contestant, Molink, MolinkAlone, Vllm, VllmDefault
from curve import measure_curve
from measure import Sample, Say, alternate, serving
from models import BUNDLED, HALF, RANDOM, WIDE, Subject, existing, random_model
from rich.console import Console
from soak import soak
from terminal import run
from wire_tokens import Answers, Examiner
from workload import Workload

from molink.planning.micro_batches import STEP_COST_TOKENS, prefill_tokens_per_step, unmeasured

ONE, VLLM_TWO, OURS_ALONE = "one process", "vLLM's pipeline, 2", "molink serve"
# Our scheduler cuts prefill on its own; here vLLM's is told to cut as ours does at first.
VLLM_CUT = "vLLM's pipeline, 2, cut prefill"
MEMORY_MARKS = (2_000, 10_000)  # requests
MEMORY_LIMIT_S = 300.0
GPU_FLAGS = (
    "--no-enforce-eager",
    "--gpu-memory-utilization=0.05",  # must be free; how much is used says the next
    f"--kv-cache-memory-bytes={1 << 30}",
)


class Benchmark:
    """One run. `results` is complete for whatever has been measured so far."""

    def __init__(self, options: argparse.Namespace, console: Console, say: Say) -> None:
        self._options = options
        self._console = console
        self._say = say
        prompt_tokens = 256 if options.gpu else 128
        output_tokens = 16 if options.quick else 64
        self._workload = Workload(prompt_tokens=prompt_tokens, output_tokens=output_tokens)
        self._rounds = options.rounds or (2 if options.quick else 6)
        self.results: dict[str, Any] = {}

    def run(self) -> None:
        if self._options.gpu:
            self._gpu()
            return
        subjects = self._subjects()
        if self._options.memory:
            self._memory(subjects[-1])
            return
        for subject in subjects:
            if self._options.plain:
                alone = [VllmDefault(ONE, subject), MolinkAlone(OURS_ALONE, subject)]
                self._compare(subject, alone, [(OURS_ALONE, ONE)])
            else:
                self._pipelines(subject)

    def _subjects(self) -> list[Subject]:
        if self._options.model:
            return [existing(path) for path in self._options.model]
        self._say("making the models")
        bundled = [existing(BUNDLED)] if (BUNDLED / "config.json").exists() else []
        return [random_model(RANDOM), *bundled]

    def _pipelines(self, subject: Subject) -> None:
        ours = [Molink(_ours(stages), subject, stages) for stages in self._options.stages]
        theirs = self._theirs(subject)
        pairs = [(each.name, other.name) for each in ours for other in theirs]
        samples = self._compare(subject, [*theirs, *ours], [*pairs, (theirs[1].name, ONE)])
        if subject.name == RANDOM.name and 2 in self._options.stages:
            self._bounds(samples)

    def _theirs(self, subject: Subject) -> list[Contestant]:
        if source := self._options.beside:
            stages = self._options.stages
            others = [Molink(_ours(n) + f" of {source}", subject, n, source=source) for n in stages]
            return [Vllm(ONE, subject), *others]
        return [
            Vllm(ONE, subject),
            Vllm(VLLM_TWO, subject, stages=2),
            Vllm(VLLM_CUT, subject, stages=2, flags=_cut(self._workload)),
        ]

    def _gpu(self) -> None:
        exact = self._on_gpu(existing(BUNDLED), ("--dtype=float32",))
        with serving(exact, self._workload, self._say):
            one, *ours = map(_answers, exact)
        found = {each.name: said.unlike(one) for each, said in zip(exact[1:], ours, strict=True)}
        self.results["beside one process, float32"] = found
        for name, shares in found.items():
            self._console.print(report.values_table(f"{name}, beside one process, float32", shares))
        for path in self._options.model or [random_model(WIDE).path]:
            contestants = self._on_gpu(existing(path))
            pairs = [(each.name, ONE) for each in contestants[1:]]
            self._compare(contestants[0].subject, contestants, pairs)

    def _on_gpu(self, subject: Subject, flags: tuple[str, ...] = ()) -> list[Contestant]:
        """One process, and stages beside it on the same GPU."""
        flags = (*GPU_FLAGS, *flags)
        ours = [Molink(_ours(number), subject, number, flags) for number in self._options.stages]
        return [Vllm(ONE, subject, flags=flags), *ours]

    def _compare(
        self, subject: Subject, contestants: list[Contestant], pairs: list[tuple[str, str]]
    ) -> dict[str, list[Sample]]:
        with serving(contestants, self._workload, self._say):
            samples = alternate(contestants, subject, self._workload, self._rounds, self._say)
        ratios = report.shares(samples, pairs)
        self.results[subject.name] = {**report.as_json(samples), "ratios": ratios}
        self._console.print(report.figures_table(subject.name, samples))
        self._console.print(report.shares_table(ratios))
        return samples

    def _bounds(self, samples: dict[str, list[Sample]]) -> None:
        rounds = 1 if self._options.quick else 3
        curve = measure_curve(random_model(HALF), self._workload, rounds, self._say)
        one = median(sample.tokens_per_s for sample in samples[ONE])
        bounds = report.bounds(curve, self._workload, samples[_ours(2)], one)
        self.results["stage curve"] = report.curve_json(curve)
        self.results["bounds of two stages"] = bounds
        self._console.print(report.curve_table(curve))
        self._console.print(report.values_table("bounds of two stages", bounds))

    def _memory(self, subject: Subject) -> None:
        self.results["memory"] = soak(subject, MEMORY_MARKS, MEMORY_LIMIT_S, self._say)
        for title, values in self.results["memory"].items():
            self._console.print(report.values_table(title, values))


def _answers(contestant: Contestant) -> Answers:
    contestant.resume()
    return Examiner(contestant.url, contestant.subject).answers()


def _cut(workload: Workload) -> tuple[str, ...]:
    prompts = workload.num_requests * workload.prompt_tokens
    tokens = prefill_tokens_per_step(unmeasured(2, STEP_COST_TOKENS), prompts)
    return (f"--max-num-batched-tokens={tokens}",)


def _ours(stages: int) -> str:
    return f"MoLink, {stages} stages"


def main() -> None:
    options = _parser().parse_args()
    run(lambda console, say: Benchmark(options, console, say), options.json)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="2 short rounds: does it run?")
    parser.add_argument("--rounds", type=int, help="rounds of every contestant (default 6)")
    parser.add_argument("--stages", type=int, nargs="*", default=[2, 3], help="of ours")
    parser.add_argument("--model", type=Path, action="append", help="a folder, instead of both")
    parser.add_argument("--beside", type=Path, help="a checkout, whose MoLink replaces vLLM's")
    parser.add_argument("--json", type=Path, help="write every figure here")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--plain", action="store_true", help="one node against vLLM's own server")
    mode.add_argument("--gpu", action="store_true", help="stages share one NVIDIA GPU")
    mode.add_argument("--memory", action="store_true", help="memory under many short requests")
    return parser


if __name__ == "__main__":
    main()
