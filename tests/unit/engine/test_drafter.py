"""Drafts over a pipeline: requests get the tokens they should, and every stage learns all of them.

The scheduler is vLLM's own, as ours, short of memory so that requests preempt one another. The
stages are played: the first keeps tokens as vLLM's runner does, the last knows what comes next.
"""

import json
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.config import VllmConfig
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.structured_output import StructuredOutputManager

from molink.planning.pace import Share

from .conftest import MakeConfig
from .test_scheduler import Engine

NUM_BLOCKS = 24  # of 16 tokens
DRAFTED = 3
PERIOD = 5  # of what requests say, so that n-grams come again
NGRAM = {"method": "ngram", "num_speculative_tokens": DRAFTED, "prompt_lookup_max": 3}
NGRAM |= {"prompt_lookup_min": 1}


@pytest.fixture(scope="module")
def make(make_config: MakeConfig) -> Callable[[int], VllmConfig]:
    """The configuration of so many stages."""

    def make(num_stages: int) -> VllmConfig:
        init_none_hash(sha256)
        flags = ("--max-num-seqs=8", "--max-num-batched-tokens=64")
        speculation = f"--speculative-config={json.dumps(NGRAM)}"
        made = make_config(*flags, speculation, num_stages=num_stages)
        made.cache_config.num_gpu_blocks = NUM_BLOCKS
        return made

    return make


@pytest.fixture(scope="module")
def config(make: Callable[[int], VllmConfig]) -> VllmConfig:
    return make(2)


class EarlyStage:
    """The tokens that a runner before the last stage believes its requests have."""

    def __init__(self) -> None:
        self.tokens: dict[str, list[int]] = {}

    def run(self, output: SchedulerOutput, truth: dict[str, list[int]]) -> None:
        """Take a step. Raises AssertionError if a token to compute is another than it should be."""
        for name in output.finished_req_ids:
            self.tokens.pop(name, None)
        computed = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        for new in output.scheduled_new_reqs:
            self.tokens[new.req_id] = list(new.prompt_token_ids or [])
        cached = output.scheduled_cached_reqs
        for name, done, new_tokens in zip(
            cached.req_ids, cached.num_computed_tokens, cached.new_token_ids, strict=True
        ):
            computed[name] = done
            lacking = done + len(new_tokens) - len(self.tokens[name])  # as GPUModelRunner has it
            if lacking > 0:
                self.tokens[name] += new_tokens[-lacking:]
        for name, num_tokens in output.num_scheduled_tokens.items():
            drafted = output.scheduled_spec_decode_tokens.get(name, [])
            end = computed[name] + num_tokens - len(drafted)
            assert self.tokens[name][:end] == truth[name][:end], name


class Speculating(Engine):
    """An engine whose last stage samples what it should, and accepts the drafts that are right."""

    def __init__(self, config: VllmConfig) -> None:
        super().__init__(config, StructuredOutputManager(config), NUM_BLOCKS)
        self.truth: dict[str, list[int]] = {}
        self.first = EarlyStage()
        self.num_drafted = self.num_accepted = 0

    def say(self, name: str, prompt: list[int], numbers: random.Random, **params: Any) -> None:
        """Add a request that goes on after `prompt` with period PERIOD, mostly."""
        part = [numbers.randrange(9) for _ in range(PERIOD)]
        answer = part * 30
        for _ in range(8):
            answer[numbers.randrange(len(answer))] = numbers.randrange(9)
        self.truth[name] = prompt + answer
        self.add(name, prompt, **params)

    def step(self) -> dict[str, int]:
        taken = super().step()
        output = self.in_flight[-1][0] if self.in_flight else None
        if output is not None and output.num_scheduled_tokens == taken:
            self.first.run(output, self.truth)
        return taken

    def take_answer(self, answer: ModelRunnerOutput | None = None) -> None:
        output, whole = self.in_flight[0]
        sampled = [
            self._sample(n, output) if n in whole else [] for n in output.num_scheduled_tokens
        ]
        names = list(output.num_scheduled_tokens)
        places = {name: index for index, name in enumerate(names)}
        super().take_answer(ModelRunnerOutput(names, places, sampled))

    def _sample(self, name: str, output: SchedulerOutput) -> list[int]:
        request = self.scheduler.requests.get(name)
        if request is None:
            return [0]
        drafts = output.scheduled_spec_decode_tokens.get(name, [])
        right = self.truth[name][request.num_tokens :][: len(drafts) + 1]
        accepted = next((i for i, d in enumerate(drafts) if d != right[i]), len(drafts))
        self.num_drafted += len(drafts)
        self.num_accepted += accepted
        return right[: accepted + 1]

    def check(self) -> None:
        said: dict[str, list[int]] = {}
        for output in self.outputs:
            said.setdefault(output.request_id, []).extend(output.new_token_ids)
        for name, tokens in said.items():
            assert tokens == self.truth[name][-30 * PERIOD :][: len(tokens)], name
        self.check_blocks()


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.tuples(st.integers(1, 120), st.integers(1, 90)), min_size=1, max_size=10),
    st.integers(0, 1000),
    st.integers(0, DRAFTED),
)
def test_every_request_gets_its_tokens_and_every_stage_learns_them(
    config: VllmConfig, sizes: list[tuple[int, int]], seed: int, wanted: int
) -> None:
    numbers = random.Random(seed)
    engine = Speculating(config)
    engine.scheduler._pace.drafts = lambda *_: wanted  # type: ignore[method-assign]
    for index, (length, max_tokens) in enumerate(sizes):
        prompt = [numbers.randrange(9) for _ in range(length)]
        engine.say(f"request-{index}", prompt, numbers, max_tokens=max_tokens)
    engine.drain()
    engine.check()
    has_room = any(max_tokens > 40 for _, max_tokens in sizes)
    assert (engine.num_drafted > 0) == (wanted > 0) or not has_room


