"""What steps cost, measured while they run."""

from dataclasses import dataclass

FORGET = 0.98  # weight of what was known, for every new sample: the last 50 count
OUTLIER = 4.0  # times what is expected: a step that takes longer counts as one that takes so long
EXPECTS_AFTER = 10.0  # samples
PRIOR_WEIGHT = 0.05  # of a sample, for each of two that hold the line's slope while sizes are equal


@dataclass(frozen=True, slots=True)
class Line:
    """Seconds of work on so many tokens: fixed + per token."""

    fixed_s: float
    per_token_s: float

    def __call__(self, tokens: float) -> float:
        return self.fixed_s + self.per_token_s * tokens


class LineFit:
    """A line through measured (tokens, seconds), by least squares that forget.

    Steps of one size say nothing of the slope. Until others come, the fixed part is worth as much
    time as `prior_tokens`. The first sample is left out: memory and kernels are still cold. One
    during which the machine stood still may not bend the line, a stage that becomes slower does.
    """

    def __init__(self, prior_tokens: float) -> None:
        self._prior_tokens = prior_tokens
        self._sums = [0.0] * 5  # of 1, x, y, x², x·y
        self._is_warm = False

    def add(self, tokens: float, seconds: float) -> None:
        if not self._is_warm:
            self._is_warm = True
            return
        line = self.line if self._sums[0] >= EXPECTS_AFTER else None
        if line is not None:
            seconds = min(seconds, OUTLIER * line(tokens))
        sample = (1.0, tokens, seconds, tokens * tokens, tokens * seconds)
        self._sums = [FORGET * old + new for old, new in zip(self._sums, sample, strict=True)]

    @property
    def line(self) -> Line | None:
        """None before the second sample."""
        count, x, y, xx, xy = self._sums
        if not count or not x:
            return None
        slope = y / (x + count * self._prior_tokens)  # of the prior line, through the mean
        for tokens in (0.0, 2 * x / count):
            seconds = slope * (tokens + self._prior_tokens)
            count += PRIOR_WEIGHT
            x += PRIOR_WEIGHT * tokens
            y += PRIOR_WEIGHT * seconds
            xx += PRIOR_WEIGHT * tokens * tokens
            xy += PRIOR_WEIGHT * tokens * seconds
        per_token = (count * xy - x * y) / (count * xx - x * x)
        per_token = min(max(per_token, 0.0), y / x)  # neither part is less than nothing
        return Line(max(0.0, (y - per_token * x) / count), per_token)
