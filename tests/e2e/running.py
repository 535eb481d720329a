"""Requests that are under way while something else happens."""

import json
import threading
import time
from typing import Any

import httpx
from tests.e2e.cluster import Cluster, eventually
from tests.factories import make_prompt

LONG = {"max_tokens": 450, "ignore_eos": True, "temperature": 0.0}  # seconds of work
LONG |= {"return_token_ids": True}


class Running:
    """One long completion in a thread of its own: what came of it, and when."""

    def __init__(self, cluster: Cluster, *, stream: bool) -> None:
        body = {"model": cluster.model, "prompt": make_prompt(20, seed=1), "stream": stream, **LONG}
        self.is_stream = stream
        self.status: int | None = None
        self.headers = httpx.Headers()
        self.lines: list[str] = []
        self.ended_at: float | None = None
        self._thread = threading.Thread(target=self._run, args=(cluster.url, body), daemon=True)
        self._thread.start()

    def _run(self, url: str, body: dict[str, Any]) -> None:
        try:
            with (
                httpx.Client(timeout=240.0, trust_env=False) as client,
                client.stream("POST", f"{url}/v1/completions", json=body) as response,
            ):
                self.status, self.headers = response.status_code, response.headers
                self.lines.extend(filter(None, response.iter_lines()))
        except httpx.HTTPError:
            pass  # the server went away: then there is no status, or no end of the stream
        self.ended_at = time.monotonic()

    def wait(self, timeout_s: float) -> None:
        """Raises ClusterError if it does not end in time."""
        eventually(lambda: self.ended_at is not None, timeout_s, "a running request ends")

    @property
    def tokens(self) -> list[int]:
        """Those that have come."""
        answers = self.events if self.is_stream else map(json.loads, self.lines)
        return [token for answer in answers for token in answer["choices"][0]["token_ids"]]

    @property
    def events(self) -> list[dict[str, Any]]:
        """The events of a stream."""
        data = (line.removeprefix("data: ") for line in self.lines)
        return [json.loads(text) for text in data if text != "[DONE]"]


def requests_in_flight(cluster: Cluster) -> tuple[Running, Running]:
    """A stream that has begun, and a request without a first byte; both take seconds more."""
    stream, whole = Running(cluster, stream=True), Running(cluster, stream=False)
    eventually(lambda: len(stream.lines) > 5, 20, "a stream begins")
    assert stream.ended_at is whole.ended_at is None
    return stream, whole
