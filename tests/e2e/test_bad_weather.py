"""A link between two stages dies for a while, slows down, dies for long; a peer stands still."""

import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import psutil
import pytest
from benchmarks.netlab import Lab, Line
from tests.e2e.cluster import Cluster, Machine, Request, eventually, tokens
from tests.e2e.conftest import BUNDLED, MAX_MODEL_LEN
from tests.e2e.running import Running, requests_in_flight
from tests.factories import make_completion, make_prompt, make_prompts

from molink.transport.link import SILENCE_S

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.netns,
    pytest.mark.timeout(300),
]

LINE = Line(20e6, 20e6, delay_s=0.01)
REQUESTS = [
    make_completion(prompt, max_tokens=60, ignore_eos=True) for prompt in make_prompts([20, 150])
]
LONG_PROMPT = make_completion(make_prompt(480, seed=3), max_tokens=1)
NARROW = 4e5  # bit/s
MEASURED_S = 75.0  # after a link has begun, it has been measured on a machine at rest
OUTAGE_S = 60.0  # longer than a link is waited for
HALF = 40_000  # bytes of LONG_PROMPT's activations, which take more than four times as many
GROWTH = 32 << 20  # bytes, of a process that keeps half of a message
FOLLOWED_S = 5.0  # after a link changes, it has been measured anew
NOTICED_S = 3.0  # after a link is lost, everybody knows
REPAIR_S = 90.0


def test_bad_weather(two_hosts: Lab) -> None:
    two_hosts.call("head", lambda: through_all_weathers(two_hosts))


def through_all_weathers(lab: Lab) -> None:
    flags = [f"--max-model-len={MAX_MODEL_LEN}", "--no-enable-prefix-caching"]
    layers = ["4:8", None]  # activations cross to the head
    cluster = Cluster(BUNDLED, layers=layers, flags=flags, head_arguments=["--listen=0.0.0.0:0"])
    try:
        cluster.start_head()
        there = {"arguments": ["--listen=0.0.0.0:0"], "prefix": lab.prefix("a")}
        far = cluster.add_member(name="a", **there)
        cluster.wait_until_serving()
        expected = tokens(cluster.ask(REQUESTS))
        after_prompt = tokens(cluster.ask([LONG_PROMPT]))
        assert [path.way for path in cluster.view().paths] == ["direct"]
        eventually(lambda: is_measured(cluster), MEASURED_S, "the link's figures are right")
        for pause_s in (1.0, 5.0):
            assert meanwhile(cluster, lambda s=pause_s: pause(lab, s)) == expected
        assert meanwhile(cluster, lambda: lab.set_rate("head", "a", 2e6, 2e6)) == expected
        lab.set_rate("head", "a", LINE.up, LINE.down)
        assert while_it_falls_tenfold(cluster, lab) == after_prompt
        lab.set_rate("head", "a", NARROW, NARROW)
        for _ in range(3):  # the link notices that it has become narrow
            assert tokens(cluster.ask([LONG_PROMPT])) == after_prompt
        assert while_others_decode(cluster, LONG_PROMPT) == after_prompt
        lab.set_rate("head", "a", LINE.up, LINE.down)
        assert cluster.view().epoch == 1
        lose_it(cluster, lab)
        assert tokens(cluster.ask(REQUESTS)) == expected
        stop_in_mid_message(cluster, lab, far)
        assert tokens(cluster.ask(REQUESTS)) == expected
        cluster.stop()
    finally:
        cluster.end()


def is_measured(cluster: Cluster) -> bool:
    """Whether what was measured is what the lab was told."""
    return all(
        link.bytes_per_s == pytest.approx(LINE.up / 8, rel=0.25)
        and link.rtt_s == pytest.approx(2 * LINE.delay_s, abs=0.015)
        and (link.loss is None or link.loss < 0.05)
        for link in cluster.view().links
    )


def meanwhile(cluster: Cluster, weather: Callable[[], None]) -> list[list[int]]:
    """The tokens of requests that run while something happens."""
    with ThreadPoolExecutor(1) as thread:
        asked = thread.submit(cluster.ask, REQUESTS)
        eventually(lambda: cluster.metrics()["vllm:num_requests_running"] > 0, 10, "they run")
        weather()
        assert not asked.done()
        return tokens(asked.result(timeout=60))


