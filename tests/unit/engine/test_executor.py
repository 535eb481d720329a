"""The executor over a real session whose agent, with all its stages, is in memory."""

import pickle
import queue
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, cast

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.config import VllmConfig
from vllm.exceptions import LoRAAdapterNotFoundError
from vllm.lora.request import LoRARequest
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.core.sched.output import CachedRequestData, GrammarOutput, SchedulerOutput
from vllm.v1.executor.abstract import Executor
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput

from molink.core.errors import PipelineDownError, StageError, UsageError
from molink.core.ids import EVERY_STAGE, HEAD, Address, NodeId, Port
from molink.engine import executor as executor_module
from molink.engine import session as session_module
from molink.engine.adapters import adapter_digest
from molink.engine.config import resolve
from molink.engine.environment import FLAGS_VARIABLE, SOCKET_VARIABLE
from molink.engine.executor import PipelineExecutor
from molink.engine.footprint import StepTraits
from molink.engine.grammar import unpack_grammar
from molink.engine.lost import LostStep
from molink.engine.types import build_codec
from molink.planning.order import Footprint
from molink.wire import to_agent, to_engine
from molink.wire.assembly import Message
from molink.wire.frames import Kind
from molink.wire.to_engine import (
    PipelineAssigned,
    PipelineDown,
    PipelineRepaired,
    StagePlace,
    StandbyChosen,
    StandbyDropped,
)
from molink.wire.to_stage import WORKER_CALLS, LoadStage

CODEC = build_codec()
NODES = [4, 0, 7]  # in the order of the pipeline
SIZES = [1, 2, 1]  # tensor parallel
WORKERS = [(node, rank) for node, n in zip(NODES, SIZES, strict=True) for rank in range(n)]
LAST = NodeId(NODES[-1])


def pipeline(epoch: int = 1, nodes: list[int] = NODES) -> PipelineAssigned:
    return PipelineAssigned(
        epoch,
        [
            StagePlace(node, f"node-{node}", 2 * i, 2 * i + 2, size, ["float32"])
            for i, (node, size) in enumerate(zip(nodes, SIZES, strict=True))
        ],
    )


class Sent(NamedTuple):
    """What the engine gave to its agent."""

    kind: Kind
    node: int
    epoch: int
    sequence: int
    content: Any


class Agent:
    """Takes the place of the session's socket; its stages answer calls at once, steps when told."""

    def __init__(self, news: PipelineDown | None = None) -> None:
        self._inbox: queue.Queue[Message] = queue.Queue()
        self._has_begun = False
        self.sent: list[Sent] = []
        self.pipeline = pipeline()
        self.answer: Callable[[int, int, str], Any] = lambda node, rank, method: None
        self.also: list[tuple[int, int]] = []  # workers of nodes that stand by
        self.tell(news or self.pipeline)

    # What the session sees

    def send(
        self,
        kind: Kind,
        destination: Address,
        parts: list[bytes],
        *,
        epoch: int = 0,
        sequence: int = 0,
        **_: Any,
    ) -> None:
        [payload] = parts
        content: Any
        if kind == Kind.CONTROL:
            content = to_agent.decode(payload)
        else:
            content = CODEC.decode(unpack_grammar(payload) if kind == Kind.SAMPLE else payload)
        self.sent.append(Sent(kind, destination.node, epoch, sequence, content))
        if kind == Kind.CALL:
            self._reply(self.sent[-1])

    def receive(self) -> Message:
        if self._has_begun:
            self._inbox.task_done()
        self._has_begun = True
        return self._inbox.get()

    # What the cluster does

    def tell(self, message: to_engine.ToEngine) -> None:
        self._put(Kind.CONTROL, HEAD, to_engine.encode(message), port=Port.AGENT)

    def finish(self, step: Sent, output: Any) -> None:
        """The last stage answers a step; returns when the engine has taken note."""
        self.answer_step(step, CODEC.encode(output))

    def answer_step(self, step: Sent, payload: bytes) -> None:
        self._put(Kind.RESULT, LAST, payload, step.sequence)
        self.settle()

    def lose(self, reason: str) -> None:
        self.tell(PipelineDown(reason))
        self.settle()

    def settle(self) -> None:
        self._inbox.join()

    def _reply(self, call: Sent) -> None:
        method = call.content[0]
        for node, rank in self.workers:
            if node == call.node:
                answer = self.answer(node, rank, method)
                kind = Kind.FAILURE if isinstance(answer, Exception) else Kind.REPLY
                answer = str(answer) if kind == Kind.FAILURE else answer
                self._put(kind, node, CODEC.encode(answer), call.sequence, rank=rank)

    @property
    def workers(self) -> list[tuple[int, int]]:
        stages = self.pipeline.stages
        own = [(s.node, rank) for s in stages for rank in range(s.tensor_parallel_size)]
        return own + self.also

    def _put(
        self,
        kind: Kind,
        node: int,
        payload: bytes,
        sequence: int = 0,
        *,
        rank: int = 0,
        port: Port = Port.STAGE,
    ) -> None:
        source = Address(NodeId(node), port)
        epoch = self.pipeline.epoch
        self._inbox.put(Message(kind, source, rank, epoch, sequence, bytearray(payload)))

    # What a test asks

    def of(self, kind: Kind) -> list[Sent]:
        return [sent for sent in self.sent if sent.kind == kind]

    def calls(self) -> list[tuple[int, Any]]:
        """(node, (method, args, kwargs)) in the order in which they were made."""
        return [(sent.node, sent.content) for sent in self.of(Kind.CALL)]


