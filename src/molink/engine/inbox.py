"""What a stage has to do, in the order in which it can.

A step may overtake those that wait for their input longer, but for those the engine says it must
follow (see `planning.order`); calls are in order with everything. The order depends on nothing but
the order of the messages, which is the same for every rank of a stage: they need not agree on it.
"""

from collections import deque
from typing import Any, NamedTuple

from molink.core.errors import WireError
from molink.core.ids import HEAD, Address, Port
from molink.transport.local import LocalSocket
from molink.wire import to_stage
from molink.wire.assembly import Message
from molink.wire.codec import Codec
from molink.wire.frames import Kind

MAX_PARTS = 1024  # that wait for their steps; a pipeline has a few steps in flight
ENGINE = Address(HEAD, Port.ENGINE)


class StepAbandonedError(Exception):
    """A newer epoch began while a step waited for its grammar."""


class Step(NamedTuple):
    """The content of a STEP message."""

    sample_now: bool  # no grammar follows
    is_prefill: bool
    after: list[int]  # numbers of the steps in flight that must have run here
    output: Any  # vLLM's SchedulerOutput
    restored: list[Any]  # requests that no stage knows any more: `engine.replay.Restored`


class Turn(NamedTuple):
    """A step or call whose turn has come."""

    message: Message
    content: Any  # a Step, or (method, arguments, keyword arguments)
    activations: Message | None  # the step's input; the first stage needs none


class _Waiting(NamedTuple):
    message: Message
    content: Any
    after: frozenset[int]
    needs_input: bool


class Inbox:
    """Sorts what the agent delivers. Owns the steps and calls that wait, and their input.

    Only the engine makes steps and begins epochs; activations come from `previous` alone.
    """

    def __init__(self, socket: LocalSocket, codec: Codec) -> None:
        self._socket = socket
        self._codec = codec
        self._agent = Address(socket.address.node, Port.AGENT)
        self._waiting: dict[int, _Waiting] = {}  # by sequence, in order of arrival
        self._ready: deque[Turn] = deque()
        self._parts: dict[tuple[Kind, int], Message] = {}
        self.epoch = 0
        self.previous: Address | None = None  # the stage before this one
        self.max_input_bytes = 0  # that wait for their steps
        self.link_rates: dict[int, float] = {}  # bytes a second, by node

    def next(self) -> Turn:
        """Wait for the next step or call that can run.

        Raises:
            LinkError: the agent is gone.
            WireError: the engine sent what is no step and no call, or the stage before too much.
        """
        while not self._ready:
            self._receive()
        return self._ready.popleft()

    def grammar(self, sequence: int) -> Message:
        """Wait for the grammar of a step.

        Raises:
            StepAbandonedError: a newer epoch began.
        """
        epoch = self.epoch
        while (Kind.SAMPLE, sequence) not in self._parts:
            self._receive()
            if self.epoch != epoch:
                raise StepAbandonedError
        return self._parts.pop((Kind.SAMPLE, sequence))

    def _receive(self) -> None:
        message = self._socket.receive()
        if message.kind == Kind.CONTROL and message.source == self._agent:
            self.link_rates = to_stage.decode(message.payload).bytes_per_s
        if message.source == ENGINE and message.epoch > self.epoch:
            self.epoch = message.epoch
            self._parts.clear()
            self._waiting.clear()
            self._ready.clear()
        if message.epoch != self.epoch:
            return
        expected = self.previous if message.kind == Kind.ACTIVATIONS else ENGINE
        if message.source != expected:
            return
        if message.kind in (Kind.STEP, Kind.CALL):
            self._waiting[message.sequence] = self._arrived(message)
        elif message.kind in (Kind.ACTIVATIONS, Kind.SAMPLE):
            self._parts[message.kind, message.sequence] = message
            self._check_parts()
        self._release()

    def _check_parts(self) -> None:
        if len(self._parts) > MAX_PARTS:
            raise WireError(f"{MAX_PARTS} inputs have come of steps that have not")
        waiting = sum(
            len(part.payload) for (kind, _), part in self._parts.items() if kind == Kind.ACTIVATIONS
        )
        if waiting > self.max_input_bytes:
            raise WireError(f"{waiting} bytes of input wait, more than {self.max_input_bytes}")

    def _arrived(self, message: Message) -> _Waiting:
        content = self._codec.decode(message.payload)
        if message.kind == Kind.CALL:
            return _Waiting(message, content, frozenset(self._waiting), needs_input=False)
        step = Step(*content)
        calls = (n for n, other in self._waiting.items() if other.message.kind == Kind.CALL)
        has_input = self.previous is not None and step.output.total_num_scheduled_tokens > 0
        return _Waiting(message, step, frozenset((*step.after, *calls)), has_input)

    def _release(self) -> None:
        """Move what can run to the ready ones; a step only ever follows those before it."""
        for sequence, item in list(self._waiting.items()):
            part = (Kind.ACTIVATIONS, sequence)
            if item.needs_input and part not in self._parts:
                continue
            if item.after.isdisjoint(self._waiting):
                del self._waiting[sequence]
                self._ready.append(Turn(item.message, item.content, self._parts.pop(part, None)))
