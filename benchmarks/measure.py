"""Paired rounds: every contestant answers the same prompts, in turned order every other round."""

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import psutil
import uvloop
from contestants import Contestant
from models import Subject
from workload import Round, Workload, run_round

WARM_UP_TOKENS = 8
REPORTS_ARRIVE_S = 3.5  # a stage reports to its agent, that to the head, that to HTTP, each in 1 s

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Sample:
    """One round of one contestant."""

    tokens_per_s: float  # output tokens over the time until the last one came
    ttft_p50_s: float
    ttft_p99_s: float
    tpot_p50_s: float
    decode_tokens_per_s: float  # once every prompt was computed
    cpu_s: dict[str, float]  # by process, the client's too
    link_bytes_per_token: float | None  # of tokens that passed the layers; over all links
    stage_compute_s: dict[str, float]  # wall seconds inside steps, waiting for a core counted
    others_cpu_s: float  # of contestants that idle meanwhile
    elsewhere_cpu_s: float  # used by, or stolen from, the machine by anything else

    def figures(self) -> dict[str, float]:
        """What is compared, flat."""
        flat = {
            "output tokens/s": self.tokens_per_s,
            "decode tokens/s": self.decode_tokens_per_s,
            "TTFT p50, ms": self.ttft_p50_s * 1e3,
            "TTFT p99, ms": self.ttft_p99_s * 1e3,
            "TPOT p50, ms": self.tpot_p50_s * 1e3,
        }
        if self.link_bytes_per_token is not None:
            flat["link bytes/token"] = self.link_bytes_per_token
        for role, seconds in sorted(self.cpu_s.items()):
            flat[f"CPU s, {role}"] = seconds
        flat["CPU s, idle contestants"] = self.others_cpu_s
        flat["CPU s, elsewhere"] = self.elsewhere_cpu_s
        for role, seconds in sorted(self.stage_compute_s.items()):
            flat[f"in steps s, {role}"] = seconds
        return flat


def medians(samples: Sequence[Sample]) -> dict[str, float]:
    """The median of every figure over the rounds."""
    flat = [sample.figures() for sample in samples]
    return {name: median(figures[name] for figures in flat) for name in flat[0]}


def ratios(ours: Sequence[Sample], theirs: Sequence[Sample]) -> list[float]:
    """Output tokens/s of ours over theirs, round by round."""
    pairs = zip(ours, theirs, strict=True)
    return [our.tokens_per_s / their.tokens_per_s for our, their in pairs]


@contextmanager
def serving(contestants: Sequence[Contestant], workload: Workload, say: Say) -> Iterator[None]:
    """Start all, one after the other, and warm each up; end them all on leaving."""
    with ExitStack() as stack:
        for contestant in contestants:
            say(f"starting {contestant.name} ({contestant.subject.name})")
            stack.enter_context(contestant)
            contestant.start()
            contestant.wait_until_serving()
            prompts = workload.prompts(contestant.subject.vocab_size, seed=0)
            ask(contestant, prompts, WARM_UP_TOKENS)
            contestant.suspend()
        yield


def ask(
    contestant: Contestant,
    prompts: list[list[int]],
    output_tokens: int,
    extra: Mapping[str, Any] | None = None,
) -> Round:
    """One round, without any figure but the client's; `extra` joins the body of each request."""
    model = str(contestant.subject.path)
    return uvloop.run(run_round(contestant.url, model, prompts, output_tokens, extra=extra))


def alternate(
    contestants: Sequence[Contestant], subject: Subject, workload: Workload, rounds: int, say: Say
) -> dict[str, list[Sample]]:
    """Samples of every contestant by name; the contestants are serving."""
    samples: dict[str, list[Sample]] = {contestant.name: [] for contestant in contestants}
    for number in range(rounds):
        prompts = workload.prompts(subject.vocab_size, seed=number + 1)
        for contestant in contestants if number % 2 == 0 else contestants[::-1]:
            say(f"round {number + 1} of {rounds}: {contestant.name}")
            others = [other for other in contestants if other is not contestant]
            samples[contestant.name].append(_sample(contestant, others, prompts, workload))
    return samples


def _sample(
    contestant: Contestant,
    others: Sequence[Contestant],
    prompts: list[list[int]],
    workload: Workload,
) -> Sample:
    contestant.resume()
    time.sleep(REPORTS_ARRIVE_S)  # what was stopped catches up, what waits for reports has them
    cluster = contestant.cluster()
    before, idle, whole = _cpu_seconds(contestant), _all_cpu_s(others), busy_s()
    done = ask(contestant, prompts, workload.output_tokens)
    whole, idle = busy_s() - whole, _all_cpu_s(others) - idle
    cpu = {role: used - before.get(role, 0.0) for role, used in _cpu_seconds(contestant).items()}
    link_bytes, compute = None, {}
    if cluster is not None:
        time.sleep(REPORTS_ARRIVE_S)
        after = contestant.cluster() or {}
        link_bytes = (_bytes_sent(after) - _bytes_sent(cluster)) / workload.computed_tokens
        compute = {role: s - _compute_s(cluster)[role] for role, s in _compute_s(after).items()}
    contestant.suspend()
    return Sample(
        tokens_per_s=done.tokens_per_s,
        ttft_p50_s=done.ttft_s(0.5),
        ttft_p99_s=done.ttft_s(0.99),
        tpot_p50_s=done.tpot_s,
        decode_tokens_per_s=workload.num_requests / done.decode_step_s(),
        cpu_s=cpu,
        link_bytes_per_token=link_bytes,
        stage_compute_s=compute,
        others_cpu_s=idle,
        elsewhere_cpu_s=whole - idle - sum(cpu.values()),
    )


def _cpu_seconds(contestant: Contestant) -> dict[str, float]:
    return {**contestant.cpu_seconds(), "client": time.process_time()}


def _all_cpu_s(contestants: Sequence[Contestant]) -> float:
    return sum(sum(contestant.cpu_seconds().values()) for contestant in contestants)


def busy_s() -> float:
    """Seconds in which cores of this machine were not idle, or were not given to it."""
    times = psutil.cpu_times()._asdict()
    idle = ("idle", "iowait", "guest", "guest_nice")  # the last two are in "user" and "nice" too
    return sum(float(seconds) for name, seconds in times.items() if name not in idle)


def _bytes_sent(cluster: dict[str, Any]) -> int:
    return sum(link["bytes_sent"] for link in cluster["links"])


def _compute_s(cluster: dict[str, Any]) -> dict[str, float]:
    stages = cluster["stages"]
    return {f"stage {stage['index']}": stage["counters"]["compute_s"] for stage in stages}


async def ask_both(
    contestants: Sequence[Contestant], prompts: list[list[int]], output_tokens: int
) -> list[Round]:
    """The same round on several servers at the same time."""
    return await asyncio.gather(
        *(
            run_round(contestant.url, str(contestant.subject.path), prompts, output_tokens)
            for contestant in contestants
        )
    )