@dataclass(frozen=True)
class Head:
    """An engine's executor and its agent; what start-up sent is forgotten."""

    executor: PipelineExecutor
    agent: Agent


def ended(status: int) -> None:
    raise AssertionError("the engine's process would end")


@pytest.fixture
def start(head_config: VllmConfig, monkeypatch: pytest.MonkeyPatch) -> Callable[[Agent], Head]:
    monkeypatch.setattr(executor_module, "die_with_parent", lambda: None)
    monkeypatch.setattr(executor_module, "REPORT_INTERVAL_S", 3600.0)
    monkeypatch.setattr(executor_module.os, "_exit", ended)
    monkeypatch.setenv(SOCKET_VARIABLE, "/nowhere")
    monkeypatch.setenv(FLAGS_VARIABLE, '["--seed", "5"]')

    def begin(agent: Agent) -> Head:
        monkeypatch.setattr(session_module, "LocalSocket", lambda *_: agent)
        return Head(PipelineExecutor(head_config), agent)

    return begin


@pytest.fixture
def head(start: Callable[[Agent], Head]) -> Iterator[Head]:
    made = start(Agent())
    made.agent.sent.clear()
    yield made
    made.agent.settle()


def step_of(*request_ids: str, grammar: bool = False) -> SchedulerOutput:
    """A step that decodes one token for each request."""
    output = SchedulerOutput.make_empty()
    output.scheduled_cached_reqs = CachedRequestData(
        req_ids=list(request_ids),
        resumed_req_ids=set(),
        new_token_ids=[[1] for _ in request_ids],
        all_token_ids={name: list(range(1000)) for name in request_ids},
        new_block_ids=[None for _ in request_ids],
        num_computed_tokens=[7 for _ in request_ids],
        num_output_tokens=[1 for _ in request_ids],
    )
    output.num_scheduled_tokens = dict.fromkeys(request_ids, 1)
    output.total_num_scheduled_tokens = len(request_ids)
    output.has_structured_output_requests = grammar
    return with_traits(output)


def with_traits(output: SchedulerOutput, *blocks: int) -> SchedulerOutput:
    """As the scheduler leaves it: a step that reads and writes these KV blocks."""
    requests = frozenset(output.num_scheduled_tokens) | output.finished_req_ids
    written = frozenset(blocks)
    output.traits = StepTraits(False, Footprint(requests, written, written))  # type: ignore[attr-defined]
    return output


def answer_of(*request_ids: str) -> ModelRunnerOutput:
    return ModelRunnerOutput(
        req_ids=list(request_ids),
        req_id_to_index={name: index for index, name in enumerate(request_ids)},
        sampled_token_ids=[[9] for _ in request_ids],
    )


def run(head: Head, output: SchedulerOutput, grammar: GrammarOutput | None = None) -> Future[Any]:
    """As `EngineCore.step_with_batch_queue` does."""
    executed = head.executor.execute_model(output, non_block=True)
    if output.total_num_scheduled_tokens == 0:
        return cast(Future[Any], executed)
    assert executed.done()
    return cast(Future[Any], head.executor.sample_tokens(grammar, non_block=True))


