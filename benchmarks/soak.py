"""Resident memory of a two-stage cluster under many short requests."""

import time
from collections.abc import Sequence

import uvloop
from contestants import Molink
from measure import Say, serving
from models import Subject
from workload import Workload, run_round

WORKLOAD = Workload(num_requests=500, prompt_tokens=8, output_tokens=4)  # of one batch
CONCURRENCY = 32
MIB = 1024 * 1024


def soak(
    subject: Subject, marks: Sequence[int], limit_s: float, say: Say
) -> dict[str, dict[str, float]]:
    """MiB of every process after so many requests, and the growth from first to last mark in %.

    Ends after `limit_s` seconds, at whatever request it then is.
    """
    cluster = Molink("MoLink, 2 stages", subject, 2)
    taken: dict[int, dict[str, float]] = {}
    with serving([cluster], Workload(num_requests=2), say):
        done, give_up_at = 0, time.monotonic() + limit_s
        while done < max(marks) and time.monotonic() < give_up_at:
            say(f"memory: request {done:,} of {max(marks):,}")
            prompts = WORKLOAD.prompts(subject.vocab_size, seed=done)
            model, tokens = str(subject.path), WORKLOAD.output_tokens
            uvloop.run(run_round(cluster.url, model, prompts, tokens, CONCURRENCY))
            done += len(prompts)
            if done in marks or time.monotonic() > give_up_at:
                taken[done] = _mib(cluster)
    first, last = taken[min(taken)], taken[max(taken)]
    growth = {role: 100 * (last[role] / first[role] - 1) for role in first}
    found = {f"MiB at request {count:,}": sizes for count, sizes in taken.items()}
    return {**found, f"growth from request {min(taken):,} to {max(taken):,}, %": growth}


def _mib(cluster: Molink) -> dict[str, float]:
    return {role: size / MIB for role, size in sorted(cluster.resident_bytes().items())}
