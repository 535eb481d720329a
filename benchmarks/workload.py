"""The client: sends token prompts to an OpenAI server all at once and notes when tokens come."""

import asyncio
import json
import random
import statistics
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import httpx

TIMEOUT_S = 240.0
EVENT = b"data: {"
USAGE = b'"usage":{'


@dataclass(frozen=True, slots=True)
class Workload:
    """`num_requests` prompts of random tokens, greedy, all sent at once."""

    num_requests: int = 32
    prompt_tokens: int = 128
    output_tokens: int = 64

    def prompts(self, vocab_size: int, seed: int) -> list[list[int]]:
        """Token ids; the lowest ids are left out, where models keep their special tokens."""
        numbers = random.Random(seed)
        return [
            [numbers.randrange(16, vocab_size) for _ in range(self.prompt_tokens)]
            for _ in range(self.num_requests)
        ]

    @property
    def computed_tokens(self) -> int:
        """Tokens that go through the layers; the last one sampled never does."""
        return self.num_requests * (self.prompt_tokens + self.output_tokens - 1)


@dataclass(frozen=True, slots=True)
class Answer:
    """One request: when it was sent, when each piece of its answer came, and its tokens."""

    sent_at: float  # seconds, clock of the client
    arrivals: list[float]
    output_tokens: int
    text: str = ""

    @property
    def ttft_s(self) -> float:
        return self.arrivals[0] - self.sent_at

    @property
    def events_per_token(self) -> float:
        return len(self.arrivals) / self.output_tokens

    @property
    def tpot_s(self) -> float:
        """Mean seconds between tokens after the first."""
        return (self.arrivals[-1] - self.arrivals[0]) / max(self.output_tokens - 1, 1)

    @property
    def longest_gap_s(self) -> float:
        """Most seconds without a token, once the first was there."""
        return max((later - earlier for earlier, later in pairwise(self.arrivals)), default=0.0)


def quantile(values: Iterable[float], share: float) -> float:
    """By nearest rank."""
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


@dataclass(frozen=True, slots=True)
class Round:
    """All answers of one run of a workload."""

    seconds: float  # from the first request sent to the last token
    answers: list[Answer]

    @property
    def output_tokens(self) -> int:
        return sum(answer.output_tokens for answer in self.answers)

    @property
    def tokens_per_s(self) -> float:
        return self.output_tokens / self.seconds

    @property
    def tpot_s(self) -> float:
        return statistics.median(answer.tpot_s for answer in self.answers)

    def ttft_s(self, share: float) -> float:
        """The quantile `share` of the seconds to the first token, by nearest rank."""
        return quantile((answer.ttft_s for answer in self.answers), share)

    @property
    def prefilled_at(self) -> float:
        """When the last of the first tokens came."""
        return max(answer.arrivals[0] for answer in self.answers)

    def decode_step_s(self) -> float:
        """Seconds of one round of decoding, once every prompt is computed.

        A server that lags puts several tokens into one event, so events are scaled to tokens.
        """
        steps = [
            (answer.arrivals[-1] - later[0]) / (len(later) - 1) * answer.events_per_token
            for answer in self.answers
            if len(later := [time for time in answer.arrivals if time >= self.prefilled_at]) > 1
        ]
        return statistics.median(steps)


async def run_round(
    url: str,
    model: str,
    prompts: list[list[int]],
    output_tokens: int,
    concurrency: int = 0,
    extra: Mapping[str, Any] | None = None,
) -> Round:
    """Send all prompts; `concurrency` bounds how many at once (0: all), `extra` joins each body.

    Raises:
        httpx.HTTPError: a request failed.
    """
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(
        base_url=url, timeout=TIMEOUT_S, limits=limits, verify=False
    ) as client:
        allowed = asyncio.Semaphore(concurrency or len(prompts))

        async def one(prompt: list[int]) -> Answer:
            async with allowed:
                return await complete(client, model, prompt, output_tokens, extra)

        started = time.perf_counter()
        answers = await asyncio.gather(*map(one, prompts))
    return Round(max(answer.arrivals[-1] for answer in answers) - started, answers)


def _body(model: str, output_tokens: int) -> dict[str, Any]:
    return {
        "model": model,
        "max_tokens": output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def complete(
    client: httpx.AsyncClient,
    model: str,
    prompt: list[int],
    output_tokens: int,
    extra: Mapping[str, Any] | None = None,
) -> Answer:
    """Stream one completion; `extra` joins its body. Raises httpx.HTTPError if it fails."""
    body = _body(model, output_tokens) | {"prompt": prompt} | dict(extra or {})
    sent_at = time.perf_counter()
    arrivals: list[float] = []
    texts: list[str] = []
    rest = b""
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != httpx.codes.OK:
            raise httpx.HTTPError(f"{response.status_code}: {(await response.aread())[:400]!r}")
        usage = None
        async for data in response.aiter_raw():
            now = time.perf_counter()
            *events, rest = (rest + data).split(b"\n\n")
            for event in events:
                if USAGE in event:
                    usage = json.loads(event[len("data: ") :])["usage"]
                elif event.startswith(EVENT):
                    arrivals.append(now)
                    texts.append(json.loads(event[len("data: ") :])["choices"][0]["text"])
    if usage is None or not arrivals:
        raise httpx.HTTPError(f"the stream ended early: {rest[:400]!r}")
    return Answer(sent_at, arrivals, usage["completion_tokens"], "".join(texts))
