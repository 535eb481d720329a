"""The engine's loop: a step whenever one can be made, a result whenever one is there."""

import queue
import threading
from collections import deque
from concurrent.futures import Future
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.engine import EngineCoreRequestType

from molink.engine.loop import StepLoop


class Core:
    """What the loop sees of an `EngineCore`: its scheduler has so many steps to make."""

    is_pooling_model = False
    path = None
    pace = None
    is_down = False
    patience_s = 10.0
    mended: Any = None

    def __init__(self, num_steps: int) -> None:
        self.input_queue: queue.Queue[Any] = queue.Queue()
        self.output_queue: queue.Queue[Any] = queue.Queue()
        self.todo = deque(range(num_steps))
        self.futures: list[Future[Any]] = []
        self.taken: list[tuple[int, Any]] = []
        self.handled: list[Any] = []
        self.scheduler = self.model_executor = self
        self.capture_iteration_details = self.log_error_detail = lambda output: nullcontext()

    def has_requests(self) -> bool:
        return len(self.taken) < len(self.futures) or bool(self.todo)

    has_unfinished_requests = has_requests

    def take_path(self, path: None) -> None:
        pass

    def schedule(self, throttle_prefills: bool) -> Any:
        number = self.todo.popleft() if self.todo else None
        return SimpleNamespace(number=number, total_num_scheduled_tokens=int(number is not None))

    def execute_model(self, output: Any, non_block: bool) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(None)
        return done

    def get_grammar_bitmask(self, output: Any) -> None:
        pass

    def sample_tokens(self, grammar: None, non_block: bool) -> Future[Any]:
        self.futures.append(Future())
        return self.futures[-1]

    def update_from_output(self, output: Any, result: Any) -> dict[int, Any]:
        if output.number is not None:
            self.taken.append((output.number, result))
        return {}

    def _handle_client_request(self, kind: EngineCoreRequestType, request: Any) -> None:
        self.handled.append(kind)
        if kind == EngineCoreRequestType.ADD:
            self.todo.append(request)

    def _should_throttle_prefills(self) -> bool:
        return False

    def _process_aborts_queue(self) -> None:
        pass

    def _attach_iteration_details(self, outputs: Any, details: None) -> None:
        pass

    def _attach_weight_version(self, outputs: Any) -> None:
        pass


def turns(loop: StepLoop, number: int) -> None:
    for _ in range(number):
        loop.turn()


def test_results_are_taken_in_the_order_of_their_coming() -> None:
    core = Core(3)
    loop = StepLoop(core)
    turns(loop, 3)
    assert len(loop) == 3
    for number in (2, 0, 1):
        core.futures[number].set_result(f"of {number}")
    turns(loop, 3)
    assert core.taken == [(2, "of 2"), (0, "of 0"), (1, "of 1")]
    assert len(loop) == 0


def test_a_result_that_is_there_comes_before_the_next_step() -> None:
    core = Core(2)
    loop = StepLoop(core)
    loop.turn()
    core.futures[0].set_result("first")
    loop.turn()
    assert core.taken == [(0, "first")]
    assert len(core.futures) == 1
    loop.turn()
    assert len(core.futures) == 2


def test_with_nothing_to_start_it_waits_for_a_request_as_for_a_result() -> None:
    core = Core(1)
    loop = StepLoop(core)
    loop.turn()
    core.input_queue.put((EngineCoreRequestType.ADD, 7))
    loop.turn()
    assert core.handled == [EngineCoreRequestType.ADD]
    loop.turn()
    assert len(loop) == 2
    core.futures[1].set_result("later one")
    turns(loop, 2)
    assert core.taken == [(7, "later one")]


def test_a_result_wakes_it() -> None:
    core = Core(1)
    loop = StepLoop(core)
    loop.turn()
    threading.Timer(0.05, lambda: core.futures[0].set_result("done")).start()
    turns(loop, 2)
    assert core.taken == [(0, "done")]
    assert core.handled == [EngineCoreRequestType.WAKEUP]


def test_it_waits_for_steps_whose_requests_have_gone() -> None:
    core = Core(2)
    loop = StepLoop(core)
    turns(loop, 2)
    core.has_requests = lambda: False  # type: ignore[method-assign]
    core.input_queue.put((EngineCoreRequestType.WAKEUP, None))
    loop.turn()
    assert core.handled == [EngineCoreRequestType.WAKEUP]


def test_a_request_that_came_beside_an_empty_step_is_not_waited_for() -> None:
    """vLLM drains its queue before each turn."""
    core = Core(1)
    loop = StepLoop(core)
    loop.turn()
    core.todo.append(7)
    loop.turn()
    assert len(loop) == 2


def test_what_a_step_without_tokens_ends_is_told() -> None:
    core = Core(0)
    core.futures.append(Future())
    core.update_from_output = lambda output, result: {0: "refused"}  # type: ignore[method-assign]
    StepLoop(core).turn()
    assert core.output_queue.get_nowait() == (0, "refused")


def test_without_steps_in_flight_it_never_blocks() -> None:
    """A request may wait for its grammar, which nobody reports: vLLM polls."""
    core = Core(0)
    core.futures.append(Future())  # a request that waits
    loop = StepLoop(core)
    for _ in range(3):
        assert loop.turn() == (None, False)


def test_while_the_pipeline_is_down_requests_come_and_none_is_computed() -> None:
    core = Core(1)
    core.is_down, core.take_ended = True, dict  # type: ignore[attr-defined]
    loop = StepLoop(core)
    core.input_queue.put((EngineCoreRequestType.ADD, 7))
    assert loop.turn() == ({}, True)
    assert (core.handled, len(core.futures)) == ([EngineCoreRequestType.ADD], 0)
    core.is_down = False
    core.mended()
    turns(loop, 2)
    assert len(core.futures) == 2


def test_a_pipeline_that_does_not_come_back_ends_the_requests() -> None:
    core = Core(1)
    core.is_down, core.patience_s = True, 0.0
    ended: dict[int, str] = {}
    core.give_up = lambda: ended.update({0: "ended"})  # type: ignore[attr-defined]
    core.take_ended = lambda: dict(ended)  # type: ignore[attr-defined]
    assert StepLoop(core).turn() == ({0: "ended"}, True)


def test_what_ends_while_the_pipeline_is_down_is_told_at_once() -> None:
    core = Core(1)
    core.is_down, core.take_ended = True, lambda: {0: "refused"}  # type: ignore[attr-defined]
    assert StepLoop(core).turn() == ({0: "refused"}, True)


def test_without_requests_it_does_not_wait_for_the_pipeline() -> None:
    """What has finished is told to the stages, or to nobody."""
    core = Core(0)
    core.is_down = True
    core.update_from_output = lambda output, result: {0: "ended"}  # type: ignore[method-assign]
    core.futures.append(Future())
    core.has_unfinished_requests = lambda: False  # type: ignore[method-assign]
    assert StepLoop(core).turn() == (None, False)
    assert core.output_queue.get_nowait() == (0, "ended")


def test_an_engine_that_fails_says_with_what() -> None:
    core = Core(1)
    loop = StepLoop(core)
    loop.turn()
    core.futures[0].set_exception(ValueError("broken"))
    with pytest.raises(ValueError, match="broken"):
        loop.turn()