def test_drafts_save_steps(config: VllmConfig) -> None:
    def steps(wanted: int) -> tuple[int, int]:
        engine = Speculating(config)
        engine.scheduler._pace.drafts = lambda *_: wanted  # type: ignore[method-assign]
        engine.say("one", [1, 2, 3], random.Random(1), max_tokens=80)
        engine.drain()
        return sum(map(bool, engine.steps)), engine.num_accepted

    (without, none), (with_drafts, accepted) = steps(0), steps(DRAFTED)
    assert none == 0
    assert accepted > 30
    assert with_drafts == without - accepted


def test_one_stage_alone_may_speculate(make: Callable[[int], VllmConfig]) -> None:
    """A head that computes nothing, and one node: vLLM then sends no tokens along."""
    engine = Speculating(make(1))
    engine.scheduler._pace.drafts = lambda *_: DRAFTED  # type: ignore[method-assign]
    engine.say("one", [1, 2, 3], random.Random(1), max_tokens=60)
    while engine.scheduler.has_requests():
        Engine.step(engine)
    engine.check()
    assert engine.num_accepted > 0


def test_nothing_is_drafted_beyond_the_end(config: VllmConfig) -> None:
    engine = Speculating(config)
    engine.scheduler._pace.drafts = lambda *_: DRAFTED  # type: ignore[method-assign]
    engine.say("one", [1, 2, 3], random.Random(1), max_tokens=30)
    engine.drain()
    computed = sum(step.get("one", 0) for step in engine.steps)
    rejected = engine.num_drafted - engine.num_accepted
    assert computed - rejected == 3 + 30 - 1  # the last token is never computed


def test_a_step_has_room_for_what_it_drafts(config: VllmConfig) -> None:
    engine = Speculating(config)
    engine.scheduler._pace.drafts = lambda *_: DRAFTED  # type: ignore[method-assign]
    engine.scheduler._pace.next = lambda load: Share(  # type: ignore[method-assign]
        load.num_ready, min(load.pending, 20), max_drafted=2
    )
    for index in range(6):
        engine.say(f"request-{index}", [1, 2, 3], random.Random(index), max_tokens=40)
    engine.drain()
    assert engine.num_drafted > 0
    assert all(sum(step.values()) <= 6 + 20 + 2 for step in engine.steps)
    engine.check()


def test_what_has_a_seed_is_not_drafted(config: VllmConfig) -> None:
    engine = Speculating(config)
    engine.scheduler._pace.drafts = lambda *_: DRAFTED  # type: ignore[method-assign]
    engine.say("one", [1, 2, 3], random.Random(1), max_tokens=60, temperature=0.7, seed=4)
    engine.drain()
    engine.check()
    assert engine.num_drafted == 0
