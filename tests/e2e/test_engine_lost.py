"""An engine that is killed in mid-generation: streams go on where they were, on the next engine."""

import json
import signal
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
import psutil
import pytest
from tests.e2e.cluster import Cluster, Request, eventually
from tests.e2e.conftest import BUNDLED, COMMON
from tests.factories import make_completion, make_prompt, make_prompts

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

ENGINE = "molink.entrypoints.engine"
CORE = "EngineCore"  # what vLLM calls its child
FLAGS = (*COMMON, "--max-num-batched-tokens=64", "--max-num-seqs=24")
LONG = {"max_tokens": 150, "ignore_eos": True}
NOISY = {**LONG, "temperature": 0.9}
REPAIR_S = 90.0
BEGUN = 5  # events of each stream

COMPLETIONS = [
    *(make_completion(prompt, **LONG) for prompt in make_prompts([3, 90])),
    *(make_completion(prompt, **NOISY, seed=7) for prompt in make_prompts([5, 64])),
    make_completion(make_prompt(20, 9), **NOISY, seed=9, n=2),
    make_completion(make_prompt(33, 10), **LONG, presence_penalty=1.5, repetition_penalty=1.1),
    make_completion(make_prompt(12, 11), **LONG, logprobs=2),
    make_completion(
        make_prompt(8, 14), max_tokens=150, structured_outputs={"regex": "(red green blue ){14}"}
    ),
]
CHATS: list[Request] = [
    {"messages": [{"role": "user", "content": "Tell me more."}], "temperature": 0.0, **LONG},
    {"messages": [{"role": "user", "content": "And then?"}], "seed": 3, **NOISY},
]


class Stream:
    """What a client has received."""

    def __init__(self, cluster: Cluster, path: str, body: Request) -> None:
        self.events: list[dict[str, Any]] = []
        self.is_done = False
        self._body = {"model": cluster.model, "stream": True, **body}
        self._cluster, self._path = cluster, path

    def run(self) -> "Stream":
        with self._cluster.http.stream("POST", self._path, json=self._body) as answer:
            assert answer.status_code == 200, answer.read()
            for line in filter(None, answer.iter_lines()):
                data = line.removeprefix("data: ")
                self.is_done |= data == "[DONE]"
                if data != "[DONE]":
                    self.events.append(json.loads(data))
        return self

    @property
    def choices(self) -> dict[int, list[Any]]:
        """Of each choice: text, tokens, number of log probabilities, end."""
        found: dict[int, list[Any]] = {}
        for event in self.events:
            assert "error" not in event, event
            for choice in event["choices"]:
                one = found.setdefault(choice["index"], ["", [], 0, []])
                one[0] += choice.get("text") or choice.get("delta", {}).get("content") or ""
                one[1] += choice["token_ids"] or [] if choice.get("token_ids") else []
                one[2] += len((choice.get("logprobs") or {}).get("tokens", []))
                one[3] += [choice["finish_reason"]] if choice.get("finish_reason") else []
        return found


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(BUNDLED, flags=FLAGS, head_arguments=["--split-after=5"]) as cluster:
        yield cluster


def streams_of(cluster: Cluster) -> list[Stream]:
    streams = [Stream(cluster, "/v1/completions", body) for body in COMPLETIONS]
    return streams + [Stream(cluster, "/v1/chat/completions", body) for body in CHATS]


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster) -> list[dict[int, list[Any]]]:
    with ThreadPoolExecutor(len(COMPLETIONS) + len(CHATS)) as threads:
        return [stream.choices for stream in threads.map(Stream.run, streams_of(cluster))]


def stages_of(cluster: Cluster) -> list[int]:
    """Process ids."""
    machines = (m.processes("molink.entrypoints.stage") for m in cluster.machines)
    return [process.pid for processes in machines for process in processes]


def victim(cluster: Cluster, which: str) -> psutil.Process:
    (process,) = cluster.head.processes(which)
    return process


@pytest.mark.parametrize(
    ("which", "number"),
    [(CORE, signal.SIGKILL), (ENGINE, signal.SIGKILL), (ENGINE, signal.SIGTERM)],
)
def test_every_stream_goes_on_where_it_was(
    which: str,
    number: signal.Signals,
    cluster: Cluster,
    undisturbed: list[dict[int, list[Any]]],
) -> None:
    streams, stages = streams_of(cluster), stages_of(cluster)
    whole = make_completion(make_prompt(20, 30), **LONG)
    (expected,) = cluster.ask([whole])
    with ThreadPoolExecutor(len(streams) + 1) as threads:
        running: list[Future[Any]] = [threads.submit(stream.run) for stream in streams]
        asked = threads.submit(cluster.ask, [whole])
        eventually(lambda: all(len(s.events) > BEGUN for s in streams), REPAIR_S, "all begin")
        victim(cluster, which).send_signal(number)
        assert not any(stream.is_done for stream in streams)
        for stream in running:
            stream.result(REPAIR_S)
        answer = asked.result()[0]
    assert [stream.choices for stream in streams] == undisturbed
    assert all(stream.is_done for stream in streams)
    assert all(len({event["id"] for event in stream.events}) == 1 for stream in streams)
    assert answer["choices"][0]["token_ids"] == expected["choices"][0]["token_ids"]
    assert stages_of(cluster) == stages  # they were not loaded again
    resumed = cluster.metrics()["molink_gateway_streams_resumed_total"]
    assert resumed >= len(streams)


def test_health_says_that_another_engine_is_starting(cluster: Cluster) -> None:
    victim(cluster, ENGINE).send_signal(signal.SIGKILL)
    eventually(lambda: cluster.has_status(503), 2.0, "the loss is noticed")
    assert "the engine has ended; another one is starting" in cluster.http.get("/health").text
    eventually(lambda: cluster.has_status(200), REPAIR_S, "it serves again")


def answers(cluster: Cluster, path: str) -> bool:
    """Whether somebody answers there, and with 200."""
    try:
        return cluster.http.get(path).status_code == 200
    except httpx.TransportError:
        return False


def test_a_gateway_that_is_killed_comes_back(cluster: Cluster) -> None:
    victim(cluster, "molink.entrypoints.gateway").send_signal(signal.SIGKILL)
    eventually(lambda: answers(cluster, "/health"), 10.0, "another gateway answers")
    assert cluster.ask([make_completion(make_prompt(5, 1), max_tokens=3)])


def test_requests_wait_at_a_gateway_that_is_back_before_the_engine(cluster: Cluster) -> None:
    for process in (ENGINE, "molink.entrypoints.gateway"):
        victim(cluster, process).send_signal(signal.SIGKILL)
    eventually(lambda: answers(cluster, "/cluster"), 10.0, "another gateway answers")
    assert not cluster.view().serving
    assert cluster.ask([make_completion(make_prompt(5, 1), max_tokens=3)])


def test_who_is_left_takes_all_layers_and_streams_go_on(
    cluster: Cluster, undisturbed: list[dict[int, list[Any]]]
) -> None:
    streams = streams_of(cluster)
    with ThreadPoolExecutor(len(streams)) as threads:
        running = [threads.submit(stream.run) for stream in streams]
        eventually(lambda: all(len(s.events) > BEGUN for s in streams), REPAIR_S, "all begin")
        gone = cluster.members.pop()
        gone.signal(signal.SIGKILL)
        for stream in running:
            stream.result(REPAIR_S)
    assert [stream.choices for stream in streams] == undisturbed
    assert [stage.layers for stage in cluster.view().stages] == ["0:8"]
    gone.end()
