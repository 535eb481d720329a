"""Requests that come at random times, whether earlier ones are done or not, and what is seen."""

import asyncio
import hashlib
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from statistics import median
from typing import Concatenate, ParamSpec, TypeVar

import httpx
import uvloop
from measure import busy_s
from wan_results import Reading, Run, occupancies
from wan_servers import Staged
from workload import Answer, Workload, complete, quantile

Given = ParamSpec("Given")
Result = TypeVar("Result")

SETTLE_S = 2.0  # what was stopped catches up
READ_EVERY_S = 0.5
REPORTS_ARRIVE_S = 3.0  # a stage reports to its agent, that to the head, that to HTTP, each in 1 s

Ways = Mapping[str, tuple[str, str]]
"""Directions of links: from which host to which."""


class Watcher(threading.Thread):
    """Reads the counters of a server and of the links until it is told to stop."""

    def __init__(self, server: Staged, ways: Ways) -> None:
        super().__init__(name="watcher", daemon=True)
        self._server = server
        self._ways = ways
        self._is_done = threading.Event()
        self.readings: list[Reading] = []

    def run(self) -> None:
        while True:
            self.readings.append(self._read())
            if self._is_done.wait(READ_EVERY_S):
                return

    def stop(self) -> list[Reading]:
        self._is_done.set()
        self.join()
        return self.readings

    def _read(self) -> Reading:
        view = self._server.cluster() or {"stages": [], "pace": None}
        counters = [stage["counters"] for stage in view["stages"]]
        site = self._server.site
        return Reading(
            time.perf_counter(),
            tuple((each["compute_s"], each["waiting_s"]) for each in counters),
            {way: site.bytes_sent(*ends) for way, ends in self._ways.items()},
            view["pace"] and view["pace"]["micro_batches"],
        )


def as_its_client(
    function: Callable[Concatenate[Staged, Given], Result],
) -> Callable[Concatenate[Staged, Given], Result]:
    """Have a function of a server run on the host of its client, while the server runs."""

    @wraps(function)
    def run(server: Staged, *args: Given.args, **kwargs: Given.kwargs) -> Result:
        if server.is_suspendable:
            server.resume()
            time.sleep(SETTLE_S)
        try:
            return server.site.call(server.hosts[0], lambda: function(server, *args, **kwargs))
        finally:
            server.suspend()

    return run


@as_its_client
def warm_up(server: Staged, workload: Workload) -> None:
    """Have it answer requests that are not measured, all at once."""
    uvloop.run(ask_openly(server, workload, rate=100.0, seed=0))


@as_its_client
def measured_run(
    server: Staged,
    workload: Workload,
    rate: float,
    seed: int,
    ways: Ways,
    link_rates: Mapping[str, float],
) -> Run:
    """One run of the requests. Raises httpx.HTTPError if one fails.

    Args:
        link_rates: bits a second of each way, with the headers of IP.
    """
    watcher = Watcher(server, ways)
    cpu, own, whole = server.cpu_seconds(), time.process_time(), busy_s()
    watcher.start()
    answers = uvloop.run(ask_openly(server, workload, rate, seed))
    used = {role: s - cpu.get(role, 0.0) for role, s in server.cpu_seconds().items()}
    used["client"] = time.process_time() - own
    elsewhere_s = busy_s() - whole - sum(used.values())
    num_seen = len(watcher.readings)
    if server.cluster() is not None:
        time.sleep(REPORTS_ARRIVE_S)
    readings = watcher.stop()
    first, ended = readings[0], readings[min(num_seen, len(readings) - 1)]
    reports = [reading.stages for reading in readings if reading.stages] or [()]
    stages = zip(reports[0], reports[-1], strict=True)
    ttft, tpot = [each.ttft_s for each in answers], [each.tpot_s for each in answers]
    return Run(
        seed=seed,
        num_tokens=sum(each.output_tokens for each in answers),
        seconds=max(each.arrivals[-1] for each in answers) - min(each.sent_at for each in answers),
        ttft_p50_s=median(ttft),
        ttft_p99_s=quantile(ttft, 0.99),
        tpot_p50_s=median(tpot),
        tpot_p99_s=quantile(tpot, 0.99),
        longest_gap_s=max(each.longest_gap_s for each in answers),
        answers=digests(answers),
        link_bytes={way: ended.sent[way] - first.sent[way] for way in ways},
        link_rates=dict(link_rates),
        compute_s=[after[0] - before[0] for before, after in stages],
        cpu_s=used,
        elsewhere_s=elsewhere_s,
        occupancy=occupancies(readings[: num_seen + 2], link_rates),
    )


def digests(answers: Sequence[Answer]) -> list[str]:
    return [hashlib.sha256(each.text.encode()).hexdigest()[:8] for each in answers]


async def ask_openly(server: Staged, workload: Workload, rate: float, seed: int) -> list[Answer]:
    """Send each request when its time has come (Poisson). Raises httpx.HTTPError if one fails."""
    times, numbers = [0.0], random.Random(seed)
    while len(times) < workload.num_requests:
        times.append(times[-1] + numbers.expovariate(rate))
    prompts = workload.prompts(server.subject.vocab_size, seed)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=server.url, timeout=None, limits=limits) as client:

        async def one(after_s: float, prompt: list[int]) -> Answer:
            await asyncio.sleep(after_s)
            model = str(server.subject.path)
            return await complete(client, model, prompt, workload.output_tokens)

        return await asyncio.gather(*map(one, times, prompts))
