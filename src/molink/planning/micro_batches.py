"""How much work one step takes, so that all stages of a pipeline are busy."""

import math

STEP_COST_TOKENS = 128
"""Fixed cost of a step (weights are read, a message crosses), in prompt tokens of equal time."""


def prefill_tokens_per_step(pending: int, num_stages: int) -> int:
    """Prompt tokens to put into the next step when `pending` wait.

    Cut into k steps, they pass N stages in (k + N - 1) · (pending / k + STEP_COST_TOKENS), in units
    of one token's time on one stage: large steps leave later stages idle at the start and early
    ones at the end, small ones pay the fixed cost more often. The minimum is at
    k = sqrt(pending · (N - 1) / STEP_COST_TOKENS). With one stage, one step takes everything.
    """
    if num_stages == 1 or pending <= 1:
        return pending
    steps = round(math.sqrt(pending * (num_stages - 1) / STEP_COST_TOKENS))
    return math.ceil(pending / max(steps, 1))


def pending_that_fills(max_tokens: int, num_stages: int) -> int:
    """Prompt tokens beyond which a step takes `max_tokens` anyway, so that counting can stop."""
    return 2 * (max_tokens + max_tokens**2 * (num_stages - 1) // STEP_COST_TOKENS)


def decodes_per_step(num_decoding: int, num_stages: int) -> int:
    """Requests that decode in one step when `num_decoding` do so now, in any step.

    As many steps are in flight as there are stages, and a request is in one of them. Each passes
    every stage once a round, so the round takes `num_stages` times the largest step: equal steps
    make the shortest round.
    """
    return math.ceil(num_decoding / num_stages)
