"""Seconds of steps that are over when they return."""

import time

import torch

from molink.engine.step_timer import StepKind, timer_for


def test_steps_are_told_once_in_their_order() -> None:
    timer = timer_for(torch.device("cpu"))
    kinds = [StepKind(3, is_prefill=True), StepKind(1, is_prefill=False)]
    for kind in kinds:
        timer.start()
        timer.stop(kind)
    assert [kind for kind, _ in timer.finished()] == kinds
    assert not list(timer.finished())


def test_seconds_are_those_between_start_and_stop() -> None:
    timer = timer_for(torch.device("cpu"))
    time.sleep(0.05)
    timer.start()
    time.sleep(0.01)
    timer.stop(StepKind(1, is_prefill=False))
    ((_, seconds),) = timer.finished()
    assert 0.01 <= seconds < 0.05
