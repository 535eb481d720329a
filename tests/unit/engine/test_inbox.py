"""What a stage runs next: the engine binds steps to one another, everything else is free."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from molink.core.errors import WireError
from molink.core.ids import HEAD, Address, NodeId, Port
from molink.engine.inbox import ENGINE, MAX_PARTS, Inbox, StepAbandonedError
from molink.transport.local import LocalSocket
from molink.wire import to_stage
from molink.wire.assembly import Message
from molink.wire.codec import Codec
from molink.wire.frames import Kind
from molink.wire.to_stage import LinkRates

PREVIOUS = Address(NodeId(1), Port.STAGE)
OTHER = Address(NodeId(2), Port.STAGE)
NODE = NodeId(3)
MAX_BYTES = 1000  # of input that waits


class Payloads:
    """A codec whose bytes are the thing itself."""

    def decode(self, payload: Any) -> Any:
        return payload


class Socket:
    """Delivers messages in order; IndexError where a stage would wait."""

    def __init__(self) -> None:
        self.waiting: list[Message] = []
        self.address = Address(NODE, Port.STAGE)

    def add(
        self,
        kind: Kind,
        source: Address,
        *,
        epoch: int = 1,
        sequence: int = 1,
        after: tuple[int, ...] = (),
        tokens: int = 1,
        size: int = 0,
    ) -> None:
        content: Any = bytearray(size)
        if kind == Kind.STEP:
            output = SimpleNamespace(total_num_scheduled_tokens=tokens)
            content = (True, False, list(after), output, [])
        self.waiting.append(Message(kind, source, 0, epoch, sequence, content))

    def receive(self) -> Message:
        return self.waiting.pop(0)


class Stage:
    """A later stage's inbox, and what it would run."""

    def __init__(self) -> None:
        self.socket = Socket()
        self.inbox = Inbox(cast(LocalSocket, self.socket), cast(Codec, Payloads()))
        self.inbox.previous = PREVIOUS
        self.inbox.max_input_bytes = MAX_BYTES
        self.call(0)  # the engine begins the epoch
        self.ran()

    def step(self, sequence: int, *after: int, **other: Any) -> None:
        self.socket.add(Kind.STEP, ENGINE, sequence=sequence, after=after, **other)

    def call(self, sequence: int, **other: Any) -> None:
        self.socket.add(Kind.CALL, ENGINE, sequence=sequence, **other)

    def input(self, sequence: int, **other: Any) -> None:
        self.socket.add(Kind.ACTIVATIONS, PREVIOUS, sequence=sequence, **other)

    def ran(self) -> list[int]:
        """Sequences of all turns that what has arrived allows."""
        turns = []
        while True:
            try:
                turns.append(self.inbox.next().message.sequence)
            except IndexError:
                return turns


@pytest.fixture
def stage() -> Stage:
    return Stage()


def test_steps_run_when_their_input_is_there(stage: Stage) -> None:
    for number in (1, 2, 3):
        stage.step(number)
    stage.input(3)
    stage.input(1)
    assert stage.ran() == [3, 1]
    stage.input(2)
    assert stage.ran() == [2]


def test_a_step_waits_for_those_it_must_follow(stage: Stage) -> None:
    stage.step(1)
    stage.step(2, 1)
    stage.step(3, 1, 2)
    stage.step(4)
    for number in (3, 2, 4):
        stage.input(number)
    assert stage.ran() == [4]
    stage.input(1)
    assert stage.ran() == [1, 2, 3]


def test_what_has_run_binds_nobody(stage: Stage) -> None:
    stage.step(1)
    stage.input(1)
    assert stage.ran() == [1]
    stage.step(2, 1)
    stage.input(2)
    assert stage.ran() == [2]


def test_the_first_stage_runs_in_order_and_so_do_steps_without_tokens(stage: Stage) -> None:
    stage.step(1)
    stage.step(2, tokens=0)
    assert stage.ran() == [2]
    first = Stage()
    first.inbox.previous = None
    for number in (1, 2, 3):
        first.step(number)
    assert first.ran() == [1, 2, 3]


def test_nothing_overtakes_a_call_and_it_overtakes_nothing(stage: Stage) -> None:
    stage.step(1)
    stage.call(2)
    stage.step(3)
    stage.input(3)
    assert stage.ran() == []
    stage.input(1)
    assert stage.ran() == [1, 2, 3]


