"""Steps that overtake one another at every stage: each token still finds its own past in memory.

The scheduler is vLLM's own, as ours, and so are its block tables; the inboxes are those of stages.
The stages are played: they keep tables and KV memory as a runner does, and every token looks at all
those before it. Now and then all stages are lost, with the steps in flight and all that they know.
"""

import random
from collections import deque
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.config import VllmConfig
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from molink.core.ids import Address, NodeId, Port
from molink.engine.compat import says_something
from molink.engine.footprint import traits_of
from molink.engine.inbox import ENGINE, Inbox, Turn
from molink.engine.lost import LostStep, losses
from molink.engine.replay import Restored
from molink.planning.order import StepsInFlight
from molink.transport.local import LocalSocket
from molink.wire.assembly import Message
from molink.wire.codec import Codec
from molink.wire.frames import Kind

from .conftest import MakeConfig
from .test_inbox import Payloads
from .test_scheduler import BLOCK, Engine

NUM_BLOCKS = 20  # so few that requests preempt one another
Tokens = dict[str, list[int]]  # of every request, as far as they are known when a step is made


class Memory:
    """What a runner keeps: block tables, and in each slot the past its token was computed with."""

    def __init__(self) -> None:
        self._slots: dict[tuple[int, int], int] = {}
        self._tables: dict[str, list[int]] = {}

    def restore(self, requests: list[Restored], tokens: Tokens) -> None:
        for request, output in requests:
            name, prompt = request.req_id, request.prompt_token_ids or []
            assert name not in self._tables
            self._tables[name] = []
            assert prompt + output == tokens[name]

    def run(self, output: SchedulerOutput, tokens: Tokens) -> None:
        """Compute a step. Raises AssertionError if a token does not find its past."""
        for name in output.finished_req_ids:
            self._tables.pop(name, None)
        for copy in output.kv_cache_block_copies or ():
            for place in range(BLOCK):
                held = self._slots.get((copy.src_block_id, place))
                self._slots[copy.dst_block_id, place] = cast(int, held)
        computed = self._take_tables(output)
        pasts = {name: _pasts(tokens[name]) for name in computed}
        ends = {name: done + output.num_scheduled_tokens[name] for name, done in computed.items()}
        for name, done in computed.items():
            for position in range(done, ends[name]):
                self._slots[self._slot(name, position)] = pasts[name][position]
        for name, end in ends.items():
            found = [self._slots.get(self._slot(name, position)) for position in range(end)]
            assert found == pasts[name][:end], name

    def _take_tables(self, output: SchedulerOutput) -> dict[str, int]:
        """Tokens of each request that were computed before this step."""
        computed = {}
        for new in output.scheduled_new_reqs:
            self._tables[new.req_id] = list(new.block_ids[0])
            computed[new.req_id] = new.num_computed_tokens
        cached = output.scheduled_cached_reqs
        for name, blocks, done in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
        ):
            table = self._tables[name]  # KeyError: the runner does not know the request
            if name in cached.resumed_req_ids:
                table.clear()
            table += blocks[0] if blocks else []
            computed[name] = done
        return computed

    def _slot(self, name: str, position: int) -> tuple[int, int]:
        return self._tables[name][position // BLOCK], position % BLOCK


def _pasts(tokens: list[int]) -> list[int]:
    past, pasts = 0, []
    for token in tokens:
        past = hash((past, token))
        pasts.append(past)
    return pasts


class Socket:
    """Of a stage: what the test has delivered."""

    def __init__(self) -> None:
        self.arrived: deque[Message] = deque()
        self.address = Address(NodeId(0), Port.STAGE)

    def receive(self) -> Message:
        return self.arrived.popleft()  # IndexError: the stage would wait


class Stage:
    """One stage: a real inbox, and what has not reached it yet."""

    def __init__(self, index: int) -> None:
        self._socket = Socket()
        self._inbox = Inbox(cast(LocalSocket, self._socket), cast(Codec, Payloads()))
        self._inbox.previous = Address(NodeId(index - 1), Port.STAGE) if index else None
        self._memory = Memory()
        self.steps: deque[Message] = deque()  # come in order
        self.inputs: list[Message] = []  # come as they like

    def deliver(self, numbers: random.Random) -> None:
        if self.steps and (not self.inputs or numbers.random() < 0.5):
            self._socket.arrived.append(self.steps.popleft())
        elif self.inputs:
            chosen = numbers.randrange(len(self.inputs))
            self._socket.arrived.append(self.inputs.pop(chosen))

    def run(self, tokens: dict[int, Tokens]) -> Turn | None:
        try:
            turn = self._inbox.next()
        except IndexError:
            return None
        self._memory.restore(turn.content.restored, tokens[turn.message.sequence])
        self._memory.run(turn.content.output, tokens[turn.message.sequence])
        return turn


class Pipeline(Engine):
    """An engine over stages that run whatever they can, in the order of a seed."""

    def __init__(self, config: VllmConfig, grammars: StructuredOutputManager, seed: int) -> None:
        super().__init__(config, grammars, NUM_BLOCKS)
        self._numbers = random.Random(seed)
        self._stages = [Stage(index) for index in range(self.num_stages)]
        self._started: dict[int, tuple[SchedulerOutput, list[str]]] = {}
        self._tokens: dict[int, Tokens] = {}
        self._order = StepsInFlight()
        self.overtakings = 0

    def start(self) -> None:
        """Schedule a step and send it to every stage."""
        output = self.scheduler.schedule()
        if not output.num_scheduled_tokens:
            self.scheduler.update_from_output(output, ModelRunnerOutput([], {}))
            if not says_something(output):
                return
        sequence, traits = len(self._tokens) + 1, traits_of(output)
        names = list(output.num_scheduled_tokens)
        requests = [self.scheduler.requests[name] for name in names]
        whole = [r.request_id for r in requests if r.num_computed_tokens >= r.num_tokens]
        self._tokens[sequence] = {r.request_id: list(r.all_token_ids) for r in requests}
        after = self._order.start(sequence, traits.footprint, is_answered=bool(names))
        step: Any = (True, traits.is_prefill, after, output, traits.restored)
        for stage in self._stages:
            stage.steps.append(Message(Kind.STEP, ENGINE, 0, 0, sequence, step))
        if names:
            self._started[sequence] = (output, whole)

    def move(self) -> None:
        """Something reaches a stage, or a stage runs something."""
        index = self._numbers.randrange(len(self._stages))
        self._stages[index].deliver(self._numbers)
        turn = self._stages[index].run(self._tokens)
        if turn is None or not turn.content.output.num_scheduled_tokens:
            return
        sequence = turn.message.sequence
        if index + 1 < len(self._stages):
            source, empty = Address(NodeId(index), Port.STAGE), bytearray()
            passed = Message(Kind.ACTIVATIONS, source, 0, 0, sequence, empty)
            self._stages[index + 1].inputs.append(passed)
        else:
            self._answer(sequence)

    def lose(self) -> None:
        """All stages lose what they hold, and the engine the steps in flight."""
        losses.count += 1
        self._stages = [Stage(index) for index in range(self.num_stages)]
        self._order = StepsInFlight()
        while self._started:
            self.in_flight.append(self._started.pop(min(self._started)))
            self.take_answer(LostStep.because("gone"))

    def _answer(self, sequence: int) -> None:
        self.overtakings += sequence != min(self._started)
        self._order.finish(sequence)
        self.in_flight.append(self._started.pop(sequence))
        self.take_answer()

    @property
    def is_busy(self) -> bool:
        return self.scheduler.has_requests() or bool(self._started)


comings = st.lists(
    st.tuples(
        st.integers(0, 3),  # which of a few texts its prompt begins with
        st.integers(1, 5 * BLOCK),  # tokens of its prompt
        st.integers(1, 20),  # of its answer
        st.sampled_from(["stay", "stay", "abort"]),
    ),
    min_size=2,
    max_size=12,
)


@pytest.fixture(scope="module")
def configs(make_config: MakeConfig) -> dict[int, VllmConfig]:
    """By number of stages."""
    init_none_hash(sha256)
    made = {}
    for num_stages in (2, 3):
        flags = ("--max-num-seqs=8", "--max-num-batched-tokens=64", f"--block-size={BLOCK}")
        made[num_stages] = make_config(*flags, num_stages=num_stages)
        made[num_stages].cache_config.num_gpu_blocks = NUM_BLOCKS
    return made


@settings(deadline=None, max_examples=150)
@given(st.sampled_from([2, 3]), comings, st.integers(0, 2**32), st.sampled_from([0.0, 0.01]))
def test_every_token_finds_its_past(
    configs: dict[int, VllmConfig],
    num_stages: int,
    arriving: list[tuple[int, int, int, str]],
    seed: int,
    loss_chance: float,
) -> None:
    config = configs[num_stages]
    pipeline = Pipeline(config, StructuredOutputManager(config), seed)
    numbers = random.Random(seed)
    waiting = deque(enumerate(arriving))
    doomed = [f"request-{i}" for i, (*_, fate) in enumerate(arriving) if fate == "abort"]
    while waiting or pipeline.is_busy:
        chance = numbers.random()
        if waiting and chance < 0.1:
            index, (text, length, answer, _) = waiting.popleft()
            prompt = [1000 * text + place for place in range(length)]
            pipeline.add(f"request-{index}", prompt, max_tokens=answer)
        elif doomed and chance < 0.12:
            pipeline.scheduler.finish_requests(doomed.pop(), RequestStatus.FINISHED_ABORTED)
        elif chance < 0.4 and pipeline.scheduler.has_requests():
            pipeline.start()
        elif chance > 1 - loss_chance:
            pipeline.lose()
        else:
            pipeline.move()
    pipeline.check_blocks()