def while_it_falls_tenfold(cluster: Cluster, lab: Lab) -> list[list[int]]:
    """The tokens of a prompt that crosses while the rate of a busy link falls, and is measured."""
    with ThreadPoolExecutor(3) as threads:
        asked = [threads.submit(cluster.ask, [LONG_PROMPT]) for _ in range(3)]

        def rate() -> float:
            for index, request in enumerate(asked):
                if request.done():
                    asked[index] = threads.submit(cluster.ask, [LONG_PROMPT])
            return rate_from_a(cluster)

        full = pytest.approx(LINE.up / 8, rel=0.25)
        eventually(lambda: rate() == full, REPAIR_S, "the busy link is measured")
        lab.set_rate("head", "a", LINE.up / 10, LINE.down / 10)
        tenth = 1.5 * LINE.up / 10 / 8
        eventually(lambda: rate() <= tenth, FOLLOWED_S, "its fall is measured")
        return tokens(asked[0].result(timeout=20))


def rate_from_a(cluster: Cluster) -> float:
    """Bytes a second of the link that carries activations, as the pace is told."""
    (rate,) = (link.bytes_per_s for link in cluster.view().links if link.source == "a")
    assert rate is not None
    return rate


def while_others_decode(cluster: Cluster, request: Request) -> list[list[int]]:
    """The tokens of a request whose prompt takes seconds to cross; decodes pass it meanwhile."""
    stream = Running(cluster, stream=True)
    eventually(lambda: len(stream.lines) > 5, 30, "a stream has begun")
    began, before = time.monotonic(), len(stream.lines)
    answers = cluster.ask([request])
    assert time.monotonic() - began > 1.0
    assert len(stream.lines) - before > 10
    assert stream.ended_at is None
    return tokens(answers)


def pause(lab: Lab, seconds: float) -> None:
    lab.cut("head", "a")
    time.sleep(seconds)
    lab.restore("head", "a")


def lose_it(cluster: Cluster, lab: Lab) -> None:
    """Cut the link for long: requests wait until it is back, and end as if nothing had happened."""
    undisturbed = Running(cluster, stream=False)
    undisturbed.wait(REPAIR_S)
    running = requests_in_flight(cluster)
    cut_at = time.monotonic()
    lab.cut("head", "a")
    wait_until_down(cluster)
    while time.monotonic() < cut_at + OUTAGE_S:
        assert cluster.has_status(503)
        time.sleep(1.0)
    lab.restore("head", "a")
    eventually(lambda: cluster.has_status(200), REPAIR_S, "it serves again")
    for request in running:
        request.wait(REPAIR_S)
        assert request.tokens == undisturbed.tokens


def wait_until_down(cluster: Cluster) -> None:
    eventually(lambda: cluster.has_status(503), SILENCE_S + NOTICED_S, "the pipeline is down")
    refusal = cluster.http.get("/health")
    assert "the pipeline is down: a: link to node 1 broke" in refusal.text
    assert "nothing was heard for" in refusal.text


def stop_in_mid_message(cluster: Cluster, lab: Lab, far: Machine) -> None:
    """Stop the agent of the first stage while its activations are under way; let it go on later."""
    head = psutil.Process(cluster.head.process.pid)
    lab.set_rate("head", "a", NARROW, NARROW)
    before, sent = head.memory_info().rss, lab.bytes_sent("a", "head")
    with ThreadPoolExecutor(1) as thread:
        body = {"model": cluster.model, **LONG_PROMPT}
        post = partial(cluster.http.post, timeout=2 * REPAIR_S)
        asked = thread.submit(post, "/v1/completions", json=body)
        eventually(lambda: lab.bytes_sent("a", "head") > sent + HALF, 30, "half has crossed")
        far.signal(signal.SIGSTOP)
        assert not asked.done()
        wait_until_down(cluster)
        assert head.memory_info().rss - before < GROWTH
        lab.set_rate("head", "a", LINE.up, LINE.down)
        far.signal(signal.SIGCONT)
        assert asked.result(REPAIR_S).is_success
    eventually(lambda: cluster.has_status(200), REPAIR_S, "it serves again")