def test_activations_and_grammar_come_with_their_step(stage: Stage) -> None:
    stage.input(2)
    stage.step(2)
    stage.socket.add(Kind.SAMPLE, ENGINE, sequence=2)
    turn = stage.inbox.next()
    assert turn.activations is not None
    assert (turn.activations.kind, turn.activations.sequence) == (Kind.ACTIVATIONS, 2)
    assert stage.inbox.grammar(2).kind == Kind.SAMPLE


@given(st.data())
def test_every_rank_runs_the_same_order_whenever_it_looks(data: st.DataObject) -> None:
    """One rank reads each message at once, another only when it has nothing to do."""
    eager, lazy = Stage(), Stage()
    numbers = range(1, data.draw(st.integers(2, 8)))
    events: list[tuple[str, int, list[int]]] = []
    for number in numbers:
        after = data.draw(st.lists(st.integers(1, number - 1), unique=True)) if number > 1 else []
        events.append(("step", number, after))
    for number in data.draw(st.permutations(list(numbers))):
        events.insert(data.draw(st.integers(0, len(events))), ("input", number, []))
    order = []
    for kind, number, after in events:
        for stage in (eager, lazy):
            stage.step(number, *after) if kind == "step" else stage.input(number)
        order += eager.ran()
    assert order == lazy.ran()
    assert sorted(order) == list(numbers)
    for number, after in ((n, a) for kind, n, a in events if kind == "step"):
        assert all(order.index(earlier) < order.index(number) for earlier in after)


def test_only_the_engine_begins_an_epoch(stage: Stage) -> None:
    for kind in set(Kind) - {Kind.CONTROL}:
        stage.socket.add(kind, OTHER, epoch=2**32 - 1)
    stage.step(2, tokens=0)
    assert stage.ran() == [2]
    assert stage.inbox.epoch == 1


def test_nobody_but_the_stage_before_gives_activations(stage: Stage) -> None:
    stage.call(1)
    stage.step(2)
    for source in (OTHER, Address(PREVIOUS.node, Port.ENGINE), ENGINE):
        stage.socket.add(Kind.ACTIVATIONS, source, sequence=2)
    assert stage.ran() == [1]
    stage.input(2)
    assert stage.ran() == [2]


def test_an_epoch_ends_what_waits_for_the_one_before(stage: Stage) -> None:
    stage.step(5)
    stage.step(6, 5)
    stage.input(6)
    stage.call(7, epoch=2)
    stage.input(5)  # late
    stage.step(8, epoch=1, tokens=0)
    stage.step(9, epoch=2, tokens=0)
    assert stage.ran() == [7, 9]


def test_an_epoch_ends_the_wait_for_a_grammar(stage: Stage) -> None:
    stage.step(5)
    stage.input(5)
    stage.inbox.next()
    stage.call(7, epoch=2)
    with pytest.raises(StepAbandonedError):
        stage.inbox.grammar(5)


def test_parts_that_nobody_asks_for_do_not_pile_up(stage: Stage) -> None:
    for sequence in range(2, MAX_PARTS + 3):
        stage.input(sequence)
    with pytest.raises(WireError, match="inputs have come of steps that have not"):
        stage.ran()


def test_bytes_that_nobody_asks_for_do_not_pile_up(stage: Stage) -> None:
    stage.step(1)
    for sequence in (2, 1, 3):
        stage.input(sequence, size=MAX_BYTES // 2)
    assert stage.ran() == [1]  # what has run does not count
    stage.input(4, size=1)
    with pytest.raises(WireError, match="bytes of input wait, more than"):
        stage.ran()


def test_the_nodes_own_agent_says_how_fast_its_links_are(stage: Stage) -> None:
    news = bytearray(to_stage.encode(LinkRates({1: 1e6})))
    for source in (OTHER, Address(OTHER.node, Port.AGENT), Address(HEAD, Port.AGENT)):
        stage.socket.waiting.append(Message(Kind.CONTROL, source, 0, 0, 0, news))
    assert stage.ran() == []
    assert stage.inbox.link_rates == {}
    own = Address(NODE, Port.AGENT)
    stage.socket.waiting.append(Message(Kind.CONTROL, own, 0, 0, 0, news))
    assert stage.ran() == []
    assert stage.inbox.link_rates == {1: 1e6}
