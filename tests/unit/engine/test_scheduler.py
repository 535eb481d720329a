"""vLLM's own scheduler, as ours: equal steps, full pipelines, and requests that end with an error.

The stages are played by a queue as deep as the pipeline; they sample the token 7, always.
"""

from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.config import VllmConfig
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.engine import EngineCoreOutput, FinishReason
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from molink.engine.footprint import traits_of
from molink.engine.lost import LostStep, losses
from molink.engine.replay import MOST_SETBACKS, Restored
from molink.engine.scheduler import PipelineScheduler
from molink.planning.micro_batches import decodes_per_step
from molink.wire.delivered import key_of
from molink.wire.to_agent import StageCounters, StepCost
from molink.wire.to_engine import HopFigures, PathMeasured

from .conftest import MakeConfig

BLOCK = 16  # tokens
NUM_BLOCKS = 4000
quick = settings(deadline=None, max_examples=25)
Make = Callable[[int], "Engine"]


class Engine:
    """What `EngineCore.step_with_batch_queue` does with a scheduler and a pipeline."""

    def __init__(
        self, config: VllmConfig, grammars: StructuredOutputManager, num_blocks: int = NUM_BLOCKS
    ) -> None:
        spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=1, dtype=torch.float32)
        self.scheduler = PipelineScheduler(
            vllm_config=config,
            kv_cache_config=KVCacheConfig(num_blocks, [], [KVCacheGroupSpec(["layer"], spec)]),
            structured_output_manager=grammars,
            block_size=BLOCK,
        )
        self.num_stages = config.parallel_config.pipeline_parallel_size
        self.deepest = self.num_stages  # steps in flight, beyond which an answer is taken
        self.in_flight: deque[tuple[SchedulerOutput, list[str]]] = deque()
        self.steps: list[dict[str, int]] = []  # tokens of each request
        self.outputs: list[EngineCoreOutput] = []
        self.restored: list[Restored] = []
        self._hasher = get_request_block_hasher(BLOCK, sha256)

    def add(
        self, name: str, prompt: int | list[int], adapter: int | None = None, **params: Any
    ) -> None:
        tokens = [len(name) + i for i in range(prompt)] if isinstance(prompt, int) else prompt
        sampling = SamplingParams(**{"max_tokens": 300, "ignore_eos": True} | params)
        lora = LoRARequest(f"adapter-{adapter}", adapter, "path") if adapter else None
        request = Request(
            name, tokens, sampling, None, lora_request=lora, block_hasher=self._hasher
        )
        self.scheduler.add_request(request)

    def step(self) -> dict[str, int]:
        """Schedule; take the oldest answer if enough are in flight, or nothing else is to do."""
        output = self.scheduler.schedule()
        taken = dict(output.num_scheduled_tokens)
        requests = [self.scheduler.requests[name] for name in taken]
        whole = [r.request_id for r in requests if r.num_computed_tokens >= r.num_tokens]
        self.in_flight.append((output, whole))
        self.steps.append(taken)
        self.restored += traits_of(output).restored
        self.last = output
        is_idle = not taken and not self.scheduler.has_requests()
        if len(self.in_flight) == self.deepest or is_idle:
            self.take_answer()
        return taken

    def take_answer(self, answer: ModelRunnerOutput | None = None) -> None:
        output, whole = self.in_flight.popleft()
        names = list(output.num_scheduled_tokens)
        sampled = [[7] if name in whole else [] for name in names]
        places = {name: index for index, name in enumerate(names)}
        answer = answer or ModelRunnerOutput(names, places, sampled)
        for of_client in self.scheduler.update_from_output(output, answer).values():
            self.outputs += of_client.outputs

    def drain(self) -> None:
        while self.scheduler.has_requests():
            self.step()
        while self.in_flight:
            self.take_answer()

    @property
    def ended(self) -> dict[str, FinishReason]:
        return {o.request_id: o.finish_reason for o in self.outputs if o.finish_reason is not None}

    def check_blocks(self) -> None:
        """Every block is free again; one is vLLM's own."""
        assert not self.scheduler.requests
        pool = self.scheduler.kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1


