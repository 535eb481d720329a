"""Whether lossless coding of what a stage sends pays, from what was measured. Pure."""

from dataclasses import dataclass
from typing import Final

MARGIN: Final = 1.5
"""Seconds on the link that one second of coding must save: the coder's core also computes."""

MIN_BYTES: Final = 4096
"""Of a message; in a smaller one the constant costs weigh more than the bytes."""

TRIAL_INTERVAL: Final = 64
"""Messages from one trial to the next."""

WEIGHT: Final = 0.2  # of the newest measurement


@dataclass(frozen=True, slots=True)
class CodingFigures:
    """What coding does to the messages of one stage. All of them per byte before coding."""

    ratio: float  # bytes after coding
    encode_s: float
    decode_s: float

    def followed_by(self, newest: "CodingFigures") -> "CodingFigures":
        """The moving average, one measurement later."""

        def mean(old: float, new: float) -> float:
            return old + WEIGHT * (new - old)

        return CodingFigures(
            mean(self.ratio, newest.ratio),
            mean(self.encode_s, newest.encode_s),
            mean(self.decode_s, newest.decode_s),
        )


def pays(figures: CodingFigures | None, link_bytes_per_s: float | None) -> bool:
    """Whether the bytes that coding saves take longer on the link than coding them.

    Args:
        figures: None if nothing was measured yet.
        link_bytes_per_s: None if the link is unknown, or within one machine.
    """
    if figures is None or not link_bytes_per_s:
        return False
    saved_s = (1.0 - figures.ratio) / link_bytes_per_s
    return saved_s > MARGIN * (figures.encode_s + figures.decode_s)
