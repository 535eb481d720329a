"""Measures the lab's own links: what was asked of each, and what ping and iperf3 find.

    python benchmarks/netlab [PROFILE…] [--json FILE]

Needs root, and iproute2, nftables, iperf3 and iputils-ping of Debian.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that a folder can be run

from netlab.accuracy import Measured, measure
from netlab.lab import Lab, LabError
from netlab.profiles import PROFILES, Line, add_profiles

MBIT = 1e6


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_profiles(parser)
    parser.add_argument("--json", type=Path, help="write every figure here")
    options = parser.parse_args()
    console, found = Console(highlight=False), dict[str, Measured]()
    names = options.profiles or list(PROFILES)
    try:
        for name in track(names, "measuring", console=console, transient=True):
            found[name] = measured(PROFILES[name])
    except LabError as error:
        sys.exit(f"no lab: {error}")
    console.print(times_table(found), rates_table(found), sep="\n")
    console.print(f"TCP's congestion control: {congestion_control()}")
    if options.json:
        options.json.write_text(
            json.dumps({name: asdict(result) for name, result in found.items()}, indent=2)
        )


def measured(line: Line) -> Measured:
    with Lab() as lab:
        for host in ("one", "other"):
            lab.add_host(host)
        lab.link("one", "other", line)
        return measure(lab, "one", "other", line)


def congestion_control() -> str:
    return Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip()


def times_table(found: dict[str, Measured]) -> Table:
    table = Table("link", "round trip, ms", "found: least / mean / most", "loss both ways", "found")
    for name, result in found.items():
        line = PROFILES[name]
        least, more = 2e3 * line.delay_s, 2e3 * line.jitter_s
        asked = f"{least:g} to {least + more:g}" if more else f"{least:g}"
        times = (result.rtt_min_s, result.rtt_mean_s, result.rtt_max_s)
        said = " / ".join(f"{1e3 * seconds:.2f}" for seconds in times)
        table.add_row(name, asked, said, f"{1 - (1 - line.loss) ** 2:.1%}", f"{result.loss:.1%}")
    return table


def rates_table(found: dict[str, Measured]) -> Table:
    table = Table("link", "Mbit/s", "found: datagrams' content", "found: one TCP stream")
    for name, result in found.items():
        line = PROFILES[name]
        for way, rate, of_way in (("up", line.up, result.up), ("down", line.down, result.down)):
            capacity = "–" if of_way.capacity is None else f"{of_way.capacity / MBIT:.1f}"
            stream = f"{of_way.one_stream / MBIT:.1f}"
            table.add_row(f"{name}, {way}", f"{rate / MBIT:g}", capacity, stream)
    return table


if __name__ == "__main__":
    main()
