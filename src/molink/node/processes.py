"""The processes of a node: started, watched, and ended with it."""

import asyncio
import contextlib
import os
import re
import signal
import sys
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path

from molink.core.errors import ProcessError
from molink.engine.environment import PARENT_VARIABLE

STOP_TIMEOUT_S = 5.0
TAIL_LINES = 15
EXIT_USAGE = 2  # a parser of flags ends a process with it, after one line that says why
EXIT_HUB_FAILED = os.EX_TEMPFAIL  # the same for a failure that may pass
_NOISE = re.compile(r"nanobind: | - (leaked|\.\.\. skipped) ")  # what a library says at its end
ExitHandler = Callable[["Child", int], None]


class Child:
    """One child process, started once, whose output goes to a log file.

    Args:
        module: run as `python -m module`.
        environment: more variables for it; unlike arguments, no other user sees them.
        exited: called once with the exit status, unless `stop` ended it.
    """

    def __init__(
        self,
        module: str,
        arguments: list[str],
        *,
        log: Path,
        exited: ExitHandler,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._command = [sys.executable, "-m", module, *arguments]
        self.log = log
        self._exited = exited
        self._environment = environment or {}
        self._process: asyncio.subprocess.Process | None = None
        self._watch: asyncio.Task[None] | None = None
        self._starting = asyncio.Lock()
        self._is_stopped = False

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def start(self) -> None:
        """Start it, unless `stop` was called before. Raises ProcessError."""
        async with self._starting:
            if self._is_stopped:
                return
            try:
                await self._spawn()
            except OSError as error:
                raise ProcessError(f"cannot start a process: {error}") from error

    async def _spawn(self) -> None:
        self.log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(self.log, "wb") as log:
            self._process = await asyncio.create_subprocess_exec(
                *self._command,
                env={**os.environ, **self._environment, PARENT_VARIABLE: str(os.getpid())},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C reaches the agent alone, which ends its children
            )
        self._watch = asyncio.create_task(self._wait())

    async def _wait(self) -> None:
        assert self._process is not None
        status = await self._process.wait()
        self._exited(self, status)

    async def stop(self) -> None:
        """End the process and whatever it started: politely first, then for certain."""
        self._is_stopped = True
        async with self._starting:  # a process on its way into the world is ended too
            if self._process is None or self._watch is None:
                return
        self._watch.cancel()
        self._signal(signal.SIGTERM)
        try:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), STOP_TIMEOUT_S)
        finally:
            self._signal(signal.SIGKILL)
        await self._process.wait()

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def tail(self, lines: int = TAIL_LINES) -> str:
        """The last lines of the log that say something."""
        with open(self.log, errors="replace") as log:
            return "".join(deque((line for line in log if not _NOISE.match(line)), lines)).rstrip()


def how_it_ended(status: int) -> str:
    """What became of a process, as a predicate."""
    return f"killed by signal {-status}" if status < 0 else f"ended with status {status}"