# --- start


def test_vllm_reaches_executor_and_scheduler_by_reference(head_config: VllmConfig) -> None:
    """They are made in another process, which imports them."""
    executor = Executor.get_class(head_config)
    assert executor is PipelineExecutor
    assert PipelineExecutor.__module__.encode() in pickle.dumps(executor)
    for cls in (executor, head_config.scheduler_config.get_scheduler_cls()):
        assert cls.__module__.startswith("molink.engine.")
        assert getattr(import_module(cls.__module__), cls.__qualname__) is cls
        assert resolve_obj_by_qualname(f"{cls.__module__}.{cls.__qualname__}") is cls


def test_every_stage_loads_its_layers_with_the_heads_values(
    start: Callable[[Agent], Head], head_config: VllmConfig
) -> None:
    agent = Agent()
    start(agent)
    assert agent.calls() == [
        (
            node,
            (
                "load",
                (
                    LoadStage(
                        stage_index=index,
                        nodes=NODES,
                        partition=[2, 2, 2],
                        engine_flags=["--seed", "5"],
                        resolved=resolve(head_config),
                    ),
                ),
                {},
            ),
        )
        for index, node in enumerate(NODES)
    ]


def test_who_takes_a_sum_is_told_to_the_stage_before(start: Callable[[Agent], Head]) -> None:
    agent = Agent()
    agent.answer = lambda node, rank, method: node == NODES[2] or None
    start(agent)
    assert agent.calls()[len(NODES) :] == [(NODES[1], ("send_sum", (True,), {}))]


def test_a_stage_that_cannot_load_ends_the_start_and_says_why(
    start: Callable[[Agent], Head],
) -> None:
    agent = Agent()
    agent.answer = lambda node, rank, method: StageError("too little memory") if node == 7 else None
    with pytest.raises(StageError, match="node-7: too little memory"):
        start(agent)
    assert agent.sent[-1].content == to_agent.EngineFailed(
        "node-7: too little memory", is_usage=False
    )


def test_an_engine_that_starts_while_the_pipeline_is_down_ends(
    start: Callable[[Agent], Head],
) -> None:
    """The agent starts another when there is a plan."""
    with pytest.raises(StageError, match="node-7 went away"):
        start(Agent(PipelineDown("node-7 went away")))


