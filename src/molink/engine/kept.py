"""What a stage has loaded and said while it was started, for the next engine that starts it."""

from collections.abc import Callable
from typing import Any

import msgspec

from molink.core.errors import StageError
from molink.wire.to_stage import LoadStage


class StaleStageError(StageError):
    """The stage holds something else than an engine wants: only a new process can begin anew."""


class Kept:
    """Owns what the layers were loaded from, and the answers to the start-up calls.

    An engine may start a stage that another one has started before. If it asks for the same, in
    every byte, it is told the same, and nothing is done: what the device holds is as it would be.
    """

    def __init__(self) -> None:
        self._load: LoadStage | None = None
        self._said: dict[str, tuple[bytes, Any]] = {}  # by method: what was asked, the answer

    def has(self, load: LoadStage) -> bool:
        """Whether the layers are loaded already. Raises StaleStageError if others are."""
        held, self._load = self._load, load
        if held is None:
            return False
        if msgspec.structs.replace(held, nodes=load.nodes) != load:  # who the others are may change
            raise StaleStageError(f"layers {held.layers} are loaded, others are wanted")
        return True

    def answer(self, method: str, asked: bytes, call: Callable[[], Any]) -> Any:
        """What a start-up call returns. Raises StaleStageError if it was made otherwise before."""
        if method in self._said:
            before, answer = self._said[method]
            if before != asked:
                raise StaleStageError(f"{method} was called otherwise before")
            return answer
        answer = call()
        self._said[method] = asked, answer
        return answer
