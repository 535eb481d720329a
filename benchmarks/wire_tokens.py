"""What each format of activations does to a model's answers: real clusters of two stages.

Every cluster answers the same questions, greedily, and reads the answers of the first one: of each
of their tokens it tells the log-likelihood, and whether it would have chosen it too. Reading does
not go astray after the first other token, so its share counts each change once.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import uvloop
from contestants import Molink
from models import Subject

ANSWER_TOKENS = 48
TIMEOUT_S = 240.0

COUNTRIES = (
    *("France", "Germany", "Italy", "Spain", "Portugal", "Scotland", "Ireland", "Belgium"),
    *("Switzerland", "Austria", "Poland", "Hungary", "Greece", "Norway", "Sweden", "Finland"),
    *("Denmark", "Iceland", "Romania", "Bulgaria", "Croatia", "Serbia", "Ukraine", "Russia"),
    *("Estonia", "Latvia", "Lithuania", "Slovenia", "Japan", "China", "India", "Thailand"),
)
WORDS = ("hot", "big", "up", "day", "fast", "happy", "old", "good")
QUESTIONS = (
    *(f"What is the capital of {name}?" for name in COUNTRIES),
    *(f"What is {a} plus {b}?" for a in range(2, 10, 2) for b in range(1, 9, 2)),
    *(f"Tell me a story about a {name}." for name in ("fox", "girl", "boat", "tree")),
    *(f"What is the opposite of {word}?" for word in WORDS),
    "What is MoLink?",
    "Count to twenty.",
    "Name the four seasons.",
    "Who wrote Hamlet?",
)


@dataclass(frozen=True, slots=True)
class Answers:
    """What a cluster said: ids of each question's prompt and of its answer."""

    prompts: list[list[int]]
    tokens: list[list[int]]

    def unlike(self, other: "Answers") -> dict[str, float]:
        """Shares of answers and of tokens, by place, that are not the other's."""
        pairs = list(zip(self.tokens, other.tokens, strict=True))
        places = [a != b for mine, theirs in pairs for a, b in zip(mine, theirs, strict=True)]
        return {
            "answers changed": sum(mine != theirs for mine, theirs in pairs) / len(pairs),
            "tokens changed by place": sum(places) / len(places),
        }


@dataclass(frozen=True, slots=True)
class Reading:
    """How a cluster reads the tokens of someone's answers."""

    logprobs: list[float]
    is_choice: list[bool]  # whether it would have chosen the token

    def beside(self, other: "Reading") -> dict[str, float]:
        number = len(self.logprobs)
        pairs = list(zip(self.logprobs, other.logprobs, strict=True))
        same = zip(self.is_choice, other.is_choice, strict=True)
        return {
            "greedy tokens changed": sum(a != b for a, b in same) / number,
            "change of mean log-likelihood": sum(a - b for a, b in pairs) / number,
            "mean change of a token's": sum(abs(a - b) for a, b in pairs) / number,
        }


class Examiner:
    """Asks one cluster. Raises httpx.HTTPError if it refuses."""

    def __init__(self, url: str, subject: Subject) -> None:
        self._url = url
        self._model = str(subject.path)

    def answers(self, concurrency: int = len(QUESTIONS)) -> Answers:
        bodies = [
            {
                "messages": [{"role": "user", "content": question}],
                "max_tokens": ANSWER_TOKENS,
                "temperature": 0.0,
                "ignore_eos": True,
                "return_token_ids": True,
            }
            for question in QUESTIONS
        ]
        found = self._ask("/v1/chat/completions", bodies, concurrency)
        tokens = [answer["choices"][0]["token_ids"] for answer in found]
        return Answers([answer["prompt_token_ids"] for answer in found], tokens)

    def reads(self, answers: Answers, concurrency: int = len(QUESTIONS)) -> Reading:
        pairs = list(zip(answers.prompts, answers.tokens, strict=True))
        bodies = [
            {"prompt": [*prompt, *said], "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 1}
            for prompt, said in pairs
        ]
        found = self._ask("/v1/completions", bodies, concurrency)
        logprobs, is_choice = [], []
        for (prompt, said), answer in zip(pairs, found, strict=True):
            places = answer["choices"][0]["prompt_logprobs"][len(prompt) :]
            for token, place in zip(said, places, strict=True):
                logprobs.append(place[str(token)]["logprob"])
                is_choice.append(place[str(token)]["rank"] == 1)
        return Reading(logprobs, is_choice)

    def _ask(
        self, path: str, bodies: Sequence[dict[str, Any]], concurrency: int
    ) -> list[dict[str, Any]]:
        async def ask() -> list[dict[str, Any]]:
            limits = httpx.Limits(max_connections=concurrency)
            async with httpx.AsyncClient(
                base_url=self._url, timeout=TIMEOUT_S, limits=limits, trust_env=False
            ) as client:

                async def one(body: dict[str, Any]) -> dict[str, Any]:
                    response = await client.post(path, json={"model": self._model, **body})
                    if response.is_error:
                        raise httpx.HTTPError(response.text[:400])
                    answer: dict[str, Any] = response.json()
                    return answer

                return await asyncio.gather(*map(one, bodies))

        return uvloop.run(ask())


def start(name: str, subject: Subject, flags: tuple[str, ...]) -> Molink:
    """A cluster of two stages; end it with `stop`."""
    cluster = Molink(name, subject, 2, flags)
    try:
        cluster.start()
        cluster.wait_until_serving()
    except BaseException:
        cluster.stop()
        raise
    return cluster
