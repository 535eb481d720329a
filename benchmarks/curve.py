"""The stage curve, and the best that a pipeline of such stages could do.

A stage is stood in for by a vLLM process of a model with half the layers, on one core. It includes
what a stage of two has (six layers) and more than either has: embedding, head, sampling, scheduling
and a step's fixed cost. So the true curve lies a little below, and a pipeline may come out above
its bound. It is measured twice: alone, and while a second such process does the same on the other
core, which is what two stages on one machine do to each other (memory bandwidth, last-level cache,
the HTTP servers' share of the cores).

With c(b) the seconds of a decode step of b sequences, p(b) the seconds to compute b prompts, N
stages and m = N micro-batches of b = B / m:

    stage bound        B / (m c(b))                                   decode tokens/s
    ideal time of all  (N - 1 + m) p(b) + (n - 1) m c(b)              n output tokens each

The second counts the filling of the pipeline once, with prompts; after it the last stage always
has work: m p(b), then n - 1 rounds of m steps (the first token comes with the prompt).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median

import uvloop
from contestants import Contestant, Vllm
from measure import Say, ask, ask_both, serving
from models import Subject
from workload import Round, Workload


@dataclass(frozen=True, slots=True)
class Point:
    """A stage with `sequences` in a step."""

    sequences: int
    decode_s: float  # c(b)
    prefill_s: float  # p(b)


@dataclass(frozen=True, slots=True)
class Bound:
    """What `num_stages` stages could do with a workload."""

    decode_tokens_per_s: float
    tokens_per_s: float  # of the whole workload, prompts counted


@dataclass(frozen=True, slots=True)
class Curve:
    alone: list[Point]
    together: list[Point]  # with a second stage at work on the other core


def bound(curve: Sequence[Point], workload: Workload, num_stages: int = 2) -> Bound:
    """Raises StopIteration if the curve has no point at the micro-batch's size."""
    size = workload.num_requests // num_stages
    point = next(point for point in curve if point.sequences == size)
    step, prefill = num_stages * point.decode_s, (2 * num_stages - 1) * point.prefill_s
    seconds = prefill + (workload.output_tokens - 1) * step
    total = workload.num_requests * workload.output_tokens
    return Bound(workload.num_requests / step, total / seconds)


def measure_curve(half: Subject, workload: Workload, rounds: int, say: Say) -> Curve:
    """Starts two processes of the half model, and ends them."""
    stages = [Vllm("a stage", half), Vllm("another stage", half)]
    sizes = [workload.num_requests // divisor for divisor in (4, 2, 1)]
    with serving(stages, workload, say):
        alone = [_point(stages[:1], half, workload, size, rounds, say) for size in sizes]
        together = [_point(stages, half, workload, size, rounds, say) for size in sizes]
    return Curve(alone, together)


def _point(
    stages: Sequence[Contestant],
    half: Subject,
    workload: Workload,
    size: int,
    rounds: int,
    say: Say,
) -> Point:
    for stage in stages:
        stage.resume()
    done: list[Round] = []
    for number in range(rounds):
        say(f"stage curve: {size} sequences on {len(stages)} stage(s), {number + 1} of {rounds}")
        prompts = replace(workload, num_requests=size).prompts(half.vocab_size, seed=number)
        if len(stages) == 1:
            done.append(ask(stages[0], prompts, workload.output_tokens))
        else:
            done += uvloop.run(ask_both(stages, prompts, workload.output_tokens))
    for stage in stages:
        stage.suspend()
    return Point(
        size,
        median(each.decode_step_s() for each in done),
        median(each.ttft_s(1.0) for each in done),
    )