@pytest.fixture(scope="module")
def make(make_config: MakeConfig) -> Make:
    """An engine over so many stages, without requests."""
    init_none_hash(sha256)
    configs: dict[int, VllmConfig] = {}

    def engine(num_stages: int) -> Engine:
        if num_stages not in configs:
            config = make_config(
                "--max-num-seqs=64", "--max-num-batched-tokens=8192", num_stages=num_stages
            )
            config.cache_config.num_gpu_blocks = NUM_BLOCKS
            configs[num_stages] = config
        config = configs[num_stages]
        return Engine(config, grammars)

    grammars = StructuredOutputManager(make_config())
    return engine


def decoding(make: Make, num_stages: int, num_requests: int) -> Engine:
    """An engine whose requests have all begun to decode, and have gone round once since."""
    engine = make(num_stages)
    for index in range(num_requests):
        engine.add(f"request-{index}", 3)
    while len(engine.scheduler.running) < num_requests or any(
        not request.num_output_tokens for request in engine.scheduler.running
    ):
        engine.step()
    for _ in range(2 * num_stages):
        engine.step()
    engine.steps.clear()
    return engine


# --- decodes


@quick
@given(st.integers(1, 5), st.integers(1, 24))
def test_every_round_takes_each_decode_once_in_equal_steps(
    make: Make, num_stages: int, num_requests: int
) -> None:
    engine = decoding(make, num_stages, num_requests)
    for _ in range(4 * num_stages):
        engine.step()
    assert max(map(len, engine.steps)) == decodes_per_step(num_requests, num_stages)
    for start in range(0, len(engine.steps), num_stages):
        taken = [name for step in engine.steps[start : start + num_stages] for name in step]
        assert sorted(taken) == sorted({f"request-{i}" for i in range(num_requests)})


@quick
@given(st.integers(1, 4), st.integers(1, 12))
def test_who_is_held_back_is_taken_in_the_next_step(
    make: Make, num_stages: int, share: int
) -> None:
    engine = decoding(make, num_stages, 1)
    while engine.in_flight:
        engine.take_answer()
    num_requests = share * num_stages
    for index in range(1, num_requests):
        engine.add(f"request-{index}", 3)
    while len(engine.scheduler.running) < num_requests:
        engine.step()
    while engine.in_flight:  # now all are ready at once
        engine.take_answer()
    engine.steps.clear()
    for _ in range(num_stages):
        engine.step()
    assert [len(step) for step in engine.steps] == [share] * num_stages
    assert len({name for step in engine.steps for name in step}) == num_requests


arrivals = st.lists(
    st.tuples(st.integers(0, 3), st.integers(1, 40), st.integers(1, 30)), min_size=1, max_size=20
)  # steps after the one before, prompt, answer


def longest_wait(engine: Engine, comings: list[tuple[int, int, int]]) -> int:
    """Steps in a row for which a request was ready to decode, and was not taken."""
    waited: dict[str, int] = {}
    longest, number, coming = 0, 0, deque(enumerate(comings))
    while coming or engine.scheduler.has_requests():
        while coming and coming[0][1][0] <= number:
            index, (_, prompt, answer) = coming.popleft()
            engine.add(f"request-{index}", prompt, max_tokens=answer)
            number = 0
        ready = {r.request_id for r in engine.scheduler.running if is_ready(r)}
        taken = engine.step()
        waited = {name: waited.get(name, 0) + 1 for name in ready - taken.keys()}
        longest = max(longest, *waited.values(), 0)
        number += 1
    while engine.in_flight:
        engine.take_answer()
    return longest


def is_ready(request: Request) -> bool:
    return request.num_tokens - request.num_computed_tokens == 1


