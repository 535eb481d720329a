"""Messages leave in order, coded where that pays, and nobody waits for the coding."""

import threading
from collections.abc import Callable

import pytest
import torch

from molink.engine import coder as module
from molink.engine.activations import Parts, StepId, unpack
from molink.engine.coder import Coder
from molink.planning.coding import TRIAL_INTERVAL, CodingFigures
from molink.wire.to_stage import WireCoding

CPU = torch.device("cpu")
SLOW, FAST = 1e5, 1e13  # bytes a second


class Wire:
    """Takes what a coder emits; can be held."""

    def __init__(self) -> None:
        self.sent: list[tuple[int, int, torch.Tensor]] = []  # sequence, bytes, "sum"
        self.open = threading.Event()
        self.open.set()

    def emit(self, step: StepId, parts: Parts) -> None:
        assert self.open.wait(10)
        payload = bytearray(b"".join(parts))
        self.sent.append((step.sequence, len(payload), unpack(payload, CPU)["sum"]))

    @property
    def order(self) -> list[int]:
        return [sequence for sequence, _, _ in self.sent]

    @property
    def sizes(self) -> list[int]:
        return [size for _, size, _ in self.sent]


def settle(coder: Coder) -> None:
    """Until the coder's thread has nothing to do."""
    coder._thread.submit(lambda: None).result(10)


MakeCoder = Callable[..., Coder]


@pytest.fixture
def wire() -> Wire:
    return Wire()


def make(wire: Wire, mode: WireCoding, rate: float | None = None) -> Coder:
    return Coder(mode, wire.emit, lambda: rate)


def output(seed: int) -> torch.Tensor:
    return torch.randn(64, 512, generator=torch.Generator().manual_seed(seed)).bfloat16()


RAW = 64 * 512 * 2


@pytest.mark.parametrize(
    ("mode", "rate", "is_coded"),
    [
        ("off", SLOW, False),
        ("on", None, True),
        ("auto", None, False),
        ("auto", SLOW, True),
        ("auto", FAST, False),
    ],
)
def test_when_messages_are_coded(
    wire: Wire, mode: WireCoding, rate: float | None, is_coded: bool
) -> None:
    coder = make(wire, mode, rate)
    coder(StepId(1, 0), {"sum": output(0)})
    settle(coder)  # the first of «auto» is a trial
    coder(StepId(1, 1), {"sum": output(1)})
    settle(coder)
    assert wire.order == [0, 1]
    assert (wire.sizes[1] < 0.75 * RAW) == is_coded
    assert torch.equal(wire.sent[1][2], output(1))


def test_a_small_message_is_left_as_it_is(wire: Wire) -> None:
    coder = make(wire, "auto", SLOW)
    for sequence in range(3):
        coder(StepId(1, sequence), {"sum": torch.ones(2, 8)})
    settle(coder)
    assert coder.figures is None
    assert wire.order == [0, 1, 2]


def test_the_first_message_after_the_link_is_known_is_tried(wire: Wire) -> None:
    rate = None
    coder = Coder("auto", wire.emit, lambda: rate)
    coder(StepId(1, 0), {"sum": output(0)})
    settle(coder)
    assert coder.figures is None
    rate = SLOW
    coder(StepId(1, 1), {"sum": output(1)})
    settle(coder)
    assert coder.figures is not None
    assert 0.6 < coder.figures.ratio < 0.75


def test_a_cold_start_is_not_what_coding_costs(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    cold, warm = (CodingFigures(0.5, encode_s, 1e-9) for encode_s in (6e-8, 5e-9))
    measured = iter([cold, warm])
    coder = make(wire, "auto", SLOW)
    monkeypatch.setattr(coder, "_measure", lambda sample: next(measured))
    coder(StepId(1, 0), {"sum": output(0)})
    settle(coder)
    assert coder.figures == warm


def test_the_decision_is_made_again_when_the_link_changes(wire: Wire) -> None:
    rate = FAST
    coder = Coder("auto", wire.emit, lambda: rate)
    for sequence in range(2 * TRIAL_INTERVAL):
        coder(StepId(1, sequence), {"sum": output(sequence)})
        settle(coder)
        if sequence == TRIAL_INTERVAL:
            rate = SLOW
    assert {size >= RAW for size in wire.sizes[: TRIAL_INTERVAL + 1]} == {True}
    assert {size < 0.75 * RAW for size in wire.sizes[TRIAL_INTERVAL + 1 :]} == {True}


def test_the_next_step_does_not_wait_and_does_not_overtake(wire: Wire) -> None:
    """While a coded message is on its way, others line up behind it; their memory is free."""
    rates = iter([SLOW, SLOW, SLOW, SLOW, FAST, FAST])  # each is asked for twice
    coder = Coder("auto", wire.emit, lambda: next(rates))
    coder(StepId(1, 0), {"sum": output(0)})
    settle(coder)
    wire.open.clear()
    values = output(1)
    coder(StepId(1, 1), {"sum": values})
    values.copy_(output(2))
    coder(StepId(1, 2), {"sum": values})
    values.fill_(0)
    assert wire.order == [0]
    wire.open.set()
    settle(coder)
    assert wire.order == [0, 1, 2]
    for sequence, _, arrived in wire.sent:
        assert torch.equal(arrived, output(sequence))
    assert wire.sizes[1] < 0.75 * RAW < wire.sizes[2]


def test_a_sum_is_coded_where_the_next_stage_takes_it() -> None:
    messages: list[bytearray] = []
    coder = Coder(
        "on", lambda step, parts: messages.append(bytearray(b"".join(parts))), lambda: None
    )
    tensors = {"hidden_states": output(1), "residual": output(2)}
    coder(StepId(1, 0), tensors)
    settle(coder)
    coder.may_code_sum = True
    coder(StepId(1, 1), tensors)
    settle(coder)
    both, one = (unpack(message, CPU) for message in messages)
    assert list(both) == ["hidden_states", "residual"]
    assert list(one)[:3] == ["sum.upper", "sum.middle", "sum.lower"]
    assert len(messages[1]) < 0.8 * len(messages[0])


def test_a_failure_in_the_thread_ends_the_stage(
    wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[int] = []
    monkeypatch.setattr(module.os, "_exit", ended.append)
    coder = Coder("on", lambda step, parts: 1 / 0, lambda: None)  # type: ignore[arg-type,return-value]
    coder(StepId(1, 0), {"sum": output(0)})
    settle(coder)
    assert ended == [1]
