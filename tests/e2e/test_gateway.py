"""The gateway before a real engine: keys, places, time, and an end without losses."""

import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import run
from typing import Any

import httpx
import pytest
from tests.e2e.cluster import COMMAND, START_S, Cluster, eventually
from tests.e2e.conftest import BUNDLED, COMMON
from tests.factories import make_completion, make_prompt

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

LONG = make_completion(make_prompt(20, 1), max_tokens=300, ignore_eos=True)
SHORT = make_completion(make_prompt(5, 2), max_tokens=3)
FREED_S = 5.0
END_S = 40.0


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Keys that `molink key` made, by name; `file` holds their hashes."""
    file = tmp_path_factory.mktemp("keys") / "keys.toml"
    made = {"file": str(file)}
    for name in ("alice", "bob"):
        command = [sys.executable, "-c", COMMAND, "key", name, "--file", str(file)]
        said = run(command, capture_output=True, text=True, check=True).stdout
        made[name] = said.split()[-1]
    assert file.stat().st_mode & 0o777 == 0o600
    return made


class Guarded(Cluster):
    """Asks with a key."""

    key = ""

    def post(self, body: dict[str, Any], key: str | None = None, **headers: str) -> httpx.Response:
        headers |= {"authorization": f"Bearer {key or self.key}"}
        request = {"model": self.model, **body}
        return self.http.post("/v1/completions", json=request, headers=headers)


@pytest.fixture(scope="module")
def cluster(keys: dict[str, str]) -> Iterator[Guarded]:
    limits = ["--max-running=2", "--max-waiting=1", f"--api-keys-file={keys['file']}"]
    Guarded.key = keys["alice"]
    with Guarded(BUNDLED, flags=COMMON, head_arguments=limits) as cluster:
        yield cluster


def test_a_key_is_needed_until_it_is_revoked(cluster: Guarded, keys: dict[str, str]) -> None:
    assert cluster.post(SHORT, key="wrong").status_code == 401
    assert cluster.http.get("/v1/models").status_code == 401
    assert cluster.has_status(200)
    assert cluster.post(SHORT, key=keys["bob"]).status_code == 200
    file = Path(keys["file"])
    text = file.read_text()
    file.write_text(text[: text.index('[keys."bob"]')])
    eventually(lambda: cluster.post(SHORT, key=keys["bob"]).status_code == 401, 10, "it is revoked")
    assert cluster.post(SHORT).status_code == 200


def test_no_key_is_seen_from_outside(cluster: Guarded, keys: dict[str, str]) -> None:
    secrets = [keys["alice"], keys["bob"]]
    seen = [" ".join(p.cmdline()) for m in cluster.machines for p in m.processes()]
    seen += [cluster.logs(), cluster.http.get("/metrics").text, cluster.http.get("/cluster").text]
    assert not [secret for secret in secrets for text in seen if secret in text]


def test_places_are_limited_and_come_free_when_a_client_leaves(cluster: Guarded) -> None:
    with ThreadPoolExecutor(6) as threads:
        answers = list(threads.map(cluster.post, [LONG] * 6))
    statuses = sorted(answer.status_code for answer in answers)
    assert statuses == [200] * 3 + [429] * 3
    assert all(int(a.headers["retry-after"]) >= 1 for a in answers if a.status_code == 429)

    def leave() -> None:
        headers = {"authorization": f"Bearer {cluster.key}"}
        body = {"model": cluster.model, "stream": True, **LONG}
        with cluster.http.stream("POST", "/v1/completions", json=body, headers=headers) as answer:
            next(answer.iter_bytes())

    for _ in range(3):
        leave()

    def is_empty() -> bool:
        found = cluster.metrics()
        return found["vllm:num_requests_running"] == found["vllm:kv_cache_usage_perc"] == 0

    eventually(is_empty, FREED_S, "nothing is left at the engine")
    assert cluster.post(SHORT).status_code == 200


def test_a_request_may_not_take_longer_than_its_client_waits(cluster: Guarded) -> None:
    began = time.monotonic()
    answer = cluster.post(LONG, **{"x-request-timeout": "0.3"})
    assert answer.status_code == 504
    assert time.monotonic() - began < 2.0
    running = "vllm:num_requests_running"
    eventually(lambda: cluster.metrics()[running] == 0, FREED_S, "the engine has ended it")


def test_a_head_that_is_told_to_end_lets_requests_end(cluster: Guarded) -> None:
    answers: list[httpx.Response] = []
    asking = threading.Thread(target=lambda: answers.append(cluster.post(LONG)))
    asking.start()
    running = "vllm:num_requests_running"
    eventually(lambda: cluster.metrics()[running] == 1, 10, "it runs")
    cluster.head.signal(signal.SIGTERM)
    cluster.head.wait_for("1 request is under way")
    assert cluster.post(SHORT).status_code == 503
    asking.join(END_S)
    assert answers[0].json()["usage"]["completion_tokens"] == 300
    assert cluster.head.wait(END_S) == 0


class Alone(Cluster):
    """One machine, whose head serves as that of a cluster would."""

    def wait_until_serving(self, timeout_s: float = START_S) -> None:
        self.head.wait_for("serving at", timeout_s)


def test_one_machine_may_have_a_gateway_too() -> None:
    with Alone(
        BUNDLED, nodes=1, flags=COMMON, head_arguments=["--gateway", "--listen=127.0.0.1:0"]
    ) as alone:
        (before,) = alone.ask([LONG])
        (engine,) = alone.head.processes("EngineCore")
        with ThreadPoolExecutor(1) as threads:
            asked = threads.submit(alone.ask, [LONG])
            running = "vllm:num_requests_running"
            eventually(lambda: alone.metrics()[running] == 1, 10, "it runs")
            engine.kill()
            (after,) = asked.result()
        assert after["choices"][0]["text"] == before["choices"][0]["text"]
