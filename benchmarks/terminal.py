"""Runs a benchmark for the command line: progress, Ctrl-C, and whatever was measured by then."""

import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import httpx
from contestants import ServerError
from measure import Say
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

LOG_WIDTH = 240  # characters, where there is no terminal to ask: the widest table


class Benchmark(Protocol):
    """One run. `results` is complete for whatever has been measured so far."""

    results: dict[str, Any]

    def run(self) -> None: ...


def run(make: Callable[[Console, Say], Benchmark], file: Path | None) -> None:
    """Run to the end, write the results to `file` as JSON, and exit with a status."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` has it ignored
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = LOG_WIDTH
    with _saying(console) as say:
        bench = make(console, say)
        status = 0
        try:
            bench.run()
        except KeyboardInterrupt:
            console.print("stopped")
            status = 130
        except (ServerError, httpx.HTTPError) as error:
            console.print(f"{type(error).__name__}: {error}", markup=False)
            status = 1
    if file and bench.results:
        file.write_text(json.dumps(bench.results, indent=2))
    sys.exit(status)


@contextmanager
def _saying(console: Console) -> Iterator[Say]:
    """Shows what is being done: one line that changes, or a log where there is no terminal."""
    if not console.is_terminal:
        started = time.monotonic()
        yield lambda text: console.print(f"{time.monotonic() - started:6.0f} s  {text}")
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("")
        yield lambda text: progress.update(task, description=text)