@quick
@given(st.integers(1, 5), arrivals)
def test_nobody_waits_longer_than_a_round(
    make: Make, num_stages: int, comings: list[tuple[int, int, int]]
) -> None:
    engine = make(num_stages)
    assert longest_wait(engine, comings) <= num_stages
    engine.check_blocks()
    lengths = {f"request-{i}": answer for i, (_, _, answer) in enumerate(comings)}
    for name, length in lengths.items():
        assert sum(len(o.new_token_ids) for o in engine.outputs if o.request_id == name) == length


# --- prefill


@quick
@given(st.integers(1, 5), st.lists(st.integers(2, 400), min_size=1, max_size=8))
def test_prompts_are_computed_once_and_decodes_keep_their_place(
    make: Make, num_stages: int, prompts: list[int]
) -> None:
    engine = decoding(make, num_stages, 2 * num_stages)
    old = {request.request_id for request in engine.scheduler.running}
    for index, length in enumerate(prompts):
        engine.add(f"new-{index}", [1000 * index + i for i in range(length)], max_tokens=1)
    while "new" in "".join(engine.scheduler.requests):
        engine.step()
    for index, length in enumerate(prompts):
        assert sum(step.get(f"new-{index}", 0) for step in engine.steps) == length
    for step in engine.steps:
        assert len(old & step.keys()) == 2


def test_a_prompt_of_one_token_is_taken_while_others_decode(make: Make) -> None:
    engine = decoding(make, 2, 4)
    engine.add("short", 1)
    for _ in range(20):
        engine.step()
    assert any("short" in step for step in engine.steps)


def test_a_chunk_that_stands_before_decodes_takes_no_place_of_theirs(make: Make) -> None:
    """Vllm hands out a step's tokens in the order of its list, until there are none left."""
    engine = decoding(make, 2, 4)
    cost = StepCost(0.001, 0.01)  # so dear that a chunk is small
    stages = [StageCounters(decode=cost, prefill=cost, bytes_per_token=10.0)] * 2
    engine.scheduler.take_path(PathMeasured(1, [HopFigures(1e9, 0.0)] * 2, stages))
    engine.add("new", 400, max_tokens=1)
    while not any(request.is_prefill_chunk for request in engine.scheduler.running):
        engine.step()
    engine.steps.clear()
    for _ in range(6):
        engine.scheduler.running.sort(key=lambda request: not request.is_prefill_chunk)
        engine.step()
    old = {f"request-{index}" for index in range(4)}
    assert all(len(old & step.keys()) == 2 for step in engine.steps)
    assert any(step.keys() - old for step in engine.steps)


def test_a_long_prompt_is_cut_so_that_the_second_stage_begins_early(make: Make) -> None:
    engine = make(2)
    for index in range(8):
        engine.add(f"new-{index}", [1000 * index + i for i in range(500)], max_tokens=1)
    engine.step()
    assert 500 <= sum(engine.steps[0].values()) <= 1500
    engine.drain()
    assert sum(sum(step.values()) for step in engine.steps) == 4000
    alone = make(1)
    for index in range(8):
        alone.add(f"new-{index}", [1000 * index + i for i in range(500)], max_tokens=1)
    assert sum(alone.step().values()) == 4000


