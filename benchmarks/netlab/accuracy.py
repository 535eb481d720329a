"""How true the lab's links are to what was asked: ping and iperf3 over them."""

import json
import re
import time
from dataclasses import dataclass

from .lab import Lab, LabError
from .profiles import Line

PINGS = 200
PING_INTERVAL_S = 0.01
STREAM_S = 3
WARM_UP_S = 1  # of a TCP stream, not counted
UDP_LIMIT = 1e9  # bits a second that iperf3 sends as datagrams here
OVERLOAD = 1.1  # of datagrams, so that the line is full
_LOSS = re.compile(r"([0-9.]+)% packet loss")
_TIMES = re.compile(r"= ([0-9.]+)/([0-9.]+)/([0-9.]+)/([0-9.]+) ms")


@dataclass(frozen=True, slots=True)
class Way:
    """One direction, in bits a second."""

    capacity: float | None  # of datagrams; None: too fast to send them
    one_stream: float  # of TCP


@dataclass(frozen=True, slots=True)
class Measured:
    """What ping and iperf3 found between two hosts."""

    rtt_min_s: float
    rtt_mean_s: float
    rtt_max_s: float
    loss: float  # share of pings without an answer: both directions
    up: Way
    down: Way


def measure(lab: Lab, one: str, other: str, line: Line) -> Measured:
    """Measure the way between two hosts over `line`. Raises LabError without ping or iperf3."""
    interval = str(PING_INTERVAL_S)
    ping = ("ping", "-q", "-c", str(PINGS), "-i", interval, lab.address(other))
    said = lab.command(one, *ping)
    times, lost = _TIMES.search(said), _LOSS.search(said)
    if times is None or lost is None:
        raise LabError(f"no answer to ping: {said}")
    least, mean, most = (float(times[number]) / 1e3 for number in (1, 2, 3))
    server = lab.popen(other, ["iperf3", "--server"], stdout=-3, stderr=-3)
    try:
        time.sleep(0.3)
        up, down = (
            Way(_capacity(lab, one, other, rate, ways), _stream(lab, one, other, ways))
            for ways, rate in (((), line.up), (("--reverse",), line.down))
        )
    finally:
        server.kill()
        server.wait()
    return Measured(least, mean, most, float(lost[1]) / 100, up, down)


def _capacity(lab: Lab, one: str, other: str, rate: float, way: tuple[str, ...]) -> float | None:
    if rate > UDP_LIMIT:
        return None
    offered = ("--udp", "--bitrate", f"{rate * OVERLOAD:.0f}", "--length", "1400")
    return _iperf(lab, one, other, *offered, *way)


def _stream(lab: Lab, one: str, other: str, way: tuple[str, ...]) -> float:
    return _iperf(lab, one, other, "--omit", str(WARM_UP_S), *way)


def _iperf(lab: Lab, one: str, other: str, *flags: str) -> float:
    """Bits a second that arrived."""
    fixed = ("--client", lab.address(other), "--time", str(STREAM_S), "--json")
    end = json.loads(lab.command(one, "iperf3", *fixed, *flags))["end"]
    received = end.get("sum_received") or end["sum"]
    return float(received["bits_per_second"])
