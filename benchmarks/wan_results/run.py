"""One run of a server, and the least time that links, stages and cores need for it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from .occupancy import Occupancy


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """The requests of one seed at one rate."""

    seed: int
    num_tokens: int  # output tokens of all answers
    seconds: float  # from the first request to the last token
    ttft_p50_s: float
    ttft_p99_s: float
    tpot_p50_s: float
    tpot_p99_s: float
    longest_gap_s: float  # between two tokens of one answer
    answers: list[str]  # a digest of each one's text
    link_bytes: dict[str, int]  # with headers of IP, by direction
    link_rates: dict[str, float]  # bits a second, with the same headers
    compute_s: list[float]  # seconds inside steps, by stage; empty: not known
    cpu_s: dict[str, float]  # of processes, the client's too
    elsewhere_s: float = 0.0  # CPU seconds of the lab and of whatever else ran beside
    occupancy: list[Occupancy] = field(default_factory=list)

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.seconds

    @property
    def link_bound(self) -> float | None:
        """Output tokens/s of the busiest direction if it never paused; None without links."""
        needed = [8 * sent / self.link_rates[way] for way, sent in self.link_bytes.items()]
        return self.num_tokens / max(needed) if needed and max(needed) else None

    @property
    def stage_bound(self) -> float | None:
        """Output tokens/s of the slowest stage if it never waited for input; where stages share
        cores, its seconds contain what it waited for one.
        """
        return self.num_tokens / max(self.compute_s) if self.compute_s else None

    def core_bound(self, cores: int) -> float:
        """Output tokens/s if cores did all that was done meanwhile, the lab's own work too, without
        ever being idle. Without meaning for a server whose processes spin while they wait.
        """
        return self.num_tokens * cores / (sum(self.cpu_s.values()) + self.elsewhere_s)

    @classmethod
    def from_json(cls, figures: Mapping[str, Any]) -> Self:
        seen = [Occupancy(**each) for each in figures["occupancy"]]
        return cls(**{**figures, "occupancy": seen})

    def as_json(self) -> dict[str, Any]:
        return _rounded(asdict(self))


def _rounded(value: Any) -> Any:
    """Four digits that count: a file of many readings stays small."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list | tuple) else value
