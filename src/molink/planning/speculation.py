"""How many drafted tokens a request takes along into a step: as many as speed the round up.

A step that verifies k drafted tokens of a request yields 1 + a + a² + … + a^k tokens on average,
if each is accepted with chance a once those before it are (Leviathan et al., 2023, equation 1),
and it computes and carries 1 + k. Across a long ring the second costs little; where stages or
links are busy it delays everybody.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from molink.planning.micro_batches import HYSTERESIS, Ring, round_s

MEMORY = 20  # drafted tokens that a chance is measured over
PRIOR_WEIGHT = 2.0  # drafted tokens that all requests' chance counts for beside a request's own
FIRST_CHANCE = 0.5  # before anything was drafted
CHANCES = 20  # that are told apart


@dataclass(slots=True)
class Acceptance:
    """How many of the drafted tokens that could be judged were right; old ones fade."""

    right: float = 0.0
    judged: float = 0.0

    def observe(self, draft: Sequence[int], tokens: Sequence[int]) -> None:
        """Compare a draft with the tokens that came, whether it was sent along or not.

        Nothing after the first wrong token, or beyond those that came, says anything.
        """
        compared = min(len(draft), len(tokens))
        right = next((i for i in range(compared) if draft[i] != tokens[i]), compared)
        judged = min(right + 1, compared)
        faded = (1 - 1 / MEMORY) ** judged
        self.right = self.right * faded + right
        self.judged = self.judged * faded + judged

    def chance(self, prior: float) -> float:
        """That the next drafted token is right, if nothing else were known but `prior`."""
        return (self.right + PRIOR_WEIGHT * prior) / (self.judged + PRIOR_WEIGHT)


def tokens_per_step(chance: float, num_drafted: int) -> float:
    """Tokens that a request gains by a step, on average."""
    return sum(chance**position for position in range(num_drafted + 1))


def drafts_worth(ring: Ring, num_decoding: int, num_steps: int, chance: float, most: int) -> int:
    """Drafted tokens to take along for a request, when all others do likewise.

    None unless they gain HYSTERESIS: verifying has costs that no stage's line shows.

    Args:
        num_steps: micro-batches that `num_decoding` requests are shared by.
        chance: that a drafted token is accepted, if those before it are.
        most: that may be drafted.
    """
    return _drafts_worth(ring, num_decoding, num_steps, round(chance * CHANCES), most)


@lru_cache(maxsize=1024)
def _drafts_worth(ring: Ring, num_decoding: int, num_steps: int, chance: int, most: int) -> int:
    def tokens_per_s(num_drafted: int) -> float:
        seconds = round_s(ring, num_decoding, num_steps, 1 + num_drafted)
        return tokens_per_step(chance / CHANCES, num_drafted) / seconds

    best = max(range(most + 1), key=tokens_per_s)
    return best if tokens_per_s(best) > (1 + HYSTERESIS) * tokens_per_s(0) else 0
