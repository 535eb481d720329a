"""Fewer bytes between stages: the same bits where that is promised, nearly the same elsewhere.

That a sum changes no token in float32 is tested by every pipeline of `test_equality`.
"""

from dataclasses import dataclass

import pytest
from tests.e2e.cluster import Cluster, tokens
from tests.e2e.conftest import BUNDLED, TWO_STAGES
from tests.factories import make_completion, make_prompts

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

LENGTHS = [20, 33, 64, 65, 100, 129, 190]
FLAGS = ("--dtype=bfloat16", "--max-model-len=512", "--max-num-batched-tokens=64")
PLAIN = ("--wire-sum=off", "--wire-coding=off")


@dataclass(frozen=True)
class Heard:
    """What two stages say, and what they think of the prompts."""

    tokens: list[list[int]]
    logprobs: list[float]
    logs: str  # of the stages

    def mean_change(self, other: "Heard") -> float:
        pairs = zip(self.logprobs, other.logprobs, strict=True)
        return sum(abs(a - b) for a, b in pairs) / len(self.logprobs)


def hear(*arguments: str) -> Heard:
    with Cluster(BUNDLED, flags=FLAGS, head_arguments=arguments) as cluster:
        answers = cluster.ask(
            [make_completion(prompt, prompt_logprobs=0) for prompt in make_prompts(LENGTHS)]
        )
        logs = logs_of_stages(cluster)
    places = (place for answer in answers for place in answer["choices"][0]["prompt_logprobs"])
    logprobs = [found["logprob"] for place in places if place for found in place.values()]
    return Heard(tokens(answers), logprobs, logs)


def logs_of_stages(cluster: Cluster) -> str:
    files = (f for m in cluster.machines for f in m.home.glob("*/logs/stage-*.log"))
    return "".join(file.read_text(errors="replace") for file in files)


@pytest.fixture(scope="module")
def plain() -> Heard:
    return hear(*PLAIN)


def test_coding_loses_nothing(plain: Heard) -> None:
    """Nor does the sum that it codes."""
    coded = hear("--wire-coding=on")
    assert "may_code_sum=True" in coded.logs
    assert coded.tokens == plain.tokens
    assert coded.logprobs == plain.logprobs
    assert "outputs are coded: True" in coded.logs
    assert "outputs are coded" not in plain.logs


@pytest.mark.parametrize(("kind", "most"), [("int8", 0.05), ("fp8", 0.1)])
def test_eight_bits_change_little(kind: str, most: float, plain: Heard) -> None:
    """With them goes the sum: a quarter of the bytes is left."""
    heard = hear(f"--wire-dtype={kind}")
    assert 0 < heard.mean_change(plain) < most
    assert len(heard.logprobs) == len(plain.logprobs)
    assert f"input comes as HopFormat(eight_bits='{kind}', has_sum=True" in heard.logs


@pytest.mark.parametrize("case", [TWO_STAGES], indirect=True)
def test_in_float32_the_sum_crosses(pipeline: Cluster) -> None:
    assert "input comes as HopFormat(eight_bits=None, has_sum=True" in logs_of_stages(pipeline)
