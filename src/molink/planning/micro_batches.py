"""How many steps are in flight over a pipeline, and how much work each takes."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from molink.planning.costs import Line

SHORTEST_S = 1e-9  # that anything takes, whatever was reported
MAX_STEPS = 16  # in flight, of one kind
HYSTERESIS = 0.05  # what another number of micro-batches must gain, as a share of the round
STEP_COST_TOKENS = 128
"""Fixed cost of a prefill step (weights are read, a message crosses), in prompt tokens of equal
time, where it has not been measured."""
DECODE_COST_TOKENS = 32
"""The same of a decode step."""
SLACK = 0.05
"""By which prompts may pass later for fewer steps, as a share of the shortest time."""
MAX_PREFILL_SHARE = 0.5
"""Of a stage's time that decodes leave to prompts, at most: without end, where stages are slower
than links."""


@dataclass(frozen=True, slots=True)
class Ring:
    """What a step passes on its way from the engine through all stages and back.

    `stages` and `hops` are the seconds of each stage's compute and of each link's transfer, for a
    step of so many tokens; nothing else is known to share them.
    """

    stages: tuple[Line, ...]
    hops: tuple[Line, ...] = ()
    delay_s: float = 0.0  # sum of the one-way delays

    def busiest_s(self, tokens: float, prefill_share: float = 0.0) -> float:
        """The least time between two such steps, where prompts take so much of a stage's time."""
        stages = (line(tokens) / (1 - prefill_share) for line in self.stages)
        return max(SHORTEST_S, *stages, *(line(tokens) for line in self.hops))

    def trip_s(self, tokens: float) -> float:
        """From the engine and back, with nothing in the way."""
        return sum(line(tokens) for line in (*self.stages, *self.hops)) + self.delay_s

    @property
    def is_bound_by_links(self) -> bool:
        """Whether every additional token costs a link more than any stage."""
        return self.stage_share < 1

    @property
    def stage_share(self) -> float:
        """How busy tokens without end keep the slowest stage, beside the slowest link."""
        slowest = max(line.per_token_s for line in self.stages)
        busiest = max([slowest, *(hop.per_token_s for hop in self.hops)])
        return slowest / busiest if busiest else 1.0


def unmeasured(num_stages: int, cost_tokens: int) -> Ring:
    """A ring of equal stages without delay, in units of one token's time."""
    return Ring((Line(float(cost_tokens), 1.0),) * num_stages)


def round_s(
    ring: Ring,
    num_decoding: int,
    num_steps: int,
    tokens_each: int = 1,
    prefill_share: float = 0.0,
) -> float:
    """Seconds until every request was in a step, when so many steps share them.

    Args:
        tokens_each: that a step computes of a request: its next one, and those drafted.
        prefill_share: of every stage's time, that prompts take meanwhile.
    """
    tokens = decodes_per_step(num_decoding, num_steps) * tokens_each
    return max(num_steps * ring.busiest_s(tokens, prefill_share), ring.trip_s(tokens))


@lru_cache(maxsize=256)
def micro_batches(
    ring: Ring,
    num_decoding: int,
    current: int,
    tokens_each: int = 1,
    prefill_share: float = 0.0,
) -> int:
    """Decode steps to have in flight: those of the shortest round.

    More of them hide delays and keep every stage busy; each pays the fixed costs once more, and
    where prompts come too, a stage that is busy with more steps keeps them from the links. Where
    several are as good, as many as there are stages, then the fewest; `current` stays unless
    another gains HYSTERESIS.
    """
    largest = max(1, min(num_decoding, MAX_STEPS))
    if num_decoding <= 1:
        return 1
    rounds = {
        n: round_s(ring, num_decoding, n, tokens_each, prefill_share) for n in range(1, largest + 1)
    }
    if current in rounds and rounds[current] <= (1 + HYSTERESIS) * min(rounds.values()):
        return current
    stages = len(ring.stages)
    return min(rounds, key=lambda n: (rounds[n], n < stages, n))


def decodes_per_step(num_decoding: int, num_steps: int) -> int:
    """Requests that decode in one step when `num_decoding` do so now, in any step.

    A round takes `num_steps` times the largest step: equal steps make the shortest round.
    """
    return math.ceil(num_decoding / num_steps)


def steps_that_fill(ring: Ring, tokens: int) -> int:
    """Steps of this size in flight that keep the busiest stage or link busy (Little's law)."""
    return max(1, min(MAX_STEPS, math.ceil(ring.trip_s(tokens) / ring.busiest_s(tokens))))


@lru_cache(maxsize=256)
def prefill_tokens_per_step(ring: Ring, pending: int, max_stage_s: float = math.inf) -> int:
    """Prompt tokens to put into the next step when `pending` wait.

    Cut into k steps they pass stages and links in trip(pending / k) + (k - 1) · busiest(pending /
    k): large steps leave later stages idle at the start and early ones at the end, small ones pay
    the fixed cost more often. The fewest are taken whose time is within SLACK of the shortest: what
    a stage spends on fixed costs it does not have for decodes. Where a link is the busiest, the
    shortest is where a chunk's transfer takes as long as one stage's compute; no chunk is so small
    that its compute is mostly fixed cost. Nor is one made that small because others decode.

    Args:
        max_stage_s: seconds for which one step may keep a stage busy.
    """
    half_fixed = max(1.0, *(line.fixed_s / _slope(line) for line in ring.stages))
    of_stall = min((max_stage_s - line.fixed_s) / _slope(line) for line in ring.stages)
    least = half_fixed if ring.is_bound_by_links else 1.0
    most = max(half_fixed, of_stall)
    if pending <= least:
        return pending
    first = max(1, math.ceil(pending / most))
    last = max(first, min(int(pending / least), first + 512))
    times = {steps: _makespan(ring, pending, steps) for steps in _counts(first, last)}
    allowed_s = (1 + SLACK) * min(times.values())
    return math.ceil(pending / min(steps for steps, time in times.items() if time <= allowed_s))


def _slope(line: Line) -> float:
    return max(line.per_token_s, SHORTEST_S)


def _counts(first: int, last: int) -> Iterable[int]:
    """Numbers of steps to try: every one of the first, then every eighth part more."""
    while first <= last:
        yield first
        first += max(1, first // 8)


def _makespan(ring: Ring, pending: int, steps: int) -> float:
    tokens = pending / steps
    return ring.trip_s(tokens) + (steps - 1) * ring.busiest_s(tokens)
