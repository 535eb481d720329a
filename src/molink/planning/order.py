"""Which steps may overtake which, so that every result is what it would be in order.

Stages may run two steps in either order when they share no request and neither writes a KV block
that the other reads or writes; a shared prefix that both only read is no conflict.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Footprint:
    """What one step touches; `blocks` are all KV blocks it reads or writes."""

    requests: frozenset[str]  # that it runs, or tells the stages to forget
    blocks: frozenset[int]
    written: frozenset[int]
    is_barrier: bool = False  # touches what is shared by all, such as an encoder's cache

    def conflicts_with(self, other: "Footprint") -> bool:
        return (
            self.is_barrier
            or other.is_barrier
            or not self.requests.isdisjoint(other.requests)
            or not self.written.isdisjoint(other.blocks)
            or not self.blocks.isdisjoint(other.written)
        )


class StepsInFlight:
    """Owns the footprints of the steps that may still be under way at some stage."""

    def __init__(self) -> None:
        self._footprints: dict[int, Footprint] = {}
        self._unanswered: dict[int, frozenset[int]] = {}  # whom they follow

    def __len__(self) -> int:
        return len(self._footprints)

    def start(self, sequence: int, footprint: Footprint, *, is_answered: bool) -> list[int]:
        """Add a step; the numbers of those in flight that every stage must run before it."""
        after = [
            number
            for number, earlier in self._footprints.items()
            if footprint.conflicts_with(earlier)
        ]
        self._footprints[sequence] = footprint
        if not is_answered:
            self._unanswered[sequence] = frozenset(after)
            self._forget_unanswered()
        return after

    def finish(self, sequence: int) -> None:
        """Every stage has run this step: the last one has answered, or the pipeline is lost."""
        self._footprints.pop(sequence, None)
        self._forget_unanswered()

    def _forget_unanswered(self) -> None:
        """A step that needs no input runs as soon as those it follows have: it comes in order."""
        for sequence, after in list(self._unanswered.items()):
            if after.isdisjoint(self._footprints):
                del self._unanswered[sequence], self._footprints[sequence]
