"""What the next step holds: decodes, prompt tokens, both, or nothing yet.

Where stages are the bottleneck a step takes decodes and prompt tokens together, as vLLM does: the
fixed cost of a step is paid once. Where a link is, a step takes either, so that decodes overtake
prompts which are still on their way.
"""

import math
from dataclasses import dataclass

from molink.planning.costs import Line
from molink.planning.micro_batches import (
    DECODE_COST_TOKENS,
    MAX_PREFILL_SHARE,
    STEP_COST_TOKENS,
    Ring,
    decodes_per_step,
    micro_batches,
    prefill_tokens_per_step,
    round_s,
    steps_that_fill,
    unmeasured,
)
from molink.planning.speculation import drafts_worth
from molink.wire.to_agent import PaceDecision
from molink.wire.to_engine import Pacing, PathMeasured

MAX_STALL_S = 0.2  # for which a prompt may hold up requests that decode, beyond one round
SLOWEST_LINK = 1.0  # byte a second, whatever was reported
MAX_PENDING_STEPS = 64  # full steps of prompts beyond which counting changes nothing


def rings_of(path: PathMeasured) -> tuple[Ring, Ring] | None:
    """The rings of decode and of prefill steps; None until every stage has run some."""
    decode, prefill = [], []
    for stage in path.stages:
        if stage.decode is None or stage.prefill is None:
            return None
        decode.append(Line(stage.decode.fixed_s, stage.decode.per_token_s))
        prefill.append(Line(stage.prefill.fixed_s, stage.prefill.per_token_s))
    hops = tuple(
        Line(0.0, (stage.bytes_per_token or 0.0) / max(hop.bytes_per_s, SLOWEST_LINK))
        for stage, hop in zip(path.stages, path.hops[:-1], strict=False)  # results take no time
        if hop.bytes_per_s is not None
    )
    delay_s = sum((hop.rtt_s or 0.0) / 2 for hop in path.hops)
    return Ring(tuple(decode), hops, delay_s), Ring(tuple(prefill), hops, delay_s)


@dataclass(frozen=True, slots=True)
class Load:
    """What the scheduler holds when it makes a step."""

    num_decoding: int  # requests whose prompt is all computed or in some step
    num_ready: int  # those of them that could be in this one
    pending: int  # prompt tokens that are not in any step yet
    tokens_in_flight: int  # in all steps
    decode_steps: int  # in flight
    prefill_steps: int  # in flight, those that hold both among them
    tokens_each: int = 1  # of a request in a decode step, with those drafted; a mean of late
    draft_chance: float | None = None  # that a drafted token is right; None: none are drafted


@dataclass(frozen=True, slots=True)
class Share:
    """What a step takes of it; nothing where the first two are 0."""

    num_decodes: int = 0
    num_prefill_tokens: int = 0
    max_drafted: int = 0  # tokens that there is room for beside them


class Pace:
    """Decides shares from measured costs. Owns the number of micro-batches.

    Args:
        max_tokens: of one step, as the user bounds it.
        max_in_flight: tokens in all steps; vLLM keeps so much of a sliding window's cache for them.
        wanted: what is not to be decided here.
        max_drafted: tokens that may be drafted for one request.
    """

    def __init__(
        self,
        num_stages: int,
        max_tokens: int,
        max_in_flight: int,
        wanted: Pacing,
        max_drafted: int = 0,
    ) -> None:
        self._max_tokens = max_tokens
        self._max_in_flight = max_in_flight
        self._wanted = wanted
        self._max_drafted = max_drafted
        self._decode = unmeasured(num_stages, DECODE_COST_TOKENS)
        self._prefill = unmeasured(num_stages, STEP_COST_TOKENS)
        self._is_measured = False
        self._micro_batches = wanted.micro_batches or num_stages
        self.decision: PaceDecision | None = None  # the latest

    @property
    def max_pending(self) -> int:
        """Prompt tokens beyond which nobody needs to count."""
        return MAX_PENDING_STEPS * self._max_tokens

    def take(self, path: PathMeasured) -> None:
        """Learn what stages and links cost; until then all stages are taken to be equal."""
        if (rings := rings_of(path)) is not None:
            self._decode, self._prefill = rings
            self._is_measured = True

    def next(self, load: Load) -> Share:
        decision = self.decision = self._decide(load)
        share = decodes_per_step(load.num_decoding, decision.micro_batches)
        room = min(self._max_tokens, self._max_in_flight - load.tokens_in_flight)
        if room <= 0:
            return Share()
        num_decodes = min(load.num_ready, share, room)
        prefill = min(load.pending, decision.prefill_tokens, room)
        if not decision.is_split:
            most = max(decision.micro_batches, decision.prefill_steps if prefill else 0)
            if load.decode_steps + load.prefill_steps >= most:
                return Share()
            prefill = min(prefill, room - num_decodes)
            left = room - num_decodes - prefill if num_decodes else 0
            return Share(num_decodes, prefill, max_drafted=left)
        if num_decodes and load.decode_steps < decision.micro_batches:
            return Share(num_decodes, max_drafted=room - num_decodes)
        if prefill and load.prefill_steps < decision.prefill_steps:
            return Share(num_prefill_tokens=prefill)
        return Share()

    def drafts(self, num_decoding: int, chance: float) -> int:
        """Drafted tokens that a request takes along, if each is right with this chance."""
        if self._wanted.drafts == "all":
            return self._max_drafted
        return drafts_worth(
            self._decode, num_decoding, self._micro_batches, chance, self._max_drafted
        )

    def _decide(self, load: Load) -> PaceDecision:
        prompts = 0.0
        if load.pending or load.prefill_steps:
            prompts = min(MAX_PREFILL_SHARE, self._prefill.stage_share)
        if self._is_measured and self._wanted.micro_batches is None and load.num_decoding:
            self._micro_batches = micro_batches(
                self._decode, load.num_decoding, self._micro_batches, load.tokens_each, prompts
            )
        round_time = round_s(
            self._decode, load.num_decoding, self._micro_batches, load.tokens_each, prompts
        )
        stall = math.inf
        if self._is_measured and load.num_decoding:
            stall = max(MAX_STALL_S, round_time)
        tokens = prefill_tokens_per_step(self._prefill, load.pending, stall)
        tokens = max(1, min(tokens, self._max_tokens))
        wanted, chance = self._wanted.separate_prefill, load.draft_chance
        return PaceDecision(
            self._micro_batches,
            tokens,
            steps_that_fill(self._prefill, tokens),
            is_split=self._prefill.is_bound_by_links if wanted == "auto" else wanted == "on",
            round_s=round_time if self._is_measured else None,
            draft_chance=chance,
            drafts=None if chance is None else self.drafts(load.num_decoding, chance),
        )
