"""Prints the tables of results as Markdown and draws their pictures again.

    python benchmarks/wan_results FILE… [--png]

Several files are read as one: their runs of the same link, rate and server are put together.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that a folder can be run

from wan_results import picture, tables


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--png", action="store_true", help="draw pictures beside the first file")
    options = parser.parse_args()
    try:
        results = tables.merged([_read(file) for file in options.files])
    except (ValueError, OSError) as error:
        parser.error(str(error))
    cores = results["machine"]["cores"]
    for profile, found in results["links"].items():
        rates = {rate: tables.runs_of(servers) for rate, servers in found["rates"].items()}
        print(f"\n{tables.link_text(profile, found)}\n")
        table = (row for rate, runs in rates.items() for row in tables.rows(rate, runs, cores))
        print_markdown(tables.HEAD, table)
        if proof := list(tables.proof_rows(rates)):
            print()
            print_markdown(tables.PROOF_HEAD, proof)
        if options.png:
            for rate, runs in rates.items():
                name = f"{options.files[0].stem}-{profile}-{rate}.png"
                picture.draw(
                    f"{profile}, {rate} requests/s", runs, options.files[0].with_name(name)
                )


def _read(file: Path) -> dict[str, Any]:
    """Raises ValueError, which names the file, for what `wan.py` has not written."""
    try:
        results = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    if not isinstance(results, dict) or "links" not in results:
        raise ValueError(f"{file} is not of wan.py")
    return results


def print_markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Columns that are empty in every row are left out."""
    rows = list(rows)
    used = [n for n in range(len(head)) if any(row[n] for row in rows)]
    for row in (head, ["---"] * len(head), *rows):
        print("| " + " | ".join(row[n] for n in used) + " |")


if __name__ == "__main__":
    main()