def test_whole_prompts_where_the_user_wants_no_chunks(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make(2)
    monkeypatch.setattr(engine.scheduler.scheduler_config, "enable_chunked_prefill", False)
    for index in range(4):
        engine.add(f"new-{index}", [1000 * index + i for i in range(500)], max_tokens=1)
    engine.drain()
    for index in range(4):
        assert [step[f"new-{index}"] for step in engine.steps if f"new-{index}" in step] == [500]


# --- links that are the bottleneck


def slow_links(num_stages: int, rtt_s: float = 0.03) -> PathMeasured:
    """A path whose stages compute a token in 0.5 ms and whose links need 2.5."""
    cost = StepCost(0.02, 0.0005)
    stage = StageCounters(decode=cost, prefill=cost, bytes_per_token=2500.0)
    return PathMeasured(1, [HopFigures(1e6, rtt_s)] * num_stages, [stage] * num_stages)


def test_over_slow_links_a_step_holds_decodes_or_prompts(make: Make) -> None:
    engine = decoding(make, 2, 6)
    engine.scheduler.take_path(slow_links(2))
    old = {request.request_id for request in engine.scheduler.running}
    for index in range(3):
        engine.add(f"new-{index}", [1000 * index + i for i in range(300)], max_tokens=1)
    while "new" in "".join(engine.scheduler.requests):
        engine.step()
    kinds = [(bool(old & step.keys()), bool(step.keys() - old)) for step in engine.steps if step]
    assert (True, True) not in kinds
    assert {(True, False), (False, True)} <= set(kinds)
    for index in range(3):
        assert sum(step.get(f"new-{index}", 0) for step in engine.steps) == 300


@quick
@given(st.integers(2, 4), arrivals)
def test_over_slow_links_everybody_gets_an_answer(
    make: Make, num_stages: int, comings: list[tuple[int, int, int]]
) -> None:
    engine = make(num_stages)
    engine.scheduler.take_path(slow_links(num_stages))
    engine.deepest = 40
    longest_wait(engine, comings)
    engine.check_blocks()
    lengths = {f"request-{i}": answer for i, (_, _, answer) in enumerate(comings)}
    for name, length in lengths.items():
        assert sum(len(o.new_token_ids) for o in engine.outputs if o.request_id == name) == length


# --- requests that cannot cross the wire


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_request_that_cannot_cross_the_wire_ends_and_the_others_run(
    make: Make, place: int
) -> None:
    engine = make(2)
    for index in range(3):
        extra = {"kv_transfer_params": {"deep": [range(3) if index == place else None]}}
        engine.add(f"request-{index}", 20, max_tokens=4, extra_args=extra)
    engine.drain()
    assert not any(f"request-{place}" in step for step in engine.steps)
    assert engine.ended == {
        f"request-{i}": FinishReason.ERROR if i == place else FinishReason.LENGTH for i in range(3)
    }
    engine.check_blocks()


def test_a_request_that_cannot_cross_the_wire_ends_with_nobody_else_there(make: Make) -> None:
    engine = make(2)
    engine.add("alone", 20, extra_args={"plugin": object()})
    engine.drain()
    assert engine.ended == {"alone": FinishReason.ERROR}
    engine.check_blocks()


# --- a lost pipeline


@pytest.mark.parametrize("num_steps", [1, 2, 5, 40])
def test_lost_steps_are_computed_again(make: Make, num_steps: int) -> None:
    engine = make(3)
    for index in range(5):
        engine.add(f"request-{index}", list(range(1000 * index, 1000 * index + 100)), max_tokens=50)
    for _ in range(num_steps):
        engine.step()
    had = {r.request_id: list(r.output_token_ids) for r in engine.scheduler.requests.values()}
    known = {name for step in engine.steps for name in step}
    while engine.in_flight:
        engine.take_answer(LostStep.because("node-1 went away"))
    engine.steps.clear()
    restored: dict[str, list[int]] = {}
    while engine.scheduler.has_requests():
        engine.step()
        restored |= {r.req_id: tokens for r, tokens in traits_of(engine.last).restored}
    engine.drain()
    assert restored == {name: had[name] for name in known if had[name]}
    for name, tokens in had.items():
        computed = sum(step.get(name, 0) for step in engine.steps)
        assert computed == 100 + 49  # nothing is cached
        later = sum(len(o.new_token_ids) for o in engine.outputs if o.request_id == name)
        assert later == 50, tokens
    assert set(engine.ended.values()) == {FinishReason.LENGTH}
    engine.check_blocks()


def lose(engine: Engine) -> None:
    losses.count += 1
    while engine.in_flight:
        engine.take_answer(LostStep.because("killed"))


def test_what_is_lost_again_and_again_without_a_token_ends(make: Make) -> None:
    """It may be what ends the stages."""
    engine = make(2)
    engine.add("poison", 100)
    for _ in range(MOST_SETBACKS):
        assert not engine.ended
        engine.step()
        lose(engine)
    assert engine.ended == {"poison": FinishReason.ERROR}
    engine.check_blocks()


def test_what_gets_on_between_losses_is_never_given_up(make: Make) -> None:
    engine = make(2)
    engine.add("patient", 100, max_tokens=3 * MOST_SETBACKS)
    while "patient" not in engine.ended:
        had = sum(len(o.new_token_ids) for o in engine.outputs)
        while sum(len(o.new_token_ids) for o in engine.outputs) == had:
            engine.step()
        lose(engine)
    assert engine.ended == {"patient": FinishReason.LENGTH}


def test_a_step_whose_output_makes_no_sense_ends_every_request(make: Make) -> None:
    engine = make(3)
    for index in range(5):
        engine.add(f"request-{index}", 100)
    for _ in range(3):
        engine.step()
    while engine.in_flight:
        engine.take_answer(LostStep.because("a stage answered str", is_broken=True))
    errors = [o.request_id for o in engine.outputs if o.finish_reason is FinishReason.ERROR]
    assert sorted(errors) == [f"request-{index}" for index in range(5)]
    engine.check_blocks()
    assert engine.scheduler.schedule().finished_req_ids == set(errors)

    engine.steps.clear()
    engine.add("later", 100, max_tokens=3)
    engine.drain()
    assert sum(step.get("later", 0) for step in engine.steps) == 102  # no prefix is cached
    assert engine.ended["later"] is FinishReason.LENGTH
    engine.check_blocks()


def test_prefixes_are_cached_until_a_step_is_lost(make: Make) -> None:
    engine = make(2)
    prompt = list(range(4 * BLOCK + 1))
    for name in ("first", "second", "third"):
        engine.add(name, prompt, max_tokens=1)
        if name == "third":
            engine.step()
            engine.take_answer(LostStep.because("gone"))
        engine.drain()
    taken = [number for step in engine.steps for number in step.values()]
    assert taken == [len(prompt), 1, 1, len(prompt)]


def test_an_idle_pipeline_that_is_lost_has_no_prefixes_left(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make(2)
    for name in ("before", "again"):
        engine.add(name, list(range(100)), max_tokens=1)
        engine.drain()
    engine.scheduler.encoder_cache_manager.cached["an image"] = set()
    monkeypatch.setattr(losses, "count", losses.count + 1)
    engine.add("after", list(range(100)), max_tokens=1)
    engine.drain()
    assert not engine.scheduler.encoder_cache_manager.cached
    computed = {name: sum(step.get(name, 0) for step in engine.steps) for name in engine.ended}
    assert computed == {"before": 100, "again": 100 - 100 // BLOCK * BLOCK, "after": 100}


# --- adapters


def test_a_request_for_an_adapter_that_was_lost_is_refused(
    config_with_adapters: VllmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(config_with_adapters, StructuredOutputManager(config_with_adapters))
    monkeypatch.setattr("molink.engine.scheduler.dropped", {2})
    for adapter in (1, 2):
        engine.add(f"request-{adapter}", 20, adapter, max_tokens=1)
    engine.drain()
    assert engine.ended == {"request-1": FinishReason.LENGTH, "request-2": FinishReason.ERROR}


MAX_LORAS = 2
requests = st.tuples(st.integers(0, 3), st.integers(1, 200), st.integers(1, 12))


@pytest.fixture(scope="module")
def config_with_adapters(make_config: MakeConfig) -> VllmConfig:
    config = make_config("--enable-lora", f"--max-loras={MAX_LORAS}", "--max-num-batched-tokens=64")
    config.cache_config.num_gpu_blocks = NUM_BLOCKS
    return config


@quick
@given(st.lists(requests, min_size=1, max_size=16))
def test_a_step_has_no_more_adapters_than_a_stage(
    config_with_adapters: VllmConfig, asked: list[tuple[int, int, int]]
) -> None:
    """Where plain vLLM ends: requests admitted to different steps meet in one."""
    engine = Engine(config_with_adapters, StructuredOutputManager(config_with_adapters))
    adapters: dict[str, int] = {}
    for index, (adapter, prompt, answer) in enumerate(asked):
        adapters[f"request-{index}"] = adapter
        engine.add(f"request-{index}", prompt, adapter or None, max_tokens=answer)
        if prompt % 2:
            engine.step()
    engine.drain()
    for step in engine.steps:
        assert len({adapters[name] for name in step} - {0}) <= MAX_LORAS
    assert engine.ended.keys() == adapters.keys()
    engine.check_blocks()


# --- requests that an engine before this one began


def delivered(*tokens: int, prompt: int = 0, choice: int = 0) -> dict[str, list[int]]:
    return {key_of(prompt, choice): list(tokens)}


def test_a_request_goes_on_after_the_tokens_that_its_client_has(make: Make) -> None:
    engine = make(2)
    extra = delivered(3, 4, 5) | {"of-user": [1]}
    engine.add("cmpl-1-0-0123abcd", 20, max_tokens=6, extra_args=extra)
    engine.drain()
    told = [output.new_token_ids for output in engine.outputs]
    assert told == [[3, 4, 5], [7], [7], [7]]
    assert engine.ended == {"cmpl-1-0-0123abcd": FinishReason.LENGTH}
    assert engine.steps[0] == {"cmpl-1-0-0123abcd": 23}
    assert engine.restored[0].output == [3, 4, 5]
    assert engine.restored[0].request.sampling_params.extra_args == {"of-user": [1]}
    engine.check_blocks()


def test_each_choice_gets_its_own_tokens_again(make: Make) -> None:
    engine = make(2)
    extra = delivered(1, prompt=0, choice=1) | delivered(2, 2, prompt=1, choice=0)
    names = ["0_cmpl-a-0-0123abcd", "1_cmpl-a-0-0123abcd", "0_cmpl-a-1-0123abcd"]
    for name in names:
        engine.add(name, 5, max_tokens=3, extra_args=extra)
    engine.drain()
    tokens: dict[str, list[int]] = {}
    for output in engine.outputs:
        tokens.setdefault(output.request_id, []).extend(output.new_token_ids)
    assert [tokens[name] for name in names] == [[7, 7, 7], [1, 7, 7], [2, 2, 7]]


def test_a_request_whose_last_token_was_delivered_only_has_to_end(make: Make) -> None:
    engine = make(2)
    engine.add("chatcmpl-1-0123abcd", 20, max_tokens=2, extra_args=delivered(3, 4))
    engine.add("cmpl-2-0-0123abcd", 20, stop_token_ids=[4], extra_args=delivered(3, 4), logprobs=2)
    engine.drain()
    assert [output.new_token_ids for output in engine.outputs] == [[3, 4], [3, 4]]
    assert [output.stop_reason for output in engine.outputs] == [None, 4]
    reasons = [FinishReason.LENGTH, FinishReason.STOP]
    assert list(engine.ended.values()) == reasons
    assert engine.outputs[1].new_logprobs is not None
    assert engine.outputs[1].new_logprobs.logprob_token_ids.tolist() == [[3], [4]]
    engine.check_blocks()


@pytest.mark.parametrize("tokens", [[-1], [10**9], ["x"], [1.5], "no list", [1] * 4])
def test_what_cannot_have_been_delivered_ends_a_request(make: Make, tokens: Any) -> None:
    engine = make(2)
    engine.add("cmpl-1-0-0123abcd", 20, max_tokens=3, extra_args={key_of(0, 0): tokens})
    engine.drain()
    assert engine.ended == {"cmpl-1-0-0123abcd": FinishReason.ERROR}
    engine.check_blocks()


def test_a_request_that_goes_on_survives_the_loss_of_a_stage(make: Make) -> None:
    engine = make(2)
    engine.add("cmpl-1-0-0123abcd", 20, max_tokens=6, extra_args=delivered(3, 4, 5))
    engine.step()
    losses.count += 1
    engine.take_answer(LostStep.because("gone"))
    engine.drain()
    assert [t for output in engine.outputs for t in output.new_token_ids] == [3, 4, 5, 7, 7, 7]
    engine.check_blocks()
