"""What crosses between two stages: bytes, seconds and changed answers of every format.

Bytes, codec times and the error of the activations are measured in this process, on one core: with
the 88 M model, whose width is that of a small real one, and with made-up activations of which a few
channels are far above the others. What becomes of answers is measured on real clusters of two
stages that serve the bundled model, which is trained, in bfloat16; beside them stands the same
cluster asked one question at a time, since a change of batch size may change tokens too, and one
that computes in float32, to show what rounding to bfloat16 does everywhere else. Prints tables,
writes JSON, asserts nothing.

    python benchmarks/wire.py [--quick] [--json FILE]
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from measure import Say
from models import BUNDLED, RANDOM, existing, random_model
from rich.console import Console
from rich.table import Table
from terminal import run
from wire_formats import FORMATS, TIMES, formats_of, outlier_losses
from wire_tokens import Examiner, start

FLOOR = "both, one question at a time"
FLOAT32 = "both, all computed in float32"


class Benchmark:
    """Formats in this process, then a cluster for each."""

    def __init__(self, options: argparse.Namespace, console: Console, say: Say) -> None:
        self._console = console
        self._say = say
        self._is_quick: bool = options.quick
        self.results: dict[str, Any] = {}

    def run(self) -> None:
        self._say("formats")
        formats = self.results["formats"] = dict(formats_of(random_model(RANDOM)))
        self._console.print(formats_table(formats))
        losses = self.results["outliers"] = {times: outlier_losses(times) for times in TIMES}
        self._console.print(outliers_table(losses))
        if not self._is_quick:
            self.results["answers"] = {}
            self._answers(self.results["answers"])
            self._console.print(answers_table(self.results["answers"]))

    def _answers(self, found: dict[str, Any]) -> None:
        subject = existing(BUNDLED)
        # Coding loses nothing, which one format shows.
        flags = {
            form.name: form.flags for form in FORMATS if not (form.is_coded and form.hop.has_sum)
        }
        flags[FLOAT32] = (*FORMATS[0].flags, "--dtype=float32")
        for name, of_format in flags.items():
            self._say(f"two stages: {name}")
            with start(name, subject, of_format) as cluster:
                examiner = Examiner(cluster.url, subject)
                if not found:
                    plain = examiner.answers()
                    read = examiner.reads(plain)
                    alone = examiner.reads(plain, concurrency=1)
                    found[FLOOR] = examiner.answers(1).unlike(plain) | alone.beside(read)
                found[name] = examiner.answers().unlike(plain)
                found[name] |= examiner.reads(plain).beside(read)


def formats_table(formats: Mapping[str, Mapping[str, float]]) -> Table:
    table = Table("format", title="one hop of the 88 M model, per token")
    for kind in ("decode of 32", "prefill of 2,048"):
        for head in ("bytes", "encode µs", "decode µs"):
            table.add_column(f"{kind}: {head}", justify="right")
    table.add_column("of both", justify="right")
    table.add_column("error", justify="right")
    plain = formats[FORMATS[0].name]["prefill bytes"]
    for name, figures in formats.items():
        cells = [
            f"{figures[f'{kind} {what}']:,.{digits}f}"
            for kind in ("decode", "prefill")
            for what, digits in (("bytes", 0), ("encode_us", 2), ("decode_us", 2))
        ]
        table.add_row(
            name, *cells, f"{figures['prefill bytes'] / plain:.3f}", f"{figures['loss']:.4f}"
        )
    return table


def outliers_table(losses: Mapping[int, Mapping[str, float]]) -> Table:
    title = "error of the other channels, where 6 of 4,096 are so many times their size"
    table = Table("", *(f"{times:,}" for times in losses), title=title)
    for name in next(iter(losses.values())):
        table.add_row(name, *(f"{found[name]:.4f}" for found in losses.values()))
    return table


def answers_table(answers: Mapping[str, Mapping[str, float]]) -> Table:
    heads = list(next(iter(answers.values())))
    table = Table("format", *heads, title="the bundled model over two stages, bfloat16")
    for name, figures in answers.items():
        cells = (f"{v:+.5f}" if "log" in head else f"{v:.4f}" for head, v in figures.items())
        table.add_row(name, *cells)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="no clusters")
    parser.add_argument("--json", type=Path, help="write every figure here")
    options = parser.parse_args()
    run(lambda console, say: Benchmark(options, console, say), options.json)


if __name__ == "__main__":
    main()
