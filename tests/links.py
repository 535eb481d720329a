"""Links as nodes report them."""

from typing import Any

from molink.wire.to_head import LinkCounters


def make_link(peer: int, **changes: Any) -> LinkCounters:
    """A link as one end counts it, with nothing measured yet."""
    nothing: dict[str, Any] = {
        "bytes_sent": 0,
        "bytes_received": 0,
        "frames_queued": 0,
        "bytes_queued": [0, 0, 0, 0],
        "bytes_in_flight": 0,
        "window": 0,
        "bytes_per_s": None,
        "rtt_s": None,
        "jitter_s": 0.0,
        "loss": None,
    }
    return LinkCounters(peer=peer, **nothing | changes)
