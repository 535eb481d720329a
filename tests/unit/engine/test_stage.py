"""What a stage listens to: the engine for steps and epochs, the stage before it for activations."""

from typing import cast

import pytest

from molink.core.ids import HEAD, Address, NodeId, Port
from molink.engine.stage import ENGINE, MAX_PARTS, Inbox, StepAbandonedError
from molink.transport.local import LocalSocket
from molink.wire import to_stage
from molink.wire.assembly import Message
from molink.wire.frames import Kind
from molink.wire.to_stage import LinkRates

PREVIOUS = Address(NodeId(1), Port.STAGE)
OTHER = Address(NodeId(2), Port.STAGE)


class Socket:
    """Delivers messages in order; then the agent is gone."""

    address = Address(NodeId(5), Port.STAGE)

    def __init__(self) -> None:
        self.waiting: list[Message] = []

    def add(
        self,
        kind: Kind,
        source: Address,
        *,
        epoch: int = 1,
        sequence: int = 1,
        payload: bytes = b"",
    ) -> Message:
        message = Message(kind, source, 0, epoch, sequence, bytearray(payload))
        self.waiting.append(message)
        return message

    def receive(self) -> Message:
        return self.waiting.pop(0)


@pytest.fixture
def socket() -> Socket:
    return Socket()


@pytest.fixture
def inbox(socket: Socket) -> Inbox:
    inbox = Inbox(cast(LocalSocket, socket))
    inbox.previous = PREVIOUS
    return inbox


def test_steps_and_calls_come_in_order_and_parts_when_they_are_asked_for(
    socket: Socket, inbox: Inbox
) -> None:
    call = socket.add(Kind.CALL, ENGINE, sequence=1)
    early = socket.add(Kind.ACTIVATIONS, PREVIOUS, sequence=2)
    step = socket.add(Kind.STEP, ENGINE, sequence=2)
    grammar = socket.add(Kind.SAMPLE, ENGINE, sequence=2)
    assert [inbox.next(), inbox.next()] == [call, step]
    assert inbox.part(Kind.SAMPLE, 2) is grammar
    assert inbox.part(Kind.ACTIVATIONS, 2) is early


def test_only_the_engine_begins_an_epoch(socket: Socket, inbox: Inbox) -> None:
    socket.add(Kind.CALL, ENGINE)
    inbox.next()
    for kind in Kind:
        socket.add(kind, OTHER, epoch=2**32 - 1)
    step = socket.add(Kind.STEP, ENGINE)
    assert inbox.next() is step
    assert inbox.epoch == 1


def test_nobody_but_the_stage_before_gives_activations(socket: Socket, inbox: Inbox) -> None:
    socket.add(Kind.CALL, ENGINE)
    inbox.next()
    socket.add(Kind.ACTIVATIONS, OTHER)
    socket.add(Kind.ACTIVATIONS, Address(PREVIOUS.node, Port.ENGINE))
    socket.add(Kind.SAMPLE, PREVIOUS)
    true = socket.add(Kind.ACTIVATIONS, PREVIOUS)
    assert inbox.part(Kind.ACTIVATIONS, 1) is true
    inbox.previous = None  # now it is the first stage
    socket.add(Kind.ACTIVATIONS, Address(HEAD, Port.AGENT), sequence=2)
    with pytest.raises(IndexError):
        inbox.part(Kind.ACTIVATIONS, 2)


def test_an_epoch_ends_what_waits_for_the_one_before(socket: Socket, inbox: Inbox) -> None:
    socket.add(Kind.STEP, ENGINE, sequence=5)
    inbox.next()
    socket.add(Kind.STEP, ENGINE, sequence=6)
    socket.add(Kind.ACTIVATIONS, PREVIOUS, sequence=6)
    late = socket.add(Kind.CALL, ENGINE, epoch=2, sequence=7)
    with pytest.raises(StepAbandonedError):
        inbox.part(Kind.ACTIVATIONS, 5)
    socket.add(Kind.ACTIVATIONS, PREVIOUS, epoch=1, sequence=6)
    socket.add(Kind.STEP, ENGINE, epoch=1, sequence=8)
    step = socket.add(Kind.STEP, ENGINE, epoch=2, sequence=9)
    assert [inbox.next(), inbox.next()] == [late, step]


def test_parts_that_nobody_asks_for_do_not_pile_up(socket: Socket, inbox: Inbox) -> None:
    socket.add(Kind.CALL, ENGINE)
    inbox.next()
    for sequence in range(MAX_PARTS + 10):
        socket.add(Kind.ACTIVATIONS, PREVIOUS, sequence=sequence)
    socket.add(Kind.STEP, ENGINE)
    inbox.next()
    assert len(inbox._parts) == MAX_PARTS


def test_only_its_own_agent_says_how_fast_links_are(socket: Socket, inbox: Inbox) -> None:
    own, other = (Address(NodeId(node), Port.AGENT) for node in (5, 6))
    said = [(own, 1e6), (other, 9e9)]
    for source, rate in said:
        payload = to_stage.encode(LinkRates({7: rate}))
        socket.add(Kind.CONTROL, source, epoch=0, payload=payload)
    socket.add(Kind.CALL, ENGINE)
    inbox.next()
    assert inbox.link_rates == {7: 1e6}
