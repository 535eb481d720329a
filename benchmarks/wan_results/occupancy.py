"""How busy stages and links were, from counters that were read while they worked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True, slots=True)
class Reading:
    """Counters at one time; they only grow while the server lives."""

    at_s: float
    stages: tuple[tuple[float, float], ...]  # seconds in steps, seconds of waiting for them
    sent: Mapping[str, int]  # bytes that have left, by direction of a link
    micro_batches: int | None = None


@dataclass(frozen=True, slots=True)
class Occupancy:
    """Shares of the time between two readings."""

    at_s: float  # since the first reading
    stages: tuple[float | None, ...]  # None: the stage has not reported yet
    links: Mapping[str, float]
    micro_batches: int | None


def occupancies(readings: Sequence[Reading], rates: Mapping[str, float]) -> list[Occupancy]:
    """One for each reading but the first.

    A stage reports once a second, so between two reports its last share holds. It is taken of what
    the stage itself has counted, so it does not matter how long a report was on its way.

    Args:
        rates: bits a second that each direction carries.
    """
    found: list[Occupancy] = []
    for before, after in pairwise(readings):
        last = found[-1].stages if found else ()
        last += (None,) * (len(after.stages) - len(last))
        found.append(
            Occupancy(
                after.at_s - readings[0].at_s,
                tuple(map(_busy, _padded(before.stages, after.stages), after.stages, last)),
                {
                    way: 8 * (sent - before.sent[way]) / (after.at_s - before.at_s) / rates[way]
                    for way, sent in after.sent.items()
                },
                after.micro_batches,
            )
        )
    return found


def _busy(
    before: tuple[float, float], after: tuple[float, float], last: float | None
) -> float | None:
    computed, waited = after[0] - before[0], after[1] - before[1]
    return computed / (computed + waited) if computed + waited > 0 else last


def _padded(
    before: tuple[tuple[float, float], ...], after: tuple[tuple[float, float], ...]
) -> tuple[tuple[float, float], ...]:
    """A server that did not answer one reading has no stages in it: nothing is known to differ."""
    return before if len(before) == len(after) else after
