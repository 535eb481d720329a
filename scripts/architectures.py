"""What scripts/architectures runs: see there."""

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from tests.e2e.architectures.comparison import MonotonousModelError, compare
from tests.e2e.architectures.page import Row, read_rows, row_of, write_page
from tests.e2e.architectures.table import ARCHITECTURES, Architecture

PAGE = Path(__file__).parents[1] / "docs" / "architectures.md"


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/architectures")
    parser.add_argument("names", nargs="*", metavar="NAME", help="a class or a model_type")
    parser.add_argument("--stages", type=numbers, default=[2, 3], metavar="2,3", help="pipelines")
    parser.add_argument("--json", action="store_true", help="print the rows that were run")
    parser.add_argument("--list", action="store_true", help="tell the names and end")
    options = parser.parse_args()
    options.chosen = [
        architecture
        for architecture in ARCHITECTURES.values()
        if not options.names or {architecture.name, architecture.model_type} & set(options.names)
    ]
    known = {name for a in options.chosen for name in (a.name, a.model_type)}
    if unknown := set(options.names) - known:
        parser.error(f"no architecture {', '.join(sorted(unknown))}; --list tells the names")
    return options


def main() -> None:
    options = parse()
    if options.list:
        for architecture in options.chosen:
            print(architecture.model_type, architecture.name)
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="molink-architectures-") as folder:
        os.environ["HF_MODULES_CACHE"] = f"{folder}/code"
        try:
            rows = run(options.chosen, options.stages, Path(folder))
        except KeyboardInterrupt:
            sys.exit(130)
    if options.json:
        print(json.dumps([row._asdict() for row in rows], indent=2))


def run(chosen: list[Architecture], stages: list[int], folder: Path) -> list[Row]:
    """Compare one after the other; the page is written after each."""
    rows: dict[str, Row] = {}
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task("", total=len(chosen))
        for architecture in chosen:

            def show(step: str, name: str = architecture.name) -> None:
                progress.update(task, description=f"{name}: {step}")

            model = folder / architecture.name
            try:
                row = row_of(architecture, compare(architecture, model, stages, show))
            except MonotonousModelError as error:
                console.print(f"{architecture.name}: no verdict: {error}", markup=False)
            else:
                rows[row.name] = row
                write_page(PAGE, read_rows(PAGE) | rows)
                console.print(f"{row.name}: {row.verdict}", markup=False, soft_wrap=True)
            shutil.rmtree(model)
            progress.advance(task)
    return list(rows.values())


if __name__ == "__main__":
    main()
