"""A bound on bytes a second."""

BURST_S = 0.1  # of its rate that an unused allowance saves up


class Allowance:
    """Says how long to wait for bytes that have been taken. Time is an argument.

    Args:
        bytes_per_s: more than zero.
    """

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._paid_until = 0.0

    def take(self, size: int, now: float) -> float:
        """Take bytes; the seconds until more may be taken."""
        self._paid_until = max(self._paid_until, now - BURST_S) + size / self._bytes_per_s
        return max(self._paid_until - now, 0.0)
