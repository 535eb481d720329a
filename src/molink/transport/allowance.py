"""A bound on bytes a second."""

BURST_S = 0.1  # of its rate that an unused allowance saves up


class Allowance:
    """Says how long to wait for bytes that have been taken. Time is an argument.

    What is urgent waits for what is urgent, and all else for everything.

    Args:
        bytes_per_s: more than zero.
    """

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._paid_until = {True: 0.0, False: 0.0}  # what is urgent; everything

    def take(self, size: int, now: float, *, is_urgent: bool = False) -> float:
        """Take bytes; the seconds until more of their kind may be taken."""
        for kind in {is_urgent, False}:
            paid_until = max(self._paid_until[kind], now - BURST_S)
            self._paid_until[kind] = paid_until + size / self._bytes_per_s
        return max(self._paid_until[is_urgent] - now, 0.0)