def test_what_does_not_work_over_stages_is_reported_before_any_stage_loads(
    start: Callable[[Agent], Head], head_config: VllmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = Agent()
    monkeypatch.setattr(head_config.scheduler_config, "async_scheduling", True)
    with pytest.raises(UsageError, match="async scheduling"):
        start(agent)
    assert not agent.calls()
    assert "async scheduling" in agent.sent[-1].content.reason


# --- steps


def test_a_step_goes_once_to_every_stage_and_its_output_is_the_last_ones(head: Head) -> None:
    future = run(head, step_of("a", "b"))
    [step] = head.agent.sent
    expected = step_of("a", "b")
    expected.scheduled_cached_reqs.all_token_ids = {}
    assert (step.kind, step.node, step.epoch) == (Kind.STEP, EVERY_STAGE, 1)
    assert step.content == (True, False, [], expected, [])
    assert not future.done()
    head.agent.finish(step, answer_of("a", "b"))
    assert future.result(0) == answer_of("a", "b")


def test_steps_in_flight_are_told_apart(head: Head) -> None:
    futures = [run(head, step_of(name)) for name in "abc"]
    for name, step, future in reversed(
        list(zip("abc", head.agent.of(Kind.STEP), futures, strict=True))
    ):
        head.agent.finish(step, answer_of(name))
        assert future.result(0) == answer_of(name)


def test_a_grammar_goes_to_the_last_stage_after_its_step(head: Head) -> None:
    grammar = GrammarOutput(["a"], np.full((1, 5), 3, np.int32), [1])
    future = run(head, step_of("a", grammar=True), grammar)
    step, sample = head.agent.sent
    assert step.content[0] is False  # the last stage waits for the grammar
    assert (sample.kind, sample.node, sample.sequence) == (Kind.SAMPLE, LAST, step.sequence)
    assert sample.content.structured_output_request_ids == ["a"]
    assert np.array_equal(sample.content.grammar_bitmask, grammar.grammar_bitmask)
    head.agent.finish(step, answer_of("a"))
    assert future.result(0) == answer_of("a")


def test_a_step_without_tokens_is_resolved_here(head: Head) -> None:
    assert run(head, SchedulerOutput.make_empty()).result(0) is EMPTY_MODEL_RUNNER_OUTPUT
    assert not head.agent.sent


def test_a_step_without_tokens_that_says_something_is_sent_one_way(head: Head) -> None:
    output = SchedulerOutput.make_empty()
    output.finished_req_ids = {"a"}
    assert run(head, with_traits(output)).result(0) is EMPTY_MODEL_RUNNER_OUTPUT
    [step] = head.agent.sent
    assert (step.kind, step.node) == (Kind.STEP, EVERY_STAGE)
    assert step.content[3].finished_req_ids == {"a"}
    head.executor._session.report(None)
    assert head.agent.sent[-1].content.steps_in_flight == 0  # nothing is waited for


# --- failures


def test_an_answer_that_cannot_be_read_is_a_lost_step(head: Head) -> None:
    future = run(head, step_of("a"))
    [step] = head.agent.sent
    head.agent.answer_step(step, b"\xc1")
    lost = future.result(0)
    assert isinstance(lost, LostStep)
    assert lost.is_broken


@pytest.mark.parametrize("num_steps", [0, 1, 3])
def test_a_lost_stage_loses_the_steps_in_flight_and_all_that_follow(
    head: Head, num_steps: int
) -> None:
    futures = [run(head, step_of(str(n))) for n in range(num_steps)]
    head.agent.lose("node-0 went away")
    num_sent = len(head.agent.sent)
    futures += [run(head, step_of("later")), run(head, SchedulerOutput.make_empty())]
    for future in futures:
        lost = future.result(0)
        assert isinstance(lost, LostStep)
        assert (lost.reason, lost.is_broken) == ("node-0 went away", False)
    assert head.executor.is_down
    assert len(head.agent.sent) == num_sent


def test_a_stage_lost_between_the_two_calls_of_a_step(head: Head) -> None:
    assert head.executor.execute_model(step_of("a"), non_block=True).result(0) is None
    head.agent.lose("gone")
    assert isinstance(head.executor.sample_tokens(None, non_block=True).result(0), LostStep)


def test_a_stage_lost_while_a_step_is_encoded(head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    codec = head.executor._codec

    class LosingCodec:
        def encode(self, value: Any) -> bytes:
            head.agent.lose("gone")
            return codec.encode(value)

    monkeypatch.setattr(head.executor, "_codec", LosingCodec())
    assert isinstance(run(head, step_of("a")).result(0.1), LostStep)


def test_a_call_while_the_pipeline_is_down_fails(head: Head) -> None:
    head.agent.lose("node-7 went away")
    head.agent.pipeline = pipeline(nodes=[4, 0, 8])  # who is gone answers nothing
    with pytest.raises(StageError, match="node-7 went away"):
        head.executor.collective_rpc("list_loras", timeout=0.1)


def test_a_step_names_those_it_must_not_overtake(head: Head) -> None:
    run(head, with_traits(step_of("a"), 1, 2))
    run(head, with_traits(step_of("b"), 3))
    run(head, with_traits(step_of("c"), 2))
    first, *others = head.agent.of(Kind.STEP)
    assert [step.content[2] for step in others] == [[], [first.sequence]]
    head.agent.finish(first, answer_of("a"))
    run(head, with_traits(step_of("d"), 1, 2))
    assert head.agent.of(Kind.STEP)[-1].content[2] == [others[1].sequence]


def test_a_lost_pipeline_binds_no_step_of_the_next(head: Head) -> None:
    run(head, with_traits(step_of("a"), 1))
    head.executor.collective_rpc("compile_or_warm_up_model")
    head.agent.lose("node-7 went away")
    reported = wait_for_report(head.executor)
    head.agent.pipeline = pipeline(epoch=2)
    head.agent.tell(PipelineRepaired(head.agent.pipeline, []))
    assert reported.result(10) is None
    run(head, with_traits(step_of("a"), 1))
    assert head.agent.of(Kind.STEP)[-1].content[2] == []


# --- calls


def test_a_call_has_one_answer_per_worker_in_order(head: Head) -> None:
    head.agent.answer = lambda node, rank, method: [method, node, rank]
    answers = head.executor.collective_rpc("list_loras", args=(1,), kwargs={"x": 2})
    assert answers == [["list_loras", node, rank] for node, rank in WORKERS]
    assert head.agent.calls() == [(node, ("list_loras", (1,), {"x": 2})) for node in NODES]
    later = head.executor.collective_rpc("list_loras", non_block=True)
    assert later.result(0) == answers


closed = st.text().filter(lambda name: name not in WORKER_CALLS)


def test_what_is_not_on_the_list_is_called_nowhere(head: Head) -> None:
    @settings(deadline=None, max_examples=30)
    @given(
        st.one_of(closed, st.sampled_from(["load", "reset", "execute_model", "save_sharded_state"]))
    )
    def check(method: str) -> None:
        with pytest.raises(StageError, match="cannot be called"):
            head.executor.collective_rpc(method)

    check()
    for callable_ in (lambda worker: None, len, WORKER_CALLS.union):
        with pytest.raises(StageError, match="cannot be called"):
            head.executor.collective_rpc(callable_)
    assert not head.agent.sent


def test_a_worker_that_fails_is_named(head: Head) -> None:
    head.agent.answer = lambda node, rank, method: StageError("no such adapter") if rank else True
    with pytest.raises(StageError, match="node-0: no such adapter"):
        head.executor.collective_rpc("pin_lora", args=(1,))


def test_each_worker_gets_its_own_part_of_the_kv_configuration(head: Head) -> None:
    configs = [f"of {node}/{rank}" for node, rank in WORKERS]
    head.executor.initialize_from_config(cast(Any, configs))
    assert head.agent.calls() == [
        (4, ("initialize_from_config", (["of 4/0"],), {})),
        (0, ("initialize_from_config", (["of 0/0", "of 0/1"],), {})),
        (7, ("initialize_from_config", (["of 7/0"],), {})),
    ]


def test_kv_layouts_are_those_that_all_workers_have_in_the_firsts_order(head: Head) -> None:
    names = st.permutations(["LBHNC", "BLHNC", "LBNHC", "BHLNC"])
    lists = names.flatmap(lambda order: st.integers(0, 4).map(lambda n: order[:n]))

    @settings(deadline=None, max_examples=30)
    @given(st.tuples(*(lists for _ in WORKERS)))
    def check(of_workers: tuple[list[str], ...]) -> None:
        supported = dict(zip(WORKERS, of_workers, strict=True))
        head.agent.answer = lambda node, rank, method: supported[node, rank]
        common = set.intersection(*map(set, of_workers))
        expected = sorted(common, key=of_workers[0].index)
        assert head.executor.get_supported_kv_cache_layouts() == [expected] * len(WORKERS)

    check()
    head.agent.answer = lambda *_: ["LBHNC", "BLHNC"]
    assert head.executor.get_supported_kv_cache_layouts()[0] == ["LBHNC", "BLHNC"]


# --- adapters


@pytest.fixture
def adapter(tmp_path: Path) -> LoRARequest:
    (tmp_path / "adapter_config.json").write_text("{}")
    return LoRARequest("own", 3, str(tmp_path))


def test_every_stage_is_told_what_the_heads_adapter_is(head: Head, adapter: LoRARequest) -> None:
    head.agent.answer = lambda *_: True
    assert head.executor.add_lora(adapter)
    call = ("add_lora", (adapter, adapter_digest(adapter)), {})
    assert head.agent.calls() == [(node, call) for node in NODES]


def test_an_adapter_that_one_stage_lacks_is_on_none(head: Head, adapter: LoRARequest) -> None:
    head.agent.answer = lambda node, rank, method: (
        StageError("no such adapter") if (node, method) == (7, "add_lora") else True
    )
    with pytest.raises(StageError, match="node-7: no such adapter"):
        head.executor.add_lora(adapter)
    removed = [(node, ("remove_lora", (3,), {})) for node in NODES]
    assert head.agent.calls()[len(NODES) :] == removed


def test_an_adapter_that_the_head_lacks_is_asked_of_no_stage(head: Head) -> None:
    with pytest.raises(LoRAAdapterNotFoundError, match="No adapter found for /nowhere"):
        head.executor.add_lora(LoRARequest("own", 3, "/nowhere"))
    assert not head.agent.calls()


def test_no_adapter_is_replaced_in_place(head: Head, adapter: LoRARequest) -> None:
    with pytest.raises(UsageError, match="load_inplace"):
        head.executor.add_lora(LoRARequest("own", 3, adapter.lora_path, load_inplace=True))
    assert not head.agent.calls()


def test_a_replaced_stage_gets_the_adapters_that_are_loaded(
    head: Head, adapter: LoRARequest
) -> None:
    head.agent.answer = lambda *_: True
    head.executor.collective_rpc("compile_or_warm_up_model")
    head.executor.add_lora(adapter)
    head.executor.add_lora(LoRARequest("gone", 4, adapter.lora_path))
    head.executor.remove_lora(4)
    head.agent.lose("node-0 went away")
    head.agent.sent.clear()
    reported = wait_for_report(head.executor)
    head.agent.tell(PipelineRepaired(head.agent.pipeline, [1]))
    assert reported.result(10) is None
    [(node, (_, (request, _), _))] = [c for c in head.agent.calls() if c[1][0] == "add_lora"]
    assert (node, request) == (0, adapter)


def test_an_adapter_that_a_replaced_stage_lacks_is_dropped_and_the_pipeline_serves(
    head: Head, adapter: LoRARequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("molink.engine.executor.dropped", dropped := set[int]())
    head.agent.answer = lambda *_: True
    head.executor.collective_rpc("compile_or_warm_up_model")
    head.executor.add_lora(adapter)
    head.agent.answer = lambda node, rank, method: (
        StageError("no such adapter") if method == "add_lora" else True
    )
    head.agent.lose("node-0 went away")
    head.agent.sent.clear()
    reported = wait_for_report(head.executor)
    head.agent.tell(PipelineRepaired(head.agent.pipeline, [1]))
    assert reported.result(10) is None
    removed = [node for node, (method, *_) in head.agent.calls() if method == "remove_lora"]
    assert (removed, dropped) == (NODES, {adapter.lora_int_id})


# --- repair


def test_a_replaced_stage_gets_the_start_up_again_and_every_stage_forgets(head: Head) -> None:
    configs = [f"of {node}/{rank}" for node, rank in WORKERS]
    head.agent.answer = lambda *_: ["LBHNC"]
    head.executor.get_supported_kv_cache_layouts()
    head.executor.set_kv_cache_layout("LBHNC")
    head.executor.determine_available_memory()
    head.executor.initialize_from_config(cast(Any, configs))
    head.executor.collective_rpc("compile_or_warm_up_model")
    head.executor.collective_rpc("list_loras")
    head.agent.lose("node-0 went away")
    head.agent.sent.clear()

    nodes = [4, 3, 7]  # a spare takes the middle stage
    reported = wait_for_report(head.executor)
    head.agent.pipeline = pipeline(2, nodes)
    head.agent.tell(PipelineRepaired(head.agent.pipeline, [1]))
    assert reported.result(10) is None

    (first, load), *others = head.agent.calls()
    assert (first, load[0]) == (3, "load")
    assert (load[1][0].stage_index, load[1][0].nodes) == (1, nodes)
    assert others == [
        (4, ("send_sum", (False,), {})),  # it may have sent sums to the stage that is gone
        (3, ("set_kv_cache_layout", ("LBHNC",), {})),
        (3, ("determine_available_memory", (), {})),
        (3, ("initialize_from_config", (["of 0/0", "of 0/1"],), {})),
        (3, ("compile_or_warm_up_model", (), {})),
        *((node, ("reset", (nodes,), {})) for node in nodes),
    ]
    assert {sent.epoch for sent in head.agent.of(Kind.CALL)} == {2}

    future = run(head, step_of("a"))
    [step] = head.agent.of(Kind.STEP)
    assert step.epoch == 2
    head.agent.finish(step, answer_of("a"))
    assert future.result(0) == answer_of("a")


def choose_standby(head: Head, answer: Any = None) -> str | None:
    """Have node 3 load the layers of the middle stage ahead; why it cannot."""
    place = msgspec.structs.replace(head.agent.pipeline.stages[1], node=3, name="node-3")
    head.agent.also = [(3, rank) for rank in range(place.tensor_parallel_size)]
    head.agent.answer = lambda node, rank, method: answer if node == 3 else None
    told: Future[str | None] = Future()
    session = head.executor._session
    session.report_standby = lambda _, error: told.set_result(error)  # type: ignore[method-assign]
    head.agent.tell(StandbyChosen(place, 1, 1))
    return told.result(10)


def test_a_standby_gets_the_start_up_ahead_and_nothing_when_it_takes_over(head: Head) -> None:
    head.executor.initialize_from_config(cast(Any, [f"of {n}/{rank}" for n, rank in WORKERS]))
    head.executor.collective_rpc("compile_or_warm_up_model")
    head.agent.sent.clear()
    assert choose_standby(head, answer=True) is None
    (first, load), *others = head.agent.calls()
    assert (first, load[0], load[1][0].stage_index) == (3, "load", 1)
    assert others == [
        (3, ("initialize_from_config", (["of 0/0", "of 0/1"],), {})),
        (3, ("compile_or_warm_up_model", (), {})),
    ]
    head.agent.lose("node-0 went away")
    head.agent.sent.clear()
    nodes = [4, 3, 7]
    reported = wait_for_report(head.executor)
    head.agent.pipeline = pipeline(2, nodes)
    head.agent.also.clear()
    head.agent.tell(PipelineRepaired(head.agent.pipeline, []))
    assert reported.result(10) is None
    assert head.agent.calls() == [
        (4, ("send_sum", (True,), {})),  # as the standby has said
        (3, ("send_sum", (False,), {})),
        *((node, ("reset", (nodes,), {})) for node in nodes),
    ]


def test_a_standby_that_cannot_load_is_told_and_one_that_goes_is_not_waited_for(
    head: Head,
) -> None:
    head.executor.collective_rpc("compile_or_warm_up_model")
    assert choose_standby(head, answer=StageError("no room")) == "node-3: no room"
    session = head.executor._session
    told: Future[str | None] = Future()
    session.report_standby = lambda _, error: told.set_result(error)  # type: ignore[method-assign]
    head.agent.also.clear()  # it answers nothing any more
    place = msgspec.structs.replace(head.agent.pipeline.stages[1], node=3, name="node-3")
    num_calls = len(head.agent.calls())
    head.agent.tell(StandbyChosen(place, 1, 1))
    while len(head.agent.calls()) == num_calls:
        time.sleep(0.01)
    waiting = [future for (_, _, node, _), future in session._waiting.items() if node == 3]
    head.agent.tell(StandbyDropped(3))
    assert [type(future.exception(10)) for future in waiting] == 2 * [PipelineDownError]
    assert not told.done()


def test_a_repair_that_fails_leaves_the_pipeline_down(head: Head) -> None:
    head.executor.collective_rpc("compile_or_warm_up_model")
    head.agent.lose("node-0 went away")
    head.agent.answer = lambda node, rank, method: StageError("no memory") if rank else None
    reported = wait_for_report(head.executor)
    head.agent.tell(PipelineRepaired(head.agent.pipeline, [1]))
    assert reported.result(10) == "node-0: no memory"
    assert run(head, step_of("a")).result(0).reason == "node-0: no memory"


def test_a_repair_that_fails_in_an_unknown_way_says_so(
    head: Head, monkeypatch: pytest.MonkeyPatch
) -> None:
    head.executor.collective_rpc("compile_or_warm_up_model")
    head.agent.lose("node-0 went away")
    monkeypatch.setattr(head.executor, "_load", lambda _: [].pop())
    reported = wait_for_report(head.executor)
    head.agent.tell(PipelineRepaired(head.agent.pipeline, [1]))
    assert "IndexError" in str(reported.result(10))


def test_a_stage_lost_while_another_is_repaired(
    head: Head, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = head.executor._call

    def call(method: str, *others: Any) -> list[Future[Any]]:
        futures = calls(method, *others)
        if method == "reset":
            for future in futures:
                future.result(10)
            head.agent.lose("node-4 went away")
        return futures

    head.executor.collective_rpc("compile_or_warm_up_model")
    monkeypatch.setattr(head.executor, "_call", call)
    head.agent.lose("node-0 went away")
    reported = wait_for_report(head.executor)
    head.agent.tell(PipelineRepaired(head.agent.pipeline, [1]))
    assert reported.result(10) == "node-4 went away"


def wait_for_report(executor: PipelineExecutor) -> Future[str | None]:
    """Gets what the executor tells its agent when a repair has ended."""
    told: Future[str | None] = Future()
    session = executor._session
    session.report = lambda *_: told.set_result(session.down)  # type: ignore[method-assign]
    return told
